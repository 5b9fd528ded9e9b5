// A block's share of the maps, walked in accesses of 16 bytes wherever the data allows.
//
// A share has
//   n, c0, channels           its sample and its channels, from c0 on
//   sample_first()            whether this block stores what several blocks compute for the whole sample
//   owns(i)                   the same for the channel c0 + i
//   walk(operation)           calls the operation for every V elements
//
// An operation has
//   kAhead                    loads under way before the first of them is used
//   fetch<V>(Index)           the loads of V elements
//   gather<V>(along)          what belongs to their channels: along(values, v) sets v[k] = values[i] for the channel
//                             c0 + i of element k
//   finish(Index, gathered, fetched)
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

// NCHW: elements [first, first + count) of the map.
template <class T>
struct RowShare {
  static constexpr int V = 16 / sizeof(T);
  int64_t n, range, first, c0;
  unsigned l, count, before;  // before: elements of channel c0 that are not in the share
  int channels;
  bool wide;
  Divisor by_l;

  __device__ RowShare(const Problem& p, const Elementwise& e, const Divisor& by, unsigned block)
      : l(static_cast<unsigned>(p.l)), by_l(by) {
    const auto ranges = static_cast<unsigned>(e.ranges);
    n = block / ranges;
    range = block - static_cast<unsigned>(n) * ranges;
    const int64_t e0 = range * e.per_block, rest = p.c * l - e0;
    count = static_cast<unsigned>(rest < e.per_block ? rest : e.per_block);
    first = n * p.c * l + e0;
    c0 = channel_of(e0);
    channels = static_cast<int>(channel_of(e0 + count - 1) - c0) + 1;
    before = static_cast<unsigned>(e0 - c0 * l);
    wide = e.width == 16;
  }
  // Of an element of the sample; by 32 bits where they do.
  __device__ int64_t channel_of(int64_t e) const { return e >> 31 ? e / l : by_l.divide(static_cast<unsigned>(e)); }
  __device__ bool sample_first() const { return range == 0; }
  __device__ bool owns(int i) const { return i > 0 || before == 0; }
  __device__ Index index(unsigned e) const { return {first + e, e}; }
  // Elements before the first border of 16 bytes; all, where the accesses are not wide.
  __device__ unsigned head() const {
    const auto to_border = static_cast<unsigned>((V - first % V) % V);
    return !wide || to_border > count ? count : to_border;
  }

  // kRun: so many elements from each border of as many lie in one channel. W takes 42 instructions for 512 bytes, W / 2
  // 58, 1 takes 68 (instructions.csv: forward_cluster_kernel of half precision, plain, sm_90).
  template <int W, int kRun, class Operation>
  __device__ void finish(const Operation& operation, unsigned e,
                         const typename Operation::template Fetched<W>& fetched) const {
    const unsigned i = by_l.divide(e + before), r = e + before - i * l;
    const auto gathered = operation.template gather<W>([&](const auto* values, auto& v) {
      v[0] = values[i];
      if constexpr (kRun == W) {
#pragma unroll
        for (int k = 1; k < W; ++k) v[k] = v[0];
      } else if (l >= W) {
        const auto next = values[r + W > l ? i + 1 : i];
#pragma unroll
        for (int k = 1; k < W; ++k) v[k] = r + k / kRun * kRun < l ? v[0] : next;
      } else {
        unsigned at = i, left = l - r;
#pragma unroll
        for (int k = 1; k < W; ++k) {
          if (--left == 0) left = l, ++at;
          v[k] = values[at];
        }
      }
    });
    operation.finish(index(e), gathered, fetched);
  }
  template <int kRun, class Operation>
  __device__ void walk_vectors(const Operation& operation, unsigned begin, unsigned vectors) const {
    in_batches<Operation::kAhead>(
        threadIdx.x, vectors, blockDim.x, [&](unsigned v) { return operation.template fetch<V>(index(begin + v * V)); },
        [&](unsigned v, const auto& fetched) { finish<V, kRun>(operation, begin + v * V, fetched); });
  }
  template <class Operation>
  __device__ void walk(const Operation& operation) const {
    const unsigned begin = head(), vectors = (count - begin) / V;
    if (begin == 0 && l % V == 0) {
      walk_vectors<V>(operation, begin, vectors);
    } else if (begin == 0 && l % (V / 2) == 0) {
      walk_vectors<V / 2>(operation, begin, vectors);
    } else {
      walk_vectors<1>(operation, begin, vectors);
    }
    // Before the vectors and after them.
    for (unsigned i = threadIdx.x; i < count - vectors * V; i += blockDim.x) {
      const unsigned e = i < begin ? i : i + vectors * V;
      finish<1, 1>(operation, e, operation.template fetch<1>(index(e)));
    }
  }
};

