"""y = post_act(u * s + residual), the whole operation, in one launch or three.

    kernel           computes                                        writes                reads
    squeeze_kernel   sums and maxima of u over ranges of positions   both [splits, N, C]   x
    hidden_kernel    z from them, p1 = W1 z + b1                     z [N, C], p1 [N, R]   w1
    scale_kernel     p2 = W2 act(p1) + b2, s = gate(p2), y           p2 [N, C], y          w2, x again

If a sample is small, one program of forward_sample_kernel does the three steps for it. There is a barrier between the
steps, because a thread reads what other threads wrote in the step before. The one-FC form has no p1: its scale step
computes W2 z instead of W2 act(p1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import IDENTITY, activation
from .tiles import (
    ACT,
    GATE,
    LOWEST,
    MAX,
    MEAN,
    OFFSET,
    POST_ACT,
    SLOPE,
    SQUEEZE,
    add_bias,
    before_squeeze,
    block_start,
    gemv,
    load_weights,
    map_offsets,
    matrix_offsets,
    max_keep_nan,
    max_of_positions,
    scale_add,
)


@triton.jit
def _squeeze(
    x, scale, shift, sums, maxima, split, n0, c0, begin, end, n, c, l, OPTIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = sums.dtype.element_ty
    total = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_L], A)
    largest = tl.full([BLOCK_N, BLOCK_C, BLOCK_L], LOWEST, A)
    for l0 in range(begin, end, BLOCK_L):
        offset, inside = map_offsets(n0, c0, l0, n, c, l, CHANNELS_LAST, ALIGNMENT, BLOCK_N, BLOCK_C, BLOCK_L)
        raw = tl.load(x + offset, inside, 0.0).to(A)
        u = before_squeeze(raw, scale, shift, c0, c, OPTIONS)
        if OPTIONS[SQUEEZE] != MAX:
            total += tl.where(inside, u, 0.0)
        if OPTIONS[SQUEEZE] != MEAN:
            largest = max_keep_nan(largest, tl.where(inside, u, LOWEST))
    at, valid = matrix_offsets(n0, c0, n, c, BLOCK_N, BLOCK_C)
    if OPTIONS[SQUEEZE] != MAX:
        tl.store(sums + split * n * c + at, tl.sum(total, 2), valid)
    if OPTIONS[SQUEEZE] != MEAN:
        tl.store(maxima + split * n * c + at, max_of_positions(largest), valid)


@triton.jit
def _finish_squeeze(
    sums, maxima, at, valid, splits, n, c, l, OPTIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Returns z [BLOCK_N, BLOCK_C], from the sums and maxima of all splits."""
    A: tl.constexpr = sums.dtype.element_ty
    z = tl.zeros([BLOCK_N, BLOCK_C], A)
    largest = tl.full([BLOCK_N, BLOCK_C], LOWEST, A)
    for split in range(splits):
        if OPTIONS[SQUEEZE] != MAX:
            z += tl.load(sums + split * n * c + at, valid, 0.0)
        if OPTIONS[SQUEEZE] != MEAN:
            largest = max_keep_nan(largest, tl.load(maxima + split * n * c + at, valid, 0.0))
    if OPTIONS[SQUEEZE] == MAX:
        z = largest
    else:
        z = z / l
        if OPTIONS[SQUEEZE] != MEAN:
            z = (z + largest) / 2
    return z


