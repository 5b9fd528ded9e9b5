"""y = post_act(u * s + residual), all of it, in one launch or three.

    squeeze   sums and maxima of u over a span of positions   [splits, N, C]   reads x
    hidden    z from them, p1 = W1 z + b1                     [N, C], [N, R]   reads w1
    scale     p2 = W2 act(p1) + b2, s = gate(p2), y                            reads w2, x again; writes y

Where a sample is small, one program does the three in turn (`forward_sample_kernel`): what it wrote in one step, its
other threads read in the next, behind a barrier. The one-FC form has no p1, and W2 z in place of W2 act(p1).
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
    PRE_ACT,
    SLOPE,
    SQUEEZE,
    add_bias,
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
def _squeeze(
    x, sums, maxima, split, n0, c0, begin, end, n, c, l, codes: tl.constexpr,
    LAST: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = sums.dtype.element_ty
    total = tl.zeros([BN, BC, BL], A)
    largest = tl.full([BN, BC, BL], LOWEST, A)
    for l0 in range(begin, end, BL):
        offset, inside = tile(n0, c0, l0, n, c, l, LAST, ALIGN, BN, BC, BL)
        raw = tl.load(x + offset, inside, 0.0).to(A)
        u = activation(raw, codes[PRE_ACT], codes[SLOPE], codes[OFFSET])
        if codes[SQUEEZE] != MAX:
            total += tl.where(inside, u, 0.0)
        if codes[SQUEEZE] != MEAN:
            largest = max_keep_nan(largest, tl.where(inside, u, LOWEST))
    at, valid = rows(n0, c0, n, c, BN, BC)
    if codes[SQUEEZE] != MAX:
        tl.store(sums + split * n * c + at, tl.sum(total, 2), valid)
    if codes[SQUEEZE] != MEAN:
        tl.store(maxima + split * n * c + at, max_of_positions(largest), valid)


@triton.jit
def _squeezed(sums, maxima, at, valid, splits, n, c, l, codes: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """z [BN, BC]."""
    A: tl.constexpr = sums.dtype.element_ty
    z = tl.zeros([BN, BC], A)
    largest = tl.full([BN, BC], LOWEST, A)
    for split in range(splits):
        if codes[SQUEEZE] != MAX:
            z += tl.load(sums + split * n * c + at, valid, 0.0)
        if codes[SQUEEZE] != MEAN:
            largest = max_keep_nan(largest, tl.load(maxima + split * n * c + at, valid, 0.0))
    if codes[SQUEEZE] == MAX:
        z = largest
    else:
        z = z / l
        if codes[SQUEEZE] != MEAN:
            z = (z + largest) / 2
    return z


@triton.jit
def _hidden(
    sums, maxima, z, w1, b1, p1, n0, r0, splits, n, c, r, l, codes: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = sums.dtype.element_ty
    products = tl.zeros([BN, BR, BK], A)
    for c0 in range(0, c, BK):
        at, valid = rows(n0, c0, n, c, BN, BK)
        v = _squeezed(sums, maxima, at, valid, splits, n, c, l, codes, BN, BK)
        if r0 == 0:
            tl.store(z + at, v, valid)
        if w1 is not None:
            products += v[:, None, :] * matrix(w1, r0, c0, r, c, False, BR, BK).to(A)
    if w1 is not None:
        at, valid = rows(n0, r0, n, r, BN, BR)
        tl.store(p1 + at, add_bias(tl.sum(products, 2), b1, r0, r, BR), valid)


@triton.jit
def _scale(
    x, residual, z, p1, w2, b2, p2, y, n0, c0, begin, end, n, c, r, l, codes: tl.constexpr,
    RESIDUAL: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    if p1 is not None:
        t = product(p1, w2, b2, n0, c0, n, c, r, codes[ACT], codes, False, BN, BC, BK)
    else:
        t = product(z, w2, b2, n0, c0, n, c, c, IDENTITY, codes, False, BN, BC, BK)
    if (p2 is not None) and (begin == 0):
        at, valid = rows(n0, c0, n, c, BN, BC)
        tl.store(p2 + at, t, valid)
    s = activation(t, codes[GATE], codes[SLOPE], codes[OFFSET])
    for l0 in range(begin, end, BL):
        offset, inside = tile(n0, c0, l0, n, c, l, LAST, ALIGN, BN, BC, BL)
        _, _, v = blend(x, residual, s, offset, inside, codes, RESIDUAL)
        out = activation(v, codes[POST_ACT], codes[SLOPE], codes[OFFSET])
        tl.store(y + offset, out.to(y.dtype.element_ty), inside)


@triton.jit
def squeeze_kernel(
    x, sums, maxima, n, c, l, steps, codes: tl.constexpr,
    LAST: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(c, BC)
    n0 = block(tl.program_id(0) // blocks, BN)
    c0 = block(tl.program_id(0) % blocks, BC)
    split = tl.program_id(1).to(tl.int64)
    begin = block(split, BL) * steps
    end = tl.minimum(begin + steps * BL, l)
    _squeeze(x, sums, maxima, split, n0, c0, begin, end, n, c, l, codes, LAST, ALIGN, BN, BC, BL)


@triton.jit
def hidden_kernel(
    sums, maxima, z, w1, b1, p1, splits, n, c, r, l, codes: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n0 = block(tl.program_id(0), BN)
    r0 = block(tl.program_id(1), BR)
    _hidden(sums, maxima, z, w1, b1, p1, n0, r0, splits, n, c, r, l, codes, BN, BR, BK)


@triton.jit
def scale_kernel(
    x, residual, z, p1, w2, b2, p2, y, n, c, r, l, steps, codes: tl.constexpr,
    RESIDUAL: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(c, BC)
    n0 = block(tl.program_id(0) // blocks, BN)
    c0 = block(tl.program_id(0) % blocks, BC)
    begin = block(tl.program_id(1), BL) * steps
    end = tl.minimum(begin + steps * BL, l)
    _scale(
        x, residual, z, p1, w2, b2, p2, y, n0, c0, begin, end, n, c, r, l, codes,
        RESIDUAL, LAST, ALIGN, BN, BC, BL, BK,
    )  # fmt: skip


@triton.jit
def forward_sample_kernel(
    x, residual, w1, b1, w2, b2, sums, maxima, z, p1, p2, y, n, c, r, l, codes: tl.constexpr,
    RESIDUAL: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    BC: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr, BKC: tl.constexpr, BKR: tl.constexpr,
):  # fmt: skip
    n0 = block(tl.program_id(0), 1)
    for c0 in range(0, c, BC):
        _squeeze(x, sums, maxima, 0, n0, c0, 0, l, n, c, l, codes, LAST, ALIGN, 1, BC, BL)
    tl.debug_barrier()
    for r0 in range(0, r, BR):
        _hidden(sums, maxima, z, w1, b1, p1, n0, r0, 1, n, c, r, l, codes, 1, BR, BKC)
    # Also because y may be x, which all threads must have read.
    tl.debug_barrier()
    for c0 in range(0, c, BC):
        _scale(
            x, residual, z, p1, w2, b2, p2, y, n0, c0, 0, l, n, c, r, l, codes,
            RESIDUAL, LAST, ALIGN, 1, BC, BL, BKR,
        )  # fmt: skip
