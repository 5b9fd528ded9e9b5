// Blocks that hold one sample together in their shared memory: thread-block clusters, from sm_90 on.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "elementwise.cuh"
#include "reduce.cuh"

// What the body of a kernel for clusters stands between.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SE_FUSED_HAS_CLUSTERS
#endif

namespace se::cuda {

// A block's channels at every position of a channels_last map, packed in shared memory. others: channels of the map
// that are not among them.
template <class T>
struct Packed {
  T* slab;
  int64_t first;
  unsigned others;
  Divisor by_c;

  __device__ unsigned index(int64_t at) const {
    const auto e = static_cast<unsigned>(at - first);
    return e - by_c.divide(e) * others;
  }
  template <int V>
  __device__ void load(int64_t at, Accumulator<T> (&v)[V]) const {
    unpack<V, T>(*reinterpret_cast<const typename Access<V * sizeof(T)>::Type*>(slab + index(at)), v);
  }
};

// channels_last: the channels [c0, c0 + channels) of sample n at every position, in whole 16 bytes.
template <class T>
struct ChannelShare {
  static constexpr bool kSplitsPositions = false;
  static constexpr int V = 16 / sizeof(T);
  struct Divisors {
    Divisor vectors, c;
  };
  int64_t n, c0, first, c, l;
  int channels;
  unsigned vectors;  // of a position, in every block but the last
  Divisors by;

  __device__ ChannelShare(const Problem& p, const Elementwise& e, const Divisors& by) : c(p.c), l(p.l), by(by) {
    const auto ranges = static_cast<unsigned>(e.ranges);
    n = blockIdx.x / ranges;
    c0 = blockIdx.x % ranges * e.channels;
    channels = static_cast<int>(c - c0 < e.channels ? c - c0 : e.channels);
    vectors = static_cast<unsigned>(e.channels / V);
    first = n * l * c + c0;
  }
  __device__ Packed<T> slab(T* memory) const { return {memory, first, static_cast<unsigned>(c - channels), by.c}; }

  template <class Body>
  __device__ void walk(Body&& body) const {
    const auto size = static_cast<unsigned>(l) * vectors;
    for (unsigned v = threadIdx.x; v < size; v += kThreads) {
      const unsigned position = by.vectors.divide(v);
      const auto i = static_cast<int>((v - position * vectors) * V);
      if (i < channels) body(std::integral_constant<int, V>(), Place{first + position * c + i, i, 0});
    }
  }
  template <class A>
  __device__ void along(const A* values, const Place& place, A (&v)[V]) const {
#pragma unroll
    for (int k = 0; k < V; ++k) v[k] = values[place.i + k];
  }
};

// body(share, by) as with_share has it, for the plan's blocks of a cluster.
template <class T, class Body>
void with_cluster_share(const Plan& plan, Body&& body) {
  if (!plan.residence.by_channels) return with_share<T>(plan.call, plan.elementwise, body);
  using Share = ChannelShare<T>;
  body(static_cast<Share*>(nullptr),
       typename Share::Divisors{Divisor(plan.elementwise.channels / Share::V), Divisor(plan.call.c)});
}

#ifdef SE_FUSED_HAS_CLUSTERS
struct Cluster {
  using Group = cooperative_groups::cluster_group;
  int size, rank;

  __device__ explicit Cluster(int size) : size(size), rank(static_cast<int>(blockIdx.x % size)) {}

  // What any thread of any block wrote before arrive() is seen by all after wait().
  __device__ void arrive() const { Group::barrier_arrive(); }
  __device__ void wait() const { Group::barrier_wait(); }
  __device__ void sync() const {
    arrive();
    wait();
  }
  // Where another block has the same variable of its shared memory: from the first sync() on, until that block ends.
  template <class V>
  __device__ const V* of(int peer, V* mine) const {
    return Group::map_shared_rank(mine, peer);
  }
};

// The same share of another sample.
template <class Share>
__device__ Share of_sample(Share share, const Problem& p, int64_t n) {
  share.first += (n - share.n) * p.c * p.l;
  share.n = n;
  return share;
}

// The slab of a share in `memory`. An element's address has the same remainder of 16 as in the map, so that accesses
// are as wide as there.
template <class T, class Share>
__device__ auto slab_in(const Share& share, bool wide, T* memory) {
  return share.slab(memory + (wide ? share.first % (16 / sizeof(T)) : 0));
}

// Begins to copy a share of a map into its slab; it is there after await_copies().
template <class T, class Share>
__device__ auto copy_to_slab(const Share& share, const void* map, bool wide, T* memory) {
  constexpr int V = 16 / sizeof(T);
  const auto slab = slab_in(share, wide, memory);
  const T* from = static_cast<const T*>(map) + share.first;
  T* to = slab.slab;
  const auto size = static_cast<unsigned>(share.count), to_border = static_cast<unsigned>((V - share.first % V) % V);
  const unsigned head = !wide || to_border > size ? size : to_border, vectors = (size - head) / V;
  for (unsigned v = threadIdx.x; v < vectors; v += kThreads) {
    __pipeline_memcpy_async(to + head + v * V, from + head + v * V, 16);
  }
  // Before the vectors and after them.
  for (unsigned i = threadIdx.x; i < size - vectors * V; i += kThreads) {
    const unsigned e = i < head ? i : i + vectors * V;
    Accumulator<T> value[1];
    load_streaming<1>(from + e, value);
    to[e] = narrow<T>(value[0]);
  }
  return slab;
}
template <class T>
__device__ auto copy_to_slab(const ChannelShare<T>& share, const void* map, bool wide, T* memory) {
  const auto packed = slab_in(share, wide, memory);
  share.walk([&](auto, const Place& place) {
    __pipeline_memcpy_async(packed.slab + packed.index(place.at), static_cast<const T*>(map) + place.at, 16);
  });
  return packed;
}

__device__ inline void await_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
}

