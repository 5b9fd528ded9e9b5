"""What a machine with a GPU can show: numbers, sanitizers, then time. `make gpu-check OUT=folder`.

It needs torch >= 2.10 with CUDA, nvcc, and the package's own dependencies; no network, no installation. Each result is
written to OUT as it comes. What a machine lacks (compute-sanitizer, pytest) is reported as not run.
"""

from __future__ import annotations

import csv
import datetime
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

import se_fused
from se_fused import backends, verify

from . import gpu_plans
from .gpu_calls import calls, cold_sets, copy_bandwidth, eager_times, graph_times, rows, spread

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "sanitizers", "probes", "bench", "sweep")
VARIANTS = ("cuda", "triton", "eager", "compile")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
WATCHED = ("", "two_pass", "cluster size=2", "cluster size=2 by_channels=1", "cluster samples=4")  # by the sanitizers
SANITIZER_TIMEOUT = 300  # seconds, for each of TOOLS
FIELDS = (
    "date", "commit", "gpu", "driver", "torch", "shape", "r", "dtype", "layout", "direction", "mode", "variant",
    "p20_us", "p50_us", "p80_us", "bytes", "floor_us", "copy_gb_s",
)  # fmt: skip


def bench(out: Path, budget_s: float) -> bool:
    """Time every row for which there is time, the variants of a row one after the other.

    Returns whether the CUDA kernels ran wherever they had the memory.
    """
    passed = True
    end = time.monotonic() + budget_s
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    properties = torch.cuda.get_device_properties(0)
    copy = copy_bandwidth()
    typer.echo(f"{properties.name}: a copy moves {copy / 1e9:.0f} GB/s")
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "commit": commit or "unknown",
        "gpu": properties.name, "driver": driver, "torch": torch.__version__, "copy_gb_s": f"{copy / 1e9:.0f}",
    }  # fmt: skip
    no_triton = backends.why_not("triton", torch.device("cuda"))
    if no_triton is not None:
        typer.echo(f"not run: the Triton column: {no_triton}")
    variants = [variant for variant in VARIANTS if variant != "triton" or no_triton is None]
    with (out / "layer_gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row, variant in itertools.product(rows(), variants):
            if time.monotonic() > end:
                typer.echo("out of time: the rows that are left have not run")
                return passed
            backend = variant if variant in backends.BACKENDS else "auto"
            try:
                functions = calls(row, variant, cold_sets(row))
                with torch.set_grad_enabled(row.direction == "both"), se_fused.use_backend(backend):
                    measured = {"cold": graph_times(functions), "warm": graph_times(functions[:1])}
                    measured["eager"] = eager_times(functions[0])
            except Exception as error:  # a peer may break in any way; the other columns are still wanted
                typer.echo(f"not run: {row.shape} {row.dtype} {row.layout} {row.direction} {variant}: {error}")
                passed &= variant != "cuda" or isinstance(error, torch.OutOfMemoryError)
                continue
            for mode, times in measured.items():
                p20, p50, p80 = (f"{value:.2f}" for value in spread(times))
                writer.writerow(
                    facts
                    | {"shape": row.shape, "r": row.shape.r, "dtype": str(row.dtype)[6:], "layout": row.layout}
                    | {"direction": row.direction, "mode": mode, "variant": variant, "bytes": row.bytes()}
                    | {"p20_us": p20, "p50_us": p50, "p80_us": p80, "floor_us": f"{1e6 * row.bytes() / copy:.2f}"}
                )
            file.flush()
    return passed


def watched(plan: str) -> list[verify.Case]:
    """The cases of the grid that the sanitizers watch by a plan: a part of it, another one for each plan, and in each
    precision and layout other options and shapes, because their number is no multiple of that of the plans."""
    cases = [c for c in verify.cases() if c.precision in ("float32", "float16") and c.layout != "strided"]
    return cases[WATCHED.index(plan) :: len(WATCHED)]


def small_calls() -> None:
    """What the sanitizers watch: forward and backward by every algorithm and in both layouts, on small maps."""
    has_clusters = any(backends.cuda_limits(0)[4:])
    for plan in (plan for plan in WATCHED if has_clusters or "cluster" not in plan):
        ran = 0
        for seed, case in enumerate(watched(plan)):
            try:
                with se_fused.use_backend("cuda", plan):
                    error, worst = verify.error(case, "cuda", seed)
            except ValueError:
                if not plan.startswith("cluster"):
                    raise
                continue  # the case does not divide among the blocks
            assert error <= verify.tolerance(case.precision), (plan, str(case), worst)
            ran += 1
        print(f"plan '{plan}': {ran} cases", flush=True)
        assert ran, f"plan '{plan}' serves none of the cases"


def sanitizers(out: Path) -> bool:
    program = shutil.which("compute-sanitizer")
    if program is None:
        typer.echo("not run: compute-sanitizer is not on the PATH")
        return True
    passed = True
    for tool in TOOLS:
        # Torch's own calls of the API fail where it asks what a driver has. Its kernels are not watched, but initcheck
        # must see what they write.
        options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        options += ["--kernel-name", "kernel_substring=se4cuda"] * (tool != "initcheck")
        command = [program, *options, sys.executable, "-m", "benchmarks.gpu_check", "--small-calls"]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with (out / f"{tool}.log").open("w") as log:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, stdout=log, stderr=log, check=False, env=environment, timeout=SANITIZER_TIMEOUT
                ).returncode
                outcome = "clean" if code == 0 else f"exit {code}"
            except subprocess.TimeoutExpired:
                outcome = f"no end in {SANITIZER_TIMEOUT} s"
        typer.echo(f"compute-sanitizer {tool}: {outcome}")
        passed &= outcome == "clean"
    return passed


