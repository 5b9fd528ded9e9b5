"""Compares the predictions of two models for several GPUs: the planner's and one of torch.compile. Nothing is measured.

The planner's model is csrc/plan/model.cpp. The model of torch.compile has four constants, fitted to its times in the
record of an H200: the launches, one read of x and one write of y, a second read of x, which comes from the L2 if x
takes less than half of it, and the products of the layers.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from dev import refit
from se_fused import native

from . import gpu_report
from .gpu_report import DIRECTIONS, mean_and_range
from .text import markdown

GPUS = ("H200", "H100", "A100", "RTX 4090", "T4")
# Channels, hidden units and side length of SE layers in ResNets, MobileNetV3 and EfficientNet.
SHAPES = (
    (64, 4, 112), (96, 4, 112), (256, 16, 56), (512, 32, 28), (1024, 64, 14), (2048, 128, 7), (72, 24, 28),
    (960, 240, 7), (672, 168, 14),
)  # fmt: skip
BATCHES = (1, 32, 256)
RESERVED = 1 << 10  # bytes of shared memory that the system takes per block
LAYOUTS, DTYPES = ("contiguous", "channels_last"), ("float16", "float32")


@dataclass(frozen=True)
class Call:
    """A forward call on a GPU: `gpu` is a Device of the planner, `side` the square root of L."""

    gpu: Any
    dtype: str
    layout: str
    n: int
    c: int
    r: int
    side: int

    @property
    def map_bytes(self) -> int:
        return self.n * self.c * self.side**2 * (2 if self.dtype == "float16" else 4)

    def plan(self) -> Any:
        sizes = {"n": self.n, "c": self.c, "r": self.r, "l": self.side**2}
        return native.load_extension().plan(
            self.gpu, **sizes, dtype=self.dtype, channels_last=self.layout == "channels_last"
        )

    def copy_us(self) -> float:
        return float(2 * self.map_bytes / self.gpu.bytes_per_us)

    def compile_terms(self) -> list[float]:
        """The terms of torch.compile's time: launches, bytes from memory, bytes from the L2, products."""
        x, speed = self.map_bytes, self.gpu.bytes_per_us
        near = x <= self.gpu.l2_bytes / 2
        products = self.n * self.c * self.r / self.gpu.sm_count
        return [1, (2 if near else 3) * x / speed, near * x / speed, products]


def compile_model(record: Path) -> np.ndarray:
    """The factors of `compile_terms`, by least squares of relative errors over the record's forward calls."""
    gpu, terms, measured = native.load_extension().preset(refit.preset(record.name)), [], []
    for case in gpu_report.best_measured(gpu_report.read(record)):
        line = case.lines.get(("graph", "compile"))
        if line is None or case.direction != "forward":
            continue
        n, c, side, _ = map(int, case.shape.split("x"))
        terms.append(Call(gpu, case.dtype, case.layout, n, c, int(line["r"]), side).compile_terms())
        measured.append(float(line["p50_us"]))
    scaled = np.array(terms) / np.array(measured)[:, None]
    return nnls(scaled, np.ones(len(measured)))[0]


@dataclass(frozen=True)
class Prediction:
    """The predicted microseconds of a call, and why it may be slow."""

    call: Call
    ours: float
    compile: float
    why: str

    @property
    def ratio(self) -> float:
        return self.compile / self.ours

    @property
    def of_copy(self) -> float:
        return self.call.copy_us() / self.ours


def why(call: Call, plan: Any) -> str:
    """The reason why a call is not faster."""
    (_, _, shared, size, _), *_ = plan.launches
    if not any(call.gpu.clusters):
        return "the GPU has no clusters: x is read twice, by several launches"
    if not size:
        return "no cluster holds a sample, or none is faster: x is read twice, by several launches"
    if 2 * call.r > call.side**2:  # 2 C R weights, C L positions
        return "the weights are larger than a sample, and every cluster reads them again"
    if 2 * (shared + RESERVED) > call.gpu.shared_per_sm:
        return "a block fills its SM, so nothing overlaps"
    return "loads, exchange and layers of a cluster wait for one another"


