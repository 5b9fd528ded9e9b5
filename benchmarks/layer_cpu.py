"""Times one SE layer on the CPU, fused and by its baselines, and writes the CSV of record row by row.

    python -m benchmarks.layer_cpu [--quick] [--out benchmarks/results/layer_cpu.csv]

Forward runs in inference mode. Backward computes the gradients of x and of all four weights, on a graph built once;
forward_backward builds the graph in each call. Each variant's result is checked against the reference in float64 before
it is timed.
"""

from __future__ import annotations

import contextlib
import csv
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, TextIO

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import se_fused
from se_fused import timing

from . import ROOT, baselines, engines, shapes
from .shapes import Shape

RECORD = ROOT / "benchmarks" / "results" / "layer_cpu.csv"
DIRECTIONS = ("forward", "backward", "forward_backward")
Line = dict[str, str]
DTYPES = ("float32", "bfloat16")
# How many maps must move. Forward: x in, y out. Backward: x and g in, dx out. Both: the sum.
MAPS_MOVED = {"forward": 2, "backward": 3, "forward_backward": 5}


@dataclass(frozen=True)
class Contest:
    """The variants that are timed together, with one pass over the map beside them (`passes`)."""

    shape: Shape
    dtype: str
    layout: str
    direction: str
    variants: tuple[str, ...]

    @property
    def passes(self) -> tuple[str, ...]:
        return ("copy", "multiply") if "fused_inplace" in self.variants else ("copy",)


def contests(
    chosen: tuple[Shape, ...], names: tuple[str, ...], dtypes: tuple[str, ...], directions: tuple[str, ...]
) -> list[Contest]:
    """All contests, grouped by kind; the cost of a call comes first, where float32, forward and eager are chosen."""
    found = []
    beside_torch = ("fused", "fused_inplace", *(n for n in ("eager", "compile") if n in names))
    if "forward" in directions and "float32" in dtypes and "eager" in names:
        calls = ("fused", *(name for name in names if name not in engines.ENGINES), *baselines.OF_A_CALL)
        found.append(Contest(shapes.CALL, "float32", "contiguous", "forward", calls))
    for direction in directions:
        for dtype, layout in ((d, m) for d in dtypes for m in baselines.MEMORY_FORMATS):
            plain = (dtype, layout) == ("float32", "contiguous")
            if direction == "forward":
                variants = (*baselines.FUSED, *names) if plain else beside_torch
            elif plain and "eager" in names:
                variants = ("fused", "eager")
            else:
                continue
            found += [Contest(shape, dtype, layout, direction, variants) for shape in chosen]
    return found


def run_contest(contest: Contest, threads: int, until: float) -> timing.Measured:
    """Build, check and time the variants of `contest`, until about `until` on `time.monotonic`."""
    torch._dynamo.reset()
    inputs = baselines.draw(contest.shape, getattr(torch, contest.dtype), contest.layout)
    is_forward = contest.direction == "forward"
    want = baselines.truth(inputs, gradients=not is_forward)
    with torch.inference_mode() if is_forward else contextlib.nullcontext():
        variants = []
        for name in contest.variants:
            if is_forward:
                variant = baselines.forward(name, inputs, threads)
            else:
                variant = baselines.backward(name, inputs, with_forward=contest.direction == "forward_backward")
            baselines.check(variant, want)
            variants.append(variant)
        del want
        variants += [baselines.PASSES[name](inputs) for name in contest.passes]
        return timing.measure(variants, until - time.monotonic())


def rows(contest: Contest, found: timing.Measured, conditions: dict[str, str]) -> Iterator[Line]:
    """The lines of one contest. Times are microseconds per call; a ratio is the variant's time over that of its base.

    `copy_us` is how long the maps that must move (MAPS_MOVED) take at the speed of the copy in the same contest.
    """
    shape, times = contest.shape, found.times
    map_bytes = shape.n * shape.c * shape.h * shape.w * getattr(torch, contest.dtype).itemsize
    maps = MAPS_MOVED[contest.direction]
    call = {"shape": str(shape), "r": str(shape.r), "dtype": contest.dtype, "layout": contest.layout}
    quiet = {"others": f"{found.others:.3f}", "dropped": str(found.dropped)}
    copy = {"copy_us": f"{timing.spread(times['copy']).p50 * maps / 2:.2f}"}
    for name in times:
        line = {"direction": contest.direction, "variant": name, "rounds": str(len(times[name]))}
        line |= {f"{p}_us": f"{t:.2f}" for p, t in timing.spread(times[name])._asdict().items()}
        for base in baselines.FUSED:
            known = timing.ratio_spread(times, name, base)._asdict() if base in times else {}
            line |= {f"ratio_to_{base}_{p}": f"{known[p]:.3f}" if known else "" for p in timing.Spread._fields}
        moved = 2 if name in contest.passes else maps
        yield conditions | call | line | quiet | copy | {"bytes": str(moved * map_bytes)}


