"""What the planner's model builds on (csrc/plan/cluster.cpp), measured; and whether its choice is the fastest plan."""

from __future__ import annotations

import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer

import se_fused
from se_fused import backends, build

from . import gpu_probes
from .gpu_calls import Row, calls, cold_sets, copy_bandwidth, graph_times, rows
from .shapes import Shape

SIZES = (1, 2, 4, 8, 16)
PLANS = ("", "two_pass", *(f"cluster size={size}" for size in SIZES))
COPIES = tuple(1 << power for power in range(20, 30))  # 1 MB to 512 MB
# Nothing to compute: what is left is the launch, and from one size to the next what the exchange takes.
TINY = Row(Shape(1, 64, 1, 16, r=8), torch.float16, "contiguous", "forward")
FIELDS = ("shape", "r", "dtype", "layout", "direction", "plan", "p50_us", "ratio_to_planner")


def median_of(row: Row, plan: str, sets: int) -> float | None:
    """Microseconds a call by this plan; None where it cannot serve the call."""
    try:
        with torch.set_grad_enabled(row.direction == "both"), se_fused.use_backend("cuda", plan):
            return statistics.median(graph_times(calls(row, "cuda", sets)))
    except ValueError:
        return None


def probes(out: Path) -> bool:
    """Clusters that are resident at once, bandwidths and a call with nothing to compute by size; then gpu_probes.

    Returns whether all of them ran and were right.
    """
    with (out / "probes.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("probe", "of", "value", "unit"))
        limits = backends.cuda_limits(0)
        for size, clusters in zip(SIZES, limits[4:], strict=True):
            writer.writerow(("clusters, a block a multiprocessor", size, clusters, "clusters"))
        for size in COPIES:
            source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda").view(torch.float32)
            for name, function in (("read", source.sum), ("write", source.zero_)):
                writer.writerow((name, size, f"{size / _us_of(function) / 1e3:.1f}", "GB/s"))
            writer.writerow(("copy, both ways", size, f"{copy_bandwidth(size) / 1e9:.1f}", "GB/s"))
        for plan in PLANS[1:]:
            us_or_none = median_of(TINY, plan, 1)
            if us_or_none is not None:
                writer.writerow(("a call with nothing to compute", plan, f"{us_or_none:.2f}", "us"))
            file.flush()
        try:
            with tempfile.TemporaryDirectory() as folder:
                library = gpu_probes.Probes(gpu_probes.compile_probes(Path(folder)))
            clusters = dict(zip(SIZES, limits[4:], strict=True))
            for name, what, value, unit in gpu_probes.measure(library, _us_of, clusters, limits[2]):
                writer.writerow((name, what, f"{value:.2f}", unit))
                file.flush()
        except (gpu_probes.ProbeError, build.BuildError) as error:
            typer.echo(f"failed: exchanges and slabs: {error}")
            return False
    typer.echo(f"probes: {out / 'probes.csv'}")
    return True


def _us_of(call: Callable[[], None]) -> float:
    return statistics.median(graph_times([call]))


def plans_of(row: Row) -> list[str]:
    """All that may serve a row; the first is the planner's choice."""
    sizes = PLANS[2:]
    if row.layout != "contiguous":
        sizes = tuple(f"{plan} by_channels={by}" for plan in sizes for by in (0, 1))
    together = ["cluster samples=4"] if row.direction == "forward" and row.shape.n > 1 else []
    return [*PLANS[:2], *sizes, *together]


def sweep(out: Path, budget_s: float) -> None:
    """Every plan that can serve a row, beside the planner's own choice (plan ""), cold, for the half-precision rows."""
    end = time.monotonic() + budget_s
    slower = []
    with (out / "plans_gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in rows():
            if row.dtype is not torch.float16:
                continue
            if time.monotonic() > end:
                typer.echo("out of time: the plans of the rows that are left have not run")
                break
            times = {plan: median_of(row, plan, cold_sets(row)) for plan in plans_of(row)}
            chosen = times[""]
            assert chosen is not None, "the planner's own choice cannot serve the call"
            for plan, us in times.items():
                if us is not None:
                    line = (row.shape, row.shape.r, "float16", row.layout, row.direction, plan)
                    writer.writerow(dict(zip(FIELDS, (*line, f"{us:.2f}", f"{us / chosen:.3f}"), strict=True)))
            file.flush()
            best = min(us for us in times.values() if us is not None)
            if best < 0.95 * chosen:
                slower.append(f"{row.shape} {row.layout} {row.direction}: {best / chosen:.2f}")
    typer.echo(f"sweep: another plan is 5 % faster than the planner's at {len(slower)} rows")
    for text in slower:
        typer.echo(f"  {text}")
