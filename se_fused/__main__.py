"""The command line: `python -m se_fused info | verify | plan | replace | bench`."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import math
import sys
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from torch import nn

try:
    import psutil  # noqa: F401 (se_fused/timing.py needs it)
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track
    from rich.table import Table
except ImportError as error:
    sys.exit(f"error: the command line needs {error.name}: pip install typer rich psutil")

import se_fused
from se_fused import backends, cases, given, installed, measure, native
from se_fused import bench as benchmark
from se_fused import verify as grid
from se_fused.native import BuildError
from se_fused.report import grouped

_INT64_MAX = 2**63 - 1
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
console = Console(markup=False, emoji=False)


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
        given.fail(f"cannot verify on {device}: {str(error).splitlines()[0]}")
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
        sizes = given.sizes(shape)
    except ValueError:
        sizes = []
    if not 3 <= len(sizes) <= 5:
        given.fail(f"SHAPE is {shape!r}; wanted three to five sizes joined by x, such as 32x256x56x56")
    n, c, *spatial = sizes
    for name, size in [("SHAPE", n), ("SHAPE", c), ("SHAPE", math.prod(spatial)), ("--hidden", hidden)]:
        if size > _INT64_MAX:
            given.fail(f"{name} gives {size}; wanted at most 2^63 - 1, the product of the spatial sizes too")
    if min(spatial) < 1:
        given.fail(f"SHAPE is {shape!r}; wanted sizes of 1 or more")
    try:
        extension = native.load_extension()
        chosen = extension.plan(
            extension.preset(device), n=n, c=c, r=hidden, l=math.prod(spatial), dtype=dtype,
            channels_last=channels_last, backward=backward, forced=forced,
        )  # fmt: skip
    except (ValueError, BuildError) as error:
        given.fail(str(error))
    typer.echo(str(chosen))


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
    # What the model prints is no result.
    quiet = contextlib.redirect_stdout(sys.stderr)
    with quiet:
        built, x = given.model(spec, arg or []).eval(), given.random_input(shape)
        before, x = given.placed(built, x, device, dtype, channels_last)
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
        with quiet:
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


def _measured(name: str, before: nn.Module, after: nn.Module, x: torch.Tensor, repeats: int) -> dict[str, Any]:
    def run(model: nn.Module) -> object:
        y = given.run(name, model, x)
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)
        return y

    with torch.inference_mode():
        wanted, got = run(before), run(after)
        try:
            found = measure.compared(got, wanted)
        except ValueError as error:
            given.fail(str(error))
        calls = {"before": lambda: run(before), "after": lambda: run(after)}
        return found | {"seconds": measure.interleaved(calls, repeats)}


@app.command()
def bench(
    spec: Annotated[
        str | None,
        typer.Argument(help="module:callable that builds the model; else EfficientNet-B0 of timm or torchvision."),
    ] = None,
    arg: Annotated[list[str] | None, typer.Option(help="Goes to the callable; text or name=value; repeatable.")] = None,
    shape: Annotated[
        str, typer.Option("--input", help="Shape of the random input; the first size, the batch, is not used.")
    ] = "1x3x224x224",
    batch: Annotated[int, typer.Option(min=1, help="The batch size that is measured beside 1.")] = 8,
    seconds: Annotated[
        float, typer.Option(min=0, max=86400, help="Time for all rounds; more, if five rounds take longer.")
    ] = 30,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, float64, float16 or bfloat16; else the model's.")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="The order of model and input.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what se_fused.replace brings for a model on this machine, in inference.

    Fails if nothing is replaced, or if the output of a variant differs by more than rounding.
    """
    if spec is None:
        spec, arg = _example()
    # What the model prints is no result.
    with contextlib.redirect_stdout(sys.stderr):
        x = given.random_input(shape, batch)
        model, x = given.placed(given.model(spec, arg or []).eval(), x, device, dtype, channels_last)
        with torch.inference_mode():
            given.run(spec, model, x[:1])
        results = _benched(spec, model, x, seconds)
    facts: dict[str, Any] = {
        "model": " ".join([spec, *(arg or [])]), "device": device, "dtype": str(x.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "se_fused": se_fused.__version__,
    }  # fmt: skip
    wrong = {result.variant: result.found["verdict"] for result in results if not result.found["equal"]}
    failures = [f"the output of {variant} {what}" for variant, what in wrong.items()]
    if as_json:
        facts |= {"results": [result.as_dict() for result in results], "verdict": benchmark.verdict(results)}
        typer.echo(json.dumps(facts | {"failures": failures}, indent=2))
    else:
        title = "{model} on {device}, {dtype}, {threads} threads, torch {torch}".format_map(facts)
        console.print(benchmark.table(results, title))
        console.print(benchmark.verdict(results), highlight=False)
    for failure in failures:
        typer.echo(f"error: {failure}", err=True)
    if failures:
        raise typer.Exit(1)


def _benched(spec: str, model: nn.Module, x: torch.Tensor, seconds: float) -> list[benchmark.Result]:
    """The results for one sample and for all of x, with a progress bar on stderr."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    # Automatic refresh would run in a thread of its own, on the cores that are measured.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        bar = progress.add_task("replacing SE layers", total=1)

        def show(done: float) -> None:
            progress.update(bar, completed=done, refresh=True)

        try:
            models, report = benchmark.variants(model, show)
            if not (report.replaced or report.inline):
                given.fail(f"nothing is replaced: {report}")
            results: list[benchmark.Result] = []
            batches = sorted({1, len(x)})
            for n in batches:
                progress.reset(bar, description=f"measuring batch {n}")
                results += benchmark.run(models, x[:n], seconds / len(batches), show)
        except typer.Exit:
            raise
        except Exception as error:  # as in given.py: the model is the user's
            given.fail(f"{spec} raised {given.message(error)}")
    return results


def _example() -> tuple[str, list[str]]:
    """The model that `bench` takes if none is named: of the first of these libraries that is installed."""
    for spec, arguments in (("timm:create_model", ["efficientnet_b0"]), ("torchvision.models:efficientnet_b0", [])):
        if importlib.util.find_spec(spec.partition(":")[0].partition(".")[0]) is not None:
            return spec, arguments
    given.fail("no SPEC was given, and neither timm nor torchvision is installed to take an example from")


if __name__ == "__main__":
    app(prog_name="python -m se_fused")
