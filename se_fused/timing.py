"""Interleaved timing of variants in one process, and the statistics that are reported.

Each round times one batch of calls of every variant, in a new random order. A ratio is taken within a round, so that a
slow moment of the machine falls on both its sides. Before each batch the process comes to rest, because the thread
pools of OpenMP, ONNX Runtime and oneTBB spin for milliseconds after their last task, on the cores of the next variant.
Rounds during which other processes used the CPU can be left out.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

from torch import Tensor

Clock = Callable[[], int]
Times = dict[str, list[float]]

BATCH_NS = 5_000_000
# The first calls after a rest are slow: from 300 to 130 us over six calls at 1x96x112x112. So a quarter of a batch runs
# before the one that is timed. Calls as long as this need none: the rest adds less than a hundredth to them.
WARM_UP = 4
LONG_CALL_NS = 100_000_000
MIN_ROUNDS = 5
# The share of the machine's CPU time that others may use. The time of a process is counted in units of 10 ms, so the
# share is judged over at least WINDOW_NS.
QUIET = 0.05
WINDOW_NS = 1_000_000_000
# How many times its budget a measurement may take until it has MIN_ROUNDS quiet rounds.
PATIENCE = 4
# A call in place multiplies the map by its gates, so many calls in a row would time denormals, which begin at 1e-38.
# Over all shapes, 8 calls leave no magnitude below 2e-21.
CALLS_BETWEEN_RESTORES = 8


@dataclass(frozen=True)
class Variant:
    """`call` is timed. `outputs` is the preallocated memory that it writes, None if it returns its result.

    `restore` puts back an input that `call` overwrites; it is not timed.
    """

    name: str
    call: Callable[[], object]
    outputs: tuple[Tensor, ...] | None = None
    restore: Callable[[], object] | None = None


@dataclass(frozen=True)
class Measured:
    """Times of the rounds that count. others: the largest share of the machine's CPU time that other processes used
    meanwhile. dropped: the number of rounds that do not count, because others used more than was allowed."""

    times: Times
    others: float
    dropped: int


class BusyMachine(RuntimeError):
    """Other processes use the CPU, so a measurement would mean nothing."""


class Others:
    """Called, it gives the share of the machine's CPU time that other processes used since the last call.

    The times of processes are added up. Those of the CPUs are samples, taken every 10 ms: beside calls and rests that
    are shorter they gave others up to 7 % of an idle machine. Ended processes count through their parents.

    mine: the numbers of processes that take part in the measurement, besides this one.
    """

    def __init__(self, mine: Sequence[int] = ()) -> None:
        import psutil  # only here: what runs on a GPU needs PyTorch alone

        self._psutil, self._mine = psutil, {os.getpid(), *mine}
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        """Seconds of all cores, and of them those of other processes and other virtual machines, from some start."""
        others = getattr(self._psutil.cpu_times(), "steal", 0.0)
        for process in self._psutil.process_iter(["cpu_times"]):
            times = process.info["cpu_times"]
            if process.pid not in self._mine and times is not None:  # None: it may not be read
                others += times.user + times.system + times.children_user + times.children_system
        return time.monotonic() * (self._psutil.cpu_count() or 1), others

    def __call__(self) -> float:
        (total, others), self._last = self._last, self._now()
        elapsed = self._last[0] - total
        return max(0.0, (self._last[1] - others) / elapsed) if elapsed > 0 else 0.0


class Spread(NamedTuple):
    """Percentiles over the rounds: microseconds per call, or ratios."""

    p20: float
    p50: float
    p80: float


def come_to_rest(step_s: float = 0.002, limit_s: float = 1.0) -> None:
    """Sleep until the process uses no CPU time. Raises TimeoutError if it still does after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while True:
        before = time.process_time()
        time.sleep(step_s)
        if time.process_time() - before < 0.25 * step_s:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"a thread of this process was still busy {limit_s} s after the last call")


def run_batch(variant: Variant, calls: int, clock: Clock = time.perf_counter_ns) -> int:
    """The time of `calls` calls in nanoseconds, without that of `restore`."""
    total = 0
    while calls:
        chunk = calls if variant.restore is None else min(calls, CALLS_BETWEEN_RESTORES)
        if variant.restore is not None:
            variant.restore()
        call = variant.call
        start = clock()
        for _ in repeat(None, chunk):
            call()
        total += clock() - start
        calls -= chunk
    return total


