// The activations and their derivatives, each written once for vectors and single elements (simd.h). NaN and the
// infinities behave as in PyTorch: each comparison with a NaN is false and leads to a branch that returns the NaN.
#pragma once

#include <cmath>

#include "../se.h"
#include "simd.h"

namespace se::cpu {
namespace {

// 1 / k!
template <class A>
constexpr A kInverseFactorials[] = {
    A(1),        A(1),         A(1) / 2,      A(1) / 6,       A(1) / 24,       A(1) / 120,       A(1) / 720,
    A(1) / 5040, A(1) / 40320, A(1) / 362880, A(1) / 3628800, A(1) / 39916800, A(1) / 479001600, A(1) / 6227020800};

// exp(x) = scale * (1 + q), where scale = 2^n with n = round(x / ln 2), and q = expm1(x - n ln 2) is computed by its
// Taylor series. The first omitted term is below half a unit in the last place for |x - n ln 2| <= ln(2) / 2.
template <class V>
SE_INLINE void exp_parts(V x, V& q, V& scale) {
  using A = typename Traits<V>::Element;
  using Bits = typename Traits<V>::Bits;
  constexpr bool kSingle = sizeof(A) == 4;
  constexpr int kTerms = kSingle ? 7 : 13;
  constexpr int kMantissa = kSingle ? 23 : 52, kBias = kSingle ? 127 : 1023;
  constexpr A kRound = kSingle ? A(0x1.8p23) : A(0x1.8p52);  // v + kRound has round(v) in its low bits
  constexpr A kLn2High = kSingle ? A(0x1.62e4p-1) : A(0x1.62e42fefap-1);
  constexpr A kLn2Low = A(0.693147180559945309417232121458L - (long double)kLn2High);
  const V shifted = multiply_add(x, splat<V>(A(1.44269504088896340735992468100)), splat<V>(kRound));
  const V n = shifted - kRound;
  const V r = multiply_add(n, splat<V>(-kLn2Low), x - n * kLn2High);
  V sum = splat<V>(kInverseFactorials<A>[kTerms]);
  for (int k = kTerms - 1; k >= 1; --k) sum = multiply_add(sum, r, splat<V>(kInverseFactorials<A>[k]));
  q = sum * r;
  // The low bits of `shifted` hold n. The shift moves n + kBias to the exponent field and drops the bits above it.
  scale = bit_cast<V>((bit_cast<Bits>(shifted) + kBias) << kMantissa);
}

template <class V>
SE_INLINE V exp_(V x) {
  using A = typename Traits<V>::Element;
  constexpr A kLow = sizeof(A) == 4 ? A(-87.3) : A(-708.3), kHigh = sizeof(A) == 4 ? A(88.3) : A(709.4);
  const V clamped = select<V>(x < kLow, splat<V>(kLow), select<V>(x > kHigh, splat<V>(kHigh), x));
  V q, scale;
  exp_parts(clamped, q, scale);
  V y = multiply_add(scale, q, scale);
  y = select<V>(x < kLow, V{}, y);
  return select<V>(x > kHigh, splat<V>(__builtin_huge_val()), y);
}

template <class V>
SE_INLINE V sigmoid(V v) {
  return 1 / (1 + exp_(-v));
}

// Computed by expm1, which keeps the relative accuracy of small arguments.
template <class V>
SE_INLINE V tanh_(V v) {
  using A = typename Traits<V>::Element;
  const V a = select<V>(v < 0, -v, v);
  V q, scale;
  exp_parts(select<V>(a > A(20), splat<V>(-40), A(-2) * a), q, scale);
  const V e = scale * q + (scale - 1);
  const V t = -e / (e + 2);
  return select<V>(v != v, v, select<V>(v < 0, -t, t));
}

template <class V>
SE_INLINE V erf_(V v) {
  using A = typename Traits<V>::Element;
  if constexpr (sizeof(A) == 4) {
    // Abramowitz and Stegun 7.1.26: the absolute error is below 1.5e-7.
    const V a = select<V>(v < 0, -v, v);
    const V t = 1 / (1 + A(0.3275911) * a);
    const V series =
        ((((A(1.061405429) * t - A(1.453152027)) * t + A(1.421413741)) * t - A(0.284496736)) * t + A(0.254829592)) * t;
    const V e = 1 - series * exp_(-a * a);
    return select<V>(v < 0, -e, e);
  } else if constexpr (std::is_same_v<V, A>) {
    return std::erf(v);
  } else {
    V e;
    for (int i = 0; i < kWidth<A>; ++i) e[i] = std::erf(v[i]);
    return e;
  }
}

template <class V>
SE_INLINE V clamp(V v, typename Traits<V>::Element low, typename Traits<V>::Element high) {
  return select<V>(v < low, splat<V>(low), select<V>(v > high, splat<V>(high), v));
}

constexpr double kSqrtHalf = 0.70710678118654752440, kSqrtTwoOverPi = 0.79788456080286535588;
constexpr double kGeluCubic = 0.044715, kLeakySlope = 0.01;

template <Activation kActivation, class V>
SE_INLINE V activation_forward(V v, [[maybe_unused]] const Options& o) {
  using A = typename Traits<V>::Element;
  if constexpr (kActivation == Activation::kRelu) return select<V>(v < 0, V{}, v);
  if constexpr (kActivation == Activation::kRelu6) return clamp(v, 0, 6);
  if constexpr (kActivation == Activation::kSilu) return v / (1 + exp_(-v));
  if constexpr (kActivation == Activation::kHardswish) return v * clamp<V>(v + 3, 0, 6) / 6;
  if constexpr (kActivation == Activation::kGelu) return A(0.5) * v * (1 + erf_(v * A(kSqrtHalf)));
  if constexpr (kActivation == Activation::kGeluTanh)
    return A(0.5) * v * (1 + tanh_(A(kSqrtTwoOverPi) * (v + A(kGeluCubic) * v * v * v)));
  if constexpr (kActivation == Activation::kLeakyRelu) return select<V>(v > 0, v, A(kLeakySlope) * v);
  if constexpr (kActivation == Activation::kMish) {
    // tanh(log(1 + e^v)) = n / (n + 2) with n = e^v (e^v + 2). It rounds to 1 above 20 in float, above 40 in double.
    const V e = exp_(select<V>(v > 40, splat<V>(40), v)), n = e * (e + 2);
    return v * (n / (n + 2));
  }
  if constexpr (kActivation == Activation::kSigmoid) return sigmoid(v);
  if constexpr (kActivation == Activation::kTanh) return tanh_(v);
  if constexpr (kActivation == Activation::kHardSigmoid) return clamp<V>(A(o.slope) * v + A(o.offset), 0, 1);
  if constexpr (kActivation == Activation::kIdentity) return v;
}

// g activation'(v). As in PyTorch, piecewise activations select, so that an infinite g gives 0 where the derivative is
// 0. The others multiply, which gives NaN there.
template <Activation kActivation, class V>
SE_INLINE V activation_backward(V v, V g, [[maybe_unused]] const Options& o) {
  using A = typename Traits<V>::Element;
  if constexpr (kActivation == Activation::kRelu) return select<V>(v <= 0, V{}, g);
  if constexpr (kActivation == Activation::kRelu6) return select<V>((v <= 0) | (v >= 6), V{}, g);
  if constexpr (kActivation == Activation::kSilu) {
    const V s = sigmoid(v);
    return g * (s * (1 + v * (1 - s)));
  }
  if constexpr (kActivation == Activation::kHardswish)
    return select<V>(v <= -3, V{}, select<V>(v >= 3, g, g * (v / 3 + A(0.5))));
  if constexpr (kActivation == Activation::kGelu)
    return g * (A(0.5) * (1 + erf_(v * A(kSqrtHalf))) + v * exp_(A(-0.5) * v * v) * A(0.5 * kSqrtTwoOverPi));
  if constexpr (kActivation == Activation::kGeluTanh) {
    const V t = tanh_(A(kSqrtTwoOverPi) * (v + A(kGeluCubic) * v * v * v));
    const V inner = A(kSqrtTwoOverPi) * (1 + A(3 * kGeluCubic) * v * v);
    return g * (A(0.5) * (1 + t) + A(0.5) * v * (1 - t * t) * inner);
  }
  if constexpr (kActivation == Activation::kLeakyRelu) return select<V>(v > 0, g, A(kLeakySlope) * g);
  if constexpr (kActivation == Activation::kMish) {
    const V e = exp_(select<V>(v > 40, splat<V>(40), v)), n = e * (e + 2), t = n / (n + 2);
    return g * (t + v * (e / (e + 1)) * (1 - t * t));
  }
  if constexpr (kActivation == Activation::kSigmoid) {
    const V s = sigmoid(v);
    return g * (s * (1 - s));
  }
  if constexpr (kActivation == Activation::kTanh) {
    const V t = tanh_(v);
    return g * (1 - t * t);
  }
  if constexpr (kActivation == Activation::kHardSigmoid) {
    const V line = A(o.slope) * v + A(o.offset);
    return A(o.slope) * select<V>((line >= 0) & (line <= 1), g, V{});
  }
  if constexpr (kActivation == Activation::kIdentity) return g;
}

template <Activation kActivation>
struct Tag {
  static constexpr Activation kValue = kActivation;
};

// body(Tag<k>{}) with `activation` as the compile-time constant k.
template <int kCode = 0, class Body>
void with_activation(Activation activation, Body&& body) {
  if constexpr (kCode < kActivations) {
    if (static_cast<int>(activation) == kCode) return body(Tag<static_cast<Activation>(kCode)>{});
    with_activation<kCode + 1>(activation, body);
  }
}

// v = activation(v), in place.
template <class A>
void apply_activation(Activation activation, const Options& o, A* v, int64_t n) {
  if (activation == Activation::kIdentity) return;
  with_activation(activation, [&](auto tag) {
    for_each_vector<A>(n, [&](int64_t i, auto type) {
      using V = decltype(type);
      store(v + i, activation_forward<decltype(tag)::kValue>(load<V>(v + i), o));
    });
  });
}

// g = g activation'(v), in place.
template <class A>
void apply_activation_backward(Activation activation, const Options& o, const A* v, A* g, int64_t n) {
  if (activation == Activation::kIdentity) return;
  with_activation(activation, [&](auto tag) {
    for_each_vector<A>(n, [&](int64_t i, auto type) {
      using V = decltype(type);
      store(g + i, activation_backward<decltype(tag)::kValue>(load<V>(v + i), load<V>(g + i), o));
    });
  });
}

}  // namespace
}  // namespace se::cpu
