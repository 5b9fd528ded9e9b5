"""Times and differences, as the command line and the examples show them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

from torch import Tensor


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median time of each call in seconds, the calls taking turns so that a slow moment of the machine hits all.

    One round runs before those that count. The calls must have finished when they return, as on the CPU.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(repeats + 1):
        for name in names if i % 2 == 0 else reversed(names):
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times[1:]) for name, times in seconds.items()}


def largest_difference(got: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape, taken in float64; NaN if either holds a NaN."""
    return float((got.detach().double() - wanted.detach().double()).abs().max())
