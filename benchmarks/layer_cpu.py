"""One SE layer on the CPU: the fused call beside its peers. Writes the CSV of record, each row as it comes.

    python -m benchmarks.layer_cpu [--quick] [--out benchmarks/results/layer_cpu.csv]

Forward runs in inference mode. Backward is the gradient of x and of all four weights, alone on a graph built once, and
as forward_backward. Each contender's result is checked against the reference in float64 before it is timed.
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

from . import peers, shapes, timing
from .shapes import Shape

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "layer_cpu.csv"
DIRECTIONS = ("forward", "backward", "forward_backward")
DTYPES = ("float32", "bfloat16")
# Maps that must move at least once: x in, y out; backward x and g in, dx out; both: the sum.
MAPS_MOVED = {"forward": 2, "backward": 3, "forward_backward": 5}


@dataclass(frozen=True)
class Case:
    """What is measured in one go: the contenders, and beside them what no contender can be faster than."""

    shape: Shape
    dtype: str
    layout: str
    direction: str
    contenders: tuple[str, ...]

    @property
    def floors(self) -> tuple[str, ...]:
        return ("copy", "multiply") if "fused_inplace" in self.contenders else ("copy",)


@dataclass(frozen=True)
class Row:
    """A line of the CSV. Times are microseconds per call; a ratio is the contender's time over that of its base."""

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
    contender: str
    rounds: int
    p20_us: str
    p50_us: str
    p80_us: str
    ratio_to_fused: str
    ratio_to_fused_inplace: str
    floor_us: str
    bytes: int


def cases(
    chosen: tuple[Shape, ...], names: tuple[str, ...], dtypes: tuple[str, ...], directions: tuple[str, ...]
) -> list[Case]:
    """All cases, those of one kind together; the cost of a call first, where float32, forward and eager are chosen."""
    found = []
    beside_torch = ("fused", "fused_inplace", *(n for n in ("eager", "compile") if n in names))
    if "forward" in directions and "float32" in dtypes and "eager" in names:
        found.append(Case(shapes.CALL, "float32", "contiguous", "forward", ("fused", "eager")))
    for direction in directions:
        for dtype, layout in ((d, m) for d in dtypes for m in peers.MEMORY_FORMATS):
            plain = (dtype, layout) == ("float32", "contiguous")
            if direction == "forward":
                contenders = (*peers.FUSED, *names) if plain else beside_torch
            elif plain and "eager" in names:
                contenders = ("fused", "eager")
            else:
                continue
            found += [Case(shape, dtype, layout, direction, contenders) for shape in chosen]
    return found


def run_case(case: Case, threads: int, until: float) -> timing.Times:
    """Build, check and time the contenders of `case`, until about `until` on `time.monotonic`."""
    inputs = peers.draw(case.shape, getattr(torch, case.dtype), case.layout)
    is_forward = case.direction == "forward"
    want = peers.truth(inputs, gradients=not is_forward)
    with torch.inference_mode() if is_forward else contextlib.nullcontext():
        contenders = []
        for name in case.contenders:
            if is_forward:
                contender = peers.forward(name, inputs, threads)
            else:
                contender = peers.backward(name, inputs, with_forward=case.direction == "forward_backward")
            peers.check(contender, want)
            contenders.append(contender)
        del want
        contenders += [peers.FLOORS[name](inputs) for name in case.floors]
        return timing.measure(contenders, until - time.monotonic())


def rows(case: Case, times: timing.Times, conditions: dict[str, Any]) -> Iterator[Row]:
    """The lines of one case. The floor is what the bytes that must move take at the speed of the case's own copy."""
    shape = case.shape
    map_bytes = shape.n * shape.c * shape.h * shape.w * getattr(torch, case.dtype).itemsize
    maps = MAPS_MOVED[case.direction]
    floor = timing.spread(times["copy"]).p50 * maps / 2
    for name in times:
        moved = 2 if name in case.floors else maps
        p20, p50, p80 = (f"{t:.2f}" for t in timing.spread(times[name]))
        ratios = [f"{timing.ratio(times, name, base):.3f}" if base in times else "" for base in peers.FUSED]
        yield Row(
            **conditions, shape=str(shape), r=shape.r, dtype=case.dtype, layout=case.layout, direction=case.direction,
            contender=name, rounds=len(times[name]), p20_us=p20, p50_us=p50, p80_us=p80, ratio_to_fused=ratios[0],
            ratio_to_fused_inplace=ratios[1], floor_us=f"{floor:.2f}", bytes=moved * map_bytes,
        )  # fmt: skip


def cpu_name() -> str:
    """The processor, and the vector instructions that PyTorch uses on it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str:
    """The commit of the sources, "-dirty" if others than the results differ; "unknown" outside a repository."""

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
    """What is the same in every row of a run."""
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


def run(planned: list[Case], file: TextIO, threads: int, minutes: float, console: Console) -> None:
    """Measure `planned`, each with an equal share of the time left, building included, and write the CSV to `file`."""
    torch.set_num_threads(threads)
    facts = conditions(threads)
    # One more runnable process on the cores of a parallel region makes the region wait for a time slice, milliseconds.
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(f"load average {load:.1f}: another process may be taking part in this measurement")
    writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    end = time.monotonic() + 60 * minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # No refresh from a thread of its own, which would run on the cores that are measured.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bar = progress.add_task("", total=len(planned))
        for index, case in enumerate(planned):
            what = f"{case.shape} {case.dtype} {case.layout} {case.direction}"
            progress.update(bar, description=what, refresh=True)
            now = time.monotonic()
            times = run_case(case, threads, now + (end - now) / (len(planned) - index))
            for row in rows(case, times, facts):
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
    threads: Annotated[int, typer.Option(min=1, help="Threads of every contender.")] = min(2, os.cpu_count() or 1),
    minutes: Annotated[float | None, typer.Option(help="Time for all; 8, or 1 with --quick.")] = None,
    shape_names: Annotated[str, typer.Option("--shapes", help="Comma-separated, as 1x72x28x28.")] = "",
    peer_names: Annotated[str, typer.Option("--peers", help="Comma-separated.")] = ",".join(peers.PEERS),
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(DTYPES),
    directions: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(DIRECTIONS),
) -> None:
    """Time the fused SE layer on the CPU beside its peers."""
    offered = {str(shape): shape for shape in shapes.LAYER}
    chosen: tuple[Shape, ...] = shapes.QUICK if quick else shapes.LAYER
    if shape_names:
        chosen = tuple(offered[name] for name in _choose(shape_names, tuple(offered), "--shapes"))
    planned = cases(
        chosen,
        _choose(peer_names, tuple(peers.PEERS), "--peers"),
        _choose(dtypes, DTYPES, "--dtypes"),
        _choose(directions, DIRECTIONS, "--directions"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        run(planned, file, threads, minutes or (1 if quick else 8), Console())


if __name__ == "__main__":
    typer.run(main)
