"""The fused layer and its baselines, on the same input with the same weights and number of threads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor, nn

import se_fused
from se_fused.cases import LAYOUTS, TOLERANCE
from se_fused.timing import Variant

from . import engines
from .shapes import Shape

MEMORY_FORMATS = ("contiguous", "channels_last")


class WrongResult(RuntimeError):
    """A variant differs from the reference, so its time means nothing."""


class ClassicSE(nn.Module):
    """The layer as it is commonly written (Hu et al., section 3): pooling, two linear layers, ReLU, sigmoid, product.

    The product broadcasts. `expand_as` means the same, but it would put an Expand into the ONNX graph, and ONNX Runtime
    writes what it expands, which took 1.0 to 2.2 times as long at four shapes, on a busy machine.
    """

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
        super().__init__()
        r, c = w1.shape
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(c, r), nn.ReLU(inplace=True), nn.Linear(r, c), nn.Sigmoid())
        self.to(w1.dtype)
        self.load_state_dict({"fc.0.weight": w1, "fc.0.bias": b1, "fc.2.weight": w2, "fc.2.bias": b2})

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.shape
        z = self.avg_pool(x).view(n, c)
        s: Tensor = self.fc(z).view(n, c, 1, 1)
        return x * s


@dataclass(frozen=True, eq=False)
class Inputs:
    """x and g [N, C, H, W]; w1 [R, C], b1 [R], w2 [C, R], b2 [C]; all of one dtype, x and g of one memory format."""

    x: Tensor
    g: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.w1, self.b1, self.w2, self.b2


def draw(shape: Shape, dtype: torch.dtype, layout: str, seed: int = 0) -> Inputs:
    """Inputs from `seed`. The channels of x differ in mean, so that the gates differ and a wrong squeeze shows."""
    generator = torch.Generator().manual_seed(seed)
    case = shape.case(dtype, layout)
    drawn = {name: t for name, t in case.draw(generator).items() if t is not None}
    drawn["x"] += torch.randn(*case.shape[:2], 1, 1, generator=generator)
    g = LAYOUTS[layout](torch.randn(case.shape, generator=generator).to(dtype))
    return Inputs(**drawn, g=g)


def fused_layer(i: Inputs) -> se_fused.SqueezeExcite:
    r, c = i.w1.shape
    layer = se_fused.SqueezeExcite(c, hidden=r, dtype=i.x.dtype)
    layer.load_state_dict({"w1": i.w1, "b1": i.b1, "w2": i.w2, "b2": i.b2})
    return layer


def _fused(i: Inputs, threads: int) -> Variant:
    return Variant("fused", functools.partial(se_fused.squeeze_excite, i.x, *i.weights))


def _fused_inplace(i: Inputs, threads: int) -> Variant:
    x = i.x.clone()
    call = functools.partial(se_fused.squeeze_excite, x, *i.weights, inplace=True)
    return Variant("fused_inplace", call, restore=functools.partial(x.copy_, i.x))


def _eager(i: Inputs, threads: int) -> Variant:
    return Variant("eager", functools.partial(ClassicSE(*i.weights), i.x))


def _fused_out(i: Inputs, threads: int) -> Variant:
    y = torch.full_like(i.x, math.nan)
    call = functools.partial(se_fused.squeeze_excite, i.x, *i.weights, out=y)
    return Variant("fused_out", call, outputs=(y,))


def _compile(name: str, options: dict[str, object], i: Inputs, threads: int) -> Variant:
    # PyTorch keeps what it compiled by code object, and looks through all of it in each call: each variant has its own.
    code = ClassicSE.forward.__code__.replace(co_name=name)
    layer = type(name, (ClassicSE,), {"forward": FunctionType(code, globals())})(*i.weights)
    call = torch.compile(layer, dynamic=False, options=options)
    return Variant(name, functools.partial(call, i.x))


@functools.lru_cache(maxsize=1)
def _onnx_model(i: Inputs) -> bytes:
    return engines.export(ClassicSE(*i.weights), i.x)


def _engine(name: str, i: Inputs, threads: int) -> Variant:
    y = torch.full_like(i.x, math.nan)
    return Variant(name, engines.ENGINES[name](_onnx_model(i), i.x, y, threads), outputs=(y,))


FUSED: dict[str, Callable[[Inputs, int], Variant]] = {
    "fused": _fused,
    "fused_out": _fused_out,
    "fused_inplace": _fused_inplace,
}
BASELINES: dict[str, Callable[[Inputs, int], Variant]] = {
    "eager": _eager,
    "compile": functools.partial(_compile, "compile", {}),
    "compile_freezing": functools.partial(_compile, "compile_freezing", {"freezing": True}),  # weights as constants
    "compile_cpp": functools.partial(_compile, "compile_cpp", {"cpp_wrapper": True}),  # in place of one in Python
    **{name: functools.partial(_engine, name) for name in engines.ENGINES},
}
# It explains the cost of a call, and is no way to run a layer: the guards check that what was compiled still applies.
_NO_GUARDS: dict[str, object] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
OF_A_CALL = {"compile_unguarded": functools.partial(_compile, "compile_unguarded", _NO_GUARDS)}


def forward(name: str, i: Inputs, threads: int) -> Variant:
    """Variant `name` of the forward pass, for inference mode; `threads` is for those that do not use torch's number."""
    return {**FUSED, **BASELINES, **OF_A_CALL}[name](i, threads)


