// The activations and their derivatives on V values at a time, so that the run-time code is switched on once a vector.
// NaN and the infinities behave as in PyTorch: comparisons are arranged so that a NaN falls through.
#pragma once

#include <cmath>

#include "device.cuh"

namespace se::cuda {

constexpr double kSqrtHalf = 0.70710678118654752440, kSqrtTwoOverPi = 0.79788456080286535588;
constexpr double kGeluCubic = 0.044715, kLeakySlope = 0.01;

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

// tanh(log(1 + e^v)) = n / (n + 2) with n = e^v (e^v + 2); from 40 on it is 1 in float64 too.
template <class A>
__device__ A mish_factor(A e) {
  const A n = e * (e + 2);
  return n / (n + 2);
}

template <int V, class A, class Function>
__device__ void each(A (&v)[V], Function&& function) {
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = function(v[i]);
}

template <int V, class A>
__device__ void activate_inline(Activation activation, const Options& o, A (&v)[V]) {
  switch (activation) {
    case Activation::kIdentity: return;
    case Activation::kRelu: return each(v, [](A t) { return t < 0 ? A(0) : t; });
    case Activation::kRelu6: return each(v, [](A t) { return clamp<A>(t, 0, 6); });
    case Activation::kSilu: return each(v, [](A t) { return t * sigmoid(t); });
    case Activation::kHardswish: return each(v, [](A t) { return t * clamp<A>(t + 3, 0, 6) / 6; });
    case Activation::kGelu: return each(v, [](A t) { return A(0.5) * t * (1 + std::erf(t * A(kSqrtHalf))); });
    case Activation::kGeluTanh: return each(v, [](A t) { return A(0.5) * t * (1 + gelu_tanh_inner(t)); });
    case Activation::kLeakyRelu: return each(v, [](A t) { return t > 0 ? t : A(kLeakySlope) * t; });
    case Activation::kMish: return each(v, [](A t) { return t * mish_factor(std::exp(t > 40 ? A(40) : t)); });
    case Activation::kSigmoid: return each(v, [](A t) { return sigmoid(t); });
    case Activation::kTanh: return each(v, [](A t) { return std::tanh(t); });
    case Activation::kHardSigmoid: {
      const A slope = A(o.slope), offset = A(o.offset);
      return each(v, [=](A t) { return clamp<A>(slope * t + offset, 0, 1); });
    }
  }
}

template <int V, class A>
__device__ void differentiate_inline(Activation activation, const Options& o, A (&v)[V]) {
  switch (activation) {
    case Activation::kIdentity: return each(v, [](A) { return A(1); });
    case Activation::kRelu: return each(v, [](A t) { return t <= 0 ? A(0) : A(1); });
    case Activation::kRelu6: return each(v, [](A t) { return t <= 0 || t >= 6 ? A(0) : A(1); });
    case Activation::kSilu:
      return each(v, [](A t) {
        const A s = sigmoid(t);
        return s * (1 + t * (1 - s));
      });
    case Activation::kHardswish: return each(v, [](A t) { return t <= -3 ? A(0) : t >= 3 ? A(1) : t / 3 + A(0.5); });
    case Activation::kGelu:
      return each(v, [](A t) {
        return A(0.5) * (1 + std::erf(t * A(kSqrtHalf))) + t * std::exp(A(-0.5) * t * t) * A(0.5 * kSqrtTwoOverPi);
      });
    case Activation::kGeluTanh:
      return each(v, [](A t) {
        const A inner = gelu_tanh_inner(t), slope = A(kSqrtTwoOverPi) * (1 + A(3 * kGeluCubic) * t * t);
        return A(0.5) * (1 + inner) + A(0.5) * t * (1 - inner * inner) * slope;
      });
    case Activation::kLeakyRelu: return each(v, [](A t) { return t > 0 ? A(1) : A(kLeakySlope); });
    case Activation::kMish:
      return each(v, [](A t) {
        const A e = std::exp(t > 40 ? A(40) : t), factor = mish_factor(e);
        return factor + t * (e / (e + 1)) * (1 - factor * factor);
      });
    case Activation::kSigmoid:
      return each(v, [](A t) {
        const A s = sigmoid(t);
        return s * (1 - s);
      });
    case Activation::kTanh:
      return each(v, [](A t) {
        const A s = std::tanh(t);
        return 1 - s * s;
      });
    case Activation::kHardSigmoid: {
      const A slope = A(o.slope), offset = A(o.offset);
      return each(v, [=](A t) { return slope * t + offset < 0 || slope * t + offset > 1 ? A(0) : slope; });
    }
  }
}

// In float64 called, not inlined, to keep its long exponentials out of every kernel: it is there to check the others
// against.
template <class A>
__noinline__ __device__ A activate_called(Activation activation, const Options& o, A v) {
  A one[1] = {v};
  activate_inline(activation, o, one);
  return one[0];
}
template <class A>
__noinline__ __device__ A differentiate_called(Activation activation, const Options& o, A v) {
  A one[1] = {v};
  differentiate_inline(activation, o, one);
  return one[0];
}

// v = activation(v)
template <int V, class A>
__device__ void activate(Activation activation, const Options& o, A (&v)[V]) {
  if constexpr (std::is_same_v<A, double>) {
    each(v, [&](A t) { return activate_called(activation, o, t); });
  } else {
    activate_inline(activation, o, v);
  }
}

// v = activation'(v)
template <int V, class A>
__device__ void differentiate(Activation activation, const Options& o, A (&v)[V]) {
  if constexpr (std::is_same_v<A, double>) {
    each(v, [&](A t) { return differentiate_called(activation, o, t); });
  } else {
    differentiate_inline(activation, o, v);
  }
}

// g *= activation'(v). Where the derivative is 0 so is the gradient, whatever g: relu's backward in PyTorch selects, it
// does not multiply.
template <int V, class A>
__device__ void chain(Activation activation, const Options& o, const A (&v)[V], A (&g)[V]) {
  if (activation == Activation::kIdentity) return;
  A derivative[V];
#pragma unroll
  for (int i = 0; i < V; ++i) derivative[i] = v[i];
  differentiate(activation, o, derivative);
#pragma unroll
  for (int i = 0; i < V; ++i) g[i] = derivative[i] == 0 ? A(0) : g[i] * derivative[i];
}

template <class A>
__device__ A activate_one(Activation activation, const Options& o, A v) {
  A one[1] = {v};
  activate(activation, o, one);
  return one[0];
}

template <class A>
__device__ A chain_one(Activation activation, const Options& o, A v, A g) {
  const A at[1] = {v};
  A one[1] = {g};
  chain(activation, o, at, one);
  return one[0];
}

}  // namespace se::cuda