def tests(out: Path) -> bool:
    results = [_tests_of(backend, out) for backend in ("cuda", "triton")]
    passed = all(results)
    if any(importlib.util.find_spec(name) is None for name in ("pytest", "hypothesis")):
        typer.echo("not run: tests/test_cuda.py and tests/test_triton.py, for want of pytest or hypothesis")
        return passed
    with (out / "pytest.log").open("w") as log:
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "tests/test_cuda.py", "tests/test_triton.py"]
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)
    typer.echo(f"the GPU's tests: {'passed' if done.returncode == 0 else f'exit {done.returncode}'}")
    return passed and done.returncode == 0


def _tests_of(backend: str, out: Path) -> bool:
    reason = backends.why_not(backend, torch.device("cuda"))
    if reason is not None:
        typer.echo(f"not run: verify {backend}: {reason}")
        return True
    with se_fused.use_backend(backend):
        results = list(verify.run("cuda"))
    wrong = [
        f"{case}: {worst} {error:.1e}" for case, error, worst in results if error > verify.tolerance(case.precision)
    ]
    (out / f"verify_{backend}.log").write_text("\n".join(wrong))
    typer.echo(f"verify {backend}: {len(results)} cases, {len(wrong)} wrong")
    return not wrong


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("gpu_check"),
    parts: Annotated[str, typer.Option(help=f"Which of {', '.join(PARTS)}, joined by commas.")] = ",".join(PARTS),
    budget: Annotated[float, typer.Option(help="Seconds for the benchmark.")] = 240,
    sweep_budget: Annotated[float, typer.Option(help="Seconds for the plans beside each other.")] = 60,
    small: Annotated[bool, typer.Option("--small-calls", hidden=True)] = False,
) -> None:
    """Check and time the CUDA kernels on the GPU of this machine."""
    chosen = parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; wanted some of {', '.join(PARTS)}")
    reason = backends.why_not("cuda", torch.device("cuda"))
    if reason is not None:
        typer.echo(f"the CUDA kernels cannot run here: {reason}", err=True)
        raise typer.Exit(2)
    if small:
        small_calls()
        return
    out.mkdir(parents=True, exist_ok=True)
    run: dict[str, Callable[[], bool | None]] = {
        "tests": lambda: tests(out),
        "sanitizers": lambda: sanitizers(out),
        "probes": lambda: gpu_plans.probes(out),
        "bench": lambda: bench(out, budget),
        "sweep": lambda: gpu_plans.sweep(out, sweep_budget),
    }
    failed = []
    for part in (part for part in PARTS if part in chosen):
        try:
            if run[part]() is False:
                failed.append(part)
        except Exception:  # the other parts are still wanted
            typer.echo(traceback.format_exc())
            failed.append(part)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
