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

// Begins to copy a share of a map into the slab; it is there after await_copies(). An element's address has the same
// remainder of 16 as in the map, so that accesses are as wide as there.
template <class T, class Share>
__device__ Resident<T> copy_to_slab(const Share& share, const void* map, bool wide, T* slab) {
  constexpr int V = 16 / sizeof(T);
  const T* from = static_cast<const T*>(map) + share.first;
  const auto size = static_cast<unsigned>(share.count), offset = wide ? static_cast<unsigned>(share.first % V) : 0;
  const unsigned to_border = (V - offset) % V, head = !wide || to_border > size ? size : to_border;
  const unsigned vectors = (size - head) / V;
  T* to = slab + offset;
  for (unsigned v = threadIdx.x; v < vectors; v += kThreads) {
    __pipeline_memcpy_async(to + head + v * V, from + head + v * V, 16);
  }
  auto one = [&](unsigned e) {
    Accumulator<T> value[1];
    load_streaming<1>(from + e, value);
    to[e] = narrow<T>(value[0]);
  };
  for (unsigned e = threadIdx.x; e < head; e += kThreads) one(e);
  for (unsigned e = head + vectors * V + threadIdx.x; e < size; e += kThreads) one(e);
  return {to, share.first};
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
    reduce_positions_of<W>(op, share.n, c0, p.c, p.l, share.l0, share.l1, r.lanes, work, store);
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
