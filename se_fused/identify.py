"""Reads the formula of an SE layer off a run of it, in which the results of its fully connected layers were planted.

    z    compared with each squeeze of x           gives the squeeze
    h    compared with the values planted as p1    gives act
    y/x  compared with the values planted as p2    gives the gate, and whether x is added

A batch norm, or a bias added apart, may stand between the two sides of each comparison.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import reference, tracing
from .equivalence import same
from .options import ACTIVATIONS, GATES, SQUEEZES, HardSigmoid, Options
from .recognised import Recognised
from .weights import PLACES

# Activations that people use and the operation does not have, so that a refusal can name them.
_OTHER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ELU": F.elu,
    "SELU": F.selu,
    "softplus": F.softplus,
    "quick GELU": lambda v: v * torch.sigmoid(1.702 * v),
}

# A step that maps [N, K] to [N, K] by channel, by the name of the module or parameter that it belongs to; "" for none.
Steps = dict[str, Callable[[Tensor], Tensor]]
_NO_STEP: Steps = {"": lambda v: v}


def is_plain_norm(module: nn.Module) -> bool:
    """Whether `module` is a batch norm with PyTorch's own forward: another could count its calls in a buffer."""
    return isinstance(module, _BatchNorm) and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def norms_of(bare: nn.Module) -> Steps:
    """The batch norms of `bare` that have statistics, as they compute in eval mode."""
    return _NO_STEP | {
        path: partial(_normalised, module)
        for path, module in bare.named_modules()
        if is_plain_norm(module) and module.running_mean is not None and module.running_var is not None
    }


