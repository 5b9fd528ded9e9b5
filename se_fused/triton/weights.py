"""dw2 = dp2^T act(p1), db2 = sum_n dp2, dw1 = dp1^T z, db1 = sum_n dp1, in one launch.

One program computes each tile of a matrix. It takes the samples in ascending order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import IDENTITY, activation
from .tiles import ACT, OFFSET, SLOPE, block_start, matrix_offsets


@triton.jit
def _sum_outer_products(
    a, b, dw, db, tile, n, height, width, ACTIVATION: tl.constexpr, OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One tile of dw[i, j] = sum_n a[n, i] f(b[n, j]), where ACTIVATION is f, and of db[i] = sum_n a[n, i]."""
    A: tl.constexpr = a.dtype.element_ty
    columns = tl.cdiv(width, BLOCK_J)
    i0 = block_start(tile // columns, BLOCK_I)
    j0 = block_start(tile % columns, BLOCK_J)
    products = tl.zeros([BLOCK_N, BLOCK_I, BLOCK_J], A)
    sums = tl.zeros([BLOCK_N, BLOCK_I], A)
    for n0 in range(0, n, BLOCK_N):
        at, valid = matrix_offsets(n0, i0, n, height, BLOCK_N, BLOCK_I)
        left = tl.load(a + at, valid, 0.0)
        at, valid = matrix_offsets(n0, j0, n, width, BLOCK_N, BLOCK_J)
        right = activation(tl.load(b + at, valid, 0.0), ACTIVATION, OPTIONS[SLOPE], OPTIONS[OFFSET])
        products += left[:, :, None] * right[:, None, :]
        sums += left
    if dw is not None:
        at, valid = matrix_offsets(i0, j0, height, width, BLOCK_I, BLOCK_J)
        tl.store(dw + at, tl.sum(products, 0).to(dw.dtype.element_ty), valid)
    if (db is not None) and (j0 == 0):
        i = i0 + tl.arange(0, BLOCK_I)
        tl.store(db + i, tl.sum(sums, 0).to(db.dtype.element_ty), i < height)


@triton.jit
def weight_gradients_kernel(
    dp1, dp2, z, p1, dw1, db1, dw2, db2, tiles2, n, c, r, OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The first `tiles2` programs compute dw2 and db2, the others dw1 and db1."""
    i = tl.program_id(0)
    if i < tiles2:
        if p1 is not None:
            _sum_outer_products(dp2, p1, dw2, db2, i, n, c, r, OPTIONS[ACT], OPTIONS, BLOCK_N, BLOCK_I, BLOCK_J)
        else:
            _sum_outer_products(dp2, z, dw2, db2, i, n, c, c, IDENTITY, OPTIONS, BLOCK_N, BLOCK_I, BLOCK_J)
    else:
        if p1 is not None:
            _sum_outer_products(dp1, z, dw1, db1, i - tiles2, n, r, c, IDENTITY, OPTIONS, BLOCK_N, BLOCK_I, BLOCK_J)
