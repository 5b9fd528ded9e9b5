"""Building blocks of the kernels: offsets of tiles, products with the weights, and maxima that keep NaN.

A tile of a map is [BLOCK_N samples, BLOCK_C channels, BLOCK_L positions] for both memory orders; a value per channel is
[BLOCK_N, BLOCK_C]. OPTIONS is the tuple `se_fused.options.Options`; the constants ACT to POST_ACT are indices into it.
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

# The values of RESIDUAL. With X_ITSELF the residual has the memory of x, which is then loaded once.
NO_RESIDUAL = tl.constexpr(0)
MAP = tl.constexpr(1)
X_ITSELF = tl.constexpr(2)

LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def block_start(i, BLOCK: tl.constexpr):
    """The first index of block i. It has 64 bits, because an offset computed from it may not fit 32."""
    return i.to(tl.int64) * BLOCK


@triton.jit
def matrix_offsets(n0, i0, samples, count, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr):
    """Offsets and mask [BLOCK_N, BLOCK_I] of a tile of a matrix [samples, count]."""
    n = tl.cast(n0, tl.int64) + tl.arange(0, BLOCK_N)[:, None]
    i = i0 + tl.arange(0, BLOCK_I)[None, :]
    return n * count + i, (n < samples) & (i < count)


@triton.jit
def map_offsets(
    n0, c0, l0, n, c, l,
    CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Offsets and mask [BLOCK_N, BLOCK_C, BLOCK_L] of a tile of a map.

    ALIGNMENT divides the extent that is contiguous in memory. Rounding that extent to it changes nothing but tells the
    compiler, which then emits wide accesses.
    """
    i = n0 + tl.arange(0, BLOCK_N)[:, None, None]
    j = c0 + tl.arange(0, BLOCK_C)[None, :, None]
    k = l0 + tl.arange(0, BLOCK_L)[None, None, :]
    if CHANNELS_LAST:
        c = c // ALIGNMENT * ALIGNMENT
        offset = (i * l + k) * c + j
    else:
        l = l // ALIGNMENT * ALIGNMENT
        offset = (i * c + j) * l + k
    return offset, (i < n) & (j < c) & (k < l)


@triton.jit
def max_keep_nan(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def max_of_positions(a):
    """Reduces [BLOCK_N, BLOCK_C, BLOCK_L] to [BLOCK_N, BLOCK_C]. tl.max drops NaN, so NaN is reduced separately."""
    nan = a != a
    largest = tl.max(tl.where(nan, LOWEST, a), 2)
    return tl.where(tl.max(nan.to(tl.int32), 2) > 0, float("nan"), largest)


@triton.jit
def load_weights(w, i0, k0, count, depth, TRANSPOSED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loads a tile [1, BLOCK_I, BLOCK_K] of w [count, depth], or of w [depth, count] if TRANSPOSED; 0 outside of w."""
    i = tl.cast(i0, tl.int64) + tl.arange(0, BLOCK_I)[None, :, None]
    k = tl.cast(k0, tl.int64) + tl.arange(0, BLOCK_K)[None, None, :]
    offset = k * count + i if TRANSPOSED else i * depth + k
    return tl.load(w + offset, (i < count) & (k < depth), 0.0)


@triton.jit
def add_bias(v, bias, i0, count, BLOCK_I: tl.constexpr):
    """Adds bias, which may be None, to v [BLOCK_N, BLOCK_I]."""
    if bias is not None:
        i = i0 + tl.arange(0, BLOCK_I)
        v += tl.load(bias + i, i < count, 0.0).to(v.dtype)[None, :]
    return v


@triton.jit
def gemv(
    v, w, bias, n0, i0, n, count, depth, ACTIVATION: tl.constexpr, OPTIONS: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns [BLOCK_N, BLOCK_I]: bias[i] + sum_k a(v[n, k]) w[i, k], or w[k, i] if TRANSPOSED. ACTIVATION is a."""
    A: tl.constexpr = v.dtype.element_ty
    sums = tl.zeros([BLOCK_N, BLOCK_I, BLOCK_K], A)
    for k0 in range(0, depth, BLOCK_K):
        at, valid = matrix_offsets(n0, k0, n, depth, BLOCK_N, BLOCK_K)
        a = activation(tl.load(v + at, valid, 0.0), ACTIVATION, OPTIONS[SLOPE], OPTIONS[OFFSET])
        sums += a[:, None, :] * load_weights(w, i0, k0, count, depth, TRANSPOSED, BLOCK_I, BLOCK_K).to(A)
    out = tl.sum(sums, 2)
    return add_bias(out, bias, i0, count, BLOCK_I)


@triton.jit
def before_squeeze(raw, scale, shift, c0, c, OPTIONS: tl.constexpr):
    """Returns u = pre_act(scale raw + shift) of a tile of x from channel c0 on. scale and shift may be None."""
    if scale is not None:
        i = c0 + tl.arange(0, raw.shape[1])
        k = tl.load(scale + i, i < c, 0.0)[None, :, None]
        b = tl.load(shift + i, i < c, 0.0)[None, :, None]
        raw = tl.fma(raw, tl.broadcast_to(k, raw.shape), tl.broadcast_to(b, raw.shape))
    return activation(raw, OPTIONS[PRE_ACT], OPTIONS[SLOPE], OPTIONS[OFFSET])


@triton.jit
def scale_add(
    x, residual, s, offset, inside, OPTIONS: tl.constexpr, RESIDUAL: tl.constexpr, scale=None, shift=None, c0=0, c=0
):
    """Loads one tile of x and returns x, u and v = u s + residual."""
    A: tl.constexpr = s.dtype
    raw = tl.load(x + offset, inside, 0.0).to(A)
    u = before_squeeze(raw, scale, shift, c0, c, OPTIONS)
    v = u * s[:, :, None]
    if RESIDUAL == MAP:
        v += tl.load(residual + offset, inside, 0.0).to(A)
    elif RESIDUAL == X_ITSELF:
        v += raw
    return raw, u, v
