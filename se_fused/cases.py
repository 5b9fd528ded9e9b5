"""Calls to check the operation with: shapes, dtypes, layouts, the grid of `verify`, and the tolerance of each dtype.

`verify`, the tests and the benchmarks draw their inputs from here. `import se_fused` does not import this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .options import ACTIVATIONS, GATES, SQUEEZES, HardSigmoid

HALF = (torch.float16, torch.bfloat16)
# The dtype of the maps by itself, and half-precision maps with float32 weights.
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "bfloat16, float32 weights": {"dtype": torch.bfloat16, "float_weights": True},
    "float16, float32 weights": {"dtype": torch.float16, "float_weights": True},
}
# The largest error against float64 that is right, over the largest magnitude of the truth, in roundings of eps / 2.
# Half precision: the interior is float32, so only results are rounded. Where residual is x, the reference rounds both
# gradients of x and their sum: three roundings, and one to spare (float16: 2^-9). float32: the usual growth in sums of
# 64 * 64 terms, the order of the largest map; 23 were seen at the shapes of benchmarks/shapes.py. float64: twice that,
# as the truth rounds as much; 70 were seen on an H200.
_ROUNDINGS = {torch.float32: 64, torch.float64: 128, torch.float16: 4, torch.bfloat16: 4}


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


TOLERANCE = {dtype: count * rounding(dtype) for dtype, count in _ROUNDINGS.items()}


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _every_second(t: Tensor) -> Tensor:
    wide = t.new_empty(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def _some_channels(t: Tensor, order: Callable[[Tensor], Tensor] = torch.Tensor.contiguous) -> Tensor:
    n, c, *spatial = t.shape
    wide = order(t.new_empty(n, c + 3, *spatial))
    wide[:, 2 : c + 2] = t
    return wide[:, 2 : c + 2]


def _offset(t: Tensor) -> Tensor:
    flat = t.new_empty(t.numel() + 1)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


# Each gives a tensor of the same values; "expanded" repeats the first of each row.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": _channels_last,
    "channels_last_slice": lambda t: _some_channels(t, _channels_last),
    "every_second": _every_second,
    "some_channels": _some_channels,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": _offset,
    "expanded": lambda t: t[..., :1].expand(t.shape),
}


@dataclass(eq=False)
class Case:
    """One call: x is [N, C, *spatial], and R is None for the one-FC form.

    `float_weights` makes the weights of half-precision maps float32; `kernel_dims` appends so many sizes of 1 to their
    shapes; `residual` is "none", "map" for another map, or "x"; `affine` gives the call scale and shift.
    """

    n: int = 2
    c: int = 16
    r: int | None = 4
    spatial: tuple[int, ...] = (5, 7)
    dtype: torch.dtype = torch.float32
    float_weights: bool = False
    kernel_dims: int = 0
    bias: bool = True
    layout: str = "contiguous"
    residual: str = "none"
    affine: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, self.c, *self.spatial)

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.float_weights and self.dtype in HALF else self.dtype

    @property
    def precision(self) -> str:
        """Its name in PRECISIONS."""
        name = str(self.dtype).removeprefix("torch.")
        return name if self.weight_dtype is self.dtype else f"{name}, float32 weights"

    def __str__(self) -> str:
        parts = [f"{list(self.shape)} {self.layout}", "one FC" if self.r is None else f"R = {self.r}"]
        parts += [f"{name}={value}" for name, value in self.options.items()]
        if self.residual != "none":
            parts.append(f"residual={self.residual}")
        parts += ["scale and shift"] * self.affine + ["no bias"] * (not self.bias)
        return f"{self.precision}: " + ", ".join(parts)

    def draw(self, generator: torch.Generator, device: torch.device | str = "cpu") -> dict[str, Tensor | None]:
        """x, w1, b1, w2, b2, residual, and scale and shift if the case has them: the same numbers on every device; x is
        laid out, on the device."""

        def normal(shape: tuple[int, ...], dtype: torch.dtype, fan_in: int = 1) -> Tensor:
            t = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)
            return t.to(dtype).to(device)

        def weight(rows: int, columns: int) -> Tensor:
            return normal((rows, columns, *(1,) * self.kernel_dims), self.weight_dtype, columns)

        def bias(length: int) -> Tensor | None:
            return normal((length,), self.weight_dtype) if self.bias else None

        x = LAYOUTS[self.layout](normal(self.shape, self.dtype))
        w1, b1 = (None, None) if self.r is None else (weight(self.r, self.c), bias(self.r))
        w2, b2 = weight(self.c, self.c if self.r is None else self.r), bias(self.c)
        residual = x if self.residual == "x" else normal(self.shape, self.dtype) if self.residual == "map" else None
        tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "residual": residual}
        vectors = {name: normal((self.c,), self.weight_dtype) for name in ("scale", "shift") if self.affine}
        return tensors | vectors


# What each call of the grid differs by from odd sizes: every option by itself, combinations that real networks use, and
# the default options on shapes of every kind.
_ODD: dict[str, Any] = {"n": 3, "c": 20, "r": 5, "spatial": (7, 9)}
GRID_CALLS: list[dict[str, Any]] = [
    *({"options": {"act": name}} for name in ACTIVATIONS),
    *({"options": {"gate": gate}} for gate in (*GATES, HardSigmoid(0.2, 0.5))),
    *({"options": {"squeeze": name}} for name in SQUEEZES),
    *({"options": {"pre_act": name}} for name in ACTIVATIONS),
    *({"options": {"post_act": name}} for name in ACTIVATIONS),
    {"bias": False},
    {"residual": "x"},
    {"residual": "map", "options": {"post_act": "relu"}},
    {"residual": "map", "options": {"squeeze": "mean_max", "pre_act": "silu", "post_act": "gelu"}},
    {"residual": "x", "options": {"squeeze": "max", "pre_act": "leaky_relu", "gate": "tanh"}},
    {"r": None, "options": {"gate": "hard_sigmoid"}},
    {"r": None, "bias": False, "options": {"squeeze": "mean_max"}},
    {"n": 2, "c": 16, "r": 4, "spatial": (1, 1)},  # one position
    {"n": 1, "c": 3, "r": 2, "spatial": (1, 5)},  # less than a vector
    {"n": 2, "c": 1, "r": 1, "spatial": (6, 5)},  # one channel
    {"n": 4, "c": 24, "r": 6, "spatial": (37,)},
    {"n": 2, "c": 10, "r": 3, "spatial": (3, 5, 4)},
    {"n": 4, "c": 64, "r": 16, "spatial": (16, 16)},  # whole vectors
    {"n": 1, "c": 48, "r": 12, "spatial": (56, 56)},  # a large map
    {"n": 2, "c": 320, "r": 80, "spatial": (3, 3)},  # weights larger than the maps
]
AFFINE_CALLS: list[dict[str, Any]] = [
    {"affine": True},
    {"affine": True, "residual": "x", "options": {"pre_act": "silu"}},
]
GRID_LAYOUTS = ("contiguous", "channels_last", "every_second")


def grid() -> list[Case]:
    """The cases of `verify`: its calls in every precision and each of its layouts."""
    return [
        Case(**_ODD | precision | {"layout": layout} | call)
        for calls in (GRID_CALLS, AFFINE_CALLS)
        for precision in PRECISIONS.values()
        for layout in GRID_LAYOUTS
        for call in calls
    ]


def call(
    function: Callable[..., Tensor], tensors: dict[str, Tensor | None], options: dict[str, Any], **more: Any
) -> Tensor:
    """`function`, such as `se_fused.squeeze_excite`, on the tensors of a case."""
    positional = [tensors[name] for name in ("x", "w1", "b1", "w2", "b2")]
    named = {name: tensors[name] for name in ("residual", "scale", "shift") if name in tensors}
    return function(*positional, **named, **options, **more)


def in_float64(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values; where residual is x, it stays so."""
    wide = {name: t if t is None else t.detach().double() for name, t in tensors.items()}
    if tensors["residual"] is tensors["x"]:
        wide["residual"] = wide["x"]
    return wide