def predict(gpu: str, constants: np.ndarray) -> list[Prediction]:
    device, found = native.load_extension().preset(gpu), []
    for dtype, layout, n, shape in itertools.product(DTYPES, LAYOUTS, BATCHES, SHAPES):
        call = Call(device, dtype, layout, n, *shape)
        plan = call.plan()
        theirs = float(np.dot(constants, call.compile_terms()))
        found.append(Prediction(call, plan.predicted_us, theirs, why(call, plan)))
    return found


def ratios(predictions: Sequence[Prediction]) -> str:
    lost = sum(each.ratio < 1 for each in predictions)
    return f"{mean_and_range(each.ratio for each in predictions)}, {lost} of {len(predictions)}"


def copies(predictions: Sequence[Prediction]) -> str:
    return mean_and_range(each.of_copy for each in predictions).replace(
        "**", ""
    )  # bold marks a loss, and a copy cannot lose


def table(record: Path) -> str:
    """Geometric means over the shapes, the number of shapes that are predicted to lose, and the reasons."""
    constants = compile_model(record)
    rows, reasons = [], []
    for gpu in GPUS:
        predictions = predict(gpu, constants)
        for how, some in itertools.groupby(predictions, lambda each: (each.call.dtype, each.call.layout)):
            batches = [list(batch) for _, batch in itertools.groupby(some, lambda each: each.call.n)]
            rows.append([f"{gpu}, {' '.join(how)}", *map(ratios, batches), copies(batches[-1])])
        of = Counter(each.why for each in predictions)
        for reason, count in Counter(each.why for each in predictions if each.ratio < 1).most_common():
            reasons.append([gpu, reason, f"{count} of {of[reason]}"])
    header = ["forward, nine shapes", *(f"N = {n}: torch.compile / fused, lost" for n in BATCHES)]
    first = markdown([*header, f"N = {BATCHES[-1]}: copy / fused"], rows)
    launches, far, near, products = constants
    theirs = (
        f"torch.compile, as fitted: {launches:.1f} µs, bytes from memory at {1 / far:.2f} and from the L2 at "
        f"{1 / near:.2f} of a copy's speed, {products * 1e3:.2f} ns for each product of a channel and a hidden unit on "
        "an SM."
    )
    second = markdown(["GPU", "predicted slower than torch.compile, because", "calls"], reasons)
    return f"{theirs}\n\n{first}\n\n{second}"


def predicted_us(row: refit.Row) -> float:
    """The present model's prediction for a timed plan; for "planner's", the plan that is chosen today. The time of
    "both" is the sum of both directions."""
    n, c, h, w = row.shape
    facts, forced = native.load_extension(), "" if row.plan == refit.PLANNERS else row.plan
    call = {"n": n, "c": c, "r": row.r, "l": h * w, "dtype": row.dtype, "channels_last": row.channels_last}
    sides = (False, True) if row.direction == "both" else (False,)
    device = facts.preset(row.gpu)
    return float(sum(facts.plan(device, **call, backward=side, forced=forced).predicted_us for side in sides))


def against(record: Path) -> str:
    """The predicted and measured times of the planner's choices, and every call where another plan was 5 % faster."""
    calls: dict[Any, dict[str, refit.Row]] = defaultdict(dict)
    for row in refit.read(record.name):
        calls[row.call][row.plan] = row
    off: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    missed = []
    for (shape, _, _, channels_last, direction), plans in calls.items():
        chosen, fastest = plans[refit.PLANNERS], min(plans.values(), key=attrgetter("us"))
        how = "channels_last" if channels_last else "contiguous"
        off[DIRECTIONS[direction], how, shape[0]].append(predicted_us(chosen) / chosen.us)
        if fastest.us < 0.95 * chosen.us:
            cells = [f"{row.us:.1f} ({predicted_us(row):.1f})" for row in (chosen, fastest)]
            missed.append([f"{'x'.join(map(str, shape))} {how}, {DIRECTIONS[direction]}", *cells, fastest.plan])
    rows = []
    for (direction, how, n), some in off.items():
        spread = f"{statistics.median(some):.2f} ({min(some):.2f} to {max(some):.2f})"
        rows.append([f"{direction}, {how}, N = {n}", spread])
    first = markdown(["float16", "predicted / measured: median (range)"], rows)
    header = ["another plan is 5 % faster", "the planner's µs (predicted)", "its µs (predicted)", "it"]
    return f"{first}\n\n{markdown(header, missed)}"
