"""Interleaved timing of contenders in one process, and the statistics that are reported.

A round times every contender once, in an order shuffled anew, as a batch of calls; a ratio is taken within a round, so
that a slow moment of the machine falls on both its sides. Before each batch the process comes to rest: the thread pools
of OpenMP, ONNX Runtime and oneTBB spin for milliseconds after their last task, on the cores of the next contender.
"""

from __future__ import annotations

import gc
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
# The first calls after a rest are slow: 300 to 130 us over six calls at 1x96x112x112. A quarter of a batch goes before.
WARM_UP = 4
MIN_ROUNDS = 5
# A call in place multiplies the map by its gates, so many in a row would time denormals. Over all shapes the smallest
# magnitude left by 8 calls is 3e-14; denormals begin at 1e-38.
CALLS_BETWEEN_RESTORES = 8


@dataclass(frozen=True)
class Contender:
    """`call` is what is timed; `outputs` the preallocated memory that it writes, None if it returns its result.

    `restore` puts back an input that `call` overwrites; it runs outside the timed region.
    """

    name: str
    call: Callable[[], object]
    outputs: tuple[Tensor, ...] | None = None
    restore: Callable[[], object] | None = None


class Spread(NamedTuple):
    """Percentiles over the rounds, in microseconds per call."""

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


def run_batch(contender: Contender, calls: int, clock: Clock = time.perf_counter_ns) -> int:
    """The time of `calls` calls in nanoseconds, without that of `restore`."""
    total = 0
    while calls:
        chunk = calls if contender.restore is None else min(calls, CALLS_BETWEEN_RESTORES)
        if contender.restore is not None:
            contender.restore()
        call = contender.call
        start = clock()
        for _ in repeat(None, chunk):
            call()
        total += clock() - start
        calls -= chunk
    return total


def calls_per_batch(contender: Contender, clock: Clock = time.perf_counter_ns) -> int:
    """How many calls take BATCH_NS, at least one. The first batch of that length warms up: its pages may be new."""
    calls = 1
    for _ in range(2):
        while (took := run_batch(contender, calls, clock)) < BATCH_NS:
            calls = max(calls + 1, min(10 * calls, calls * BATCH_NS // max(took, 1)))
        calls = max(1, calls * BATCH_NS // took)
    return calls


def measure(
    contenders: Sequence[Contender],
    budget_s: float,
    *,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    rest: Callable[[], None] = come_to_rest,
) -> Times:
    """Microseconds per call of each contender, one entry per round, for as many rounds as `budget_s` allows (>= 5)."""
    end = clock() + int(budget_s * 1e9)
    calls = {c.name: calls_per_batch(c, clock) for c in contenders}
    times: Times = {c.name: [] for c in contenders}
    order, rng, rounds = list(contenders), random.Random(seed), 0
    gc_was_enabled = gc.isenabled()
    gc.disable()
    try:
        while rounds < MIN_ROUNDS or clock() < end:
            rng.shuffle(order)
            for contender in order:
                rest()
                count = calls[contender.name]
                run_batch(contender, max(1, count // WARM_UP), clock)
                times[contender.name].append(run_batch(contender, count, clock) / count / 1e3)
            rounds += 1
    finally:
        if gc_was_enabled:
            gc.enable()
    return times


def spread(times: Sequence[float]) -> Spread:
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Spread(p20, statistics.median(times), p80)


def ratio(times: Times, name: str, base: str) -> float:
    """The median over the rounds of the time of `name` over that of `base` in the same round: above 1, `base` wins."""
    return statistics.median(t / b for t, b in zip(times[name], times[base], strict=True))
