"""The activations and their derivatives, by the codes of enum Activation in csrc/se.h.

NaN and the infinities behave as in PyTorch: comparisons are arranged so that a NaN falls through, and `tl.maximum`,
which drops it, is not used.
"""

from __future__ import annotations

import triton
import triton.language as tl

IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
RELU6 = tl.constexpr(2)
SILU = tl.constexpr(3)
HARDSWISH = tl.constexpr(4)
GELU = tl.constexpr(5)
GELU_TANH = tl.constexpr(6)
LEAKY_RELU = tl.constexpr(7)
MISH = tl.constexpr(8)
SIGMOID = tl.constexpr(9)
TANH = tl.constexpr(10)
HARD_SIGMOID = tl.constexpr(11)

_SQRT_HALF = tl.constexpr(0.70710678118654752440)
_SQRT_TWO_OVER_PI = tl.constexpr(0.79788456080286535588)
_GELU_CUBIC = tl.constexpr(0.044715)
_LEAKY_SLOPE = tl.constexpr(0.01)


@triton.jit
def clamp(v, low, high):
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def sigmoid(v):
    return 1 / (1 + tl.exp(-v))


@triton.jit
def tanh(v):
    # Near 0 the rational function of Cephes' tanh.c, for 1 - 2 / (e^2a + 1) cancels there.
    square = v * v
    p = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square - 1.61468768441708447952e3
    q = ((square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3) * square + 4.84406305325125486048e3
    a = tl.abs(v)
    far = 1 - 2 / (tl.exp(2 * a) + 1)
    return tl.where(a < 0.625, v + v * square * (p / q), tl.where(v < 0, -far, far))


@triton.jit
def _mish_tanh(v):
    # tanh(log(1 + e^v)) = n / (n + 2) with n = e^v (e^v + 2); above 20 it is 1 in float, above 40 in double.
    e = tl.exp(tl.where(v > 40, 40.0, v))
    n = e * (e + 2)
    return e, n / (n + 2)


@triton.jit
def activation(v, code: tl.constexpr, slope: tl.constexpr, offset: tl.constexpr):
    """activation(v), elementwise. `slope`, `offset`: of a hard sigmoid."""
    if code == RELU:
        out = tl.where(v < 0, 0.0, v)
    elif code == RELU6:
        out = clamp(v, 0.0, 6.0)
    elif code == SILU:
        out = v * sigmoid(v)
    elif code == HARDSWISH:
        out = v * clamp(v + 3, 0.0, 6.0) / 6
    elif code == GELU:
        out = 0.5 * v * (1 + tl.erf(v * _SQRT_HALF))
    elif code == GELU_TANH:
        out = 0.5 * v * (1 + tanh((v + v * v * v * _GELU_CUBIC) * _SQRT_TWO_OVER_PI))
    elif code == LEAKY_RELU:
        out = tl.where(v > 0, v, v * _LEAKY_SLOPE)
    elif code == MISH:
        _, t = _mish_tanh(v)
        out = v * t
    elif code == SIGMOID:
        out = sigmoid(v)
    elif code == TANH:
        out = tanh(v)
    elif code == HARD_SIGMOID:
        out = clamp(slope * v + offset, 0.0, 1.0)
    else:
        tl.static_assert(code == IDENTITY)
        out = v
    return out


@triton.jit
def activation_backward(g, v, code: tl.constexpr, slope: tl.constexpr, offset: tl.constexpr):
    """g activation'(v), elementwise.

    PyTorch's backward selects where an activation is made of straight pieces, so that 0 is left of an infinite g, and
    multiplies elsewhere, so that NaN is.
    """
    if code == RELU:
        out = tl.where(v <= 0, 0.0, g)
    elif code == RELU6:
        out = tl.where((v <= 0) | (v >= 6), 0.0, g)
    elif code == SILU:
        s = sigmoid(v)
        out = g * (s * (1 + v * (1 - s)))
    elif code == HARDSWISH:
        out = tl.where(v <= -3, 0.0, tl.where(v >= 3, g, g * (v / 3 + 0.5)))
    elif code == GELU:
        out = g * (0.5 * (1 + tl.erf(v * _SQRT_HALF)) + v * tl.exp(-0.5 * v * v) * (0.5 * _SQRT_TWO_OVER_PI))
    elif code == GELU_TANH:
        t = tanh((v + v * v * v * _GELU_CUBIC) * _SQRT_TWO_OVER_PI)
        inner = (1 + v * v * (3 * _GELU_CUBIC)) * _SQRT_TWO_OVER_PI
        out = g * (0.5 * (1 + t) + 0.5 * v * (1 - t * t) * inner)
    elif code == LEAKY_RELU:
        out = tl.where(v > 0, g, g * _LEAKY_SLOPE)
    elif code == MISH:
        e, t = _mish_tanh(v)
        out = g * (t + v * (e / (e + 1)) * (1 - t * t))
    elif code == SIGMOID:
        s = sigmoid(v)
        out = g * (s * (1 - s))
    elif code == TANH:
        t = tanh(v)
        out = g * (1 - t * t)
    elif code == HARD_SIGMOID:
        line = slope * v + offset
        out = tl.where((line >= 0) & (line <= 1), g, 0.0) * slope
    else:
        tl.static_assert(code == IDENTITY)
        out = g
    return out
