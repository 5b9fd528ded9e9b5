"""The gradients of forward.py, from g, x, the weights and what forward saved: z, p1, p2.

    dv = g post_act'(v)    v = u s + residual, computed again from x; dresidual = dv
    ds = sum_l dv u        dp2 = ds gate'(p2)             dw2 = dp2^T h   db2 = sum_n dp2
    dh = dp2 W2            dp1 = dh act'(p1)              dw1 = dp1^T z   db1 = sum_n dp1
    dz = dp1 W1            du = dv s + dz / L (mean), or dz / ties where u is the maximum
    dx = du pre_act'(x)

The steps mirror forward's, in one launch or three, and one more launch for all the weights:

    reduce       ds, and for the maximum its value and ties   [splits, N, C]   reads g, x
    hidden       dp2, dp1                                     [N, C], [N, R]   reads w2
    apply        dz; dx, dresidual                                             reads w1, and g and x again
    weights      dw1, db1, dw2, db2                                            samples in their order
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
    blend,
    block,
    matrix,
    max_keep_nan,
    max_of_positions,
    product,
    rows,
    tile,
)


@triton.jit
def _gate(p2, n0, c0, n, c, codes: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    at, valid = rows(n0, c0, n, c, BN, BC)
    return activation(tl.load(p2 + at, valid, 0.0), codes[GATE], codes[SLOPE], codes[OFFSET])


@triton.jit
def _reduce(
    g, x, residual, p2, ds, maxima, ties, split, n0, c0, begin, end, n, c, l, codes: tl.constexpr,
    RESIDUAL: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = ds.dtype.element_ty
    s = _gate(p2, n0, c0, n, c, codes, BN, BC)
    total = tl.zeros([BN, BC, BL], A)
    largest = tl.full([BN, BC, BL], LOWEST, A)
    count = tl.zeros([BN, BC, BL], A)
    for l0 in range(begin, end, BL):
        offset, inside = tile(n0, c0, l0, n, c, l, LAST, ALIGN, BN, BC, BL)
        _, u, v = blend(x, residual, s, offset, inside, codes, RESIDUAL)
        dv = activation_backward(
            tl.load(g + offset, inside, 0.0).to(A), v, codes[POST_ACT], codes[SLOPE], codes[OFFSET]
        )
        total += tl.where(inside, dv * u, 0.0)
        if codes[SQUEEZE] != MEAN:
            u = tl.where(inside, u, LOWEST)
            again = tl.where(u == largest, count + inside.to(A), count)
            count = tl.where((u > largest) | (u != u), 1.0, again)
            largest = max_keep_nan(largest, u)
    at, valid = rows(n0, c0, n, c, BN, BC)
    at += split * n * c
    tl.store(ds + at, tl.sum(total, 2), valid)
    if codes[SQUEEZE] != MEAN:
        top = max_of_positions(largest)
        tl.store(maxima + at, top, valid)
        tl.store(ties + at, tl.sum(tl.where(largest == top[:, :, None], count, 0.0), 2), valid)


@triton.jit
def _hidden(
    ds, p1, p2, w2, dp1, dp2, n0, r0, splits, n, c, r, codes: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = ds.dtype.element_ty
    products = tl.zeros([BN, BR, BK], A)
    for c0 in range(0, c, BK):
        at, valid = rows(n0, c0, n, c, BN, BK)
        total = tl.zeros([BN, BK], A)
        for split in range(splits):
            total += tl.load(ds + split * n * c + at, valid, 0.0)
        t = tl.load(p2 + at, valid, 0.0)
        d = activation_backward(total, t, codes[GATE], codes[SLOPE], codes[OFFSET])
        if r0 == 0:
            tl.store(dp2 + at, d, valid)
        if p1 is not None:
            products += d[:, None, :] * matrix(w2, r0, c0, r, c, True, BR, BK).to(A)
    if p1 is not None:
        at, valid = rows(n0, r0, n, r, BN, BR)
        t = tl.load(p1 + at, valid, 0.0)
        d = activation_backward(tl.sum(products, 2), t, codes[ACT], codes[SLOPE], codes[OFFSET])
        tl.store(dp1 + at, d, valid)


@triton.jit
def _apply(
    g, x, residual, p2, dp1, dp2, w1, w2, maxima, ties, dx, dresidual,
    n0, c0, begin, end, splits, n, c, r, l, codes: tl.constexpr,
    RESIDUAL: tl.constexpr, TO_X: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = p2.dtype.element_ty
    s = _gate(p2, n0, c0, n, c, codes, BN, BC)
    if w1 is not None:
        dz = product(dp1, w1, None, n0, c0, n, c, r, IDENTITY, codes, True, BN, BC, BK)
    else:
        dz = product(dp2, w2, None, n0, c0, n, c, c, IDENTITY, codes, True, BN, BC, BK)
    if codes[SQUEEZE] == MEAN_MAX:
        dz = dz / 2
    if codes[SQUEEZE] != MEAN:
        top = tl.full([BN, BC], LOWEST, A)
        count = tl.zeros([BN, BC], A)
        at, valid = rows(n0, c0, n, c, BN, BC)
        for split in range(splits):
            other = tl.load(maxima + split * n * c + at, valid, 0.0)
            others = tl.load(ties + split * n * c + at, valid, 0.0)
            count = tl.where(other > top, others, tl.where(other == top, count + others, count))
            top = max_keep_nan(top, other)
        # A NaN maximum has no ties in PyTorch, so that its mask * dz / ties is NaN along the whole row.
        share = tl.where(top == top, dz / count, top)
    for l0 in range(begin, end, BL):
        offset, inside = tile(n0, c0, l0, n, c, l, LAST, ALIGN, BN, BC, BL)
        raw, u, v = blend(x, residual, s, offset, inside, codes, RESIDUAL)
        dv = activation_backward(
            tl.load(g + offset, inside, 0.0).to(A), v, codes[POST_ACT], codes[SLOPE], codes[OFFSET]
        )
        if dresidual is not None:
            tl.store(dresidual + offset, dv.to(dresidual.dtype.element_ty), inside)
        if dx is not None:
            du = dv * s[:, :, None]
            if codes[SQUEEZE] != MAX:
                du += (dz / l)[:, :, None]
            if codes[SQUEEZE] != MEAN:
                # A product, as PyTorch's: an infinite or NaN dz makes the other positions NaN.
                du += (u == top[:, :, None]).to(A) * share[:, :, None]
            d = activation_backward(du, raw, codes[PRE_ACT], codes[SLOPE], codes[OFFSET])
            if TO_X:
                d += dv
            tl.store(dx + offset, d.to(dx.dtype.element_ty), inside)


@triton.jit
def backward_reduce_kernel(
    g, x, residual, p2, ds, maxima, ties, n, c, l, steps, codes: tl.constexpr,
    RESIDUAL: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(c, BC)
    n0 = block(tl.program_id(0) // blocks, BN)
    c0 = block(tl.program_id(0) % blocks, BC)
    split = tl.program_id(1).to(tl.int64)
    begin = block(split, BL) * steps
    end = tl.minimum(begin + steps * BL, l)
    _reduce(
        g, x, residual, p2, ds, maxima, ties, split, n0, c0, begin, end, n, c, l, codes,
        RESIDUAL, LAST, ALIGN, BN, BC, BL,
    )  # fmt: skip


@triton.jit
def backward_hidden_kernel(
    ds, p1, p2, w2, dp1, dp2, splits, n, c, r, codes: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n0 = block(tl.program_id(0), BN)
    r0 = block(tl.program_id(1), BR)
    _hidden(ds, p1, p2, w2, dp1, dp2, n0, r0, splits, n, c, r, codes, BN, BR, BK)


@triton.jit
def backward_apply_kernel(
    g, x, residual, p2, dp1, dp2, w1, w2, maxima, ties, dx, dresidual,
    splits, n, c, r, l, steps, codes: tl.constexpr,
    RESIDUAL: tl.constexpr, TO_X: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(c, BC)
    n0 = block(tl.program_id(0) // blocks, BN)
    c0 = block(tl.program_id(0) % blocks, BC)
    begin = block(tl.program_id(1), BL) * steps
    end = tl.minimum(begin + steps * BL, l)
    _apply(
        g, x, residual, p2, dp1, dp2, w1, w2, maxima, ties, dx, dresidual,
        n0, c0, begin, end, splits, n, c, r, l, codes, RESIDUAL, TO_X, LAST, ALIGN, BN, BC, BL, BK,
    )  # fmt: skip


@triton.jit
def backward_sample_kernel(
    g, x, residual, p1, p2, w1, w2, ds, maxima, ties, dp1, dp2, dx, dresidual, n, c, r, l, codes: tl.constexpr,
    RESIDUAL: tl.constexpr, TO_X: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    BC: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr, BKC: tl.constexpr, BKR: tl.constexpr,
):  # fmt: skip
    n0 = block(tl.program_id(0), 1)
    for c0 in range(0, c, BC):
        _reduce(
            g, x, residual, p2, ds, maxima, ties, 0, n0, c0, 0, l, n, c, l, codes,
            RESIDUAL, LAST, ALIGN, 1, BC, BL,
        )  # fmt: skip
    tl.debug_barrier()
    for r0 in range(0, r, BR):
        _hidden(ds, p1, p2, w2, dp1, dp2, n0, r0, 1, n, c, r, codes, 1, BR, BKC)
    if (dx is not None) or (dresidual is not None):
        tl.debug_barrier()
        for c0 in range(0, c, BC):
            _apply(
                g, x, residual, p2, dp1, dp2, w1, w2, maxima, ties, dx, dresidual,
                n0, c0, 0, l, 1, n, c, r, l, codes, RESIDUAL, TO_X, LAST, ALIGN, 1, BC, BL, BKR,
            )  # fmt: skip
