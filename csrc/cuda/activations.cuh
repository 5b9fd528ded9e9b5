// The activations and their backward. Those that real networks use around their SE layers are inlined for V values at a
// time, so that the kernel switches on the activation once per vector. The others, and all in float64, are calls per
// value, which keeps their long exponentials out of every kernel.
// Half-precision maps use fast arithmetic for silu and hardswish. Its error is less than a quarter of a rounding step
// of the map's type (tests/cuda/test_half_activations.py). NaN and the infinities behave as in PyTorch: comparisons are
// arranged so that a NaN falls through.
#pragma once

#include <cmath>

#include "device.cuh"

namespace se::cuda {

constexpr double kSqrtHalf = 0.70710678118654752440, kSqrtTwoOverPi = 0.79788456080286535588;
constexpr double kGeluCubic = 0.044715, kLeakySlope = 0.01, kLog2E = 1.44269504088896340736;

template <class A>
__device__ A clamp(A v, A low, A high) {
  return v < low ? low : v > high ? high : v;
}

template <class A>
__device__ A sigmoid(A v) {
  return 1 / (1 + std::exp(-v));
}

template <class A>
__device__ A gelu_tanh_inner(A v) {
  return std::tanh(A(kSqrtTwoOverPi) * (v + A(kGeluCubic) * v * v * v));
}

// tanh(log(1 + e^v)) = n / (n + 2) with n = e^v (e^v + 2). From v = 40 on it is 1, in float64 too.
template <class A>
__device__ A mish_factor(A e) {
  const A n = e * (e + 2);
  return n / (n + 2);
}

template <class A>
__device__ A relu(A v) {
  return v < 0 ? A(0) : v;
}
template <class A>
__device__ A relu6(A v) {
  return clamp<A>(v, 0, 6);
}
template <class A>
__device__ A silu(A v) {
  return v * sigmoid(v);
}
template <class A>
__device__ A hardswish(A v) {
  return v * clamp<A>(v + 3, 0, 6) / 6;
}

// g activation'(v). As PyTorch's backward does, a piecewise linear activation selects, so that an infinite g gives 0
// where the derivative is 0; the other activations multiply, so that it gives NaN.
template <class A>
__device__ A relu_backward(A v, A g) {
  return v <= 0 ? A(0) : g;
}
template <class A>
__device__ A relu6_backward(A v, A g) {
  return v <= 0 || v >= 6 ? A(0) : g;
}
template <class A>
__device__ A silu_backward(A v, A g) {
  const A s = sigmoid(v);
  return g * (s * (1 + v * (1 - s)));
}
template <class A>
__device__ A hardswish_backward(A v, A g) {
  return v <= -3 ? A(0) : v >= 3 ? g : g * (v / 3 + A(0.5));
}

// 2^v and 1 / v by the special function unit, each within 2 ulp of float; a subnormal result becomes 0.
__device__ inline float exp2_approx(float v) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return emulator::exp2_approx(v);
#endif
}
__device__ inline float reciprocal_approx(float v) {
#ifdef __CUDACC__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return emulator::reciprocal_approx(v);
#endif
}

// sigmoid(v) = kUnit / (kUnit + kUnit e^-v). If the sum exceeds 2^126, its reciprocal is subnormal and becomes 0. With
// kUnit = 1 this happens from v = -87.4 down, where silu(v) is -2^-119.6: 0 in float16, but not in bfloat16, which
// reaches down to 2^-133. With kUnit = 2^-16 it happens from v = -98.4 down, where silu(v) is -2^-135.4.
template <class T>
constexpr int kShift = std::is_same_v<T, __nv_bfloat16> ? 16 : 0;
template <class T>
constexpr float kUnit = 1.0f / (1 << kShift<T>);

// log2(kUnit e^-v)
template <class T>
__device__ float sigmoid_exponent(float v) {
  return std::fma(v, static_cast<float>(-kLog2E), static_cast<float>(-kShift<T>));
}

template <class T>
__device__ float fast_silu(float v) {
  return v * kUnit<T> * reciprocal_approx(kUnit<T> + exp2_approx(sigmoid_exponent<T>(v)));
}

// 1 - sigmoid(v) is computed as e r, because a large v would multiply the rounding error of the difference. e is
// limited to 2^127, because an infinite e would make e r NaN where r is 0.
template <class T>
__device__ float fast_silu_backward(float v, float g) {
  const float e = exp2_approx(std::fmin(sigmoid_exponent<T>(v), 127.0f));
  const float r = reciprocal_approx(kUnit<T> + e);
  return g * (kUnit<T> * r * std::fma(v, e * r, 1.0f));
}

// float's 1/6 is too large by 2^-26 / 3. v = -3 still gives 0, and near it the error is 3 * 2^-26: less than the
// smallest float16, and a fifth of float's rounding step at v.
__device__ inline float fast_hardswish(float v) { return v * __saturatef(std::fma(v, 1.0f / 6, 0.5f)); }

// At v = -1.5 the result is 0. v / 3 + 0.5 with float's 1/3 would give 2^-26 there; v + 1.5 is exact.
__device__ inline float fast_hardswish_backward(float v, float g) {
  return v <= -3 ? 0.0f : v >= 3 ? g : g * ((v + 1.5f) * (1.0f / 3));
}