// channels_last: the channels [c0, c0 + channels), of which W divides both, at the positions [l0, l1) of sample n.
template <class T, int W>
struct PositionShare {
  int64_t n, first;
  unsigned range, positions;
  int c, c0, channels;

  __device__ PositionShare(const Problem& p, const Elementwise& e, const Divisor&, unsigned block)
      : c(static_cast<int>(p.c)) {
    const auto ranges = static_cast<unsigned>(e.ranges), chunks = static_cast<unsigned>(e.chunks);
    range = block % ranges;
    c0 = static_cast<int>(block / ranges % chunks * e.channels);
    n = block / ranges / chunks;
    const int64_t l0 = range * e.per_block;
    positions = static_cast<unsigned>(p.l - l0 < e.per_block ? p.l - l0 : e.per_block);
    channels = c - c0 < e.channels ? c - c0 : static_cast<int>(e.channels);
    first = (n * p.l + l0) * c + c0;
  }
  __device__ bool sample_first() const { return range == 0 && c0 == 0; }
  __device__ bool owns(int) const { return range == 0; }
  // Of channel c0 + i at a position; packed in shared memory.
  __device__ Index index(unsigned position, int i) const {
    return {first + int64_t{position} * c + i, position * static_cast<unsigned>(channels) + i};
  }

  // body(i, position, step): for the channels c0 + i to c0 + i + W at a position and every step-th after it. A thread
  // keeps to its channels as long as it can, so that what belongs to them is gathered once.
  template <class Body>
  __device__ void columns(Body&& body) const {
    const unsigned vectors = channels / W, threads = blockDim.x;
    const unsigned lanes = vectors < threads ? vectors : threads, groups = threads / lanes;
    const unsigned group = threadIdx.x / lanes;
    if (group >= groups) return;
    for (unsigned column = threadIdx.x - group * lanes; column < vectors; column += lanes) {
      body(static_cast<int>(column * W), group, groups);
    }
  }
  template <class Operation>
  __device__ void walk(const Operation& operation) const {
    columns([&](int i, unsigned position, unsigned step) {
      const auto gathered = operation.template gather<W>([&](const auto* values, auto& v) {
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = values[i + k];
      });
      in_batches<Operation::kAhead>(
          position, positions, step, [&](unsigned at) { return operation.template fetch<W>(index(at, i)); },
          [&](unsigned at, const auto& fetched) { operation.finish(index(at, i), gathered, fetched); });
    });
  }
};

// body(share): the type of a block's share, as a null pointer.
template <class T, class Body>
void with_share(const Call& call, const Elementwise& e, Body&& body) {
  if (!call.channels_last) return body(static_cast<RowShare<T>*>(nullptr));
  with_width<T, false>(e.width,
                       [&](auto width) { body(static_cast<PositionShare<T, decltype(width)::value>*>(nullptr)); });
}

// The shares that clusters hold: in whole 16 bytes.
template <class T, class Body>
void with_cluster_share(const Call& call, Body&& body) {
  if (!call.channels_last) return body(static_cast<RowShare<T>*>(nullptr));
  body(static_cast<PositionShare<T, 16 / sizeof(T)>*>(nullptr));
}

}  // namespace se::cuda