def cpu_name() -> str:
    """The processor, and the vector instructions that PyTorch uses on it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str:
    """The commit of the sources, with "-dirty" if any file but results differs; "unknown" outside a repository."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)

    described = git("describe", "--always")
    if described.returncode != 0:
        return "unknown"
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return described.stdout.strip() + ("-dirty" if changes.stdout else "")


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def conditions(threads: int) -> Line:
    """The columns that are the same in every row of a run."""
    x, w = torch.ones(1, 1, 1), torch.ones(1, 1)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": cpu_name(),
        "threads": str(threads),
        "torch": torch.__version__,
        "onnxruntime": installed("onnxruntime"),
        "openvino": installed("openvino"),
        "backend": se_fused.explain(x, w, None, w, None).backend,
    }


def run(planned: list[Contest], file: TextIO, threads: int, minutes: float, console: Console) -> None:
    """Measure `planned`, each with an equal part of the time left, building included, and write the CSV to `file`."""
    torch.set_num_threads(threads)
    facts = conditions(threads)
    writer: csv.DictWriter[str] | None = None
    end = time.monotonic() + 60 * minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Automatic refresh would run in a thread of its own, on the cores that are measured.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bar = progress.add_task("", total=len(planned))
        for index, contest in enumerate(planned):
            what = f"{contest.shape} {contest.dtype} {contest.layout} {contest.direction}"
            progress.update(bar, description=what, refresh=True)
            now = time.monotonic()
            found = run_contest(contest, threads, now + (end - now) / (len(planned) - index))
            for line in rows(contest, found, facts):
                if writer is None:
                    writer = csv.DictWriter(file, list(line), lineterminator="\n")
                    writer.writeheader()
                writer.writerow(line)
            file.flush()
            text = ", ".join(f"{name} {timing.spread(t).p50:.1f}" for name, t in found.times.items())
            progress.console.print(f"{what}: {text} us", highlight=False, soft_wrap=True)
            progress.update(bar, advance=1, refresh=True)


def _choose(text: str, offered: tuple[str, ...], option: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for name in chosen:
        if name not in offered:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(offered)}", param_hint=option)
    return chosen


def main(
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    quick: Annotated[bool, typer.Option("--quick", help="Three shapes in about two minutes.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every variant.")] = min(2, os.cpu_count() or 1),
    minutes: Annotated[float | None, typer.Option(help="Time for all; 15, or 2 with --quick.")] = None,
    shape_names: Annotated[str, typer.Option("--shapes", help="Comma-separated, as 1x72x28x28.")] = "",
    baseline_names: Annotated[str, typer.Option("--baselines", help="Comma-separated.")] = ",".join(
        baselines.BASELINES
    ),
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(DTYPES),
    directions: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(DIRECTIONS),
) -> None:
    """Time the fused SE layer on the CPU beside its baselines."""
    offered = {str(shape): shape for shape in shapes.LAYER}
    chosen: tuple[Shape, ...] = shapes.QUICK if quick else shapes.LAYER
    if shape_names:
        chosen = tuple(offered[name] for name in _choose(shape_names, tuple(offered), "--shapes"))
    planned = contests(
        chosen,
        _choose(baseline_names, tuple(baselines.BASELINES), "--baselines"),
        _choose(dtypes, DTYPES, "--dtypes"),
        _choose(directions, DIRECTIONS, "--directions"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        run(planned, file, threads, minutes or (2 if quick else 15), Console())


if __name__ == "__main__":
    typer.run(main)
