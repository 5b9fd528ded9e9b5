"""The calls that are timed on a GPU, the timers, and the checks of their results."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import se_fused
from se_fused import cases
from se_fused.measure import largest_difference
from se_fused.timing import Times

from ..shapes import Shape

ROUNDS = 11
SIZES = (1, 2, 4, 8, 16)  # of clusters, in blocks
LEAST_CALLS = 8  # calls in one graph; more, if a replay would take less than LEAST_US
LEAST_US = 500.0  # microseconds of a replay at the speed of a copy, so that the start of a graph hardly counts
COLD_L2, MOST_SETS = 2.5, 256  # the buffers rotate over this multiple of the L2, but over at most so many sets
Call = Callable[[], object]


def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """SE as users write it: pooling, two 1x1 convolutions, a product."""
    h = torch.relu(F.conv2d(x.mean((2, 3), keepdim=True), w1, b1))
    return x * torch.sigmoid(F.conv2d(h, w2, b2))


@dataclasses.dataclass(frozen=True)
class Row:
    """The call of a line of the table, without its variant and its timer."""

    shape: Shape
    dtype: torch.dtype
    layout: str
    direction: str  # forward | both

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype)[6:]} {self.layout} {self.direction}"

    def bytes(self) -> int:
        """The minimum bytes that any implementation moves: x, y, weights; with backward also g, x again, dx, dw."""
        n, c, h, w, r = dataclasses.astuple(self.shape)
        maps, weights = (2, 1) if self.direction == "forward" else (5, 2)
        return int((maps * n * c * h * w + weights * (2 * c * r + c + r)) * self.dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """x, w1, b1, w2, b2, and g, the gradient of y. They are random, because zeros can run faster than real data."""

    tensors: tuple[Tensor, ...]
    g: Tensor | None  # None: only forward

    def call(self, layer: Callable[..., Tensor]) -> object:
        """Return all results, y and the gradients, so that no two calls write to the same memory."""
        y = layer(*self.tensors)
        return y if self.g is None else (y, *torch.autograd.grad(y, self.tensors, self.g))

    def truth(self) -> tuple[Tensor, ...]:
        """The results of `call`, computed by the formula in float64."""
        wide = [t.detach().double().requires_grad_(self.g is not None) for t in self.tensors]
        with torch.set_grad_enabled(self.g is not None):
            y = se_fused.reference.squeeze_excite(*wide)
        return (y,) if self.g is None else (y.detach(), *torch.autograd.grad(y, wide, self.g.double()))


def draw(row: Row, sets: int, device: torch.device) -> list[Inputs]:
    """`sets` sets of maps and weights."""
    n, c, height, width, r = dataclasses.astuple(row.shape)
    generator = torch.Generator(device).manual_seed(0)
    memory_format = torch.channels_last if row.layout == "channels_last" else torch.contiguous_format
    both = row.direction == "both"

    def normal(*size: int, fan_in: int = 1) -> Tensor:
        t = torch.randn(size, device=device, generator=generator) / math.sqrt(fan_in)
        return t.to(row.dtype)

    def one() -> Inputs:
        x, g = (normal(n, c, height, width).contiguous(memory_format=memory_format) for _ in range(2))
        weights = normal(r, c, 1, 1, fan_in=c), normal(r), normal(c, r, 1, 1, fan_in=r), normal(c)
        return Inputs(tuple(t.requires_grad_(both) for t in (x, *weights)), g if both else None)

    return [one() for _ in range(sets)]


def error(results: object, inputs: Inputs) -> float:
    """The largest difference from the truth, relative to the largest magnitude in each tensor; infinite for NaN.

    The difference from a tensor of zeros is absolute. The weights' gradients are zeros if no hidden unit is above 0.
    """
    found = results if isinstance(results, tuple) else (results,)
    worst = 0.0
    for got, wanted in zip(found, inputs.truth(), strict=True):
        difference = largest_difference(got, wanted) / (float(wanted.abs().max()) or 1.0)
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def tolerance(row: Row) -> float:
    return cases.TOLERANCE[row.dtype]


def layer(variant: str) -> Callable[..., Tensor]:
    """The function of a variant: ours for "fused" and "triton" (with a forced backend), else eager, or it compiled."""
    if variant in ("fused", "triton"):
        return se_fused.squeeze_excite
    if variant == "compile":
        torch._dynamo.reset()
        compiled: Callable[..., Tensor] = torch.compile(eager, dynamic=False)
        return compiled
    return eager


def cold_sets(row: Row, device: torch.device) -> int:
    """The number of sets of buffers over which a row rotates."""
    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 20
    return min(int(COLD_L2 * size / row.bytes()) + 2, MOST_SETS)  # forward + backward counts x twice


def replay_calls(row: Row, sets: int) -> int:
    """The number of calls in one graph, a multiple of `sets`."""
    wanted = max(LEAST_CALLS, LEAST_US / (1e6 * row.bytes() / 3e12))
    return sets * max(1, math.ceil(min(wanted, MOST_SETS) / sets))


class Replay:
    """One CUDA graph of `count` calls to `functions` in turn; on the CPU, for rehearsals, a loop.

    As many results as functions stay alive, so that the results rotate over memory as the inputs do. `results[i]` is
    the last result of `functions[i]`.
    """

    def __init__(self, functions: Sequence[Call], count: int, device: torch.device) -> None:
        assert count % len(functions) == 0
        self.results: deque[object] = deque(maxlen=len(functions))
        self._functions, self._count, self._graph = functions, count, None
        if device.type != "cuda":
            self._run()
            return
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for function in functions[:3]:
                function()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._run()
        self._graph.replay()

    def _run(self) -> None:
        for function in itertools.islice(itertools.cycle(self._functions), self._count):
            self.results.append(function())

    def time(self) -> float:
        """Microseconds per call in one replay."""
        if self._graph is None:
            begin = time.perf_counter()
            self._run()
            return 1e6 * (time.perf_counter() - begin) / self._count
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / self._count


def interleaved(timers: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> Times:
    """`rounds` times of each timer. Each round runs all timers in a new random order; one warm-up round comes first."""
    times: Times = {name: [] for name in timers}
    order, shuffle = list(timers), random.Random(0).shuffle
    for round_ in range(-1, rounds):
        shuffle(order)
        for name in order:
            took = timers[name]()
            if round_ >= 0:
                times[name].append(took)
    return times


def loop_timer(functions: Sequence[Call], device: torch.device, count: int = 24) -> Callable[[], float]:
    """Wall-clock microseconds per call in a user's loop: Python launches the calls and waits once at the end."""
    turns = itertools.cycle(functions)

    def once() -> float:
        synchronize(device)
        begin = time.perf_counter()
        for function in itertools.islice(turns, count):
            function()
        synchronize(device)
        return 1e6 * (time.perf_counter() - begin) / count

    return once


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Return the memory of deleted graphs to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def copier(size: int, device: torch.device) -> Call:
    """An elementwise kernel that reads and writes `size` bytes together and does nothing else.

    `copy_` would be a memcpy node in a graph, which moves 2.8 TB/s on an H200 while a kernel moves 4.2
    (microbenchmarks of 512 MB in benchmarks/results/h200/run.json).
    """
    source = torch.randn(max(1, size // 8), device=device)
    target = torch.empty_like(source)
    return lambda: torch.neg(source, out=target)


def clock_mhz() -> str:
    """The GPU's present clock, or "" if NVML's Python package is missing."""
    try:
        return str(torch.cuda.clock_rate())
    except Exception:  # NVML may fail in many ways, and the row is useful without the clock
        return ""