@triton.jit
def _hidden(
    sums, maxima, z, w1, b1, p1, n0, r0, splits, n, c, r, l, OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = sums.dtype.element_ty
    products = tl.zeros([BLOCK_N, BLOCK_R, BLOCK_K], A)
    for c0 in range(0, c, BLOCK_K):
        at, valid = matrix_offsets(n0, c0, n, c, BLOCK_N, BLOCK_K)
        v = _finish_squeeze(sums, maxima, at, valid, splits, n, c, l, OPTIONS, BLOCK_N, BLOCK_K)
        if r0 == 0:
            tl.store(z + at, v, valid)
        if w1 is not None:
            products += v[:, None, :] * load_weights(w1, r0, c0, r, c, False, BLOCK_R, BLOCK_K).to(A)
    if w1 is not None:
        at, valid = matrix_offsets(n0, r0, n, r, BLOCK_N, BLOCK_R)
        tl.store(p1 + at, add_bias(tl.sum(products, 2), b1, r0, r, BLOCK_R), valid)


@triton.jit
def _scale(
    x, residual, scale, shift, z, p1, w2, b2, p2, y, n0, c0, begin, end, n, c, r, l, OPTIONS: tl.constexpr,
    RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if p1 is not None:
        t = gemv(p1, w2, b2, n0, c0, n, c, r, OPTIONS[ACT], OPTIONS, False, BLOCK_N, BLOCK_C, BLOCK_K)
    else:
        t = gemv(z, w2, b2, n0, c0, n, c, c, IDENTITY, OPTIONS, False, BLOCK_N, BLOCK_C, BLOCK_K)
    if (p2 is not None) and (begin == 0):
        at, valid = matrix_offsets(n0, c0, n, c, BLOCK_N, BLOCK_C)
        tl.store(p2 + at, t, valid)
    s = activation(t, OPTIONS[GATE], OPTIONS[SLOPE], OPTIONS[OFFSET])
    for l0 in range(begin, end, BLOCK_L):
        offset, inside = map_offsets(n0, c0, l0, n, c, l, CHANNELS_LAST, ALIGNMENT, BLOCK_N, BLOCK_C, BLOCK_L)
        _, _, v = scale_add(x, residual, s, offset, inside, OPTIONS, RESIDUAL, scale, shift, c0, c)
        out = activation(v, OPTIONS[POST_ACT], OPTIONS[SLOPE], OPTIONS[OFFSET])
        tl.store(y + offset, out.to(y.dtype.element_ty), inside)


@triton.jit
def squeeze_kernel(
    x, scale, shift, sums, maxima, n, c, l, steps, OPTIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(c, BLOCK_C)
    n0 = block_start(tl.program_id(0) // blocks, BLOCK_N)
    c0 = block_start(tl.program_id(0) % blocks, BLOCK_C)
    split = tl.program_id(1).to(tl.int64)
    begin = block_start(split, BLOCK_L) * steps
    end = tl.minimum(begin + steps * BLOCK_L, l)
    _squeeze(
        x, scale, shift, sums, maxima, split, n0, c0, begin, end, n, c, l, OPTIONS,
        CHANNELS_LAST, ALIGNMENT, BLOCK_N, BLOCK_C, BLOCK_L,
    )  # fmt: skip


@triton.jit
def hidden_kernel(
    sums, maxima, z, w1, b1, p1, splits, n, c, r, l, OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n0 = block_start(tl.program_id(0), BLOCK_N)
    r0 = block_start(tl.program_id(1), BLOCK_R)
    _hidden(sums, maxima, z, w1, b1, p1, n0, r0, splits, n, c, r, l, OPTIONS, BLOCK_N, BLOCK_R, BLOCK_K)


@triton.jit
def scale_kernel(
    x, residual, scale, shift, z, p1, w2, b2, p2, y, n, c, r, l, steps, OPTIONS: tl.constexpr,
    RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(c, BLOCK_C)
    n0 = block_start(tl.program_id(0) // blocks, BLOCK_N)
    c0 = block_start(tl.program_id(0) % blocks, BLOCK_C)
    begin = block_start(tl.program_id(1), BLOCK_L) * steps
    end = tl.minimum(begin + steps * BLOCK_L, l)
    _scale(
        x, residual, scale, shift, z, p1, w2, b2, p2, y, n0, c0, begin, end, n, c, r, l, OPTIONS,
        RESIDUAL, CHANNELS_LAST, ALIGNMENT, BLOCK_N, BLOCK_C, BLOCK_L, BLOCK_K,
    )  # fmt: skip


@triton.jit
def forward_sample_kernel(
    x, residual, scale, shift, w1, b1, w2, b2, sums, maxima, z, p1, p2, y, n, c, r, l, OPTIONS: tl.constexpr,
    RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K1: tl.constexpr, BLOCK_K2: tl.constexpr,
):  # fmt: skip
    n0 = block_start(tl.program_id(0), 1)
    for c0 in range(0, c, BLOCK_C):
        _squeeze(
            x, scale, shift, sums, maxima, 0, n0, c0, 0, l, n, c, l, OPTIONS,
            CHANNELS_LAST, ALIGNMENT, 1, BLOCK_C, BLOCK_L,
        )  # fmt: skip
    tl.debug_barrier()
    for r0 in range(0, r, BLOCK_R):
        _hidden(sums, maxima, z, w1, b1, p1, n0, r0, 1, n, c, r, l, OPTIONS, 1, BLOCK_R, BLOCK_K1)
    # This barrier is also needed because y may be x: all threads must have read x before one writes y.
    tl.debug_barrier()
    for c0 in range(0, c, BLOCK_C):
        _scale(
            x, residual, scale, shift, z, p1, w2, b2, p2, y, n0, c0, 0, l, n, c, r, l, OPTIONS,
            RESIDUAL, CHANNELS_LAST, ALIGNMENT, 1, BLOCK_C, BLOCK_L, BLOCK_K2,
        )  # fmt: skip
