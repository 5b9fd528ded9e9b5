// Blocks that hold one sample together in their shared memory: thread-block clusters, from sm_90 on.
#pragma once

#include <cooperative_groups.h>

#include "slab.cuh"

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

  // Until this cluster's turn to begin; a GPU may sleep for none to twice of what it is told.
  __device__ static void begin(const Residence& residence, int64_t n) {
    if (n > 0 && n < residence.first_wave) __nanosleep(static_cast<unsigned>(n) * residence.stagger_ns);
  }
  // What any thread of any block wrote before is seen by all after it.
  __device__ void sync() const {
    Group::barrier_arrive();
    Group::barrier_wait();
  }
  // The last barrier: nobody ends before all have arrived, who by then read nothing of others. It publishes nothing.
  __device__ void arrive() const { __cluster_barrier_arrive_relaxed(); }
  __device__ void wait() const { Group::barrier_wait(); }

  // Where another block has the same variable of its shared memory: from the first sync() on, until that block ends.
  template <class V>
  __device__ const V* of(int peer, V* mine) const {
    return Group::map_shared_rank(mine, peer);
  }
  // The sum over all blocks of the partial sums that each has at `mine`, in the order of their ranks. Eight are under
  // way at once.
  template <class A>
  __device__ A sum(A* mine, int64_t i) const {
    constexpr int kAhead = 8;
    A sum = 0;
    for (int peer0 = 0; peer0 < size; peer0 += kAhead) {
      A values[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (peer0 + j < size) values[j] = of(peer0 + j, mine)[i];
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (peer0 + j < size) sum += values[j];
      }
    }
    return sum;
  }
};
#endif

}  // namespace se::cuda