def backward(name: str, i: Inputs, *, with_forward: bool) -> Variant:
    """The gradients of x, w1, b1, w2, b2 by "fused" or "eager", on a graph built once, or built by each call."""
    layer: nn.Module = fused_layer(i) if name == "fused" else ClassicSE(*i.weights)
    parameters = dict(layer.named_parameters())
    names = ("w1", "b1", "w2", "b2") if name == "fused" else ("fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias")
    x = i.x.clone().requires_grad_()
    inputs = [x, *(parameters[n] for n in names)]
    if with_forward:
        return Variant(name, lambda: torch.autograd.grad(layer(x), inputs, i.g))
    y = layer(x)
    return Variant(name, lambda: torch.autograd.grad(y, inputs, i.g, retain_graph=True))


def copy(i: Inputs) -> Variant:
    """One read and one write of the map: the column copy_us is made of its speed."""
    y = torch.empty_like(i.x)
    return Variant("copy", functools.partial(y.copy_, i.x))


def multiply(i: Inputs) -> Variant:
    """The least that any layer in place must do: read the map once and write it back."""
    return Variant("multiply", functools.partial(i.x.clone().mul_, 1.0))


# What one pass over the map takes, out of place and in place.
PASSES: dict[str, Callable[[Inputs], Variant]] = {"copy": copy, "multiply": multiply}


def truth(i: Inputs, *, gradients: bool) -> tuple[Tensor, ...]:
    """(y,) or the gradients of x, w1, b1, w2, b2, computed by the reference in float64."""
    inputs = [t.double().requires_grad_(gradients) for t in (i.x, *i.weights)]
    y = se_fused.reference.squeeze_excite(*inputs)
    return torch.autograd.grad(y, inputs, i.g.double()) if gradients else (y,)


def check(variant: Variant, want: Sequence[Tensor]) -> float:
    """The largest error of one call, relative to the largest value of the truth. Raises WrongResult above TOLERANCE."""
    if variant.restore is not None:
        variant.restore()
    returned = variant.call()
    if variant.outputs is not None:
        got: Sequence[Tensor] = variant.outputs
    else:
        got = (returned,) if isinstance(returned, Tensor) else tuple(returned)  # type: ignore[arg-type]
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            raise WrongResult(f"{variant.name}: shape {list(a.shape)}; the reference gives {list(b.shape)}")
        error = float((a.double() - b).abs().max() / b.abs().max())
        # At the shapes of shapes.LAYER, the largest were 1.4e-6 in float32 (a gradient) and 5.3e-3 in bfloat16 (eager,
        # which rounds z, h, s and y). Both are about a third of what is allowed.
        if not error <= TOLERANCE[a.dtype]:
            raise WrongResult(
                f"{variant.name}: off by {error:.1e} of the largest value; at most {TOLERANCE[a.dtype]:.1e}"
            )
        worst = max(worst, error)
    return worst
