"""The operation's numbers on this machine: outputs and gradients against the formula in float64, over a fixed grid.

The grid holds every option by itself and the combinations that real networks use, on an odd shape; and the default
options on shapes of every kind; all that times `PRECISIONS` and `LAYOUTS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import reference
from .measure import largest_difference
from .ops import squeeze_excite
from .options import ACTIVATIONS, GATES, SQUEEZES, HardSigmoid

# Name: dtype of the maps, dtype of the weights.
PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16, float32 weights": (torch.bfloat16, torch.float32),
    "float16, float32 weights": (torch.float16, torch.float32),
}
LAYOUTS = ("contiguous", "channels_last", "strided")
_ODD = (3, 20, 7, 9)


@dataclass(frozen=True, eq=False)
class Case:
    """One call: its shape, R (None: the one-FC form), which residual ("x", "other" or None), and its other options."""

    precision: str
    layout: str
    shape: tuple[int, ...] = _ODD
    r: int | None = 5
    bias: bool = True
    residual: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        form = "one FC" if self.r is None else f"R = {self.r}"
        parts = [
            f"{list(self.shape)} {self.layout}",
            form,
            *(f"{name}={value}" for name, value in self.options.items()),
        ]
        if self.residual is not None:
            parts.append(f"residual={self.residual}")
        return f"{self.precision}: " + ", ".join(parts + ["no bias"] * (not self.bias))


_CALLS: list[dict[str, Any]] = [
    *({"options": {"act": name}} for name in ACTIVATIONS),
    *({"options": {"gate": gate}} for gate in (*GATES, HardSigmoid(0.2, 0.5))),
    *({"options": {"squeeze": name}} for name in SQUEEZES),
    *({"options": {"pre_act": name}} for name in ACTIVATIONS),
    *({"options": {"post_act": name}} for name in ACTIVATIONS),
    {"bias": False},
    {"residual": "x"},
    {"residual": "other", "options": {"post_act": "relu"}},
    {"residual": "other", "options": {"squeeze": "mean_max", "pre_act": "silu", "post_act": "gelu"}},
    {"residual": "x", "options": {"squeeze": "max", "pre_act": "leaky_relu", "gate": "tanh"}},
    {"r": None, "options": {"gate": "hard_sigmoid"}},
    {"r": None, "bias": False, "options": {"squeeze": "mean_max"}},
    # One position; less than a vector; one channel; 1-D; 3-D; whole vectors; a large map; weights larger than the maps.
    {"shape": (2, 16, 1, 1), "r": 4},
    {"shape": (1, 3, 1, 5), "r": 2},
    {"shape": (2, 1, 6, 5), "r": 1},
    {"shape": (4, 24, 37), "r": 6},
    {"shape": (2, 10, 3, 5, 4), "r": 3},
    {"shape": (4, 64, 16, 16), "r": 16},
    {"shape": (1, 48, 56, 56), "r": 12},
    {"shape": (2, 320, 3, 3), "r": 80},
]


def cases() -> list[Case]:
    """The whole grid."""
    return [Case(p, layout, **call) for p in PRECISIONS for layout in LAYOUTS for call in _CALLS]


def tolerance(precision: str) -> float:
    """What `error` may reach.

    float32 and float64: 64 rounding steps, the usual growth in sums of 64 * 64 terms, the order of the largest map's.
    Half precision: the interior is float32, so what is rounded is the result, by half a step at most; PyTorch's sum of
    two gradients of x, where residual is x, makes it three halves. Two steps.
    """
    dtype = PRECISIONS[precision][0]
    return (64 if dtype in (torch.float32, torch.float64) else 2) * torch.finfo(dtype).eps


def _laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        return wide[..., ::2]
    return t


def _outputs(case: Case, function: Any, inputs: dict[str, Tensor | None], g: Tensor) -> dict[str, Tensor]:
    """y as training and inference compute it, and the gradient of every input."""
    leaves = {name: t if t is None else t.detach().requires_grad_() for name, t in inputs.items()}

    def call(tensors: dict[str, Tensor | None], **more: Any) -> Tensor:
        residual = tensors["x"] if case.residual == "x" else tensors["residual"]
        weights = (tensors[name] for name in ("x", "w1", "b1", "w2", "b2"))
        y: Tensor = function(*weights, residual=residual, **case.options, **more)
        return y

    y = call(leaves)
    used = {name: t for name, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(y, list(used.values()), g)
    with torch.no_grad():
        outputs = {"y in training": y.detach(), "y": call(inputs)}
        x = inputs["x"]
        assert x is not None
        outputs["y in place"] = call(inputs | {"x": _laid_out(x.clone(), case.layout)}, inplace=True)
    return outputs | {f"d{name}": gradient for name, gradient in zip(used, gradients, strict=True)}


def error(case: Case, device: str = "cpu", seed: int = 0) -> tuple[float, str]:
    """The largest error among outputs and gradients, each relative to the largest magnitude in it, and whose it is."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    c, r = case.shape[1], case.r or case.shape[1]
    drawn = {
        "x": normal(*case.shape),
        "w1": None if case.r is None else normal(r, c, scale=c**-0.5),
        "b1": normal(r) if case.bias and case.r is not None else None,
        "w2": normal(c, r, scale=r**-0.5),
        "b2": normal(c) if case.bias else None,
        "residual": normal(*case.shape) if case.residual == "other" else None,
    }
    maps, weights = PRECISIONS[case.precision]
    inputs: dict[str, Tensor | None] = {}
    for name, t in drawn.items():
        if t is not None and name in ("x", "residual"):
            inputs[name] = _laid_out(t.to(device, maps), case.layout)
        else:
            inputs[name] = t if t is None else t.to(device, weights)
    g = _laid_out(normal(*case.shape).to(device, maps), case.layout)
    truth = _outputs(
        case, reference.squeeze_excite, {k: t if t is None else t.double() for k, t in inputs.items()}, g.double()
    )
    got = _outputs(case, squeeze_excite, inputs, g)
    errors = {name: largest_difference(got[name], t) / max(float(t.abs().max()), 1e-30) for name, t in truth.items()}
    # NaN compares as neither larger nor smaller than a tolerance; infinity is larger.
    errors = {name: math.inf if math.isnan(e) else e for name, e in errors.items()}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def run(device: str = "cpu") -> Iterator[tuple[Case, float, str]]:
    """Each case of the grid with its `error`."""
    for seed, case in enumerate(cases()):
        yield (case, *error(case, device, seed))
