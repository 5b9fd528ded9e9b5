"""Checks the operation on this machine: outputs and gradients against the formula in float64, over `cases.grid`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import reference
from .cases import HALF, LAYOUTS, Case, call, grid, in_float64
from .measure import largest_difference
from .ops import squeeze_excite


def _outputs(case: Case, function: Any, inputs: dict[str, Tensor | None], g: Tensor) -> dict[str, Tensor]:
    """y as training, inference and a call in place compute it, and the gradient of every input."""
    leaves = {name: t if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    if case.residual == "x":
        leaves["residual"] = leaves["x"]
    used = {name: t for name, t in leaves.items() if t is not None and (name != "residual" or case.residual == "map")}
    y = call(function, leaves, case.options)
    gradients = torch.autograd.grad(y, list(used.values()), g)
    with torch.no_grad():
        outputs = {"y in training": y.detach(), "y": call(function, inputs, case.options)}
        x = inputs["x"]
        assert x is not None
        overwritten = LAYOUTS[case.layout](x.clone())
        residual = overwritten if case.residual == "x" else inputs["residual"]
        own = inputs | {"x": overwritten, "residual": residual}
        outputs["y in place"] = call(function, own, case.options, inplace=True)
    return outputs | {f"d{name}": gradient for name, gradient in zip(used, gradients, strict=True)}


def error(case: Case, device: str = "cpu", seed: int = 0) -> tuple[float, str]:
    """The largest error among outputs and gradients, each relative to its largest magnitude, and whose it is."""
    generator = torch.Generator().manual_seed(seed)
    inputs = case.draw(generator, device)
    lay_out = LAYOUTS[case.layout]
    if case.residual == "map" and (residual := inputs["residual"]) is not None:
        inputs["residual"] = lay_out(residual)
    g = lay_out(torch.randn(case.shape, generator=generator, dtype=torch.float64).to(device, case.dtype))
    truth = _outputs(case, reference.squeeze_excite, in_float64(inputs), g.double())
    if case.affine and case.dtype in HALF:  # training rounds scale * x + shift, as PyTorch's batch norm does
        truth = {name: truth[name] for name in ("y", "y in place")}
    got = _outputs(case, squeeze_excite, inputs, g)
    errors = {name: largest_difference(got[name], t) / max(float(t.abs().max()), 1e-30) for name, t in truth.items()}
    # NaN compares as neither larger nor smaller than a tolerance; infinity is larger.
    errors = {name: math.inf if math.isnan(e) else e for name, e in errors.items()}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def run(device: str = "cpu") -> Iterator[tuple[Case, float, str]]:
    """Each case of the grid with its `error`."""
    for seed, case in enumerate(grid()):
        yield (case, *error(case, device, seed))
