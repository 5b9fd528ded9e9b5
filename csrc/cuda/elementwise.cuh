// A block's share of the maps, walked in accesses of 16 bytes wherever the data allows.
//
// A share has: n, c0 and channels (its sample and channels), sample_first() (whether this block reports what it
// computed for the whole sample), owns(i) (and for the channel c0 + i), walk(body) with body(std::integral_constant
// <int, V>(), Place) for every V elements, and along(values, place, v): v[k] = values[i] for the channel c0 + i of
// each of them. `first` and `count` are its elements in the map, where it has all channels of its positions;
// slab(memory) then reads them where they have been copied to. Divisors: what its constructor takes from the host.
#pragma once

#include "device.cuh"

namespace se::cuda {

// Quotient by a multiplication, for i < 2^31 and 1 <= l <= 2^30 (Granlund and Montgomery, "Division by invariant
// integers using multiplication", figure 4.1).
struct Divisor {
  unsigned multiplier, shift;

  explicit Divisor(int64_t l) : shift(0) {
    while ((int64_t{1} << shift) < l) ++shift;
    multiplier = static_cast<unsigned>((((uint64_t{1} << shift) - static_cast<uint64_t>(l)) << 32) / l + 1);
  }
  __device__ unsigned divide(unsigned i) const { return (__umulhi(i, multiplier) + i) >> shift; }
};

// Elements from `at` on in the map, the first of them in channel c0 + i of the share, at position r of L.
struct Place {
  int64_t at;
  int i;
  unsigned r;
};

// NCHW: elements [first, first + count) of the map.
template <class T>
struct RowShare {
  static constexpr bool kSplitsPositions = false;
  using Divisors = Divisor;
  int64_t n, range, first, count, c0, l;
  int channels;
  unsigned before;  // elements of channel c0 that are not in the share
  bool wide;
  Divisor by_l;

  __device__ RowShare(const Problem& p, const Elementwise& e, const Divisor& by) : l(p.l), by_l(by) {
    const auto ranges = static_cast<unsigned>(e.ranges);
    n = blockIdx.x / ranges;
    range = blockIdx.x % ranges;
    const int64_t e0 = range * e.per_block, rest = p.c * l - e0;
    count = rest < e.per_block ? rest : e.per_block;
    first = n * p.c * l + e0;
    c0 = e0 / l;
    channels = static_cast<int>((e0 + count - 1) / l - c0) + 1;
    before = static_cast<unsigned>(e0 - c0 * l);
    wide = e.width == 16;
  }
  __device__ bool sample_first() const { return range == 0; }
  __device__ bool owns(int i) const { return i > 0 || before == 0; }
  __device__ Resident<T> slab(T* memory) const { return {memory, first}; }

  template <class Body>
  __device__ void walk(Body&& body) const {
    constexpr int V = 16 / sizeof(T);
    const auto size = static_cast<unsigned>(count), to_border = static_cast<unsigned>((V - first % V) % V);
    const unsigned head = !wide || to_border > size ? size : to_border, vectors = (size - head) / V;
    auto at = [&](auto width, unsigned e) {
      const unsigned i = by_l.divide(e + before);
      body(width, Place{first + e, static_cast<int>(i), e + before - i * static_cast<unsigned>(l)});
    };
    for (unsigned v = threadIdx.x; v < vectors; v += kThreads) at(std::integral_constant<int, V>(), head + v * V);
    // Before the vectors and after them.
    for (unsigned e = threadIdx.x; e < size - vectors * V; e += kThreads) {
      at(std::integral_constant<int, 1>(), e < head ? e : e + vectors * V);
    }
  }
  template <int V, class A>
  __device__ void along(const A* values, const Place& place, A (&v)[V]) const {
    int i = place.i;
    unsigned r = place.r;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      v[k] = values[i];
      if (++r == l) r = 0, ++i;
    }
  }
};

// channels_last: positions [l0, l1) of sample n, in the channels [c0, c0 + channels), of which V divides both.
template <class T, int W>
struct PositionShare {
  static constexpr bool kSplitsPositions = true;
  using Divisors = Divisor;
  int64_t n, range, l0, l1, c0, first, count, c;
  int channels;
  unsigned vectors;  // of a position, in every chunk but the last
  Divisor by_vectors;

  __device__ PositionShare(const Problem& p, const Elementwise& e, const Divisor& by) : c(p.c), by_vectors(by) {
    const auto ranges = static_cast<unsigned>(e.ranges), chunks = static_cast<unsigned>(e.chunks);
    range = blockIdx.x % ranges;
    c0 = int64_t{blockIdx.x / ranges % chunks} * e.channels;
    n = blockIdx.x / ranges / chunks;
    l0 = p.l * range / ranges;  // at most per_block
    l1 = p.l * (range + 1) / ranges;
    channels = static_cast<int>(c - c0 < e.channels ? c - c0 : e.channels);
    vectors = static_cast<unsigned>(e.channels / W);
    first = (n * p.l + l0) * c + c0;
    count = (l1 - l0) * c;
  }
  __device__ bool sample_first() const { return range == 0 && c0 == 0; }
  __device__ bool owns(int) const { return range == 0; }
  __device__ Resident<T> slab(T* memory) const { return {memory, first}; }

  template <class Body>
  __device__ void walk(Body&& body) const {
    const auto size = static_cast<unsigned>(l1 - l0) * vectors;
    for (unsigned v = threadIdx.x; v < size; v += kThreads) {
      const unsigned position = by_vectors.divide(v);
      const auto i = static_cast<int>((v - position * vectors) * W);
      if (i < channels) body(std::integral_constant<int, W>(), Place{first + position * c + i, i, 0});
    }
  }
  template <int V, class A>
  __device__ void along(const A* values, const Place& place, A (&v)[V]) const {
#pragma unroll
    for (int k = 0; k < V; ++k) v[k] = values[place.i + k];
  }
};

// body(share, by): the type of a block's share, as a null pointer, and what its constructor divides by.
template <class T, class Body>
void with_share(const Call& call, const Elementwise& e, Body&& body) {
  if (!call.channels_last) return body(static_cast<RowShare<T>*>(nullptr), Divisor(call.l));
  with_width<T, false>(e.width, [&](auto width) {
    constexpr int W = decltype(width)::value;
    body(static_cast<PositionShare<T, W>*>(nullptr), Divisor(e.channels / W));
  });
}

}  // namespace se::cuda
