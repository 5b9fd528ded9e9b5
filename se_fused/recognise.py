"""Recognises SE layers by what they compute, whatever their class, names or style.

If the shapes of a layer's weights can be SE's, a copy of it is run once (see `tracing`), and its formula is read off:

    z    compared with each squeeze of x           gives the squeeze
    h    compared with the values planted as p1    gives act
    y/x  compared with the values planted as p2    gives the gate, and whether x is added

Finally the copy is compared with the formula on random maps. Only if they agree is the layer called an SE layer.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import reference, tracing
from .equivalence import mismatch, same
from .inside import HOOKS, Inside
from .options import ACTIVATIONS, GATES, SQUEEZES, HardSigmoid, Options
from .recognised import Recognised
from .undisturbed import undisturbed_inference

# The methods by which a class can define how it is copied. `replace` adds its own.
COPYING = (
    *("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__getnewargs_ex__"),
    *("__deepcopy__", "__copy__"),
)


def recognise(layer: nn.Module) -> Recognised | str | None:
    """What `layer` computes, if it is an SE layer; a reason why not, if it resembles one; else None.

    The layer, its class and PyTorch's state stay as they were.
    """
    shapes = tracing.weight_shapes(layer)
    if shapes is None:
        return None
    with undisturbed_inference(layer) as put_back:
        try:
            found = _recognise(layer, shapes)
        except Exception as error:  # foreign code may fail in any way, which must not end the examination of others
            return f"its examination failed: {type(error).__name__}: {error}"
    if put_back and isinstance(found, Recognised):
        return f"a call changes {put_back[0]}"
    return found


def _recognise(layer: nn.Module, shapes: list[tuple[int, ...]]) -> Recognised | str | None:
    try:
        bare = tracing.bare_copy(layer)
    except Exception as error:
        return f"it cannot be copied for examination: {error}"
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in layer.modules())
    before = None if scripted else Inside(bare, type(bare))
    arity = tracing.arity(layer)
    resembles_se = False
    for x in tracing.trial_maps(shapes):
        trace = tracing.trace(bare, x, arity)
        resembles_se = resembles_se or trace is not None
        squeeze = None if trace is None else _name_of_squeeze(x, trace.calls[0].input)
        if trace is not None and squeeze is not None:
            if arity > 1 and _channel_factor(trace) is None:
                return None
            found = _obstacle(layer, arity) or _identify(type(layer).__name__, bare, trace, squeeze)
            change = before.change(bare, marks=True) if before and isinstance(found, Recognised) else None
            return f"a call leaves something behind in it: {change}" if change else found
    if not resembles_se:
        return None
    return "its squeeze is not the mean, the maximum or half their sum over all positions of a map [N, C, *spatial]"


def _name_of_squeeze(x: Tensor, z: Tensor) -> str | None:
    return next((how for how in SQUEEZES if same(z, reference._squeeze(x, how))), None)


def _obstacle(layer: nn.Module, arity: int) -> str | None:
    """A property of `layer` that prevents replacing it and that a run does not show; None if there is none."""
    cls = type(layer)
    for name, module in layer.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"{f'its {name}' if name else 'it'} is scripted by TorchScript"
    if arity > 1:
        return f"it needs {arity} inputs"
    if "forward" in vars(layer) or cls.__call__ is not nn.Module.__call__:
        return "its forward is overridden on the object, or its class overrides __call__"
    if any(getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in COPYING):
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
            if attribute not in ("_parameters", "_modules", "_buffers"):
                kind = next((each for each in _held_by(value) if isinstance(each, (Tensor, nn.Module))), None)
                if kind is not None:
                    what = "a tensor that is no parameter" if isinstance(kind, Tensor) else "a module that is no child"
                    return f"it holds {what}: {f'{name}.{attribute}'.lstrip('.')}"
    buffers = [name for name, _ in layer.named_buffers()]
    return f"it holds buffers, as a normalisation does: {', '.join(buffers)}" if buffers else None


def _held_by(value: Any) -> Iterator[Any]:
    """`value`, or if it is a container, the values in it, at every depth."""
    if isinstance(value, (list, tuple, set, deque)):
        for each in value:
            yield from _held_by(each)
    elif isinstance(value, dict):
        yield from _held_by(list(value.values()))
    else:
        yield value


def _identify(name: str, bare: nn.Module, trace: tracing.Trace, squeeze: str) -> Recognised | str:
    """Read the formula off the trace, then check it."""
    if trace.wrote:
        return "it writes over its input"
    # Copied before any run with gradients, which could leave something behind that cannot be copied.
    meta = copy.deepcopy(bare).to("meta").eval()
    parameters = dict(bare.named_parameters())
    calls = trace.calls
    uses = Counter(call.weight for call in calls)
    if max(uses.values()) > 1:
        return f"its layers are applied more than once: {', '.join(f'{w} {n} times' for w, n in uses.items())}"
    others = parameters.keys() - uses.keys() - {call.bias for call in calls}
    if others:
        return f"it uses parameters beside those of its layers: {', '.join(sorted(others))}"
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
    m = _channel_factor(trace)
    found = None if m is None else _name_of_gate(last.planted, m)
    if found is None:
        return f"its output is not x * s or x * (1 + s) with a gate s that is one of {', '.join(GATES)}"
    gate, residual = found
    recognised = Recognised(
        name, c, parameters[first.weight].shape[0] if act else None, act, gate, squeeze, residual, (trace.x.dim(),),
        first.weight if act else None, first.bias if act else None, last.weight, last.bias,
    )  # fmt: skip
    dims = trace.x.dim()
    # The weight of a convolution fixes the rank of its maps; an nn.Linear may take maps of every rank.
    candidates = (3, 4, 5) if parameters[last.weight].dim() == 2 else (dims,)
    checked = tuple(d for d in candidates if d == dims or mismatch(bare, meta, recognised, d) is None)
    return mismatch(bare, meta, recognised, dims) or replace(recognised, dims=checked)


def _channel_factor(trace: tracing.Trace) -> Tensor | None:
    """The factor [N, C] by which each channel is multiplied; None if it depends on the position."""
    m = (trace.y / trace.x).flatten(2)
    return m[..., 0] if same(m, m[..., :1].expand_as(m).contiguous()) else None


def _name_of_act(p1: Tensor, h: Tensor) -> str | None:
    return next((name for name, act in ACTIVATIONS.items() if same(h, act(p1))), None)


def _name_of_gate(p2: Tensor, m: Tensor) -> tuple[str | HardSigmoid, bool] | None:
    """The gate, and whether m is 1 + s rather than s."""
    v = p2.reshape(-1)
    for residual in (False, True):
        s = m.reshape(-1) - float(residual)
        for name in GATES:
            gate = _fitted_hard_sigmoid(v, s) if name == "hard_sigmoid" else name
            if gate is not None and same(s, Options.of(gate=gate).apply_gate(v)):
                return gate, residual
    return None


def _fitted_hard_sigmoid(v: Tensor, s: Tensor) -> HardSigmoid | None:
    """The hard sigmoid through the two outermost points with s strictly inside (0, 1); None without such points."""
    inside = ((s > 1e-6) & (s < 1 - 1e-6)).nonzero().flatten()
    if len(inside) == 0:
        return None
    a, b = inside[v[inside].argmin()], inside[v[inside].argmax()]
    slope = float((s[b] - s[a]) / (v[b] - v[a]))
    if not math.isfinite(slope):
        return None
    return HardSigmoid(_nearest_fraction(slope), _nearest_fraction(float(s[a]) - slope * float(v[a])))


def _nearest_fraction(value: float) -> float:
    """`value`, or a simple fraction that differs only by rounding: 1/6 for a fitted 0.16666666666666669."""
    fraction = float(Fraction(value).limit_denominator(1000))
    return fraction if abs(fraction - value) < 1e-12 else value
