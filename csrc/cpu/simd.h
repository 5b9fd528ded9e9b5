// SIMD vectors of the instruction set that this file is compiled for, by the vector extensions of GCC and Clang.
//
// A loop body is written once, for a type V that is either a vector Vec<A> or a single A. for_each_vector runs it on
// vectors and then on the elements that are left.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define SE_INLINE inline __attribute__((always_inline))

namespace se::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
constexpr int kWidth = kVectorBytes / sizeof(A);

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

// The element type of V, and unsigned integers of the same shape.
template <class V>
struct Traits {
  using Element = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V>()[0])>>;
  using Bits = Vec<std::conditional_t<sizeof(Element) == 4, uint32_t, uint64_t>>;
};
template <>
struct Traits<float> {
  using Element = float;
  using Bits = uint32_t;
};
template <>
struct Traits<double> {
  using Element = double;
  using Bits = uint64_t;
};

template <class To, class From>
SE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
SE_INLINE V splat(typename Traits<V>::Element value) {
  return V{} + value;
}

template <class V, class C>
SE_INLINE V select(C condition, V yes, V no) {
  return condition ? yes : no;
}

// a * b + c, fused into one rounding if the instruction set can. -ffp-contract=off keeps the compiler from fusing by
// itself: it would fuse in vectors but not in single elements, and equal elements of a map would get unequal results.
template <class V>
SE_INLINE V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return bit_cast<V>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
  if constexpr (std::is_same_v<V, Vec<double>>)
    return bit_cast<V>(_mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
#elif defined(__FMA__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return bit_cast<V>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
  if constexpr (std::is_same_v<V, Vec<double>>)
    return bit_cast<V>(_mm256_fmadd_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b), bit_cast<__m256d>(c)));
#endif
#if defined(__FMA__)
  if constexpr (std::is_same_v<V, float>) return __builtin_fmaf(a, b, c);
  if constexpr (std::is_same_v<V, double>) return __builtin_fma(a, b, c);
#endif
  return a * b + c;
}

// The maximum. It is NaN if one operand is, as in torch.amax.
template <class V>
SE_INLINE V max_keep_nan(V a, V b) {
  return select<V>((b > a) | (b != b), b, a);
}

// A bfloat16 is the upper half of a float, rounded to nearest even. A NaN stays NaN.
SE_INLINE float to_float(BFloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
template <class U, class V>
SE_INLINE U bfloat16_bits(V v) {
  const U bits = bit_cast<U>(v);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v != v ? U{} + 0x7fc0u : rounded;
}

// float16 without F16C. Shifted into a float's place, the bits of a float16 are a float that is 2^112 times too small:
// the exponent biases differ by 112. The conversion back rounds to nearest even.
SE_INLINE float to_float(Half v) {
  const uint32_t magnitude = (v.bits & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // Inf and NaN
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | (static_cast<uint32_t>(v.bits & 0x8000u) << 16));
}
SE_INLINE uint16_t half_bits(float v) {
  const uint32_t sign = bit_cast<uint32_t>(v) & 0x80000000u;
  const uint32_t magnitude = bit_cast<uint32_t>(v) ^ sign;
  uint32_t out;
  if (magnitude >= 0x47800000u) {  // 65536 and more, Inf, NaN
    out = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds and aligns the mantissa
    out = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    out = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(out | (sign >> 16));
}

// load<V>(p) converts one or kWidth elements of type T to V. store(p, v) is the inverse.
template <class V, class T>
SE_INLINE V load(const T* p) {
  using A = typename Traits<V>::Element;
  if constexpr (std::is_same_v<T, A>) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  } else if constexpr (std::is_same_v<V, A>) {
    return to_float(*p);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    HalfBits bits;
    std::memcpy(&bits, p, sizeof(bits));
    return bit_cast<V>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
  } else {
#if defined(__AVX512F__)  // masked forms with a full mask: GCC 12 warns of an undefined operand in the plain ones
    return bit_cast<V>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return bit_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    V v;
    for (int i = 0; i < kWidth<float>; ++i) v[i] = to_float(p[i]);
    return v;
#endif
  }
}

template <class T, class V>
SE_INLINE void store(T* p, V v) {
  using A = typename Traits<V>::Element;
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(p, &v, sizeof(v));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    if constexpr (std::is_same_v<V, A>) {
      p->bits = static_cast<uint16_t>(bfloat16_bits<uint32_t>(v));
    } else {
      const HalfBits bits = __builtin_convertvector(bfloat16_bits<Vec<uint32_t>>(v), HalfBits);
      std::memcpy(p, &bits, sizeof(bits));
    }
  } else if constexpr (std::is_same_v<V, A>) {
    p->bits = half_bits(v);
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kWidth<float>; ++i) p[i].bits = half_bits(v[i]);
#endif
  }
}

