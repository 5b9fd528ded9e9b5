// The tile of a map that a block works on, in 16-byte accesses wherever the data allows.
//
// A tile (NchwTile, NhwcTile) has these members:
//   n                          the sample
//   c0, channels               the channels: c0 to c0 + channels - 1
//   sample_first()             whether this block stores values that several blocks compute for the whole sample
//   owns(i)                    whether this block stores the values of channel c0 + i that several blocks compute
//   kHeldChannels              the channels whose values a thread holds over its vectors
//   for_each_vector(op)        calls the operation `op` for every V elements
//
// An operation has these members:
//   kAhead                     loads in flight before the first of them is used
//   fetch<V>(Index)            loads V elements
//   load_channels<V>(load)     loads the values of their channels: load(from, v) sets v[k] = from[i], where c0 + i is
//                              the channel of element k
//   finish(Index, values, fetched)
//                              computes and stores V elements from the values of their channels and what fetch returned
#pragma once

#include "device.cuh"

namespace se::cuda {

// Divides by a multiplication, for i < 2^31 and 1 <= l <= 2^30 (Granlund and Montgomery, "Division by invariant
// integers using multiplication", figure 4.1).
struct Divisor {
  unsigned multiplier, shift;

  explicit Divisor(int64_t l) : shift(0) {
    while ((int64_t{1} << shift) < l) ++shift;
    multiplier = static_cast<unsigned>((((uint64_t{1} << shift) - static_cast<uint64_t>(l)) << 32) / l + 1);
  }
  __device__ unsigned divide(unsigned i) const { return (__umulhi(i, multiplier) + i) >> shift; }
};

// NCHW: the elements [first, first + count) of the map.
template <class T>
struct NchwTile {
  static constexpr int V = 16 / sizeof(T), kHeldChannels = 0;
  int64_t n, range, first, c0;
  unsigned l, count, before;  // before: elements of channel c0 that come before the tile
  int channels;
  bool wide;
  Divisor by_l;

  // Map: Problem or BatchNorm.
  template <class Map>
  __device__ NchwTile(const Map& p, const Elementwise& e, const Divisor& by, unsigned block)
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
    wide = e.vec_bytes == 16;
  }
  // The channel of an element of the sample; 32 bits are divided where they suffice.
  __device__ int64_t channel_of(int64_t e) const { return e >> 31 ? e / l : by_l.divide(static_cast<unsigned>(e)); }
  __device__ bool sample_first() const { return range == 0; }
  __device__ bool owns(int i) const { return i > 0 || before == 0; }
  __device__ Index index(unsigned e) const { return {first + e, e}; }
  // The number of elements before the first 16-byte boundary; all elements, if the accesses are not wide.
  __device__ unsigned head() const {
    const auto to_border = static_cast<unsigned>((V - first % V) % V);
    return !wide || to_border > count ? count : to_border;
  }

  // kRun: each aligned run of kRun elements lies in one channel. kRun = W takes 42 instructions per 512 bytes, W / 2
  // takes 58 and 1 takes 70 (instructions.csv: forward_cluster_kernel of half precision, plain, sm_90).
  template <int W, int kRun, class Operation>
  __device__ void finish(const Operation& operation, unsigned e,
                         const typename Operation::template Fetched<W>& fetched) const {
    const unsigned i = by_l.divide(e + before), r = e + before - i * l;
    const auto values = operation.template load_channels<W>([&](auto from, auto& v) {
      v[0] = from[i];
      if constexpr (kRun == W) {
#pragma unroll
        for (int k = 1; k < W; ++k) v[k] = v[0];
      } else if (l >= W) {
        const auto next = from[r + W > l ? i + 1 : i];
#pragma unroll
        for (int k = 1; k < W; ++k) v[k] = r + k / kRun * kRun < l ? v[0] : next;
      } else {
        unsigned at = i, left = l - r;
#pragma unroll
        for (int k = 1; k < W; ++k) {
          if (--left == 0) left = l, ++at;
          v[k] = from[at];
        }
      }
    });
    operation.finish(index(e), values, fetched);
  }
  template <int kRun, class Operation>
  __device__ void for_each_whole_vector(const Operation& operation, unsigned begin, unsigned vectors) const {
    in_batches<Operation::kAhead>(
        threadIdx.x, vectors, blockDim.x, [&](unsigned v) { return operation.template fetch<V>(index(begin + v * V)); },
        [&](unsigned v, const auto& fetched) { finish<V, kRun>(operation, begin + v * V, fetched); });
  }
  template <class Operation>
  __device__ void for_each_vector(const Operation& operation) const {
    const unsigned begin = head(), vectors = (count - begin) / V;
    if (begin == 0 && l % V == 0) {
      for_each_whole_vector<V>(operation, begin, vectors);
    } else if (begin == 0 && l % (V / 2) == 0) {
      for_each_whole_vector<V / 2>(operation, begin, vectors);
    } else {
      for_each_whole_vector<1>(operation, begin, vectors);
    }
    // The elements before the vectors and after them.
    for (unsigned i = threadIdx.x; i < count - vectors * V; i += blockDim.x) {
      const unsigned e = i < begin ? i : i + vectors * V;
      finish<1, 1>(operation, e, operation.template fetch<1>(index(e)));
    }
  }
};

