"""An eval-mode batch norm: with the residual and the activation that follow it, or its scale and shift alone."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activation
from .tiles import block_start, map_offsets


@triton.jit
def _element(vector, i, inside, OTHERWISE: tl.constexpr, A: tl.constexpr):
    if vector is None:
        return tl.full(i.shape, OTHERWISE, A)
    return tl.load(vector + i, inside, OTHERWISE).to(A)


@triton.jit
def _scale_shift(weight, bias, mean, variance, i, inside, EPS: tl.constexpr, A: tl.constexpr):
    """Returns scale and shift of the channels i. EPS is a constant, because Triton passes numbers in float32."""
    scale = _element(weight, i, inside, 1.0, A) / tl.sqrt(_element(variance, i, inside, 1.0, A) + EPS)
    return scale, _element(bias, i, inside, 0.0, A) - _element(mean, i, inside, 0.0, A) * scale


@triton.jit
def batch_norm_kernel(
    x, residual, weight, bias, mean, variance, y, n, c, l, steps, EPS: tl.constexpr, ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(c, BLOCK_C)
    n0 = block_start(tl.program_id(0) // blocks, BLOCK_N)
    c0 = block_start(tl.program_id(0) % blocks, BLOCK_C)
    begin = block_start(tl.program_id(1), BLOCK_L) * steps
    end = tl.minimum(begin + steps * BLOCK_L, l)
    i = c0 + tl.arange(0, BLOCK_C)
    scale, shift = _scale_shift(weight, bias, mean, variance, i, i < c, EPS, A)
    for l0 in range(begin, end, BLOCK_L):
        offset, inside = map_offsets(n0, c0, l0, n, c, l, CHANNELS_LAST, ALIGNMENT, BLOCK_N, BLOCK_C, BLOCK_L)
        v = tl.load(x + offset, inside, 0.0).to(A) * scale[None, :, None] + shift[None, :, None]
        if residual is not None:
            v += tl.load(residual + offset, inside, 0.0).to(A)
        tl.store(y + offset, activation(v, ACT, 0.0, 0.0).to(y.dtype.element_ty), inside)


@triton.jit
def scale_shift_kernel(weight, bias, mean, variance, scale, shift, c, EPS: tl.constexpr, BLOCK: tl.constexpr):
    i = block_start(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
    k, b = _scale_shift(weight, bias, mean, variance, i, i < c, EPS, scale.dtype.element_ty)
    tl.store(scale + i, k, i < c)
    tl.store(shift + i, b, i < c)