template <int V, class T, class Operation, class Store, class Part = typename Operation::Part>
__device__ void reduce_rows_of(const RowShare<T>& share, const Operation& op, const Problem& p, int lanes, Part* work,
                               Store&& store) {
  const int groups = kThreads / lanes;
  for (int i0 = 0; i0 < share.channels; i0 += groups) {
    const int i = i0 + static_cast<int>(threadIdx.x) / lanes;
    if (lanes == kThreads) __syncthreads();  // `work` has been read
    const Part part =
        reduce_row<V>(op, i < share.channels, share.n * p.c + share.c0 + i, p.c, p.l, 0, p.l / V, lanes, work);
    if (i < share.channels && threadIdx.x % lanes == 0) store(i, part);
  }
}

// store(i, Part) over the positions of the share, for each of its channels c0 + i. The width is no template parameter
// of the kernels: there would be three of each to compile.
template <class T, class Operation, class Store, class Part = typename Operation::Part>
__device__ void reduce_share(const RowShare<T>& share, const Operation& op, const Problem& p, const Reduction& r,
                             Part* work, Store&& store) {
  if (r.width == 16) return reduce_rows_of<16 / sizeof(T)>(share, op, p, r.lanes, work, store);
  if (r.width == 8) return reduce_rows_of<8 / sizeof(T)>(share, op, p, r.lanes, work, store);
  reduce_rows_of<1>(share, op, p, r.lanes, work, store);
}
template <class T, int W, class Operation, class Store, class Part = typename Operation::Part>
__device__ void reduce_share(const PositionShare<T, W>& share, const Operation& op, const Problem& p,
                             const Reduction& r, Part* work, Store&& store) {
  for (int c0 = 0; c0 < share.channels; c0 += r.lanes * W) {
    __syncthreads();  // `work` has been read
    reduce_positions_of<W>(op, share.n, c0, p.c, p.c, p.l, share.l0, share.l1, r.lanes, work, store);
  }
}
template <class T, class Operation, class Store, class Part = typename Operation::Part>
__device__ void reduce_share(const ChannelShare<T>& share, const Operation& op, const Problem& p, const Reduction& r,
                             Part* work, Store&& store) {
  constexpr int V = 16 / sizeof(T);
  const int64_t end = share.c0 + share.channels;
  for (int64_t channel0 = share.c0; channel0 < end; channel0 += r.lanes * V) {
    __syncthreads();  // `work` has been read
    reduce_positions_of<V>(op, share.n, channel0, end, p.c, p.l, 0, p.l, r.lanes, work,
                           [&](int64_t channel, const Part& part) { store(channel - share.c0, part); });
  }
}

// The Part of the share's channel c0 + i over the shares of all blocks. parts: this block's, one a channel.
template <class Share, class Operation, class Part = typename Operation::Part>
__device__ Part merge_shares(const Cluster& cluster, const Operation& op, Part* parts, int64_t i) {
  if (!Share::kSplitsPositions) return parts[i];
  Part part = cluster.of(0, parts)[i];
  for (int peer = 1; peer < cluster.size; ++peer) part = op.merge(part, cluster.of(peer, parts)[i]);
  return part;
}

// The sum over all blocks of the partial sums that each has at `mine`, in the order of their ranks.
template <class A>
__device__ A sum_over_blocks(const Cluster& cluster, A* mine, int64_t i) {
  A sum = cluster.of(0, mine)[i];
  for (int peer = 1; peer < cluster.size; ++peer) sum += cluster.of(peer, mine)[i];
  return sum;
}
#endif

}  // namespace se::cuda
