"""The bodies of the operators: they convert maps to an order that backends read, allocate outputs, call the backend.

The arguments of each are the backend, then x, w1, b1, w2, b2, residual, in inference scale and shift, then the seven
options as numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import Backend
from .memory import is_channels_last


def dense(t: Tensor | None, channels_last: bool = False) -> Tensor | None:
    """`t` in one of the two orders that a backend reads: [N, *spatial, C] if `channels_last`, else row-major."""
    if t is None:
        return None
    if t._is_zerotensor():  # it has no memory
        t = t.clone()
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else t.contiguous()


def _dense_out(t: Tensor, channels_last: bool) -> Tensor:
    """A tensor that a backend can fill: `t` itself, or a buffer from which the caller copies, because `t` has other
    strides (a transposed map), is lazily negated or has no memory."""
    if not (channels_last or t.is_contiguous()):
        return torch.empty_like(t, memory_format=torch.contiguous_format)
    return torch.empty_like(t) if t.is_neg() or t._is_zerotensor() else t


def _accumulated(t: Tensor | None, x: Tensor) -> Tensor | None:
    """`t` dense and in the accumulation type of `x`."""
    return dense(t if t is None else t.to(torch.promote_types(x.dtype, torch.float32)))


def forward(
    backend: Backend,
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, *options: Any, saved: tuple[Tensor | None, ...] = (None, None, None),
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    y = torch.empty_like(x) if out is None else out  # new: with the strides that eager PyTorch's result has
    channels_last = is_channels_last(y)
    filled = _dense_out(y, channels_last)
    backend.forward_out(
        dense(x, channels_last), dense(w1), dense(b1), dense(w2), dense(b2), dense(residual, channels_last),
        _accumulated(scale, x), _accumulated(shift, x), *options, channels_last, filled, *saved,
    )  # fmt: skip
    return y if filled is y else y.copy_(filled)


def forward_out(backend: Backend, *args: Any) -> None:
    *inputs, out = args
    forward(backend, *inputs, out=out)


def forward_inplace(
    backend: Backend,
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, *options: Any,
) -> None:  # fmt: skip
    channels_last = is_channels_last(x)
    out = dense(x.resolve_neg(), channels_last)
    assert out is not None
    backend.forward_out(
        out, dense(w1), dense(b1), dense(w2), dense(b2), dense(residual, channels_last),
        _accumulated(scale, x), _accumulated(shift, x), *options, channels_last, out, None, None, None,
    )  # fmt: skip
    if out.data_ptr() != x.data_ptr():
        x.copy_(out)


def empty_saved(x: Tensor, w1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    n, c = x.shape[:2]
    r = 0 if w1 is None else w1.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((n, c), dtype=dtype), x.new_empty((n, r), dtype=dtype), x.new_empty((n, c), dtype=dtype)


def forward_train(backend: Backend, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    saved = empty_saved(args[0], args[1])
    return forward(backend, *args[:6], None, None, *args[6:], saved=saved), *saved


def empty_grads(inputs: tuple[Tensor | None, ...], needs: list[bool]) -> list[Tensor]:
    x = inputs[0]
    assert x is not None
    # dresidual is allocated like x, because the backend writes both gradients in one order.
    shapes = (x, *inputs[1:5], x)
    return [
        torch.empty_like(t) if need and t is not None else x.new_empty(0) for t, need in zip(shapes, needs, strict=True)
    ]


def backward(backend: Backend, g: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, saved, options, (needs, residual_is_x) = args[:6], args[6:9], args[9:-2], args[-2:]
    grads = empty_grads(inputs, needs)
    maps = [grads[i] for i in (0, 5) if needs[i]]
    channels_last = is_channels_last(maps[0] if maps else inputs[0])
    outs = [_dense_out(grads[i], channels_last and i in (0, 5)) if need else None for i, need in enumerate(needs)]
    backend.backward_out(
        dense(g, channels_last),
        dense(inputs[0], channels_last),
        *map(dense, inputs[1:5]),
        dense(inputs[5], channels_last),
        *map(dense, saved),
        *options,
        channels_last,
        residual_is_x,
        *outs,
    )
    for grad, out in zip(grads, outs, strict=True):
        if out is not None and out is not grad:
            grad.copy_(out)
    return tuple(grads)
