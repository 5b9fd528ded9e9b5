"""Recognises SE layers by what they compute, whatever their class, names or style.

A layer that may be SE by the shapes of its weights is run once, as a copy (see `probe`), and its formula is read off:

    z    against each squeeze of x           tells the squeeze
    h    against the values planted as p1    tells act
    y/x  against the values planted as p2    tells the gate, and whether x is added

Last, copy and formula are compared on random maps: what is not proven equal is not called an SE layer.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import probe, reference, sizes
from .inside import HOOKS, Inside
from .reference import ACTIVATIONS, GATES, SQUEEZES, HardSigmoid

# Relative, in float64, where rounding stays below 2e-15 up to C = 4920 and R = 768. The two closest activations,
# gelu's forms, differ by 1e-5 of the grid's end.
_TOLERANCE = 1e-10
# PyTorch's own hard sigmoid multiplies by a float32 1/6 in backward, which is off by 3e-8.
_GRADIENT_TOLERANCE = 1e-7
# Elements of the largest map that is computed: 90 x 90 positions of 64 channels, 32 x 32 of 512; 10 ms.
_REALISTIC = 2**19


@dataclass(frozen=True)
class Recognised:
    """What an SE layer computes, in the words of `se_fused.squeeze_excite`.

    `w1`, `b1`, `w2`, `b2` are the names of the parameters below the layer, None where there is none; `dims` are the
    numbers of dimensions of x at which the match is proven; `residual` says that the layer gives x * (1 + s).
    """

    layer: str
    channels: int
    hidden: int | None
    act: str | None
    gate: str | HardSigmoid
    squeeze: str
    residual: bool
    dims: tuple[int, ...]
    w1: str | None
    b1: str | None
    w2: str
    b2: str | None

    def __str__(self) -> str:
        width = f"C={self.channels}" + (f", R={self.hidden}, {self.act}" if self.hidden else ", one layer")
        gate = "hard_sigmoid({:.4g}, {:.4g})".format(*self.gate) if isinstance(self.gate, HardSigmoid) else self.gate
        extra = ("" if self.squeeze == "mean" else f", squeeze {self.squeeze}") + (
            ", residual" if self.residual else ""
        )
        return f"{self.layer}: {width}, {gate}{extra}"

    def __rich__(self) -> str:
        return str(self)

    def weights(self, layer: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """w1, b1, w2, b2 as `layer` has them now."""
        w1, b1, b2 = (None if name is None else attrgetter(name)(layer) for name in (self.w1, self.b1, self.b2))
        return w1, b1, attrgetter(self.w2)(layer), b2

    def options(self) -> dict[str, Any]:
        """act, gate and squeeze as keyword arguments. The one-FC form has no act; its name is not used there."""
        return {"act": self.act or "identity", "gate": self.gate, "squeeze": self.squeeze}


def recognise(layer: nn.Module) -> Recognised | str | None:
    """What `layer` computes if it is an SE layer; a text that says why not if it is like one; None if it is not.

    The layer, its class and PyTorch's state are as before.
    """
    shapes = probe.weight_shapes(layer)
    if shapes is None:
        return None
    with (
        probe.undisturbed(layer) as set_on_classes,
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        try:
            found = _recognise(layer, shapes)
        except Exception as error:  # foreign code fails in its own ways, and one layer must not end it for all
            return f"its examination failed: {type(error).__name__}: {error}"
    if set_on_classes and isinstance(found, Recognised):
        return f"a call sets {set_on_classes[0]}"
    return found


def _recognise(layer: nn.Module, shapes: list[tuple[int, ...]]) -> Recognised | str | None:
    try:
        bare = probe.bare_copy(layer)
    except Exception as error:
        return f"it cannot be copied for examination: {error}"
    before = None if isinstance(bare, torch.jit.ScriptModule) else Inside(bare)
    arity = probe.arity(layer)
    alike = False
    for x in probe.trial_maps(shapes):
        trace = probe.trace(bare, x, arity)
        alike = alike or trace is not None
        squeeze = None if trace is None else _name_of_squeeze(x, trace.calls[0].input)
        if trace is not None and squeeze is not None:
            if arity > 1 and _factor(trace) is None:
                return None
            found = _obstacle(layer, arity) or _identify(type(layer).__name__, bare, trace, squeeze)
            change = before.change(bare, marks=True) if before and isinstance(found, Recognised) else None
            return f"a call leaves something behind in it: {change}" if change else found
    if not alike:
        return None
    return "its squeeze is not the mean, the maximum or half their sum over all positions of a map [N, C, *spatial]"


def _same(got: Tensor, wanted: Tensor) -> bool:
    """Whether the numbers agree, up to dimensions of size 1."""
    return got.numel() == wanted.numel() and _error(got.reshape(-1), wanted.reshape(-1)) <= _TOLERANCE


def _error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number of `wanted`; infinite if one is NaN."""
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))
    return math.inf if math.isnan(error) else error


