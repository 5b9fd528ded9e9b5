"""The gradients of forward.py, from g, x, the weights and what forward saved: z, p1, p2.

    dv = g post_act'(v)    v = u s + residual, recomputed from x; dresidual = dv
    ds = sum_l dv u        dp2 = ds gate'(p2)             dw2 = dp2^T h   db2 = sum_n dp2
    dh = dp2 W2            dp1 = dh act'(p1)              dw1 = dp1^T z   db1 = sum_n dp1
    dz = dp1 W1            du = dv s + dz / L (mean), or dz / ties where u is the maximum
    dx = du pre_act'(x)

The steps mirror those of forward and also take one launch or three. One more launch computes all weight gradients:

    kernel                    computes                            writes                   reads
    backward_reduce_kernel    ds, the maximum of u, its ties      each [splits, N, C]      g, x
    backward_hidden_kernel    dp2, dp1                            dp2 [N, C], dp1 [N, R]   w2
    backward_apply_kernel     dz, dx, dresidual                   dx, dresidual            w1, g and x again
    weight_gradients_kernel   dw1, db1, dw2, db2                  all four                 dp1, dp2, z, p1

If a sample is small, one program of backward_sample_kernel does the first three steps for it. The weight gradients are
sums over the samples in ascending order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import IDENTITY, activation, activation_backward
from .tiles import (
    ACT,
    GATE,
    LOWEST,
    MAX,
    MEAN,
    MEAN_MAX,
    OFFSET,
    POST_ACT,
    PRE_ACT,
    SLOPE,
    SQUEEZE,
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
def _gate(p2, n0, c0, n, c, OPTIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    at, valid = matrix_offsets(n0, c0, n, c, BLOCK_N, BLOCK_C)
    return activation(tl.load(p2 + at, valid, 0.0), OPTIONS[GATE], OPTIONS[SLOPE], OPTIONS[OFFSET])


@triton.jit
def _reduce(
    g, x, residual, p2, ds, maxima, ties, split, n0, c0, begin, end, n, c, l, OPTIONS: tl.constexpr,
    RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = ds.dtype.element_ty
    s = _gate(p2, n0, c0, n, c, OPTIONS, BLOCK_N, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_L], A)
    largest = tl.full([BLOCK_N, BLOCK_C, BLOCK_L], LOWEST, A)
    count = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_L], A)
    for l0 in range(begin, end, BLOCK_L):
        offset, inside = map_offsets(n0, c0, l0, n, c, l, CHANNELS_LAST, ALIGNMENT, BLOCK_N, BLOCK_C, BLOCK_L)
        _, u, v = scale_add(x, residual, s, offset, inside, OPTIONS, RESIDUAL)
        dv = activation_backward(
            tl.load(g + offset, inside, 0.0).to(A), v, OPTIONS[POST_ACT], OPTIONS[SLOPE], OPTIONS[OFFSET]
        )
        total += tl.where(inside, dv * u, 0.0)
        if OPTIONS[SQUEEZE] != MEAN:
            u = tl.where(inside, u, LOWEST)
            again = tl.where(u == largest, count + inside.to(A), count)
            count = tl.where((u > largest) | (u != u), 1.0, again)
            largest = max_keep_nan(largest, u)
    at, valid = matrix_offsets(n0, c0, n, c, BLOCK_N, BLOCK_C)
    at += split * n * c
    tl.store(ds + at, tl.sum(total, 2), valid)
    if OPTIONS[SQUEEZE] != MEAN:
        top = max_of_positions(largest)
        tl.store(maxima + at, top, valid)
        tl.store(ties + at, tl.sum(tl.where(largest == top[:, :, None], count, 0.0), 2), valid)


@triton.jit
def _hidden(
    ds, p1, p2, w2, dp1, dp2, n0, r0, splits, n, c, r, OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = ds.dtype.element_ty
    products = tl.zeros([BLOCK_N, BLOCK_R, BLOCK_K], A)
    for c0 in range(0, c, BLOCK_K):
        at, valid = matrix_offsets(n0, c0, n, c, BLOCK_N, BLOCK_K)
        total = tl.zeros([BLOCK_N, BLOCK_K], A)
        for split in range(splits):
            total += tl.load(ds + split * n * c + at, valid, 0.0)
        t = tl.load(p2 + at, valid, 0.0)
        d = activation_backward(total, t, OPTIONS[GATE], OPTIONS[SLOPE], OPTIONS[OFFSET])
        if r0 == 0:
            tl.store(dp2 + at, d, valid)
        if p1 is not None:
            products += d[:, None, :] * load_weights(w2, r0, c0, r, c, True, BLOCK_R, BLOCK_K).to(A)
    if p1 is not None:
        at, valid = matrix_offsets(n0, r0, n, r, BLOCK_N, BLOCK_R)
        t = tl.load(p1 + at, valid, 0.0)
        d = activation_backward(tl.sum(products, 2), t, OPTIONS[ACT], OPTIONS[SLOPE], OPTIONS[OFFSET])
        tl.store(dp1 + at, d, valid)


@triton.jit
def _apply(
    g, x, residual, p2, dp1, dp2, w1, w2, maxima, ties, dx, dresidual,
    n0, c0, begin, end, splits, n, c, r, l, OPTIONS: tl.constexpr,
    RESIDUAL: tl.constexpr, RESIDUAL_IS_X: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = p2.dtype.element_ty
    s = _gate(p2, n0, c0, n, c, OPTIONS, BLOCK_N, BLOCK_C)
    if w1 is not None:
        dz = gemv(dp1, w1, None, n0, c0, n, c, r, IDENTITY, OPTIONS, True, BLOCK_N, BLOCK_C, BLOCK_K)
    else:
        dz = gemv(dp2, w2, None, n0, c0, n, c, c, IDENTITY, OPTIONS, True, BLOCK_N, BLOCK_C, BLOCK_K)
    if OPTIONS[SQUEEZE] == MEAN_MAX:
        dz = dz / 2
    if OPTIONS[SQUEEZE] != MEAN:
        top = tl.full([BLOCK_N, BLOCK_C], LOWEST, A)
        count = tl.zeros([BLOCK_N, BLOCK_C], A)
        at, valid = matrix_offsets(n0, c0, n, c, BLOCK_N, BLOCK_C)
        for split in range(splits):
            other = tl.load(maxima + split * n * c + at, valid, 0.0)
            others = tl.load(ties + split * n * c + at, valid, 0.0)
            count = tl.where(other > top, others, tl.where(other == top, count + others, count))
            top = max_keep_nan(top, other)
        # A NaN maximum equals no position, so PyTorch divides by 0 ties: mask * dz / ties is NaN along the whole row.
        dz_per_maximum = tl.where(top == top, dz / count, top)
    for l0 in range(begin, end, BLOCK_L):
        offset, inside = map_offsets(n0, c0, l0, n, c, l, CHANNELS_LAST, ALIGNMENT, BLOCK_N, BLOCK_C, BLOCK_L)
        raw, u, v = scale_add(x, residual, s, offset, inside, OPTIONS, RESIDUAL)
        dv = activation_backward(
            tl.load(g + offset, inside, 0.0).to(A), v, OPTIONS[POST_ACT], OPTIONS[SLOPE], OPTIONS[OFFSET]
        )
        if dresidual is not None:
            tl.store(dresidual + offset, dv.to(dresidual.dtype.element_ty), inside)
        if dx is not None:
            du = dv * s[:, :, None]
            if OPTIONS[SQUEEZE] != MAX:
                du += (dz / l)[:, :, None]
            if OPTIONS[SQUEEZE] != MEAN:
                # A product, as in PyTorch: an infinite or NaN dz makes the other positions NaN.
                du += (u == top[:, :, None]).to(A) * dz_per_maximum[:, :, None]
            d = activation_backward(du, raw, OPTIONS[PRE_ACT], OPTIONS[SLOPE], OPTIONS[OFFSET])
            if RESIDUAL_IS_X:
                d += dv
            tl.store(dx + offset, d.to(dx.dtype.element_ty), inside)


@triton.jit
def backward_reduce_kernel(
    g, x, residual, p2, ds, maxima, ties, n, c, l, steps, OPTIONS: tl.constexpr,
    RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(c, BLOCK_C)
    n0 = block_start(tl.program_id(0) // blocks, BLOCK_N)
    c0 = block_start(tl.program_id(0) % blocks, BLOCK_C)
    split = tl.program_id(1).to(tl.int64)
    begin = block_start(split, BLOCK_L) * steps
    end = tl.minimum(begin + steps * BLOCK_L, l)
    _reduce(
        g, x, residual, p2, ds, maxima, ties, split, n0, c0, begin, end, n, c, l, OPTIONS,
        RESIDUAL, CHANNELS_LAST, ALIGNMENT, BLOCK_N, BLOCK_C, BLOCK_L,
    )  # fmt: skip


@triton.jit
def backward_hidden_kernel(
    ds, p1, p2, w2, dp1, dp2, splits, n, c, r, OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n0 = block_start(tl.program_id(0), BLOCK_N)
    r0 = block_start(tl.program_id(1), BLOCK_R)
    _hidden(ds, p1, p2, w2, dp1, dp2, n0, r0, splits, n, c, r, OPTIONS, BLOCK_N, BLOCK_R, BLOCK_K)


@triton.jit
def backward_apply_kernel(
    g, x, residual, p2, dp1, dp2, w1, w2, maxima, ties, dx, dresidual,
    splits, n, c, r, l, steps, OPTIONS: tl.constexpr,
    RESIDUAL: tl.constexpr, RESIDUAL_IS_X: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(c, BLOCK_C)
    n0 = block_start(tl.program_id(0) // blocks, BLOCK_N)
    c0 = block_start(tl.program_id(0) % blocks, BLOCK_C)
    begin = block_start(tl.program_id(1), BLOCK_L) * steps
    end = tl.minimum(begin + steps * BLOCK_L, l)
    _apply(
        g, x, residual, p2, dp1, dp2, w1, w2, maxima, ties, dx, dresidual,
        n0, c0, begin, end, splits, n, c, r, l, OPTIONS,
        RESIDUAL, RESIDUAL_IS_X, CHANNELS_LAST, ALIGNMENT, BLOCK_N, BLOCK_C, BLOCK_L, BLOCK_K,
    )  # fmt: skip


@triton.jit
def backward_sample_kernel(
    g, x, residual, p1, p2, w1, w2, ds, maxima, ties, dp1, dp2, dx, dresidual, n, c, r, l, OPTIONS: tl.constexpr,
    RESIDUAL: tl.constexpr, RESIDUAL_IS_X: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K1: tl.constexpr, BLOCK_K2: tl.constexpr,
):  # fmt: skip
    n0 = block_start(tl.program_id(0), 1)
    for c0 in range(0, c, BLOCK_C):
        _reduce(
            g, x, residual, p2, ds, maxima, ties, 0, n0, c0, 0, l, n, c, l, OPTIONS,
            RESIDUAL, CHANNELS_LAST, ALIGNMENT, 1, BLOCK_C, BLOCK_L,
        )  # fmt: skip
    tl.debug_barrier()
    for r0 in range(0, r, BLOCK_R):
        _hidden(ds, p1, p2, w2, dp1, dp2, n0, r0, 1, n, c, r, OPTIONS, 1, BLOCK_R, BLOCK_K1)
    if (dx is not None) or (dresidual is not None):
        tl.debug_barrier()
        for c0 in range(0, c, BLOCK_C):
            _apply(
                g, x, residual, p2, dp1, dp2, w1, w2, maxima, ties, dx, dresidual,
                n0, c0, 0, l, 1, n, c, r, l, OPTIONS,
                RESIDUAL, RESIDUAL_IS_X, CHANNELS_LAST, ALIGNMENT, 1, BLOCK_C, BLOCK_L, BLOCK_K2,
            )  # fmt: skip