def _normalised(norm: _BatchNorm, v: Tensor) -> Tensor:
    if norm.running_mean is None or norm.running_mean.numel() != v.shape[1]:
        return torch.full_like(v, math.nan)  # it is another norm's place
    return F.batch_norm(v, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _biases(parameters: Mapping[str, Tensor], call: tracing.Call, others: set[str]) -> Steps:
    """The sums of the result of `call` and each of the parameters `others` that can be its bias, if it has none."""
    width = call.planted.numel() // call.input.shape[0]
    return {
        name: partial(torch.add, parameters[name].flatten())
        for name in sorted(others)
        if call.bias is None and parameters[name].shape.numel() == width == max(parameters[name].shape, default=0)
    }


def squeeze_of(trace: tracing.Trace, norms: Steps) -> tuple[str, str] | None:
    """The squeeze, and the batch norm after it."""
    z = trace.calls[0].input
    return next(
        (
            (how, path)
            for how, (path, norm) in product(SQUEEZES, norms.items())
            if same(z, norm(reference._squeeze(trace.x, how)))
        ),
        None,
    )


def identify(bare: nn.Module, trace: tracing.Trace, norms: Steps, squeeze: str, norm_of_z: str) -> Recognised | str:
    """Read the formula off the trace."""
    if trace.wrote:
        return "it writes over its input"
    parameters = dict(bare.named_parameters())
    calls = trace.calls
    uses = Counter(call.weight for call in calls)
    if max(uses.values()) > 1:
        return f"its layers are applied more than once: {', '.join(f'{w} {n} times' for w, n in uses.items())}"
    n, c = trace.x.shape[:2]
    for call in calls:
        if parameters[call.weight].shape[1] != call.input.numel() // n:
            return f"its {call.weight} stands transposed, [inputs, outputs]"
    first, last = calls[0], calls[-1]
    others = parameters.keys() - uses.keys() - {call.bias for call in calls}
    others -= {f"{path}.{name}" for path in norms for name in ("weight", "bias") if path}
    beside = "it uses parameters beside those of its layers: "
    act, b1, norm_of_p1, norm_of_h = None, first.bias, "", ""
    if len(calls) == 2:
        biases = _biases(parameters, first, others)
        found_act = _act_of(first.planted.reshape(n, -1), last.input, norms | biases, norms)
        if found_act is None:
            if others:
                return beside + ", ".join(sorted(others))
            name = _name_of_other_act(first.planted, last.input)
            return f"its activation is {f'{name}, ' if name else ''}none of {', '.join(ACTIVATIONS)}"
        act, step, norm_of_h = found_act
        b1, norm_of_p1 = (step, "") if step in biases else (b1, step)
    biases = _biases(parameters, last, others - {b1})
    found_gate = _gate_of(last.planted.reshape(n, -1), channel_factor(trace), norms | biases)
    others -= {b1, found_gate[1] if found_gate else None}
    if others:
        return beside + ", ".join(sorted(others))
    if found_gate is None:
        gates = ", ".join(GATES)
        return f"its output is not x * s or x * (1 + s) with a gate s that is one of {gates}, or x * 2 * sigmoid"
    (gate, residual, is_doubled), step = found_gate
    b2, norm_of_p2 = (step, "") if step in biases else (last.bias, step)
    apart = tuple(bias for bias, call in ((b1, first), (b2, last)) if bias is not None and bias != call.bias)
    placed = tuple(zip(PLACES, (norm_of_z, norm_of_p1, norm_of_h, norm_of_p2), strict=True))
    unused = norms.keys() - {path for _, path in placed} - {""}
    if unused:
        return f"its {min(unused)} does not stand between its layers"
    return Recognised(
        "", c, parameters[first.weight].shape[0] if act else None, act, gate, squeeze, residual, (),
        first.weight if act else None, b1 if act else None, last.weight, b2,
        tuple((place, path) for place, path in placed if path), apart, is_doubled,
    )  # fmt: skip


def channel_factor(trace: tracing.Trace) -> Tensor | None:
    """The factor [N, C] by which each channel is multiplied; None if it depends on the position."""
    m = (trace.y / trace.x).flatten(2)
    return m[..., 0] if same(m, m[..., :1].expand_as(m).contiguous()) else None


def _act_of(p1: Tensor, h: Tensor, before: Steps, after: Steps) -> tuple[str, str, str] | None:
    """The activation, and the steps before and after it."""
    for (first, step), (second, norm) in product(before.items(), after.items()):
        v = step(p1)
        name = next((name for name, act in ACTIVATIONS.items() if same(h, norm(act(v)))), None)
        if name is not None:
            return name, first, second
    return None


def _name_of_other_act(p1: Tensor, h: Tensor) -> str | None:
    p1, h = p1.reshape(-1), h.reshape(-1)
    if p1.shape != h.shape:
        return None
    slope = float((h / p1)[p1 < 0].median())
    if same(h, F.leaky_relu(p1, slope)):
        return f"a leaky ReLU of slope {_nearest_fraction(slope):.4g}"
    return next((name for name, act in _OTHER_ACTIVATIONS.items() if same(h, act(p1))), None)


def _gate_of(p2: Tensor, m: Tensor | None, steps: Steps) -> tuple[tuple[str | HardSigmoid, bool, bool], str] | None:
    """What `_name_of_gate` finds, and the step before the gate."""
    for name, step in steps.items() if m is not None else ():
        assert m is not None
        found = _name_of_gate(step(p2), m)
        if found is not None:
            return found, name
    return None


def _name_of_gate(p2: Tensor, m: Tensor) -> tuple[str | HardSigmoid, bool, bool] | None:
    """The gate s, whether m is 1 + s rather than s, and whether it is 2 * s."""
    v = p2.reshape(-1)
    for residual in (False, True):
        s = m.reshape(-1) - float(residual)
        for name in GATES:
            gate = _fitted_hard_sigmoid(v, s) if name == "hard_sigmoid" else name
            if gate is not None and same(s, Options.of(gate=gate).apply_gate(v)):
                return gate, residual, False
    return ("sigmoid", False, True) if same(m.reshape(-1), 2 * torch.sigmoid(v)) else None


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