def _name_of_squeeze(x: Tensor, z: Tensor) -> str | None:
    return next((how for how in SQUEEZES if _same(z, reference._squeeze(x, how))), None)


def _obstacle(layer: nn.Module, arity: int) -> str | None:
    """What a run does not show but replacing would lose."""
    cls = type(layer)
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is scripted by TorchScript"
    if arity > 1:
        return f"it needs {arity} inputs"
    if "forward" in vars(layer) or cls.__call__ is not nn.Module.__call__:
        return "its forward is overridden on the object, or its class overrides __call__"
    if cls.__reduce_ex__ is not object.__reduce_ex__ or hasattr(cls, "__deepcopy__"):
        return f"its class {cls.__name__} defines its own copying"
    for name, module in layer.named_modules():
        whose = f"its {name}" if name else "it"
        if parametrize.is_parametrized(module) or "weight_v" in module._parameters:
            return f"{whose} is reparametrised (weight_norm or the like)"
        if type(module).__module__.startswith("torch.ao.") or getattr(module, "qconfig", None) is not None:
            return f"{whose} is quantised or prepared for it"
        if name and any(getattr(module, hooks) for hooks in HOOKS):
            return f"{whose} has hooks, which would no longer be called"
    for name, p in layer.named_parameters():
        if type(p) is not nn.Parameter:
            return f"its {name} is a {type(p).__name__}, not a plain parameter"
    if len({p.dtype for p in layer.parameters()}) > 1:
        return "its parameters are of several dtypes"
    for name, module in layer.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor):
                return f"it holds a tensor that is no parameter: {f'{name}.{attribute}'.lstrip('.')}"
    buffers = [name for name, _ in layer.named_buffers()]
    return f"it holds buffers, as a normalisation does: {', '.join(buffers)}" if buffers else None


def _identify(name: str, bare: nn.Module, trace: probe.Trace, squeeze: str) -> Recognised | str:
    """Read the formula off the trace, then prove it."""
    if trace.wrote:
        return "it writes over its input"
    # Before a run with gradients: what that might leave behind could not be copied.
    meta = copy.deepcopy(bare).to("meta").eval()
    parameters = dict(bare.named_parameters())
    calls = trace.calls
    uses = Counter(call.weight for call in calls)
    if max(uses.values()) > 1:
        return f"its layers are applied more than once: {', '.join(f'{w} {n} times' for w, n in uses.items())}"
    strangers = parameters.keys() - uses.keys() - {call.bias for call in calls}
    if strangers:
        return f"it uses parameters beside those of its layers: {', '.join(sorted(strangers))}"
    first, last = calls[0], calls[-1]
    c = trace.x.shape[1]
    for call in calls:
        if parameters[call.weight].shape[1] != call.input.numel() // trace.x.shape[0]:
            return f"its {call.weight} stands transposed, [inputs, outputs]"
    act = None
    if len(calls) == 2:
        act = _name_of_act(first.planted, last.input)
        if act is None:
            return f"its activation is none of {', '.join(ACTIVATIONS)}"
    m = _factor(trace)
    found = None if m is None else _name_of_gate(last.planted, m)
    if found is None:
        return f"its output is not x * s or x * (1 + s) with a gate s that is one of {', '.join(GATES)}"
    gate, residual = found
    recognised = Recognised(
        name, c, parameters[first.weight].shape[0] if act else None, act, gate, squeeze, residual, (trace.x.dim(),),
        first.weight if act else None, first.bias if act else None, last.weight, last.bias,
    )  # fmt: skip
    dims = trace.x.dim()
    # A convolution's rank is its weight's; a Linear may serve maps of every rank.
    others = (3, 4, 5) if parameters[last.weight].dim() == 2 else (dims,)
    proven = tuple(d for d in others if d == dims or _disproof(bare, meta, recognised, d) is None)
    return _disproof(bare, meta, recognised, dims) or replace(recognised, dims=proven)


