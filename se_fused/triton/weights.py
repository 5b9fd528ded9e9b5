"""dw2 = dp2^T act(p1), db2 = sum_n dp2, dw1 = dp1^T z, db1 = sum_n dp1, in one launch.

Each tile of a matrix belongs to one program, which takes the samples in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import IDENTITY, activation
from .tiles import ACT, OFFSET, SLOPE, block, rows


@triton.jit
def _outer(
    a, b, dw, db, tile, n, height, width, CODE: tl.constexpr, codes: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """dw[i, j] = sum_n a[n, i] f(b[n, j]) with the activation CODE as f; db[i] = sum_n a[n, i]."""
    A: tl.constexpr = a.dtype.element_ty
    across = tl.cdiv(width, BJ)
    i0 = block(tile // across, BI)
    j0 = block(tile % across, BJ)
    products = tl.zeros([BN, BI, BJ], A)
    sums = tl.zeros([BN, BI], A)
    for n0 in range(0, n, BN):
        at, valid = rows(n0, i0, n, height, BN, BI)
        left = tl.load(a + at, valid, 0.0)
        at, valid = rows(n0, j0, n, width, BN, BJ)
        right = activation(tl.load(b + at, valid, 0.0), CODE, codes[SLOPE], codes[OFFSET])
        products += left[:, :, None] * right[:, None, :]
        sums += left
    if dw is not None:
        at, valid = rows(i0, j0, height, width, BI, BJ)
        tl.store(dw + at, tl.sum(products, 0).to(dw.dtype.element_ty), valid)
    if (db is not None) and (j0 == 0):
        i = i0 + tl.arange(0, BI)
        tl.store(db + i, tl.sum(sums, 0).to(db.dtype.element_ty), i < height)


@triton.jit
def weight_gradients_kernel(
    dp1, dp2, z, p1, dw1, db1, dw2, db2, tiles2, n, c, r, codes: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """The first `tiles2` programs belong to dw2, the others to dw1."""
    i = tl.program_id(0)
    if i < tiles2:
        if p1 is not None:
            _outer(dp2, p1, dw2, db2, i, n, c, r, codes[ACT], codes, BN, BI, BJ)
        else:
            _outer(dp2, z, dw2, db2, i, n, c, c, IDENTITY, codes, BN, BI, BJ)
    else:
        if p1 is not None:
            _outer(dp1, z, dw1, db1, i - tiles2, n, r, c, IDENTITY, codes, BN, BI, BJ)
