// A block's share of the maps, walked in accesses of 16 bytes wherever the data allows.
#pragma once

#include "device.cuh"

namespace se::cuda {

// Channel of an element: i / l by a multiplication, for i < 2^31 and 1 <= l <= 2^30 (Granlund and Montgomery, "Division
// by invariant integers using multiplication", figure 4.1).
struct Divisor {
  unsigned multiplier, shift;

  explicit Divisor(int64_t l) : shift(0) {
    while ((int64_t{1} << shift) < l) ++shift;
    multiplier = static_cast<unsigned>((((uint64_t{1} << shift) - static_cast<uint64_t>(l)) << 32) / l + 1);
  }
  __device__ unsigned divide(unsigned i) const { return (__umulhi(i, multiplier) + i) >> shift; }
};

// NCHW: elements [e0, e1) of sample n, in the channels [c0, c0 + channels).
struct RowShare {
  int64_t n, range, e0, e1, c0;
  int channels;

  __device__ RowShare(int64_t c, int64_t l, const Elementwise& e) {
    const auto ranges = static_cast<unsigned>(e.ranges);
    n = blockIdx.x / ranges;
    range = blockIdx.x % ranges;
    e0 = range * e.per_block;
    e1 = e0 + e.per_block < c * l ? e0 + e.per_block : c * l;
    c0 = e0 / l;
    channels = static_cast<int>((e1 - 1) / l - c0) + 1;
  }
  // Whether this block is the one that reports what it computed for the channel c0 + i: the one of its first element.
  __device__ bool owns(int i, int64_t l) const { return i > 0 || e0 == c0 * l; }

  // body(std::integral_constant<int, V>(), at, i, r): V elements from `at` on in the map, the first of them in channel
  // c0 + i at position r.
  template <class T, class Body>
  __device__ void walk(const T* map, int64_t c, int64_t l, const Divisor& by_l, bool wide, Body&& body) const {
    constexpr int V = 16 / sizeof(T);
    const int64_t first = n * c * l + e0;
    const unsigned count = static_cast<unsigned>(e1 - e0), before = static_cast<unsigned>(e0 - c0 * l);
    const auto misaligned = static_cast<unsigned>(reinterpret_cast<uintptr_t>(map + first) % 16 / sizeof(T));
    const unsigned to_border = (V - misaligned) % V;
    const unsigned head = !wide || to_border > count ? count : to_border;
    auto one = [&](unsigned e) {
      const unsigned i = by_l.divide(e + before);
      body(std::integral_constant<int, 1>(), first + e, static_cast<int>(i), e + before - i * static_cast<unsigned>(l));
    };
    for (unsigned e = threadIdx.x; e < head; e += kThreads) one(e);
    const unsigned vectors = (count - head) / V;
    for (unsigned v = threadIdx.x; v < vectors; v += kThreads) {
      const unsigned e = head + v * V, i = by_l.divide(e + before);
      body(std::integral_constant<int, V>(), first + e, static_cast<int>(i), e + before - i * static_cast<unsigned>(l));
    }
    for (unsigned e = head + vectors * V + threadIdx.x; e < count; e += kThreads) one(e);
  }
};

// values[i] for V elements that begin in channel `i` at position r of L: one channel after the other.
template <int V, class A>
__device__ void along_row(const A* values, int i, unsigned r, int64_t l, A (&v)[V]) {
#pragma unroll
  for (int k = 0; k < V; ++k) {
    v[k] = values[i];
    if (++r == l) r = 0, ++i;
  }
}

// channels_last: positions [l0, l1) of sample n, in the channels [c0, c0 + channels).
struct PositionShare {
  int64_t n, range, l0, l1, c0;
  int channels;

  __device__ PositionShare(int64_t c, int64_t l, int per_lane, const Elementwise& e) {
    const auto ranges = static_cast<unsigned>(e.ranges), chunks = static_cast<unsigned>(e.chunks);
    range = blockIdx.x % ranges;
    c0 = int64_t{blockIdx.x / ranges % chunks} * e.lanes * per_lane;
    n = blockIdx.x / ranges / chunks;
    l0 = range * e.per_block;
    l1 = l0 + e.per_block < l ? l0 + e.per_block : l;
    channels = static_cast<int>(c - c0 < e.lanes * per_lane ? c - c0 : e.lanes * per_lane);
  }
  __device__ bool owns() const { return range == 0; }

  // body(at, i): V elements from `at` on in the map, in the channels c0 + i on. V divides C.
  template <int V, class Body>
  __device__ void walk(int64_t c, int64_t l, int lanes, Body&& body) const {
    const int i = threadIdx.x % lanes * V;
    if (i >= channels) return;
    for (int64_t at = l0 + threadIdx.x / lanes; at < l1; at += kThreads / lanes) body((n * l + at) * c + c0 + i, i);
  }
};

}  // namespace se::cuda
