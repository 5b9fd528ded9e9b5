"""Checks and times the kernels on a machine with a GPU: `make gpu-check OUT=folder`; see docs/gpu-run.md.

The most important parts come first. Each part is a process with a time limit, so that a hang or a broken CUDA context
costs one part, and gpu/runner.py names the case that caused it. If the machine lacks nvidia-smi, git,
compute-sanitizer, pytest, timm or triton, a line of the result says so. This file needs only Python; the parts need
torch with CUDA, and either a compiled library (`make prebuild`) or nvcc.

OUT gets at most six files: run.json, smoke.csv, layer_gpu.csv, models_gpu.csv, plans_gpu.csv, log.txt. The exit status
is 0 if every part that ran passed, 1 if a part failed or none ran, and 2 if an argument is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import ROOT
from .gpu.runner import Command, Missing, Part, Run, Task, rows_of

SANITIZED_STEP = 5  # one in so many smoke calls is sanitized; a plan has at least 6 in each precision
PYTHON = [sys.executable, "-u"]


def module(name: str, device: str = "") -> Command:
    """The command that runs a module of benchmarks/gpu, or another one by its full name."""
    name = name if "." in name else f"benchmarks.gpu.{name}"
    return lambda task: [*PYTHON, "-m", name, *task.options(task.out, device or task.device)]


def sanitizer(tool: str) -> Command:
    """The command that runs compute-sanitizer over some of the smoke calls."""

    def command(task: Task) -> list[str]:
        program = shutil.which("compute-sanitizer")
        if program is None:
            raise Missing("compute-sanitizer is not on the PATH")
        # Errors of API calls are not reported, because torch's own calls fail where it asks what a driver has. Only our
        # kernels are watched; but initcheck must also see what torch's kernels write.
        options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        options += ["--kernel-name", "kernel_substring=se4cuda"] * (tool != "initcheck")
        smoke = [*PYTHON, "-m", "benchmarks.gpu.smoke", *task.options(task.scratch, task.device)]
        watched = [program, *options, *smoke, "--step", str(SANITIZED_STEP)]
        return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watched]

    return command


def gpu_tests(task: Task) -> list[str]:
    """The command that runs pytest, in parallel where pytest-xdist is installed."""
    lacking = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if lacking:
        raise Missing(f"{' and '.join(lacking)} not installed")
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(12, max(1, (os.cpu_count() or 1) - 4)))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        options += ["--timeout", "25"]
    return [*PYTHON, "-m", "pytest", *options, "tests/cuda/test_cuda.py", "tests/cuda/test_cuda_blocks.py"]


def _sanitizer_part(tool: str, seconds: float, **more: Any) -> Part:
    what = "compute-sanitizer over the smoke calls"
    clean = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    return Part(tool, seconds, what, sanitizer(tool), must_contain=clean, refusal="Device not supported", **more)


# A case of "models" takes up to 16 s, a case of the others up to 4 s.
PARTS = (
    Part("library", 8, "the libraries, built where they are not there", module("library"), whole=True),
    Part("smoke", 24, "each algorithm, layout and dtype against float64", module("smoke"), silence=10),
    Part("layer", 82, "the layer beside eager, torch.compile and a copy", module("layer"), silence=30),
    Part("models", 126, "whole networks before and after replace", module("models"), silence=60),
    Part("tests", 50, "tests/cuda/test_cuda*.py in parallel processes", gpu_tests, must_contain=" passed"),
    _sanitizer_part("memcheck", 50, beside="tests"),
    Part(
        "instruction_sets",
        50,
        "the CPU kernels of each one",
        module("instruction_sets", "cpu"),
        beside="tests",
    ),
    Part("microbenchmarks", 15, "what the planner's model builds on", module("dev.microbenchmarks")),
    Part("sweep", 25, "every plan beside the planner's choice", module("dev.sweep"), silence=30),
    Part("triton", 30, "a sample of the Triton kernels, and their times", module("triton_sample")),
    *(_sanitizer_part(tool, 60, default=False) for tool in ("racecheck", "initcheck", "synccheck")),
)


def machine(run: Run) -> dict[str, Any]:
    """The facts that need no torch: the commit, the driver and the number of CPUs."""
    describe = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*")
    commit = os.environ.get("COMMIT") or output_of(run, *describe)
    driver = output_of(run, "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "commit": commit.removesuffix("-dirty") or "unknown", "dirty": commit.endswith("-dirty"),
        "driver": driver or "unknown", "cpus": os.cpu_count(),
    }  # fmt: skip


def output_of(run: Run, *command: str) -> str:
    """The first line that a command prints; "" and a line in the log if the command is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        run.say(f"no answer from {command[0]}: {error}")
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def stages(parts: Iterable[Part]) -> list[list[Part]]:
    """The parts in groups; the parts of a group run at the same time."""
    found: list[list[Part]] = []
    for part in parts:
        if part.beside and found and any(part.beside in (other.name, other.beside) for other in found[-1]):
            found[-1].append(part)
        else:
            found.append([part])
    return found


