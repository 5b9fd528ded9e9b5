"""The command line: `python -m se_fused info | verify | plan | replace`."""

from __future__ import annotations

import ast
import copy
import importlib
import json
import math
import sys
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, NoReturn

import torch
from torch import nn

try:
    import typer
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    sys.exit(f"error: the command line needs {error.name}: pip install typer rich")

import se_fused
from se_fused import backends, cases, installed, measure, native
from se_fused import verify as grid
from se_fused.native import BuildError
from se_fused.report import grouped

_INT64_MAX = 2**63 - 1
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
console = Console(markup=False, emoji=False)


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print what is installed, and for each device and backend whether the backend runs on it, or why not."""
    facts = installed.facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        console.print(installed.table(facts, console.encoding))


@app.command()
def verify(
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
) -> None:
    """Compare outputs and gradients on this machine with the formula in float64; fail if one is out of tolerance."""
    try:
        backend = backends.select(torch.device(device)).name
        results = list(track(grid.run(device), "verifying", total=len(cases.grid()), console=console))
    except (RuntimeError, AssertionError) as error:
        _fail(f"cannot verify on {device}: {str(error).splitlines()[0]}")
    table = Table(title=f"squeeze_excite on {device}, run by the {backend} backend, against the formula in float64")
    for column in ("maps", "cases", "largest error", "in", "tolerance", "verdict"):
        table.add_column(column)
    passed = True
    for precision in cases.PRECISIONS:
        rows = [row for row in results if row[0].precision == precision]
        case, worst, output = max(rows, key=lambda row: row[1])
        limit = cases.TOLERANCE[case.dtype]
        wrong = sum(row[1] > limit for row in rows)
        table.add_row(
            precision, str(len(rows)), f"{worst:.1e}", output, f"{limit:.1e}", f"{wrong} wrong" if wrong else "ok"
        )
        if wrong:
            passed = False
            typer.echo(f"wrong: {output} is off by {worst:.1e} in {case}", err=True)
    console.print(table)
    if not passed:
        raise typer.Exit(1)


def _model(spec: str, given: list[str]) -> nn.Module:
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        _fail(f"SPEC is {spec!r}; wanted module:callable, such as torchvision.models:mobilenet_v3_large")
    positional, named = _arguments(given)
    try:
        model = getattr(importlib.import_module(module), name)(*positional, **named)
    except Exception as error:  # the user's code may raise anything; the message passes it on
        _fail(f"{spec} raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    if not isinstance(model, nn.Module):
        _fail(f"{spec}() gave a {type(model).__name__}; wanted a torch.nn.Module")
    return model


def _arguments(given: list[str]) -> tuple[list[str], dict[str, Any]]:
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


@app.command()
def plan(
    shape: Annotated[str, typer.Argument(help="Shape of x: 32x256x56x56, with 1 to 3 spatial sizes.")],
    hidden: Annotated[int, typer.Option("--hidden", min=0, help="R, the units of the hidden layer; 0: one layer.")],
    device: Annotated[str, typer.Option(help="A known GPU: H200, A100, T4, ...")] = "H200",
    dtype: Annotated[str, typer.Option(help="float32, float64, float16 or bfloat16.")] = "float16",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="The order of x.")] = False,
    backward: Annotated[bool, typer.Option("--backward", help="The gradients, instead of y.")] = False,
    forced: Annotated[str, typer.Option(help="What the plan must have: 'two_pass splits=4', 'cluster size=8'.")] = "",
) -> None:
    """Print the kernels that a call would launch on some GPU, and the bytes that they would move; needs no GPU."""
    try:
        sizes = _sizes(shape)
    except ValueError:
        sizes = []
    if not 3 <= len(sizes) <= 5:
        _fail(f"SHAPE is {shape!r}; wanted three to five sizes joined by x, such as 32x256x56x56")
    n, c, *spatial = sizes
    for name, size in [("SHAPE", n), ("SHAPE", c), ("SHAPE", math.prod(spatial)), ("--hidden", hidden)]:
        if size > _INT64_MAX:
            _fail(f"{name} gives {size}; wanted at most 2^63 - 1, the product of the spatial sizes too")
    if min(spatial) < 1:
        _fail(f"SHAPE is {shape!r}; wanted sizes of 1 or more")
    try:
        extension = native.load_extension()
        chosen = extension.plan(
            extension.preset(device), n=n, c=c, r=hidden, l=math.prod(spatial), dtype=dtype,
            channels_last=channels_last, backward=backward, forced=forced,
        )  # fmt: skip
    except (ValueError, BuildError) as error:
        _fail(str(error))
    typer.echo(str(chosen))


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in shape.split("x")]


def _input(shape: str) -> torch.Tensor:
    try:
        return torch.randn(_sizes(shape), generator=torch.Generator().manual_seed(0))
    except (ValueError, RuntimeError):
        _fail(f"--input is {shape!r}; wanted sizes joined by x, such as 1x3x224x224")


def _placed(
    model: nn.Module, x: torch.Tensor, device: str, dtype: str | None, channels_last: bool
) -> tuple[nn.Module, torch.Tensor]:
    if dtype is not None and dtype not in measure.EPSILONS_ALLOWED:
        _fail(f"--dtype is {dtype!r}; wanted one of {', '.join(measure.EPSILONS_ALLOWED)}")
    try:
        where = torch.device(device)
        kind = getattr(torch, dtype) if dtype else next((p.dtype for p in model.parameters()), torch.float32)
        x = x.to(where, kind)
        model = model.to(where, kind if dtype else None)
    except (RuntimeError, AssertionError) as error:
        _fail(f"--device is {device!r}: {str(error).splitlines()[0]}")
    if channels_last:
        if x.dim() not in (4, 5):
            _fail(f"--channels-last wants an input of 4 or 5 dimensions, not {x.dim()}")
        order = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        x, model = x.to(memory_format=order), model.to(memory_format=order)  # type: ignore[call-overload]
    return model, x


@app.command()
def replace(
    spec: Annotated[str, typer.Argument(help="module:callable that builds the model.")],
    arg: Annotated[list[str] | None, typer.Option(help="Goes to the callable; text or name=value; repeatable.")] = None,
    shape: Annotated[str, typer.Option("--input", help="Shape of the random input.")] = "1x3x224x224",
    level: Annotated[Literal["layer", "block"], typer.Option(help="What to replace: see se_fused.replace.")] = "layer",
    include: Annotated[list[str] | None, typer.Option(help="Only layers whose name matches; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No layer whose name matches; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each model.")] = 10,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, float64, float16 or bfloat16; else the model's.")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="The order of model and input.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what se_fused.replace does to a model in eval mode, how much the output changes, and both times.

    Fails if nothing is replaced, a pattern matches no module, or the outputs differ by more than rounding.
    """
    before, x = _placed(_model(spec, arg or []).eval(), _input(shape), device, dtype, channels_last)
    report = se_fused.replace(copy.deepcopy(before), level=level, include=include, exclude=exclude)
    facts: dict[str, Any] = {
        "model": spec,
        **report.as_dict(),
    }
    if not as_json:
        typer.echo(str(report))
    failures = _patterns_without_match(before, {"--include": include, "--exclude": exclude})
    if not (report.replaced or report.inline):
        failures.append("nothing was replaced")
    else:
        measured = _measured(spec, before, report.model, x, repeats) | {"convolutions": report.convolutions(x)}
        facts |= measured
        if not measured["equal"]:
            failures.append(f"the output {measured['verdict']}")
        if not as_json:
            typer.echo(
                f"largest difference of the output: {measured['relative']:.1e} of its largest number "
                f"{measured['scale']:.1e}: {measured['verdict']}"
            )
            if measured["convolutions"]:
                typer.echo("\n".join(["1x1 convolutions for this input:", *grouped(measured["convolutions"])]))
            milliseconds = [f"{1e3 * s:.2f} ms {name}" for name, s in measured["seconds"].items()]
            typer.echo(f"median time: {', '.join(milliseconds)}")
    if as_json:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}
        typer.echo(json.dumps(finite | {"failures": failures}, indent=2))
    for failure in failures:
        typer.echo(f"error: {failure}", err=True)
    if failures:
        raise typer.Exit(1)


def _patterns_without_match(model: nn.Module, options: dict[str, list[str] | None]) -> list[str]:
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return [
        f"{option} {pattern!r} matches the name of no module"
        for option, patterns in options.items()
        for pattern in patterns or []
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def _measured(spec: str, before: nn.Module, after: nn.Module, x: torch.Tensor, repeats: int) -> dict[str, Any]:
    def run(model: nn.Module) -> object:
        y = model(x)
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)
        return y

    with torch.inference_mode():
        try:
            wanted, got = run(before), run(after)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else ""
            _fail(f"{spec} on a random input of {'x'.join(map(str, x.shape))} raised {type(error).__name__}: {text}")
        try:
            found = measure.compared(got, wanted)
        except ValueError as error:
            _fail(str(error))
        calls = {"before": lambda: run(before), "after": lambda: run(after)}
        return found | {"seconds": measure.interleaved(calls, repeats)}


if __name__ == "__main__":
    app(prog_name="python -m se_fused")