// channels_last: the channels [c0, c0 + channels) at some positions of sample n. V divides c0 and channels.
template <class T, int V>
struct NhwcTile {
  static constexpr int kHeldChannels = V;
  int64_t n, first;
  unsigned range, positions;
  int c, c0, channels;

  template <class Map>
  __device__ NhwcTile(const Map& p, const Elementwise& e, const Divisor&, unsigned block) : c(static_cast<int>(p.c)) {
    const auto ranges = static_cast<unsigned>(e.ranges), channel_blocks = static_cast<unsigned>(e.channel_blocks);
    range = block % ranges;
    c0 = static_cast<int>(block / ranges % channel_blocks * e.channels);
    n = block / ranges / channel_blocks;
    const int64_t l0 = range * e.per_block;
    positions = static_cast<unsigned>(p.l - l0 < e.per_block ? p.l - l0 : e.per_block);
    channels = c - c0 < e.channels ? c - c0 : static_cast<int>(e.channels);
    first = (n * p.l + l0) * c + c0;
  }
  __device__ bool sample_first() const { return range == 0 && c0 == 0; }
  __device__ bool owns(int) const { return range == 0; }
  // The index of channel c0 + i at a position. In shared memory the positions are packed.
  __device__ Index index(unsigned position, int i) const {
    return {first + int64_t{position} * c + i, position * static_cast<unsigned>(channels) + i};
  }

  // Calls body(i, position, step) for the channels c0 + i to c0 + i + V - 1 at every step-th position from `position`
  // on. A thread keeps its channels as long as it can, so that it loads their values once.
  template <class Body>
  __device__ void columns(Body&& body) const {
    const unsigned vectors = channels / V, threads = blockDim.x;
    const unsigned per_row = vectors < threads ? vectors : threads, groups = threads / per_row;
    const unsigned group = threadIdx.x / per_row;
    if (group >= groups) return;
    for (unsigned column = threadIdx.x - group * per_row; column < vectors; column += per_row) {
      body(static_cast<int>(column * V), group, groups);
    }
  }
  template <class Operation>
  __device__ void for_each_vector(const Operation& operation) const {
    columns([&](int i, unsigned position, unsigned step) {
      const auto values = operation.template load_channels<V>([&](auto from, auto& v) {
#pragma unroll
        for (int k = 0; k < V; ++k) v[k] = from[i + k];
      });
      in_batches<Operation::kAhead>(
          position, positions, step, [&](unsigned at) { return operation.template fetch<V>(index(at, i)); },
          [&](unsigned at, const auto& fetched) { operation.finish(index(at, i), values, fetched); });
    });
  }
};

// Calls body with a null pointer whose type is that of the blocks' tiles.
template <class T, class Body>
void with_tile(const Call& call, const Elementwise& e, Body&& body) {
  if (!call.channels_last) return body(static_cast<NchwTile<T>*>(nullptr));
  with_vec_bytes<T, false>(e.vec_bytes,
                           [&](auto size) { body(static_cast<NhwcTile<T, decltype(size)::value>*>(nullptr)); });
}

// The same for tiles in clusters, which are always whole 16 bytes.
template <class T, class Body>
void with_cluster_tile(const Call& call, Body&& body) {
  if (!call.channels_last) return body(static_cast<NchwTile<T>*>(nullptr));
  body(static_cast<NhwcTile<T, 16 / sizeof(T)>*>(nullptr));
}

}  // namespace se::cuda
