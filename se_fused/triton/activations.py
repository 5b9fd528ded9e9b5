"""The activations and their derivatives, with the numbers of enum Activation in csrc/se.h.

NaN and the infinities behave as in PyTorch: each comparison with a NaN is false and leads to a branch that returns the
NaN. `tl.maximum` is not used, because it drops NaN.
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
    # Near 0, where 1 - 2 / (e^2a + 1) loses digits to cancellation, the rational function of Cephes' tanh.c is used.
    square = v * v
    p = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square - 1.61468768441708447952e3
    q = ((square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3) * square + 4.84406305325125486048e3
    a = tl.abs(v)
    far = 1 - 2 / (tl.exp(2 * a) + 1)
    return tl.where(a < 0.625, v + v * square * (p / q), tl.where(v < 0, -far, far))


@triton.jit
def _mish_tanh(v):
    # tanh(log(1 + e^v)) = n / (n + 2) with n = e^v (e^v + 2). It rounds to 1 above 20 in float, above 40 in double.
    e = tl.exp(tl.where(v > 40, 40.0, v))
    n = e * (e + 2)
    return e, n / (n + 2)


@triton.jit
def activation(v, ACTIVATION: tl.constexpr, slope: tl.constexpr, offset: tl.constexpr):
    """Applies an activation elementwise. `slope` and `offset` are those of the hard sigmoid."""
    if ACTIVATION == RELU:
        out = tl.where(v < 0, 0.0, v)
    elif ACTIVATION == RELU6:
        out = clamp(v, 0.0, 6.0)
    elif ACTIVATION == SILU:
        out = v * sigmoid(v)
    elif ACTIVATION == HARDSWISH:
        out = v * clamp(v + 3, 0.0, 6.0) / 6
    elif ACTIVATION == GELU:
        out = 0.5 * v * (1 + tl.erf(v * _SQRT_HALF))
    elif ACTIVATION == GELU_TANH:
        out = 0.5 * v * (1 + tanh((v + v * v * v * _GELU_CUBIC) * _SQRT_TWO_OVER_PI))
    elif ACTIVATION == LEAKY_RELU:
        out = tl.where(v > 0, v, v * _LEAKY_SLOPE)
    elif ACTIVATION == MISH:
        _, t = _mish_tanh(v)
        out = v * t
    elif ACTIVATION == SIGMOID:
        out = sigmoid(v)
    elif ACTIVATION == TANH:
        out = tanh(v)
    elif ACTIVATION == HARD_SIGMOID:
        out = clamp(slope * v + offset, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == IDENTITY)
        out = v
    return out


@triton.jit
def activation_backward(g, v, ACTIVATION: tl.constexpr, slope: tl.constexpr, offset: tl.constexpr):
    """Returns g activation'(v), elementwise.

    As in PyTorch, piecewise activations select, so that an infinite g gives 0 where the derivative is 0. The others
    multiply, which gives NaN there.
    """
    if ACTIVATION == RELU:
        out = tl.where(v <= 0, 0.0, g)
    elif ACTIVATION == RELU6:
        out = tl.where((v <= 0) | (v >= 6), 0.0, g)
    elif ACTIVATION == SILU:
        s = sigmoid(v)
        out = g * (s * (1 + v * (1 - s)))
    elif ACTIVATION == HARDSWISH:
        out = tl.where(v <= -3, 0.0, tl.where(v >= 3, g, g * (v / 3 + 0.5)))
    elif ACTIVATION == GELU:
        out = g * (0.5 * (1 + tl.erf(v * _SQRT_HALF)) + v * tl.exp(-0.5 * v * v) * (0.5 * _SQRT_TWO_OVER_PI))
    elif ACTIVATION == GELU_TANH:
        t = tanh((v + v * v * v * _GELU_CUBIC) * _SQRT_TWO_OVER_PI)
        inner = (1 + v * v * (3 * _GELU_CUBIC)) * _SQRT_TWO_OVER_PI
        out = g * (0.5 * (1 + t) + 0.5 * v * (1 - t * t) * inner)
    elif ACTIVATION == LEAKY_RELU:
        out = tl.where(v > 0, g, g * _LEAKY_SLOPE)
    elif ACTIVATION == MISH:
        e, t = _mish_tanh(v)
        out = g * (t + v * (e / (e + 1)) * (1 - t * t))
    elif ACTIVATION == SIGMOID:
        s = sigmoid(v)
        out = g * (s * (1 - s))
    elif ACTIVATION == TANH:
        t = tanh(v)
        out = g * (1 - t * t)
    elif ACTIVATION == HARD_SIGMOID:
        line = slope * v + offset
        out = tl.where((line >= 0) & (line <= 1), g, 0.0) * slope
    else:
        tl.static_assert(ACTIVATION == IDENTITY)
        out = g
    return out