def batch(variant: Variant, clock: Clock = time.perf_counter_ns) -> tuple[int, int]:
    """How many calls warm up, and how many then take BATCH_NS, at least one."""
    calls = 1
    for _ in range(2):  # the pages of the first batch may be new
        while (took := run_batch(variant, calls, clock)) < BATCH_NS:
            calls = max(calls + 1, min(10 * calls, calls * BATCH_NS // max(took, 1)))
        if took >= LONG_CALL_NS:
            return 0, 1
        calls = max(1, calls * BATCH_NS // took)
    return max(1, calls // WARM_UP), calls


def measure(
    variants: Sequence[Variant],
    budget_s: float,
    *,
    limit: float = QUIET,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    rest: Callable[[], None] = come_to_rest,
    others: Callable[[], float] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Measured:
    """Microseconds per call of each variant, one entry per round, for as many rounds as `budget_s` allows (>= 5).

    limit: the share of CPU time that other processes may use in rounds that count; 1 lets all count. others: tells that
    share since it was last called. progress: is told the share of the budget that is used.

    Raises:
        BusyMachine: if not even MIN_ROUNDS rounds were quiet in PATIENCE times the budget.
    """
    start, budget = clock(), int(budget_s * 1e9)
    batches = {variant.name: batch(variant, clock) for variant in variants}
    order, rng, others = list(variants), random.Random(seed), others or Others()
    kept: list[dict[str, float]] = []
    largest, dropped = 0.0, 0
    gc_was_enabled = gc.isenabled()
    gc.disable()
    try:
        while len(kept) < MIN_ROUNDS or clock() < start + budget:
            window: list[dict[str, float]] = []
            others()
            begin = clock()
            while not window or clock() < begin + WINDOW_NS:
                rng.shuffle(order)
                window.append({})
                for variant in order:
                    rest()
                    warm_up, count = batches[variant.name]
                    run_batch(variant, warm_up, clock)
                    window[-1][variant.name] = run_batch(variant, count, clock) / count / 1e3
                if progress is not None:
                    progress(min(1.0, (clock() - start) / max(1, budget)))
            share = others()
            if share <= limit:
                kept += window
                largest = max(largest, share)
            else:
                dropped += len(window)
                if clock() > start + PATIENCE * budget and len(kept) < MIN_ROUNDS:
                    raise BusyMachine(
                        f"other processes use {share:.0%} of the CPU; at most {limit:.0%} lets a measurement count"
                    )
    finally:
        if gc_was_enabled:
            gc.enable()
    times = {variant.name: [of_round[variant.name] for of_round in kept] for variant in variants}
    return Measured(times, largest, dropped)


def spread(values: Sequence[float]) -> Spread:
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(p20, statistics.median(values), p80)


def ratio_spread(times: Times, name: str, base: str) -> Spread:
    """The spread over the rounds of the time of `name` over that of `base` in the same round; `base` wins above 1."""
    return spread([t / b for t, b in zip(times[name], times[base], strict=True)])


def ratio(times: Times, name: str, base: str) -> float:
    return ratio_spread(times, name, base).p50


def text(found: Spread, rounds: int) -> str:
    """p50 (p20 to p80), all to the third digit of p50, and p50 to its second one where the measurement allows no more.

    A median over n rounds is known to about (p80 - p20) / sqrt(n): 1.3 times its standard error, if times were normal.
    The third digit is left out where half of that is more than five of its units.
    """
    third = math.floor(math.log10(max(abs(found.p50), 1e-9))) - 2  # its power of ten
    is_exact = (found.p80 - found.p20) / math.sqrt(rounds) / 2 <= 5 * 10.0**third
    p50 = _rounded(found.p50, third if is_exact else third + 1)
    return f"{p50} ({_rounded(found.p20, third)} to {_rounded(found.p80, third)})"


def _rounded(value: float, power: int) -> str:
    return f"{round(value, -power):,.{max(0, -power)}f}"
