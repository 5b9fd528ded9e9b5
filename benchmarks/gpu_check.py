"""What a machine with a GPU can show, the most important first. `make gpu-check OUT=folder`; docs/gpu-run.md.

Each part is a process with a time limit, so that a hang or a broken CUDA context costs one part and names the case that
caused it. What a machine lacks (nvidia-smi, git, compute-sanitizer, pytest, timm, triton) is a line in the result. This
file needs Python alone; the parts need torch with CUDA, and a library that is there (`make prebuild`) or nvcc.

OUT gets at most six files: run.json, smoke.csv, layer_gpu.csv, models_gpu.csv, plans_gpu.csv, log.txt. Exit status: 0,
all that ran passed; 1, a part failed, or none ran; 2, an argument is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = ("smoke.csv", "layer_gpu.csv", "models_gpu.csv", "plans_gpu.csv", "probes.csv", "run.json", "log.txt")
NOT_RUN = 77  # benchmarks/gpu/part.py
CASE = re.compile(r"case (\d+): ")
# Of a part's limit, what its last case may take after the part has been told to begin no more.
LAST_CASE_S, LAST_CASE_SHARE = 8.0, 0.2
POLL_S = 0.05
SANITIZED_STEP = 5  # every so many-th smoke call is sanitized; a plan has at least 6 in each precision


class Missing(Exception):
    """What a part needs and this machine does not have."""


@dataclass(frozen=True)
class Task:
    """One process of a part: where its files go, on what device, and which cases it may begin until when."""

    out: Path
    scratch: Path
    device: str
    until: float  # of time.time()
    start: int  # number of the first case
    cases: int | None  # no more than so many

    def options(self, out: Path, device: str) -> list[str]:
        """As benchmarks/gpu/part.py takes them."""
        options = ["--out", str(out), "--device", device, "--until", f"{self.until:.1f}", "--start", str(self.start)]
        return options if self.cases is None else [*options, "--cases", str(self.cases)]


# The command line of a process. Raises Missing.
Command = Callable[[Task], list[str]]
PYTHON = [sys.executable, "-u"]


def module(name: str, device: str = "") -> Command:
    """A file of benchmarks/gpu."""
    return lambda task: [*PYTHON, "-m", f"benchmarks.gpu.{name}", *task.options(task.out, device or task.device)]


def sanitizer(tool: str) -> Command:
    """compute-sanitizer over some of the smoke calls."""

    def command(task: Task) -> list[str]:
        program = shutil.which("compute-sanitizer")
        if program is None:
            raise Missing("compute-sanitizer is not on the PATH")
        # Torch's own calls of the API fail where it asks what a driver has. Its kernels are not watched, but initcheck
        # must see what they write.
        options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        options += ["--kernel-name", "kernel_substring=se4cuda"] * (tool != "initcheck")
        smoke = [*PYTHON, "-m", "benchmarks.gpu.smoke", *task.options(task.scratch, task.device)]
        watched = [program, *options, *smoke, "--step", str(SANITIZED_STEP)]
        return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watched]

    return command


def gpu_tests(task: Task) -> list[str]:
    """pytest, in parallel where pytest-xdist is there."""
    lacking = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if lacking:
        raise Missing(f"{' and '.join(lacking)} not installed")
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(12, max(1, (os.cpu_count() or 1) - 4)))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        options += ["--timeout", "25"]
    return [*PYTHON, "-m", "pytest", *options, "tests/test_cuda.py"]


@dataclass(frozen=True)
class Part:
    """A process, or several: where `silence` is set, each goes on after the case that killed the one before.

    seconds: its share of six minutes. beside: it times nothing, and runs at the same time as the part before it.
    whole: it may take all the time there is, because nothing works without it. silence: seconds without a line, after
    the first case was announced, that count as a hang; 0: as long as it likes. proof: what the output must have.
    refusal: what it has where a tool refuses the machine.
    """

    name: str
    seconds: float
    what: str
    command: Command
    beside: bool = False
    whole: bool = False
    silence: float = 0
    default: bool = True
    proof: str = ""
    refusal: str = ""


def _sanitizer_part(tool: str, seconds: float, **more: bool) -> Part:
    what, clean = "compute-sanitizer over the smoke calls", "ERROR SUMMARY: 0 errors"
    return Part(tool, seconds, what, sanitizer(tool), proof=clean, refusal="Device not supported", **more)


# A case of models takes up to 16 s, of the others up to 4.
PARTS = (
    Part("library", 8, "the libraries, built where they are not there", module("library"), whole=True),
    Part("smoke", 24, "each algorithm, layout and dtype against float64", module("smoke"), silence=10),
    Part("layer", 108, "the layer beside eager, torch.compile and a copy", module("layer"), silence=30),
    Part("models", 100, "whole networks before and after replace", module("models"), silence=60),
    Part("tests", 50, "tests/test_cuda.py in parallel processes", gpu_tests, proof=" passed"),
    _sanitizer_part("memcheck", 50, beside=True),
    Part("instruction_sets", 50, "the CPU kernels of each one", module("instruction_sets", device="cpu"), beside=True),
    Part("probes", 15, "what the planner's model builds on", module("probes")),
    Part("sweep", 25, "every plan beside the planner's choice", module("plans"), silence=30),
    Part("triton", 30, "a sample of the Triton kernels, and their times", module("triton_sample")),
    *(_sanitizer_part(tool, 60, default=False) for tool in ("racecheck", "initcheck", "synccheck")),
)


@dataclass
class Ended:
    """What a process left: its exit status, its output, and the last case that it announced ("" before the first).

    ended_for: why it was ended, "" if it ended by itself.
    """

    code: int = 0
    ended_for: str = ""
    lines: list[str] = field(default_factory=list)
    case: str = ""

    def cause_of_death(self) -> str:
        """Why it did not come to its end; "" if it did."""
        if self.ended_for:
            return self.ended_for
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        raised = self.code and any(line.startswith("Traceback") for line in self.lines)
        return self.lines[-1] if raised else ""


@dataclass
class Outcome:
    """What became of a part, as run.json has it."""

    part: str
    limit_s: float
    outcome: str = "passed"  # passed | failed | not run
    reason: str = ""
    seconds: float = 0
    wrong: list[str] = field(default_factory=list)
    blamed: list[str] = field(default_factory=list)  # cases that killed a process, and how
    tail: list[str] = field(default_factory=list)  # of the output, where it failed

    def fail(self, reason: str, lines: list[str]) -> None:
        """The first reason stays."""
        if self.outcome != "failed":
            self.outcome, self.reason, self.tail = "failed", reason, lines[-8:]

    def judge(self, part: Part, ended: Ended) -> None:
        """Take in what a process left. A part that has failed stays so."""
        found = [line for line in ended.lines if line.startswith(("wrong: ", "FAILED ", "ERROR "))]
        self.wrong += found
        last, text = ended.lines[-1] if ended.lines else "", "\n".join(ended.lines)
        if cause := ended.cause_of_death():
            self.blamed += [f"{ended.case}: {cause}"] * bool(ended.case)
            self.fail(f"{cause} in {ended.case or 'no case'}", ended.lines)
        elif ended.code == NOT_RUN or (part.refusal and part.refusal in text):
            if self.outcome == "passed":
                self.outcome = "not run"
                self.reason = last.removeprefix("not run: ") if ended.code == NOT_RUN else "it refuses this machine"
        elif ended.code or found or part.proof not in text:
            self.fail(f"exit {ended.code}, {len(found)} wrong: {last}", ended.lines)
        elif self.outcome == "passed":
            self.reason = last


class Run:
    """One run of some parts: its folder, its log, what is known of the machine."""

    def __init__(self, out: Path, device: str = "cuda", cases: int | None = None) -> None:
        self.out, self.device, self.cases = out.resolve(), device, cases
        self.out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (self.out / name).unlink(missing_ok=True)
        self.outcomes: list[Outcome] = []
        self.facts: dict[str, Any] = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")}
        self._log = (self.out / "log.txt").open("w")
        self._lock = threading.Lock()
        self._begin = time.monotonic()
        self._stopping = threading.Event()

    def say(self, text: str, aloud: bool = True) -> None:
        stamped = f"{time.monotonic() - self._begin:6.1f} {text}"
        with self._lock:
            print(stamped, file=self._log, flush=True)
            if aloud:
                print(stamped, flush=True)

    def save(self) -> None:
        facts = {**self.facts, "parts": [vars(outcome) for outcome in self.outcomes]}
        (self.out / "run.json").write_text(json.dumps(facts, indent=1) + "\n")

    def stop(self) -> None:
        """End what runs, with its children, and begin nothing more."""
        self._stopping.set()

    def perform(self, part: Part, limit: float) -> None:
        """Run a part within `limit` seconds. Whatever happens, run.json says so."""
        outcome = Outcome(part.name, round(limit, 1))
        begin = time.monotonic()
        try:
            self._perform(part, begin + limit, outcome)
        except Missing as missing:
            outcome.outcome, outcome.reason = "not run", str(missing)
        except Exception as error:
            outcome.fail(f"{type(error).__name__}: {error}", [])
        outcome.seconds = round(time.monotonic() - begin, 1)
        with self._lock:
            self._take_in_probes()
            self.outcomes.append(outcome)
            self.save()
        self.say(f"{part.name}: {outcome.outcome}{f', {outcome.reason}' if outcome.reason else ''}")

    def _perform(self, part: Part, end: float, outcome: Outcome) -> None:
        start = 0
        with tempfile.TemporaryDirectory() as scratch:
            while True:
                left = end - time.monotonic()
                until = time.time() + left - min(LAST_CASE_S, LAST_CASE_SHARE * left)
                task = Task(self.out, Path(scratch), self.device, until, start, self.cases)
                ended = self._run(part, part.command(task), end)
                outcome.judge(part, ended)
                died_at = CASE.match(ended.case) if part.silence and ended.cause_of_death() else None
                if died_at is None or self._stopping.is_set() or end - time.monotonic() < LAST_CASE_S:
                    return
                start = int(died_at[1]) + 1
                self.say(f"{part.name}: goes on at case {start}")

    def _run(self, part: Part, command: Sequence[str], end: float) -> Ended:
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        ended, last_line = Ended(), [time.monotonic()]

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                text = line.rstrip()
                last_line[0] = time.monotonic()
                ended.lines.append(text)
                self.say(f"{part.name}| {text}", aloud=False)
                if CASE.match(text):
                    ended.case = text
                elif text.startswith("facts "):
                    with contextlib.suppress(json.JSONDecodeError):
                        self.facts.update(json.loads(text.removeprefix("facts ")))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        while process.poll() is None and not ended.ended_for:
            time.sleep(POLL_S)
            now = time.monotonic()
            if self._stopping.is_set():
                ended.ended_for = "stopped from outside"
            elif now > end:
                ended.ended_for = "no end within its time"
            elif part.silence and ended.case and now - last_line[0] > part.silence:
                ended.ended_for = f"no word for {part.silence:g} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it leaves behind
        # One that is stuck in the driver does not even die; its part is over all the same.
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended.code = process.wait(timeout=5)
        reader.join(timeout=2)
        return ended

    def _take_in_probes(self) -> None:
        file = self.out / "probes.csv"
        if file.exists():
            self.facts["probes"] = rows_of(file)
            file.unlink()


def machine(run: Run) -> dict[str, Any]:
    """What needs no torch: the commit, the driver."""
    describe = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*")
    commit = os.environ.get("COMMIT") or output_of(run, *describe)
    driver = output_of(run, "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "commit": commit.removesuffix("-dirty") or "unknown", "dirty": commit.endswith("-dirty"),
        "driver": driver or "unknown", "cpus": os.cpu_count(),
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
        # Nothing runs beside a part that times something, if what stood between them was not asked for.
        if part.beside and found and (found[-1][0].name == "tests" or found[-1][0].beside):
            found[-1].append(part)
        else:
            found.append([part])
    return found


def summary(out: Path) -> list[str]:
    """The headline: what eager or the original takes for each microsecond of ours, by batch."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for line in rows_of(out / "layer_gpu.csv"):
        if line["variant"] == "eager":
            kind = f"eager / fused, {line['dtype']} {line['layout']} {line['direction']}, {line['mode']}"
            n = line["shape"].partition("x")[0]
            ratios.setdefault(kind, {}).setdefault(n, []).append(float(line["ratio_to_fused"]))
    for line in rows_of(out / "models_gpu.csv"):
        if line["variant"] == "original":
            kind = f"original / fused, {line['model']}, {line['mode']}"
            ratios.setdefault(kind, {}).setdefault(line["n"], []).append(float(line["ratio_to_fused"]))
    return [
        f"{kind}: " + ", ".join(f"N = {n} {statistics.geometric_mean(found):.2f}" for n, found in by_n.items())
        for kind, by_n in ratios.items()
    ]


def rows_of(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


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
        # What earlier parts have left over is shared by all that are still to come.
        due = sum(max(part.seconds for part in stage) for stage in left)
        stage = left.pop(0)
        remaining = end - time.monotonic()
        limit = remaining if stage[0].whole else remaining * max(part.seconds for part in stage) / due
        with ThreadPoolExecutor(len(stage)) as pool:
            begun = [pool.submit(run.perform, part, limit) for part in stage]
            try:
                for each in begun:
                    each.result()
            except BaseException:  # an interrupt: the processes would go on without us
                run.stop()
                raise
    return conclude(run)


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):  # so that no process stays behind
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
