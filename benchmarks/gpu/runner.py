"""Runs the parts of gpu-check as processes with time limits, and judges their output. It needs only Python."""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import ROOT

FILES = ("smoke.csv", "layer_gpu.csv", "models_gpu.csv", "plans_gpu.csv", "run.json", "log.txt")
# A worker that cannot run here exits with automake's status of a skipped test. It announces a case by such a line.
NOT_RUN = 77
CASE = re.compile(r"case (\d+): ")
# The time that a part's last case may take at the end of the limit, in seconds and as a fraction of the limit.
LAST_CASE_S, LAST_CASE_FRACTION = 8.0, 0.2
POLL_S = 0.05


class Missing(Exception):
    """A part needs something that this machine does not have."""


@dataclass(frozen=True)
class Task:
    """One process of a part: its folders, its device, and the cases that it may begin."""

    out: Path
    scratch: Path
    device: str
    until: float  # time.time() after which it begins no case
    start: int  # number of the first case
    cases: int | None  # the most cases to run

    def options(self, out: Path, device: str) -> list[str]:
        """The command-line options of benchmarks/gpu/worker.py."""
        options = ["--out", str(out), "--device", device, "--until", f"{self.until:.1f}", "--start", str(self.start)]
        return options if self.cases is None else [*options, "--cases", str(self.cases)]


# Returns the command line of a process. Raises Missing.
Command = Callable[[Task], list[str]]


@dataclass(frozen=True)
class Part:
    """A part of gpu-check: one process, or several if `silence` is set. Then a new process continues after a case that
    killed the previous one.

    seconds: its part of the six minutes. beside: the part that runs at the same time, because neither measures time.
    whole: it may use all the time there is, because nothing works without it. silence: seconds without output, after
    the first case was announced, that count as a hang; 0: no limit. must_contain: a text of the output.
    refusal: a text that it contains if a tool refuses the machine.
    """

    name: str
    seconds: float
    what: str
    command: Command
    beside: str = ""
    whole: bool = False
    silence: float = 0
    default: bool = True
    must_contain: str = ""
    refusal: str = ""


@dataclass
class Ended:
    """An ended process: its exit status, its output, and the last case that it announced ("" before the first).

    ended_for: why the runner ended it, or "" if it ended by itself.
    """

    code: int = 0
    ended_for: str = ""
    lines: list[str] = field(default_factory=list)
    case: str = ""

    def cause_of_death(self) -> str:
        """Why the process did not finish; "" if it did."""
        if self.ended_for:
            return self.ended_for
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        raised = self.code and any(line.startswith("Traceback") for line in self.lines)
        return self.lines[-1] if raised else ""


@dataclass
class Outcome:
    """The outcome of a part, as in run.json."""

    part: str
    limit_s: float
    outcome: str = "passed"  # passed | failed | not run
    reason: str = ""
    seconds: float = 0
    wrong: list[str] = field(default_factory=list)
    blamed: list[str] = field(default_factory=list)  # cases that killed a process, and how
    tail: list[str] = field(default_factory=list)  # the end of the output after a failure; paths are relative to ROOT

    def fail(self, reason: str, lines: list[str]) -> None:
        """Mark the part as failed; only the first reason is kept."""
        if self.outcome != "failed":
            self.outcome, self.reason = "failed", reason
            self.tail = [line.replace(f"{ROOT}/", "") for line in lines[-8:]]

    def judge(self, part: Part, ended: Ended) -> None:
        """Judge an ended process. A part that has failed stays failed."""
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
        elif ended.code or found or part.must_contain not in text:
            self.fail(f"exit {ended.code}, {len(found)} wrong: {last}", ended.lines)
        elif self.outcome == "passed":
            self.reason = last


class Run:
    """One run of some parts: its folder, its log, and the facts about the machine."""

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
        """End the running processes with their children, and begin no more."""
        self._stopping.set()

    def perform(self, part: Part, limit: float) -> None:
        """Run a part within `limit` seconds, and record its outcome in run.json in any case."""
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
            self.outcomes.append(outcome)
            self.save()
        self.say(f"{part.name}: {outcome.outcome}{f', {outcome.reason}' if outcome.reason else ''}")

    def _perform(self, part: Part, end: float, outcome: Outcome) -> None:
        start = 0
        with tempfile.TemporaryDirectory() as scratch:
            while True:
                left = end - time.monotonic()
                until = time.time() + left - min(LAST_CASE_S, LAST_CASE_FRACTION * left)
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
            os.killpg(process.pid, signal.SIGKILL)  # also its children that still run
        # A process that is stuck in the driver does not even die; its part ends nevertheless.
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended.code = process.wait(timeout=5)
        reader.join(timeout=2)
        return ended


def rows_of(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))
