"""What the kernels share: where a tile of a map lies, products with the weights, and maxima that keep NaN.

A tile is [BN samples, BC channels, BL positions] whatever the order of the map; what is known of its channels is
[BN, BC]. `codes` is `se_fused.options.Options`; its places are named below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activation

ACT = tl.constexpr(0)
GATE = tl.constexpr(1)
SLOPE = tl.constexpr(2)
OFFSET = tl.constexpr(3)
SQUEEZE = tl.constexpr(4)
PRE_ACT = tl.constexpr(5)
POST_ACT = tl.constexpr(6)

MEAN = tl.constexpr(0)
MAX = tl.constexpr(1)
MEAN_MAX = tl.constexpr(2)

# How `residual` is given.
NO_RESIDUAL = tl.constexpr(0)
MAP = tl.constexpr(1)
X_ITSELF = tl.constexpr(2)

LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def block(i, per: tl.constexpr):
    """Where block i begins, in 64 bits, for everything that is multiplied with it may exceed 32."""
    return i.to(tl.int64) * per


@triton.jit
def rows(n0, i0, samples, count, BN: tl.constexpr, BI: tl.constexpr):
    """Offsets and mask [BN, BI] into [samples, count]."""
    n = tl.cast(n0, tl.int64) + tl.arange(0, BN)[:, None]
    i = i0 + tl.arange(0, BI)[None, :]
    return n * count + i, (n < samples) & (i < count)


@triton.jit
def tile(
    n0, c0, l0, n, c, l,
    LAST: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Offsets and mask [BN, BC, BL] into a map. ALIGN, known to the compiler, divides the contiguous extent."""
    i = n0 + tl.arange(0, BN)[:, None, None]
    j = c0 + tl.arange(0, BC)[None, :, None]
    k = l0 + tl.arange(0, BL)[None, None, :]
    if LAST:
        c = c // ALIGN * ALIGN
        offset = (i * l + k) * c + j
    else:
        l = l // ALIGN * ALIGN
        offset = (i * c + j) * l + k
    return offset, (i < n) & (j < c) & (k < l)


@triton.jit
def max_keep_nan(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def max_of_positions(a):
    """[BN, BC, BL] to [BN, BC]. The reduction itself drops NaN, so NaN is looked for apart."""
    nan = a != a
    largest = tl.max(tl.where(nan, LOWEST, a), 2)
    return tl.where(tl.max(nan.to(tl.int32), 2) > 0, float("nan"), largest)


@triton.jit
def matrix(w, i0, k0, count, depth, TRANSPOSED: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr):
    """[1, BI, BK] of w [count, depth], or of w [depth, count] if TRANSPOSED; 0 outside."""
    i = tl.cast(i0, tl.int64) + tl.arange(0, BI)[None, :, None]
    k = tl.cast(k0, tl.int64) + tl.arange(0, BK)[None, None, :]
    offset = k * count + i if TRANSPOSED else i * depth + k
    return tl.load(w + offset, (i < count) & (k < depth), 0.0)


@triton.jit
def add_bias(v, bias, i0, count, BI: tl.constexpr):
    """v [BN, BI] + bias, where there is one."""
    if bias is not None:
        i = i0 + tl.arange(0, BI)
        v += tl.load(bias + i, i < count, 0.0).to(v.dtype)[None, :]
    return v


@triton.jit
def product(
    v, w, bias, n0, i0, n, count, depth, CODE: tl.constexpr, codes: tl.constexpr,
    TRANSPOSED: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BN, BI]: bias[i] + sum_k a(v[n, k]) w[i, k], or w[k, i] if TRANSPOSED, with the activation CODE as a."""
    A: tl.constexpr = v.dtype.element_ty
    sums = tl.zeros([BN, BI, BK], A)
    for k0 in range(0, depth, BK):
        at, valid = rows(n0, k0, n, depth, BN, BK)
        a = activation(tl.load(v + at, valid, 0.0), CODE, codes[SLOPE], codes[OFFSET])
        sums += a[:, None, :] * matrix(w, i0, k0, count, depth, TRANSPOSED, BI, BK).to(A)
    out = tl.sum(sums, 2)
    return add_bias(out, bias, i0, count, BI)


@triton.jit
def blend(x, residual, s, offset, inside, codes: tl.constexpr, RESIDUAL: tl.constexpr):
    """x, u and v = u s + residual on one tile."""
    A: tl.constexpr = s.dtype
    raw = tl.load(x + offset, inside, 0.0).to(A)
    u = activation(raw, codes[PRE_ACT], codes[SLOPE], codes[OFFSET])
    v = u * s[:, :, None]
    if RESIDUAL == MAP:
        v += tl.load(residual + offset, inside, 0.0).to(A)
    elif RESIDUAL == X_ITSELF:
        v += raw
    return raw, u, v
