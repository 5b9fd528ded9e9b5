"""What a machine with a GPU can show, the most important first. `make gpu-check OUT=folder`; docs/gpu-run.md.

Each part is a process with a time limit, so that a hang or a broken CUDA context costs one part and names the case that
caused it. What a machine lacks (nvidia-smi, git, compute-sanitizer, pytest, timm, triton) is a line in the result. This
file needs Python alone; the parts need torch with CUDA, and a library that is there (`make prebuild`) or nvcc.

OUT gets at most six files: run.json, smoke.csv, layer_gpu.csv, models_gpu.csv, plans_gpu.csv, log.txt. Exit status: 0,
all that ran passed; 1, a part failed, or none ran; 2, an argument is wrong.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = ("smoke.csv", "layer_gpu.csv", "models_gpu.csv", "plans_gpu.csv", "probes.csv", "run.json", "log.txt")
NOT_RUN = 77  # benchmarks/gpu/part.py
# Of a part's limit, what its last case may take after the part has been told to begin no more.
LAST_CASE_S, LAST_CASE_SHARE = 8.0, 0.2
SANITIZER_CLEAN = "ERROR SUMMARY: 0 errors"
SANITIZER_REFUSALS = ("Device not supported", "No supported GPU", "Failed to initialize")


@dataclass(frozen=True)
class Part:
    """`seconds`: its share of six minutes. `beside`: it times nothing and runs at the same time as the part before."""

    name: str
    seconds: float
    what: str
    beside: bool = False
    default: bool = True
    resumes: bool = False  # after a case that killed it


PARTS = (
    Part("smoke", 25, "each algorithm, direction, layout and dtype against float64", resumes=True),
    Part("layer", 110, "the layer beside eager and a copy, in CUDA graphs and as eager calls", resumes=True),
    Part("models", 110, "whole networks before and after replace", resumes=True),
    Part("tests", 50, "tests/test_cuda.py in parallel processes"),
    Part("memcheck", 50, "compute-sanitizer over the smoke calls", beside=True),
    Part("instruction_sets", 50, "the CPU kernels under each instruction set", beside=True),
    Part("probes", 15, "what the planner's model builds on"),
    Part("sweep", 30, "every plan beside the planner's choice", resumes=True),
    Part("triton", 20, "a sample of the Triton kernels, and their times"),
    Part("racecheck", 60, "compute-sanitizer over the smoke calls", default=False),
    Part("initcheck", 60, "compute-sanitizer over the smoke calls", default=False),
    Part("synccheck", 60, "compute-sanitizer over the smoke calls", default=False),
)
MODULES = {
    "smoke": "smoke", "layer": "layer", "models": "models", "probes": "probes", "sweep": "plans",
    "triton": "triton_sample", "instruction_sets": "instruction_sets",
}  # fmt: skip
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED_STEP = 7  # of the smoke calls, prime to the numbers of layouts and of calls


@dataclass
class Outcome:
    """What became of a part."""

    part: str
    outcome: str = "not run"  # passed | failed | not run
    reason: str = ""
    seconds: float = 0
    limit_s: float = 0
    wrong: list[str] = field(default_factory=list)
    blamed: list[str] = field(default_factory=list)  # cases that killed it or did not end
    tail: list[str] = field(default_factory=list)


class Missing(Exception):
    """What a part needs and this machine does not have."""


class Run:
    """One run of some parts: its folder, its log, what is known of the machine."""

    def __init__(self, out: Path, device: str = "cuda", cases: int | None = None) -> None:
        self.out, self.device, self.cases = out, device, cases
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        self.outcomes: list[Outcome] = []
        self.facts: dict[str, Any] = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")}
        self._log = (out / "log.txt").open("w")
        self._lock = threading.Lock()
        self._begin = time.monotonic()

    def say(self, text: str, aloud: bool = True) -> None:
        with self._lock:
            stamped = f"{time.monotonic() - self._begin:6.1f} {text}"
            print(stamped, file=self._log, flush=True)
            if aloud:
                print(stamped, flush=True)

    def save(self) -> None:
        facts = {**self.facts, "parts": [vars(outcome) for outcome in self.outcomes]}
        (self.out / "run.json").write_text(json.dumps(facts, indent=1) + "\n")

    def perform(self, part: Part, limit: float) -> None:
        """Run a part, again after each case that killed it, until `limit` seconds are over."""
        outcome = Outcome(part.name, limit_s=round(limit, 1))
        begin = time.monotonic()
        end, start = begin + limit, 0
        with tempfile.TemporaryDirectory() as scratch:
            while True:
                try:
                    command, environment = command_of(part, self.out, Path(scratch), self.device)
                except Missing as missing:
                    outcome.reason = str(missing)
                    break
                if part.name in MODULES or part.name in SANITIZERS:
                    left = end - time.monotonic()
                    reserve = min(LAST_CASE_S, LAST_CASE_SHARE * left)
                    command = [*command, "--until", f"{time.time() + left - reserve:.1f}", "--start", str(start)]
                    command += ["--cases", str(self.cases)] * (self.cases is not None)
                died_at = self._process(part, command, environment, end, outcome)
                if died_at is None or not part.resumes or time.monotonic() > end - LAST_CASE_S:
                    break
                start = died_at + 1
                self.say(f"{part.name}: goes on at case {start}")
        outcome.seconds = round(time.monotonic() - begin, 1)
        probes = self.out / "probes.csv"
        if part.name == "probes" and probes.exists():
            with probes.open(newline="") as file:
                self.facts["probes"] = list(csv.DictReader(file))
            probes.unlink()
        with self._lock:
            self.outcomes.append(outcome)
            self.save()
        self.say(f"{part.name}: {outcome.outcome}{f', {outcome.reason}' if outcome.reason else ''}")

    def _process(
        self, part: Part, command: Sequence[str], environment: dict[str, str], end: float, outcome: Outcome
    ) -> int | None:
        """Run one process of a part. Returns the number of the case that killed it, None if it ended by itself."""
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        timed_out = threading.Event()

        def kill() -> None:
            timed_out.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(0.0, end - time.monotonic()), kill)
        timer.start()
        case, lines = "", []
        assert process.stdout is not None
        try:
            for line in process.stdout:
                text = line.rstrip()
                lines.append(text)
                self.say(f"{part.name}| {text}", aloud=False)
                if text.startswith("case "):
                    case = text
                elif text.startswith(("wrong: ", "FAILED ", "ERROR ")):
                    outcome.wrong.append(text)
                elif text.startswith("facts "):
                    self.facts.update(json.loads(text.removeprefix("facts ")))
            code = process.wait()
        finally:
            timer.cancel()
        outcome.tail = lines[-8:]
        if timed_out.is_set() or code < 0 or (code not in (0, 1, NOT_RUN) and case and part.name in MODULES):
            how = "no end within its time" if timed_out.is_set() else f"killed by {signal_name(code)}"
            outcome.outcome = "failed"
            outcome.reason = f"{how if timed_out.is_set() or code < 0 else f'exit {code}'} in {case or 'no case'}"
            outcome.blamed.append(f"{case}: {how}")
            return int(case.split()[1].rstrip(":")) if case else None
        failed_before = outcome.outcome == "failed"
        if code == NOT_RUN:
            outcome.outcome, outcome.reason = "not run", lines[-1].removeprefix("not run: ")
        elif part.name in SANITIZERS and any(word in line for word in SANITIZER_REFUSALS for line in lines):
            outcome.outcome, outcome.reason = "not run", "compute-sanitizer refuses this device"
        elif code == 0 and not outcome.wrong and (part.name not in SANITIZERS or SANITIZER_CLEAN in "".join(lines)):
            outcome.outcome, outcome.reason = "passed", lines[-1] if lines else ""
        else:
            traceback = any(line.startswith("Traceback") for line in lines)
            outcome.outcome = "failed"
            outcome.reason = f"exit {code}; {len(outcome.wrong)} wrong; {lines[-1] if lines else ''}"
            if traceback and case and part.name in MODULES:
                outcome.blamed.append(f"{case}: {lines[-1]}")
                return int(case.split()[1].rstrip(":"))
        if failed_before:
            outcome.outcome, outcome.reason = "failed", f"{outcome.reason}; died in {len(outcome.blamed)} cases"
        return None


def signal_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit {code}"


def command_of(part: Part, out: Path, scratch: Path, device: str) -> tuple[list[str], dict[str, str]]:
    """The command of a part and what it adds to the environment. Raises Missing."""
    python = [sys.executable, "-u"]
    if part.name in SANITIZERS:
        program = shutil.which("compute-sanitizer")
        if program is None:
            raise Missing("compute-sanitizer is not on the PATH")
        # Torch's own calls of the API fail where it asks what a driver has. Its kernels are not watched, but initcheck
        # must see what they write.
        options = ["--tool", part.name, "--error-exitcode", "9", "--report-api-errors", "no"]
        options += ["--kernel-name", "kernel_substring=se4cuda"] * (part.name != "initcheck")
        smoke = ["-m", "benchmarks.gpu.smoke", "--out", str(scratch), "--device", device]
        command = [program, *options, *python, *smoke, "--step", str(SANITIZED_STEP)]
        return command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if part.name == "tests":
        lacking = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
        if lacking:
            raise Missing(f"{' and '.join(lacking)} not installed")
        options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=short"]
        if importlib.util.find_spec("xdist") is not None:
            options += ["-n", str(min(12, max(1, (os.cpu_count() or 1) - 4)))]
        if importlib.util.find_spec("pytest_timeout") is not None:
            options += ["--timeout", "40"]
        return [*python, "-m", "pytest", *options, "tests/test_cuda.py"], {}
    device = "cpu" if part.name == "instruction_sets" else device
    return [*python, "-m", f"benchmarks.gpu.{MODULES[part.name]}", "--out", str(out), "--device", device], {}


def machine(run: Run) -> dict[str, Any]:
    """What needs no torch: the commit, the driver."""
    commit = os.environ.get("COMMIT") or output_of(
        run, "git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"
    )
    driver = output_of(run, "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "commit": commit.removesuffix("-dirty") or "unknown", "dirty": commit.endswith("-dirty"),
        "driver": driver or "unknown", "cpus": os.cpu_count(), "command": " ".join(sys.argv[1:]),
    }  # fmt: skip


def output_of(run: Run, *command: str) -> str:
    """The first line that a command prints; "" and a line in the log where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        run.say(f"no answer from {command[0]}: {error}")
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def stages(parts: Iterable[Part]) -> list[list[Part]]:
    """Parts that run at the same time, together."""
    found: list[list[Part]] = []
    for part in parts:
        if part.beside and found and not MODULES.keys() & {found[-1][0].name}:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def summary(out: Path) -> list[str]:
    """The headline in a few lines."""
    found = []
    lines = [line for line in rows_of(out / "layer_gpu.csv") if line["variant"] == "eager"]
    kinds = dict.fromkeys((x["dtype"], x["layout"], x["direction"], x["mode"], x["shape"].split("x")[0]) for x in lines)
    for kind in kinds:
        ratios = [
            float(x["ratio_to_fused"]) for x in lines
            if (x["dtype"], x["layout"], x["direction"], x["mode"], x["shape"].split("x")[0]) == kind
        ]  # fmt: skip
        dtype, layout, direction, mode, n = kind
        mean = statistics.geometric_mean(ratios)
        found.append(
            f"eager / fused, {dtype} {layout} {direction} {mode} N = {n}: "
            f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rows)"
        )
    for line in rows_of(out / "models_gpu.csv"):
        if line["variant"] == "original":
            found.append(f"{line['model']} N = {line['n']} {line['mode']}: original / fused {line['ratio_to_fused']}")
    return found


def rows_of(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


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
    run.facts.update(machine(run))
    left = stages(part for part in PARTS if part.name in names)
    while left:
        due = sum(max(part.seconds for part in stage) for stage in left)
        stage = left.pop(0)
        limit = (end - time.monotonic()) * max(part.seconds for part in stage) / due
        threads = [threading.Thread(target=run.perform, args=(part, limit)) for part in stage]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    run.save()
    text = summary(given.out)
    for line in text[-40:]:
        run.say(line)
    for outcome in run.outcomes:
        took = f"{outcome.seconds:6.1f} s of {outcome.limit_s:5.1f}"
        run.say(f"{outcome.part:17} {outcome.outcome:8} {took}  {outcome.reason[:90]}")
        for line in [*outcome.blamed, *outcome.wrong][:3]:
            run.say(f"    {line[:150]}")
    failed = [outcome.part for outcome in run.outcomes if outcome.outcome == "failed"]
    ran = [outcome.part for outcome in run.outcomes if outcome.outcome != "not run"]
    run.say(f"failed: {', '.join(failed)}" if failed else "all that ran passed" if ran else "nothing ran")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