def summary(out: Path) -> list[str]:
    """The headline: the time of eager, of the original and of level "block" over that of our layers, by batch."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for line in rows_of(out / "layer_gpu.csv"):
        if line["variant"] == "eager":
            kind = f"eager / fused, {line['dtype']} {line['layout']} {line['direction']}, {line['mode']}"
            n = line["shape"].partition("x")[0]
            ratios.setdefault(kind, {}).setdefault(n, []).append(float(line["ratio_to_fused"]))
    for line in rows_of(out / "models_gpu.csv"):
        if line["variant"] != "fused":
            kind = f"{line['variant']} / fused, {line['model']}, {line['mode']}"
            ratios.setdefault(kind, {}).setdefault(line["n"], []).append(float(line["ratio_to_fused"]))
    return [
        f"{kind}: " + ", ".join(f"N = {n} {statistics.geometric_mean(found):.2f}" for n, found in by_n.items())
        for kind, by_n in ratios.items()
    ]


def conclude(run: Run) -> int:
    """Print the summary, which fits one screen. Returns the exit status."""
    for line in summary(run.out):
        run.say(line)
    for outcome in run.outcomes:
        took = f"{outcome.seconds:6.1f} s of {outcome.limit_s:5.1f}"
        run.say(f"{outcome.part:17} {outcome.outcome:8} {took}  {outcome.reason[:90]}")
        for line in [*outcome.blamed, *outcome.wrong][:3]:
            run.say(f"    {line[:150]}")
    failed = [outcome.part for outcome in run.outcomes if outcome.outcome == "failed"]
    ran = [outcome for outcome in run.outcomes if outcome.outcome != "not run"]
    run.say(f"failed: {', '.join(failed)}" if failed else "all that ran passed" if ran else "nothing ran")
    return 1 if failed or not ran else 0


def main(arguments: Sequence[str] | None = None) -> int:
    default = ",".join(part.name for part in PARTS if part.default)
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Check and time the kernels on the GPU of this machine.",
        epilog="parts: " + "; ".join(f"{part.name}: {part.what}" for part in PARTS),
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for the results")
    parser.add_argument("--parts", default=default, help=f"joined by commas; default: {default}")
    parser.add_argument("--minutes", type=float, default=6, help="for all parts together (default: 6)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: rehearse without a GPU")
    parser.add_argument("--cases", type=int, help="no more than so many cases of each part")
    given = parser.parse_args(arguments)
    names = given.parts.split(",")
    if unknown := set(names) - {part.name for part in PARTS}:
        parser.error(f"--parts has {', '.join(sorted(unknown))}; wanted some of {', '.join(p.name for p in PARTS)}")
    if not given.minutes > 0:
        parser.error(f"--minutes is {given.minutes}; wanted more than 0")
    end = time.monotonic() + 60 * given.minutes
    run = Run(given.out, given.device, given.cases)
    run.facts |= {**machine(run), "minutes": given.minutes}
    left = stages(part for part in PARTS if part.name in names)
    while left:
        # The time that earlier parts have left over goes to all that are still to come.
        due = sum(max(part.seconds for part in stage) for stage in left)
        stage = left.pop(0)
        remaining = end - time.monotonic()
        limit = remaining if stage[0].whole else remaining * max(part.seconds for part in stage) / due
        with ThreadPoolExecutor(len(stage)) as pool:
            begun = [pool.submit(run.perform, part, limit) for part in stage]
            try:
                for each in begun:
                    each.result()
            except BaseException:  # an interrupt, after which the processes would go on without us
                run.stop()
                raise
    return conclude(run)


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):  # so that no process stays behind
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
