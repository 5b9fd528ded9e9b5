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
FIELDS = (
    "date", "commit", "gpu", "driver", "torch", "shape", "r", "dtype", "layout", "direction", "mode", "variant",
    "p20_us", "p50_us", "p80_us", "bytes", "floor_us", "copy_gb_s",
)  # fmt: skip


def bench(out: Path, budget_s: float) -> None:
    """Time every row for which there is time, the variants of a row one after the other."""
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
                return
            backend = variant if variant in backends.BACKENDS else "auto"
            try:
                functions = calls(row, variant, cold_sets(row))
                with torch.set_grad_enabled(row.direction == "both"), se_fused.use_backend(backend):
                    measured = {"cold": graph_times(functions), "warm": graph_times(functions[:1])}
                    measured["eager"] = eager_times(functions[0])
            except Exception as error:  # a peer may break in any way; the other columns are still wanted
                typer.echo(f"not run: {row.shape} {row.dtype} {row.layout} {row.direction} {variant}: {error}")
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


def small_calls() -> None:
    """What the sanitizers watch: every kernel, layout and alignment, forward and backward, on small maps."""
    for seed, case in enumerate(verify.cases()):
        if case.precision in ("float32", "float16") and case.layout != "strided" and seed % 3 == 0:
            error, worst = verify.error(case, "cuda", seed)
            assert error <= verify.tolerance(case.precision), (str(case), worst)


def sanitizers(out: Path) -> bool:
    program = shutil.which("compute-sanitizer")
    if program is None:
        typer.echo("not run: compute-sanitizer is not on the PATH")
        return True
    passed = True
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_check"]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SE_FUSED_BACKEND": "cuda"}
        with (out / f"{tool}.log").open("w") as log:
            done = subprocess.run(
                [*command, "--small-calls"], cwd=ROOT, stdout=log, stderr=log, check=False, env=environment
            )
        typer.echo(f"compute-sanitizer {tool}: {'clean' if done.returncode == 0 else f'exit {done.returncode}'}")
        passed &= done.returncode == 0
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
    passed = True
    if "tests" in chosen:
        passed &= tests(out)
    if "sanitizers" in chosen:
        passed &= sanitizers(out)
    if "probes" in chosen:
        gpu_plans.probes(out)
    if "bench" in chosen:
        bench(out, budget)
    if "sweep" in chosen:
        gpu_plans.sweep(out, sweep_budget)
    raise typer.Exit(0 if passed else 1)


if __name__ == "__main__":
    typer.run(main)