def _factor(trace: probe.Trace) -> Tensor | None:
    """What each channel is multiplied by, [N, C]; None if that depends on the position."""
    m = (trace.y / trace.x).flatten(2)
    return m[..., 0] if _same(m, m[..., :1].expand_as(m).contiguous()) else None


def _name_of_act(p1: Tensor, h: Tensor) -> str | None:
    return next((name for name, act in ACTIVATIONS.items() if _same(h, act(p1))), None)


def _name_of_gate(p2: Tensor, m: Tensor) -> tuple[str | HardSigmoid, bool] | None:
    """The gate, and whether m is 1 + s rather than s."""
    v = p2.reshape(-1)
    for residual in (False, True):
        s = m.reshape(-1) - float(residual)
        for name in GATES:
            gate = _fitted_hard_sigmoid(v, s) if name == "hard_sigmoid" else name
            if gate is not None and _same(s, reference._activation(gate, v)):
                return gate, residual
    return None


def _fitted_hard_sigmoid(v: Tensor, s: Tensor) -> HardSigmoid | None:
    """The hard sigmoid through the outermost two of the points strictly inside (0, 1), if s is one at all."""
    inside = ((s > 1e-6) & (s < 1 - 1e-6)).nonzero().flatten()
    if len(inside) == 0:
        return None
    a, b = inside[v[inside].argmin()], inside[v[inside].argmax()]
    slope = float((s[b] - s[a]) / (v[b] - v[a]))
    return HardSigmoid(_simple(slope), _simple(float(s[a]) - slope * float(v[a]))) if math.isfinite(slope) else None


def _simple(value: float) -> float:
    """1/6 for what was fitted as 0.16666666666666669."""
    fraction = float(Fraction(value).limit_denominator(1000))
    return fraction if abs(fraction - value) < 1e-12 else value


def _disproof(bare: nn.Module, meta: nn.Module, recognised: Recognised, dims: int) -> str | None:
    """Why layer and formula differ on maps of `dims` dimensions; None if they agree in both modes at two sizes, at one
    of realistic size, in all gradients, and use the same operators at every size."""
    c = recognised.channels
    for n, *spatial in ((2, 4, 3, 2), (3, 2, 3, 5)):
        shape = (n, c, *spatial[: dims - 2])
        found = next(filter(None, (_difference(bare, recognised, shape, mode) for mode in ("eval", "train"))), None)
        if found is not None:
            return found
    side = max(4, round((_REALISTIC / c) ** (1 / (dims - 2))))
    return _difference(bare, recognised, (1, c, side + 3, *(side,) * (dims - 3)), "eval") or sizes.dependence(
        meta, c, dims
    )


def _difference(bare: nn.Module, recognised: Recognised, shape: tuple[int, ...], mode: str) -> str | None:
    """How result or gradients of layer and formula differ on a random map."""
    bare.train(mode == "train")
    x, g = probe.random_map(*shape), probe.numbers(*shape)
    leaves = {"x": x.clone().requires_grad_(), **dict(bare.named_parameters())}
    where = f"in {mode} mode on a map of shape {list(shape)}"
    try:
        given = x.clone()
        y = bare(given)
        if not torch.equal(given, x):
            return f"it writes over its input {where}"
        with torch.enable_grad():
            recorded = bare(leaves["x"])
            gradients = torch.autograd.grad(recorded, list(leaves.values()), g, allow_unused=True)
    except Exception as failure:
        return f"it fails {where}: {failure}"
    with torch.enable_grad():
        residual = leaves["x"] if recognised.residual else None
        wanted = reference.squeeze_excite(
            leaves["x"], *recognised.weights(bare), residual=residual, **recognised.options()
        )
        right = torch.autograd.grad(wanted, list(leaves.values()), g)
    for got in (y, recorded.detach()):
        error = _error(got, wanted.detach()) if got.shape == wanted.shape else math.inf
        if error > _TOLERANCE:
            return f"its output differs from the formula by {error:.1e} of its largest number, {where}"
    for name, gradient, formula in zip(leaves, gradients, right, strict=True):
        if gradient is None:
            return f"no gradient reaches {name}, {where}"
        error = _error(gradient, formula)
        if error > _GRADIENT_TOLERANCE:
            return f"the gradient of {name} differs from the formula's by {error:.1e} of its largest number, {where}"
    return None
