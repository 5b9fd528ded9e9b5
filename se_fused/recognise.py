"""Recognises SE layers by what they compute, whatever their class, names or style.

If the shapes of a layer's weights can be SE's, a copy of it is run once (see `tracing`), and its formula is read off
(see `identify`). Finally the copy is compared with the formula on random maps. Only if they agree is the layer called
an SE layer.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import tracing
from .code import asks_for_modes
from .equivalence import mismatch
from .identify import channel_factor, identify, is_plain_norm, norms_of, squeeze_of
from .inside import HOOKS, Inside
from .recognised import Recognised
from .undisturbed import undisturbed_inference

# The buffers of a batch norm.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
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
    norms = norms_of(bare)
    for x in tracing.trial_maps(shapes):
        run = tracing.trace(bare, x, arity)
        if run is None:
            continue
        resembles_se = True
        for channels_last, trace in ((False, run), (True, run.moved())):
            squeeze = squeeze_of(trace, norms)
            if squeeze is None:
                continue
            if arity > 1 and channel_factor(trace) is None:
                return None
            found = _obstacle(layer, arity) or identify(bare, trace, norms, *squeeze)
            if isinstance(found, Recognised):
                found = replace(found, layer=type(layer).__name__, channels_last=channels_last)
                found = _checked(bare, found, x.dim())
            change = before.change(bare, marks=True) if before and isinstance(found, Recognised) else None
            return f"a call leaves something behind in it: {change}" if change else found
    if not resembles_se:
        return None
    return "its squeeze is not the mean, the maximum or half their sum over all positions of a map [N, C, *spatial]"


def _checked(bare: nn.Module, recognised: Recognised, dims: int) -> Recognised | str:
    """`recognised`, with the numbers of dimensions for which it agrees with `bare`, or how it differs for `dims`."""
    # Copied before any run with gradients, which could leave something behind that cannot be copied.
    meta = copy.deepcopy(bare).to("meta").eval()
    # The weight of a convolution fixes the rank of its maps; an nn.Linear may take maps of every rank.
    candidates = (3, 4, 5) if bare.get_parameter(recognised.w2).dim() == 2 else (dims,)
    checked = tuple(d for d in candidates if d == dims or mismatch(bare, meta, recognised, d) is None)
    return mismatch(bare, meta, recognised, dims) or replace(recognised, dims=checked)


def _obstacle(layer: nn.Module, arity: int) -> str | None:
    """A property of `layer` that prevents replacing it and that a run does not show; None if there is none."""
    cls = type(layer)
    for name, module in layer.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"{f'its {name}' if name else 'it'} is scripted by TorchScript"
    if arity > 1:
        return f"it needs {arity} inputs"
    mode = next(filter(None, map(asks_for_modes, map(type, layer.modules()))), None)
    if mode is not None:
        return f"a forward in it asks for {mode}"
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
    buffers = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in layer.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not (is_plain_norm(module) and name in _STATISTICS)
    ]
    return f"it holds buffers: {', '.join(buffers)}" if buffers else None


def _held_by(value: Any) -> Iterator[Any]:
    """`value`, or if it is a container, the values in it, at every depth."""
    if isinstance(value, (list, tuple, set, deque)):
        for each in value:
            yield from _held_by(each)
    elif isinstance(value, dict):
        yield from _held_by(list(value.values()))
    else:
        yield value
