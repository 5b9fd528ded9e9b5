"""The common code of the parts: their arguments, their messages to the parent process, their CSV files."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from se_fused import backends

from .runner import NOT_RUN

T = TypeVar("T")


class Worker:
    """A part's arguments, and its messages to the parent: lines on standard output. The parent interprets three kinds.

    `facts {...}`   facts for run.json about the machine and the results, as JSON
    `case K: text`  the case that runs next; if the process dies or hangs, the parent blames it and may go on at K + 1
    `wrong: text`   a finding that fails the part
    """

    def __init__(self, description: str, backend: str = "") -> None:
        """backend: the backend that the part needs; by default the kernels of its device."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--out", type=Path, required=True, help="folder for the results")
        parser.add_argument("--until", type=float, default=math.inf, help="time (of time.time) to begin no case after")
        parser.add_argument("--start", type=int, default=0, help="number of the first case to run")
        parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal without a GPU")
        parser.add_argument("--step", type=int, default=1, help="run every so many-th case")
        parser.add_argument("--cases", type=int, help="run no more cases than this")
        arguments = parser.parse_args()
        self.out = arguments.out
        self._start, self._step, self._cases = arguments.start, arguments.step, arguments.cases
        self.device = torch.device(arguments.device)
        self.out.mkdir(parents=True, exist_ok=True)
        self._until = arguments.until
        self._done = self._of = self._skipped = 0
        self._wrong = 0
        self.backend = backend or ("cuda" if self.device.type == "cuda" else "cpu")
        self.facts(machine(self.device))
        if (reason := backends.ALL[self.backend].why_not(self.device)) is not None:
            text = f"the {self.backend} kernels cannot run here: {reason}"
            if self.backend == "triton":  # Triton is optional; the part does not fail without it
                self.give_up(text)
            self.wrong(text)
            self.finish()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def facts(self, found: dict[str, Any]) -> None:
        self.say("facts " + json.dumps(found))

    def each(self, items: Iterable[T], text: Callable[[T], object] = str) -> Iterator[tuple[int, T]]:
        """Yield the numbered cases of this process until the time is over, and announce each before it runs."""
        numbered = [(i, item) for i, item in enumerate(items) if i >= self._start and i % self._step == 0]
        chosen = numbered[: self._cases]
        self._of += len(chosen)
        for place, (number, item) in enumerate(chosen):
            if time.time() > self._until:
                self.say(f"out of time: {len(chosen) - place} cases have not run, from {text(item)} on")
                return
            self.say(f"case {number}: {text(item)}")
            yield number, item
            self._done += 1

    def all_ran(self) -> bool:
        """Whether this process ran every case there is."""
        return self._done == self._of and (self._start, self._step, self._cases) == (0, 1, None)

    def skip(self, reason: object) -> None:
        """Record that the present case has not run."""
        self._done -= 1
        self._skipped += 1
        self.say(f"skipped: {' '.join(str(reason).split())[:200]}")

    def wrong(self, text: str) -> None:
        self._wrong += 1
        self.say(f"wrong: {' '.join(text.split())[:400]}")

    def give_up(self, reason: str) -> NoReturn:
        """End the process because this machine lacks something that it may lack."""
        self.say(f"not run: {reason}")
        sys.exit(NOT_RUN)

    def finish(self) -> NoReturn:
        """End the process, with a failure if a result was wrong or no case ran."""
        counts = {"skipped": self._skipped, "wrong": self._wrong}
        more = [f", {count} {what}" for what, count in counts.items() if count]
        self.say(f"{self._done} of {self._of} cases{''.join(more)}")
        sys.exit(1 if self._wrong or not self._done else 0)


def run_part(main: Callable[[], None]) -> None:
    """Run a part and exit without the interpreter's finalisation.

    There torch's thread for backward on a GPU may abort the process ("terminate called without an active exception";
    github.com/pytorch/pytorch/issues/38228), when all output is already written.
    """
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def machine(device: torch.device) -> dict[str, Any]:
    """The facts about this process and its device on which the results depend."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory, "cuda": torch.version.cuda,
        }  # fmt: skip
        if backends.CUDA.why_not(device) is None:
            found["limits"] = backends.CUDA.limits(torch.cuda.current_device())
    return found


class Rows:
    """A CSV file that grows row by row, so that it keeps its rows if the process dies. A new process appends to it."""

    def __init__(self, file: Path, fields: Sequence[str]) -> None:
        new = not file.exists()
        self._file = file.open("a", newline="")
        self._writer = csv.DictWriter(self._file, fields, lineterminator="\n")
        if new:
            self._writer.writeheader()
            self._file.flush()

    def write(self, *rows: dict[str, Any]) -> None:
        self._writer.writerows(rows)
        self._file.flush()
