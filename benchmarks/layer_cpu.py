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
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import se_fused

from . import ROOT, baselines, shapes, timing
from .shapes import Shape

RECORD = ROOT / "benchmarks" / "results" / "layer_cpu.csv"
DIRECTIONS = ("forward", "backward", "forward_backward")
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


@dataclass(frozen=True)
class Row:
    """A line of the CSV. Times are microseconds per call; a ratio is the variant's time over that of its base.

    `copy_us` is how long the maps that must move (MAPS_MOVED) take at the speed of the copy in the same contest.
    """

    date: str
    commit: str
    cpu: str
    threads: int
    torch: str
    onnxruntime: str
    openvino: str
    backend: str
    shape: str
    r: int
    dtype: str
    layout: str
    direction: str
    variant: str
    rounds: int
    p20_us: str
    p50_us: str
    p80_us: str
    ratio_to_fused: str
    ratio_to_fused_inplace: str
    copy_us: str
    bytes: int


def contests(
    chosen: tuple[Shape, ...], names: tuple[str, ...], dtypes: tuple[str, ...], directions: tuple[str, ...]
) -> list[Contest]:
    """All contests, grouped by kind; the cost of a call comes first, where float32, forward and eager are chosen."""
    found = []
    beside_torch = ("fused", "fused_inplace", *(n for n in ("eager", "compile") if n in names))
    if "forward" in directions and "float32" in dtypes and "eager" in names:
        found.append(Contest(shapes.CALL, "float32", "contiguous", "forward", ("fused", "eager")))
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


def run_contest(contest: Contest, threads: int, until: float) -> timing.Times:
    """Build, check and time the variants of `contest`, until about `until` on `time.monotonic`."""
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


def rows(contest: Contest, times: timing.Times, conditions: dict[str, Any]) -> Iterator[Row]:
    """The lines of one contest."""
    shape = contest.shape
    map_bytes = shape.n * shape.c * shape.h * shape.w * getattr(torch, contest.dtype).itemsize
    maps = MAPS_MOVED[contest.direction]
    copy = timing.spread(times["copy"]).p50 * maps / 2
    for name in times:
        moved = 2 if name in contest.passes else maps
        p20, p50, p80 = (f"{t:.2f}" for t in timing.spread(times[name]))
        ratios = [f"{timing.ratio(times, name, base):.3f}" if base in times else "" for base in baselines.FUSED]
        yield Row(
            **conditions, shape=str(shape), r=shape.r, dtype=contest.dtype, layout=contest.layout,
            direction=contest.direction, variant=name, rounds=len(times[name]), p20_us=p20, p50_us=p50, p80_us=p80,
            ratio_to_fused=ratios[0], ratio_to_fused_inplace=ratios[1], copy_us=f"{copy:.2f}", bytes=moved * map_bytes,
        )  # fmt: skip


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


def conditions(threads: int) -> dict[str, Any]:
    """The columns that are the same in every row of a run."""
    x, w = torch.ones(1, 1, 1), torch.ones(1, 1)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": cpu_name(),
        "threads": threads,
        "torch": torch.__version__,
        "onnxruntime": installed("onnxruntime"),
        "openvino": installed("openvino"),
        "backend": se_fused.explain(x, w, None, w, None).backend,
    }


def run(planned: list[Contest], file: TextIO, threads: int, minutes: float, console: Console) -> None:
    """Measure `planned`, each with an equal part of the time left, building included, and write the CSV to `file`."""
    torch.set_num_threads(threads)
    facts = conditions(threads)
    # If another process runs on the cores of a parallel region, the region waits for a time slice: milliseconds.
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(f"load average {load:.1f}: another process may be taking part in this measurement")
    writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    end = time.monotonic() + 60 * minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Automatic refresh would run in a thread of its own, on the cores that are measured.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bar = progress.add_task("", total=len(planned))
        for index, contest in enumerate(planned):
            what = f"{contest.shape} {contest.dtype} {contest.layout} {contest.direction}"
            progress.update(bar, description=what, refresh=True)
            now = time.monotonic()
            times = run_contest(contest, threads, now + (end - now) / (len(planned) - index))
            for row in rows(contest, times, facts):
                writer.writerow(asdict(row))
            file.flush()
            found = ", ".join(f"{name} {timing.spread(t).p50:.1f}" for name, t in times.items())
            progress.console.print(f"{what}: {found} us", highlight=False, soft_wrap=True)
            progress.update(bar, advance=1, refresh=True)


def _choose(text: str, offered: tuple[str, ...], option: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for name in chosen:
        if name not in offered:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(offered)}", param_hint=option)
    return chosen


def main(
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    quick: Annotated[bool, typer.Option("--quick", help="Three shapes in about a minute.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every variant.")] = min(2, os.cpu_count() or 1),
    minutes: Annotated[float | None, typer.Option(help="Time for all; 8, or 1 with --quick.")] = None,
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
        run(planned, file, threads, minutes or (1 if quick else 8), Console())


if __name__ == "__main__":
    typer.run(main)
