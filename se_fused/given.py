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


def model(spec: str, given: list[str]) -> nn.Module:
    """What the callable `spec`, "module:callable", returns for the arguments `given`."""
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        fail(f"SPEC is {spec!r}; wanted module:callable, such as torchvision.models:mobilenet_v3_large")
    positional, named = arguments(given)
    try:
        built = getattr(importlib.import_module(module), name)(*positional, **named)
    except Exception as error:  # the user's code may raise anything; the message passes it on
        fail(f"{spec} raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
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


def random_input(shape: str) -> torch.Tensor:
    try:
        return torch.randn(sizes(shape), generator=torch.Generator().manual_seed(0))
    except (ValueError, RuntimeError):
        fail(f"--input is {shape!r}; wanted sizes joined by x, such as 1x3x224x224")


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
        text = str(error).splitlines()[0] if str(error) else ""
        fail(f"{spec} on a random input of {'x'.join(map(str, x.shape))} raised {type(error).__name__}: {text}")
