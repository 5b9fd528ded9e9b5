"""The bodies of the operators: maps brought into an order that backends walk, outputs allocated, the backend called.

x, w1, b1, w2, b2, residual come first in every one of them; then follow the seven options, as numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, native
from .options import Options

_OPS = torch.ops.se_fused


def _resolved(argument: Any) -> Any:
    """A tensor whose memory holds its numbers: what the dispatcher does for the operators."""
    return argument.resolve_neg() if isinstance(argument, Tensor) else argument


def _forward_out(*args: Any) -> None:
    if backends.takes_triton(args[0].device):
        from . import triton

        triton.forward_out(*map(_resolved, args))
    else:
        _OPS.forward_out.default(*args)


def _backward_out(*args: Any) -> None:
    if backends.takes_triton(args[0].device):
        from . import triton

        triton.backward_out(*map(_resolved, args))
    else:
        _OPS.backward_out.default(*args)


def _is_channels_last(t: Tensor) -> bool:
    return not t.is_contiguous() and t.movedim(1, -1).is_contiguous()


def _dense(t: Tensor | None, channels_last: bool = False) -> Tensor | None:
    """`t` in one of the two orders that a backend reads."""
    if t is None:
        return None
    if t._is_zerotensor():  # it has no memory
        t = t.clone()
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else t.contiguous()


def _fillable(t: Tensor, channels_last: bool) -> Tensor:
    """`t`, or where it is dense in some third order (a transposed map), a contiguous stand-in to be copied from."""
    return t if channels_last or t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format)


def forward(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
    *options: Any, saved: tuple[Tensor | None, ...] = (None, None, None),
) -> Tensor:  # fmt: skip
    y = torch.empty_like(x)  # eager's strides
    channels_last = _is_channels_last(y)
    out = _fillable(y, channels_last)
    _forward_out(
        _dense(x, channels_last), _dense(w1), _dense(b1), _dense(w2), _dense(b2), _dense(residual, channels_last),
        *options, channels_last, out, *saved,
    )  # fmt: skip
    return y if out is y else y.copy_(out)


def forward_inplace(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
    *options: Any,
) -> None:  # fmt: skip
    channels_last = _is_channels_last(x)
    out = _dense(x.resolve_neg(), channels_last)
    assert out is not None
    _forward_out(
        out, _dense(w1), _dense(b1), _dense(w2), _dense(b2), _dense(residual, channels_last),
        *options, channels_last, out, None, None, None,
    )  # fmt: skip
    if out.data_ptr() != x.data_ptr():
        x.copy_(out)


def plan(x: Tensor, r: int, options: Options, own_residual: bool) -> str:
    """What the CUDA backend launches for a forward call (csrc/plan.h), in words."""
    facts = native.load_facts()
    limits = backends.cuda_limits(x.device.index)
    device = facts.Device(torch.cuda.get_device_name(x.device), *limits[:4], limits[4:9], *limits[9:])
    n, c = x.shape[:2]
    return str(
        facts.plan(
            device, n=n, c=c, r=r, l=x.numel() // (n * c), dtype=str(x.dtype).removeprefix("torch."),
            channels_last=_is_channels_last(x), squeeze=options.squeeze, pre_act=options.pre_act > 0,
            residual=own_residual, post_act=options.post_act > 0, forced=backends.forced_plan(),
        )
    )  # fmt: skip


def empty_saved(x: Tensor, w1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    n, c = x.shape[:2]
    r = 0 if w1 is None else w1.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((n, c), dtype=dtype), x.new_empty((n, r), dtype=dtype), x.new_empty((n, c), dtype=dtype)


def forward_train(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    saved = empty_saved(args[0], args[1])
    return forward(*args, saved=saved), *saved


def empty_grads(inputs: tuple[Tensor | None, ...], needs: list[bool]) -> list[Tensor]:
    x = inputs[0]
    assert x is not None
    # dresidual is allocated like x, whose order the backend walks in.
    shapes = (x, *inputs[1:5], x)
    return [
        torch.empty_like(t) if need and t is not None else x.new_empty(0) for t, need in zip(shapes, needs, strict=True)
    ]


def backward(g: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, saved, options, (needs, residual_is_x) = args[:6], args[6:9], args[9:-2], args[-2:]
    grads = empty_grads(inputs, needs)
    maps = [grads[i] for i in (0, 5) if needs[i]]
    channels_last = _is_channels_last(maps[0] if maps else inputs[0])
    outs = [_fillable(grads[i], channels_last and i in (0, 5)) if need else None for i, need in enumerate(needs)]
    _backward_out(
        _dense(g, channels_last),
        _dense(inputs[0], channels_last),
        *map(_dense, inputs[1:5]),
        _dense(inputs[5], channels_last),
        *map(_dense, saved),
        *options,
        channels_last,
        residual_is_x,
        *outs,
    )
    for grad, out in zip(grads, outs, strict=True):
        if out is not None and out is not grad:
            grad.copy_(out)
    return tuple(grads)
