"""The calls that are timed on a GPU, and how: many in one CUDA graph, on rotating buffers; or as a user's loop does."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import se_fused
from se_fused import backends

from .shapes import GPU, Shape

ROUNDS = 7
LEAST_CALLS = 32  # in one graph, so that the gaps between replays do not count
COLD_L2, MOST_SETS = 3, 1024  # buffers rotate over so many times the L2, but are no more than this


def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """SE as users have it: pooling, two 1x1 convolutions, a product."""
    h = torch.relu(F.conv2d(x.mean((2, 3), keepdim=True), w1, b1))
    return x * torch.sigmoid(F.conv2d(h, w2, b2))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: the call, without who makes it and how it is timed."""

    shape: Shape
    dtype: torch.dtype
    layout: str
    direction: str  # forward | both

    def bytes(self) -> int:
        """That no implementation can do without: forward x, y, weights; with backward also g, x again, dx, dw."""
        n, c, h, w, r = dataclasses.astuple(self.shape)
        maps, weights = (2, 1) if self.direction == "forward" else (5, 2)
        return (maps * n * c * h * w + weights * (2 * c * r + c + r)) * self.dtype.itemsize


def rows() -> Iterator[Row]:
    """In the order of what matters most, since the time may run out."""
    half, single = torch.float16, torch.float32
    for direction, dtype in (("forward", half), ("both", half), ("forward", single), ("both", single)):
        for layout, shape in itertools.product(("contiguous", "channels_last"), GPU):
            yield Row(shape, dtype, layout, direction)


def calls(row: Row, variant: str, sets: int, device: str = "cuda") -> list[Callable[[], object]]:
    """The same call on `sets` sets of maps and weights, of random numbers: zeros can run faster than real data.

    A call returns all that it has computed, so that none of it is written twice to the same place.
    """
    n, c, height, width, r = dataclasses.astuple(row.shape)
    torch.manual_seed(0)
    layer: Callable[..., Tensor] = se_fused.squeeze_excite if variant in backends.BACKENDS else eager
    memory_format = torch.channels_last if row.layout == "channels_last" else torch.contiguous_format
    if variant == "compile":
        torch._dynamo.reset()
        layer = torch.compile(eager, dynamic=False)

    def draw(*size: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(size, device=device) / math.sqrt(fan_in)).to(row.dtype)

    def one() -> Callable[[], object]:
        x = draw(n, c, height, width).contiguous(memory_format=memory_format)
        weights = draw(r, c, 1, 1, fan_in=c), draw(r), draw(c, r, 1, 1, fan_in=r), draw(c)
        if row.direction == "forward":
            return lambda: layer(x, *weights)
        inputs, g = [t.requires_grad_() for t in (x, *weights)], torch.randn_like(x)

        def both() -> object:
            y = layer(*inputs)
            return y, torch.autograd.grad(y, inputs, g)

        return both

    return [one() for _ in range(sets)]


def cold_sets(row: Row) -> int:
    """How many sets of buffers a row rotates over."""
    size: int = torch.cuda.get_device_properties(0).L2_cache_size
    return min(-(-COLD_L2 * size // row.bytes()) + 1, MOST_SETS)


def spread(values: list[float]) -> tuple[float, float, float]:
    quantiles = statistics.quantiles(values, n=5, method="inclusive")
    return quantiles[0], statistics.median(values), quantiles[3]


def graph_times(functions: list[Callable[[], object]]) -> list[float]:
    """Microseconds a call, of calls to all `functions` in turn in one graph, once for each round.

    As many results as functions stay alive, so that results rotate over memory as inputs do.
    """
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for function in functions[:3]:
            function()
    torch.cuda.synchronize()
    count = max(LEAST_CALLS, len(functions))
    results: deque[object] = deque(maxlen=len(functions))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in itertools.islice(itertools.cycle(functions), count):
            results.append(function())
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / count)
    return times


def eager_times(function: Callable[[], object]) -> list[float]:
    """Microseconds of wall clock a call, as a user's loop has it."""
    for _ in range(10):
        function()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(LEAST_CALLS):
            function()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start) / LEAST_CALLS)
    return times


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes read and written by a plain copy, per second."""
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / (1e-6 * statistics.median(graph_times([lambda: target.copy_(source)])))