template <class A>
__noinline__ __device__ A activate_one(Activation activation, const Options& o, A v) {
  switch (activation) {
    case Activation::kIdentity: return v;
    case Activation::kRelu: return relu(v);
    case Activation::kRelu6: return relu6(v);
    case Activation::kSilu: return silu(v);
    case Activation::kHardswish: return hardswish(v);
    case Activation::kGelu: return A(0.5) * v * (1 + std::erf(v * A(kSqrtHalf)));
    case Activation::kGeluTanh: return A(0.5) * v * (1 + gelu_tanh_inner(v));
    case Activation::kLeakyRelu: return v > 0 ? v : A(kLeakySlope) * v;
    case Activation::kMish: return v * mish_factor(std::exp(v > 40 ? A(40) : v));
    case Activation::kSigmoid: return sigmoid(v);
    case Activation::kTanh: return std::tanh(v);
    case Activation::kHardSigmoid: return clamp<A>(A(o.slope) * v + A(o.offset), 0, 1);
  }
  return v;  // never: the emulator's -Wswitch refuses a missing case
}

template <class A>
__noinline__ __device__ A activation_backward_one(Activation activation, const Options& o, A v, A g) {
  switch (activation) {
    case Activation::kIdentity: return g;
    case Activation::kRelu: return relu_backward(v, g);
    case Activation::kRelu6: return relu6_backward(v, g);
    case Activation::kSilu: return silu_backward(v, g);
    case Activation::kHardswish: return hardswish_backward(v, g);
    case Activation::kGelu:
      return g * (A(0.5) * (1 + std::erf(v * A(kSqrtHalf))) + v * std::exp(A(-0.5) * v * v) * A(0.5 * kSqrtTwoOverPi));
    case Activation::kGeluTanh: {
      const A inner = gelu_tanh_inner(v), inner_backward = A(kSqrtTwoOverPi) * (1 + A(3 * kGeluCubic) * v * v);
      return g * (A(0.5) * (1 + inner) + A(0.5) * v * (1 - inner * inner) * inner_backward);
    }
    case Activation::kLeakyRelu: return v > 0 ? g : A(kLeakySlope) * g;
    case Activation::kMish: {
      const A e = std::exp(v > 40 ? A(40) : v), factor = mish_factor(e);
      return g * (factor + v * (e / (e + 1)) * (1 - factor * factor));
    }
    case Activation::kSigmoid: {
      const A s = sigmoid(v);
      return g * (s * (1 - s));
    }
    case Activation::kTanh: {
      const A s = std::tanh(v);
      return g * (1 - s * s);
    }
    case Activation::kHardSigmoid: {
      const A line = A(o.slope) * v + A(o.offset);
      return A(o.slope) * (line >= 0 && line <= 1 ? g : A(0));
    }
  }
  return g;
}

template <int V, class A, class Function>
__device__ void each(A (&v)[V], Function&& function) {
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = function(v[i]);
}

template <class T>
constexpr bool kHalf = sizeof(T) == 2;

// Half precision inlines single values too: backward finds a maximum by equality, so a value must be the same whether a
// vector or the tail of a row computes it.
template <class T, int V>
constexpr bool kInlined = kHalf<T> || (V > 1 && std::is_same_v<T, float>);

// v = activation(v), where v are values of maps of T.
template <class T, int V, class A = Accumulator<T>>
__device__ void activate(Activation activation, const Options& o, A (&v)[V]) {
  if (activation == Activation::kIdentity) return;
  if constexpr (kInlined<T, V>) {
    switch (activation) {
      case Activation::kRelu: return each(v, relu<A>);
      case Activation::kRelu6: return each(v, relu6<A>);
      case Activation::kSilu: return each(v, kHalf<T> ? fast_silu<T> : silu<A>);
      case Activation::kHardswish: return each(v, kHalf<T> ? fast_hardswish : hardswish<A>);
      default: break;
    }
  }
  each(v, [&](A t) { return activate_one(activation, o, t); });
}

template <int V, class A, class Gradient>
__device__ void each(const A (&v)[V], A (&g)[V], Gradient&& gradient) {
#pragma unroll
  for (int i = 0; i < V; ++i) g[i] = gradient(v[i], g[i]);
}

// g = g activation'(v), where v are values of maps of T.
template <class T, int V, class A = Accumulator<T>>
__device__ void activation_backward(Activation activation, const Options& o, const A (&v)[V], A (&g)[V]) {
  if (activation == Activation::kIdentity) return;
  if constexpr (kInlined<T, V>) {
    switch (activation) {
      case Activation::kRelu: return each(v, g, relu_backward<A>);
      case Activation::kRelu6: return each(v, g, relu6_backward<A>);
      case Activation::kSilu: return each(v, g, kHalf<T> ? fast_silu_backward<T> : silu_backward<A>);
      case Activation::kHardswish: return each(v, g, kHalf<T> ? fast_hardswish_backward : hardswish_backward<A>);
      default: break;
    }
  }
  each(v, g, [&](A at, A from) { return activation_backward_one(activation, o, at, from); });
}

}  // namespace se::cuda
