"""Measures the times and differences that the command line and the examples show."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# How far fusing may move the output of a network, in machine epsilons of its largest number. It is not
# `cases.TOLERANCE`, which is for one layer: rounding piles up over a network's layers. The numbers are chosen, not
# derived; in bfloat16, 32 epsilons are a quarter of the largest number, which makes a weak test.
EPSILONS_ALLOWED = {"float32": 1024, "float64": 1024, "float16": 32, "bfloat16": 32}


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median time of each call in seconds. The calls take turns, so that a slow moment of the machine hits all.

    The first round does not count. The calls must have finished when they return, as on the CPU.
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


def compared(got: object, wanted: object) -> dict[str, Any]:
    """The largest difference of two outputs, taken from the tensor where it is largest relative to the numbers.

    Raises:
        ValueError: if no tensor of floating point numbers is in them.
    """
    pairs = [
        (a, b)
        for a, b in zip(tree_leaves(got), tree_leaves(wanted), strict=True)
        if isinstance(b, Tensor) and b.is_floating_point() and b.numel()
    ]
    if not pairs:
        raise ValueError(
            f"the model gives a {type(wanted).__name__} in which no tensor is found: nothing can be compared"
        )
    worst: dict[str, Any] = {"relative": -1.0}
    for a, b in pairs:
        difference, scale = largest_difference(a, b), float(b.detach().abs().max())
        # A difference of 0 where all numbers are 0 is none; NaN is the largest of all.
        relative = difference / scale if scale else (0.0 if difference == 0 else math.inf)
        if math.isnan(relative) or relative > worst["relative"]:
            tolerance = EPSILONS_ALLOWED[str(b.dtype).removeprefix("torch.")] * torch.finfo(b.dtype).eps
            equal = relative <= tolerance
            verdict = f"equal within rounding of {str(b.dtype).removeprefix('torch.')}" if equal else "differs"
            if not math.isfinite(scale):
                verdict = "cannot be compared: the output before replacing is not finite"
            worst = {
                "difference": difference,
                "scale": scale,
                "relative": relative,
                "tolerance": tolerance,
                "equal": equal,
                "verdict": verdict,
            }
            if math.isnan(relative):
                break
    return worst
