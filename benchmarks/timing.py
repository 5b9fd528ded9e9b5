"""Interleaved timing of variants in one process, and the statistics that are reported.

Each round times one batch of calls of every variant, in a new random order. A ratio is taken within a round, so that a
slow moment of the machine falls on both its sides. Before each batch the process comes to rest, because the thread
pools of OpenMP, ONNX Runtime and oneTBB spin for milliseconds after their last task, on the cores of the next variant.
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
# The first calls after a rest are slow: from 300 to 130 us over six calls at 1x96x112x112. So a quarter of a batch runs
# before the one that is timed.
WARM_UP = 4
MIN_ROUNDS = 5
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


def calls_per_batch(variant: Variant, clock: Clock = time.perf_counter_ns) -> int:
    """How many calls take BATCH_NS, at least one. A first batch of that length warms up, as its pages may be new."""
    calls = 1
    for _ in range(2):
        while (took := run_batch(variant, calls, clock)) < BATCH_NS:
            calls = max(calls + 1, min(10 * calls, calls * BATCH_NS // max(took, 1)))
        calls = max(1, calls * BATCH_NS // took)
    return calls


def measure(
    variants: Sequence[Variant],
    budget_s: float,
    *,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    rest: Callable[[], None] = come_to_rest,
) -> Times:
    """Microseconds per call of each variant, one entry per round, for as many rounds as `budget_s` allows (>= 5)."""
    end = clock() + int(budget_s * 1e9)
    calls = {c.name: calls_per_batch(c, clock) for c in variants}
    times: Times = {c.name: [] for c in variants}
    order, rng, rounds = list(variants), random.Random(seed), 0
    gc_was_enabled = gc.isenabled()
    gc.disable()
    try:
        while rounds < MIN_ROUNDS or clock() < end:
            rng.shuffle(order)
            for variant in order:
                rest()
                count = calls[variant.name]
                run_batch(variant, max(1, count // WARM_UP), clock)
                times[variant.name].append(run_batch(variant, count, clock) / count / 1e3)
            rounds += 1
    finally:
        if gc_was_enabled:
            gc.enable()
    return times


def spread(times: Sequence[float]) -> Spread:
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Spread(p20, statistics.median(times), p80)


def ratio(times: Times, name: str, base: str) -> float:
    """The median over the rounds of the time of `name` over that of `base` in the same round; `base` wins above 1."""
    return statistics.median(t / b for t, b in zip(times[name], times[base], strict=True))
