"""The model and the input that a command of the command line names."""

from __future__ import annotations

import ast
import importlib
from typing import Any, NoReturn

import torch
import typer
from torch import nn

from . import measure


def fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def message(error: Exception) -> str:
    """The type and the first line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def model(spec: str, given: list[str]) -> nn.Module:
    """What the callable `spec`, "module:callable", returns for the arguments `given`."""
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        fail(f"SPEC is {spec!r}; wanted module:callable, such as torchvision.models:mobilenet_v3_large")
    positional, named = arguments(given)
    try:
        built = getattr(importlib.import_module(module), name)(*positional, **named)
    except Exception as error:  # the user's code may raise anything; the message passes it on
        fail(f"{spec} raised {message(error)}")
    if not isinstance(built, nn.Module):
        fail(f"{spec}() gave a {type(built).__name__}; wanted a torch.nn.Module")
    return built


def arguments(given: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Parse texts as positional arguments, and name=value as keyword arguments. A value that reads as a number, True,
    False or None becomes that."""
    positional, named = [], {}
    for text in given:
        name, equals, value = text.partition("=")
        if equals and name.isidentifier():
            try:
                literal = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                literal = value
            named[name] = literal if literal is None or isinstance(literal, (int, float)) else value
        else:
            positional.append(text)
    return positional, named


def sizes(shape: str) -> list[int]:
    return [int(size) for size in shape.split("x")]


def random_input(shape: str, batch: int | None = None) -> torch.Tensor:
    """A tensor of this shape, with another batch, the first size, if `batch` is given."""
    try:
        wanted = sizes(shape)
        if any(size < 0 for size in wanted) or (batch is not None and len(wanted) < 2):
            raise ValueError
    except ValueError:
        fail(f"--input is {shape!r}; wanted sizes joined by x, such as 1x3x224x224")
    if batch is not None:
        wanted[0] = batch
    try:
        return torch.randn(wanted, generator=torch.Generator().manual_seed(0))
    except (RuntimeError, OverflowError) as error:
        fail(f"an input of {'x'.join(map(str, wanted))} cannot be made: {message(error)}")


def placed(
    model: nn.Module, x: torch.Tensor, device: str, dtype: str | None, channels_last: bool
) -> tuple[nn.Module, torch.Tensor]:
    if dtype is not None and dtype not in measure.EPSILONS_ALLOWED:
        fail(f"--dtype is {dtype!r}; wanted one of {', '.join(measure.EPSILONS_ALLOWED)}")
    try:
        where = torch.device(device)
        kind = getattr(torch, dtype) if dtype else next((p.dtype for p in model.parameters()), torch.float32)
        x = x.to(where, kind)
        model = model.to(where, kind if dtype else None)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device is {device!r}: {str(error).splitlines()[0]}")
    if channels_last:
        if x.dim() not in (4, 5):
            fail(f"--channels-last wants an input of 4 or 5 dimensions, not {x.dim()}")
        order = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        x, model = x.to(memory_format=order), model.to(memory_format=order)  # type: ignore[call-overload]
    return model, x


def run(spec: str, model: nn.Module, x: torch.Tensor) -> object:
    """The output of the model, whose first call of all this is."""
    try:
        return model(x)
    except Exception as error:  # as in `model`
        fail(f"{spec} on a random input of {'x'.join(map(str, x.shape))} raised {message(error)}")
