"""Checks by numbers that a layer computes what it was recognised as.

Results and gradients of layer and formula are compared in both modes at several sizes, on drawn maps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import invariance, reference, tracing
from .recognised import Recognised
from .undisturbed import are_equal, random_states

# Relative, in float64. It is not `cases.TOLERANCE`, because it separates formulas instead of bounding rounding, which
# stays below 2e-15 up to C = 4920 and R = 768. The two closest activations, the two forms of gelu, differ by 1e-5 of
# the end of the grid.
FORMULA_TOLERANCE = 1e-10
# Wider, because PyTorch's hard sigmoid multiplies by a float32 1/6 in backward, which is off by 3e-8.
GRADIENT_TOLERANCE = 1e-7
# Elements of the largest map that is computed: 90 x 90 positions of 64 channels, or 32 x 32 positions of 512.
_REALISTIC = 2**19


def same(got: Tensor, wanted: Tensor) -> bool:
    """Whether the numbers agree; dimensions of size 1 do not matter."""
    return got.numel() == wanted.numel() and error_of(got.reshape(-1), wanted.reshape(-1)) <= FORMULA_TOLERANCE


def error_of(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number of `wanted`; infinite if any difference is NaN."""
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))
    return math.inf if math.isnan(error) else error


def mismatch(bare: nn.Module, meta: nn.Module, recognised: Recognised, dims: int) -> str | None:
    """How layer and formula differ on maps of `dims` dimensions; None if they do not.

    They must agree in results and all gradients, in both modes at two small sizes and in eval mode at a realistic one,
    and in results on extreme numbers. The layer must also run the same operators at every size. Its batch norms are in
    eval mode throughout.
    """
    c = recognised.channels
    for n, *spatial in ((2, 4, 3, 2), (3, 2, 3, 5)):
        shape = (n, c, *spatial[: dims - 2])
        found = next(filter(None, (_difference(bare, recognised, shape, mode) for mode in ("eval", "train"))), None)
        if found is not None:
            return found
    found = _on_extremes(bare.eval(), recognised, dims)
    if found is not None:
        return found
    side = max(4, round((_REALISTIC / c) ** (1 / (dims - 2))))
    return _difference(bare, recognised, (1, c, side + 3, *(side,) * (dims - 3)), "eval") or invariance.violation(
        meta, recognised, dims
    )


def _difference(bare: nn.Module, recognised: Recognised, shape: tuple[int, ...], mode: str) -> str | None:
    """How the results or gradients of layer and formula differ on a random map; None if they do not."""
    tracing.set_mode(bare, mode == "train")
    x, g = (recognised.of_layer(t).contiguous() for t in (tracing.random_map(*shape), tracing.numbers(*shape)))
    leaves = {"x": x.clone().requires_grad_(), **dict(bare.named_parameters())}
    where = f"in {mode} mode on a map of shape {list(x.shape)}"
    states = random_states()
    try:
        given = x.clone()
        y = bare(given)
        if not torch.equal(given, x):
            return f"it writes over its input {where}"
        with torch.enable_grad():
            recorded = bare(leaves["x"])
            gradients = torch.autograd.grad(recorded, list(leaves.values()), g, allow_unused=True, retain_graph=True)
    except Exception as failure:
        return f"it fails {where}: {failure}"
    if not are_equal(states, random_states()):
        return f"it draws random numbers {where}"
    if not _leaves(recorded) <= {id(leaf) for leaf in leaves.values()}:
        return "it takes the gradient of a tensor that is no parameter of it"
    with torch.enable_grad():
        wanted = _formula(leaves["x"], bare, recognised)
        right = torch.autograd.grad(wanted, list(leaves.values()), g)
    for got in (y, recorded.detach()):
        error = error_of(got, wanted.detach()) if got.shape == wanted.shape else math.inf
        if error > FORMULA_TOLERANCE:
            return f"its output differs from the formula by {error:.1e} of its largest number, {where}"
    for name, gradient, formula in zip(leaves, gradients, right, strict=True):
        if gradient is None:
            return f"no gradient reaches {name}, {where}"
        error = error_of(gradient, formula)
        if error > GRADIENT_TOLERANCE:
            return f"the gradient of {name} differs from the formula's by {error:.1e} of its largest number, {where}"
    return None


def _on_extremes(bare: nn.Module, recognised: Recognised, dims: int) -> str | None:
    """How the results differ where numbers are huge, tiny, 0 or NaN; None if they do not."""
    x = recognised.of_layer(tracing.random_map(6, recognised.channels, *(4, 3, 2)[: dims - 2])).contiguous()
    for sample, factor in zip(x, (1e8, 1e-8, 0.0), strict=False):
        sample *= factor
    x[3, ::2] = 0
    x[4].view(-1)[0] = math.nan
    wanted, got = _formula(x, bare, recognised), bare(x.clone())
    # Rounding grows with the numbers that are added: 1e-16 of 1e8, which an identity gate multiplies by 1e8 again.
    if torch.allclose(got, wanted, rtol=1e-6, atol=1e-30, equal_nan=True):
        return None
    return "its output differs from the formula where numbers are huge, tiny, 0 or NaN"


def _formula(x: Tensor, bare: nn.Module, recognised: Recognised) -> Tensor:
    x = recognised.as_map(x)
    residual = x if recognised.residual else None
    w1, b1, w2, b2 = recognised.weights(bare)
    y = reference.compute(x, w1, b1, w2, b2, residual, options=recognised.options())
    return recognised.of_layer(2 * y if recognised.is_doubled else y)


def _leaves(y: Tensor) -> set[int]:
    """The ids of the leaf tensors that a gradient of y reaches."""
    found, todo, seen = set(), [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {id(node.variable)} if hasattr(node, "variable") else set()
            todo += [following for following, _ in node.next_functions]
    return found