// body(i, V{}) for i over [0, n): first with V = Vec<A>, then with V = A for the elements that are left.
template <class A, class Body>
SE_INLINE void for_each_vector(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kWidth<A> <= n; i += kWidth<A>) body(i, Vec<A>{});
  for (; i < n; ++i) body(i, A{});
}

template <int kHalf, class V, int... kLane>
SE_INLINE V swap_halves(V v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kHalf)...);
}
template <class A, int kHalf = kWidth<A> / 2>
SE_INLINE A horizontal_sum(Vec<A> v) {
  v += swap_halves<kHalf>(v, std::make_integer_sequence<int, kWidth<A>>{});
  if constexpr (kHalf > 1) return horizontal_sum<A, kHalf / 2>(v);
  return v[0];
}

// Pairwise horizontal add. Each block of 2 kHalf lanes of p or q is reduced to kHalf lanes, the sum of its two halves;
// the results alternate between p and q. With four lanes:
//   kHalf = 2:  {p0 + p2, p1 + p3, q0 + q2, q1 + q3}
//   kHalf = 1:  {p0 + p1, q0 + q1, p2 + p3, q2 + q3}
template <int kHalf, class V, int... kLane>
SE_INLINE V sum_halves(V p, V q, std::integer_sequence<int, kLane...>) {
  constexpr int kOther =
      static_cast<int>(sizeof...(kLane)) - kHalf;  // from a lane of p to the lane of q that replaces it
  return __builtin_shufflevector(p, q, (kLane & kHalf ? kLane + kOther : kLane)...) +
         __builtin_shufflevector(p, q, (kLane & kHalf ? kLane + kOther + kHalf : kLane + kHalf)...);
}
// Lane i is horizontal_sum(v[i]), with the same bits.
template <class A, int kHalf = kWidth<A> / 2>
SE_INLINE Vec<A> horizontal_sums(const Vec<A>* v) {
  Vec<A> sums[kHalf];
  for (int i = 0; i < kHalf; ++i) {
    sums[i] = sum_halves<kHalf>(v[i], v[i + kHalf], std::make_integer_sequence<int, kWidth<A>>{});
  }
  if constexpr (kHalf > 1) return horizontal_sums<A, kHalf / 2>(sums);
  return sums[0];
}

// A sum or maximum over many elements in a fixed order. It uses kUnroll accumulators: with a single one, the latency of
// the additions would limit it.
template <class A, bool kMax>
class Reduction {
 public:
  SE_INLINE Reduction() {
    for (auto& v : vectors_) v = splat<Vec<A>>(start());
  }
  // Adds n elements; value(i, V{}) returns the ones at i.
  template <class Value>
  SE_INLINE void add(int64_t n, Value&& value) {
    int64_t i = 0;
    for (; i + kUnroll * kWidth<A> <= n; i += kUnroll * kWidth<A>) {
      for (int k = 0; k < kUnroll; ++k) combine(vectors_[k], value(i + k * kWidth<A>, Vec<A>{}));
    }
    for (; i + kWidth<A> <= n; i += kWidth<A>) combine(vectors_[0], value(i, Vec<A>{}));
    for (; i < n; ++i) combine(rest_, value(i, A{}));
  }
  SE_INLINE A result() const {
    Vec<A> v = vectors_[0];
    for (int k = 1; k < kUnroll; ++k) combine(v, vectors_[k]);
    if constexpr (!kMax) return horizontal_sum<A>(v) + rest_;
    A result = rest_;
    for (int i = 0; i < kWidth<A>; ++i) combine(result, static_cast<A>(v[i]));
    return result;
  }

 private:
  static constexpr int kUnroll = 4;
  static constexpr A start() { return kMax ? -__builtin_huge_val() : A{0}; }
  template <class V>
  static SE_INLINE void combine(V& into, V v) {
    into = kMax ? max_keep_nan(into, v) : into + v;
  }
  Vec<A> vectors_[kUnroll];
  A rest_ = start();
};

}  // namespace
}  // namespace se::cpu
