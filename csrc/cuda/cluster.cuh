// Thread-block clusters, whose blocks hold one sample together in their shared memory. Clusters of several blocks exist
// from sm_90 on. On older GPUs a cluster is one block, which holds a whole sample.
#pragma once

#include <cooperative_groups.h>

#include "staged_tile.cuh"

// The bodies of cluster kernels are compiled only where this is defined: where memory is copied to shared memory
// asynchronously.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define SE_FUSED_HAS_CLUSTER_KERNELS
#endif

namespace se::cuda {

// What only a cluster of several blocks does.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SE_FUSED_HAS_CLUSTERS
struct Peers : cooperative_groups::cluster_group {
  static constexpr bool kExist = true;
  static __device__ void barrier_arrive_relaxed() { __cluster_barrier_arrive_relaxed(); }
};
#else
struct Peers {  // never called
  static constexpr bool kExist = false;
  static __device__ void barrier_arrive() {}
  static __device__ void barrier_arrive_relaxed() {}
  static __device__ void barrier_wait() {}
  template <class V>
  static __device__ V* map_shared_rank(V* mine, int) {
    return mine;
  }
};
#endif

#ifdef SE_FUSED_HAS_CLUSTER_KERNELS
struct Cluster {
  int size, rank;

  __device__ explicit Cluster(int blocks)
      : size(Peers::kExist ? blocks : 1), rank(static_cast<int>(blockIdx.x % size)) {}

  // After it, all threads of the cluster see what any of them wrote before it.
  __device__ void sync() const {
    if (size == 1) return __syncthreads();
    Peers::barrier_arrive();
    Peers::barrier_wait();
  }
  // The last barrier: no block ends before all blocks have arrived, after which none reads the shared memory of
  // another. It does not make writes visible.
  __device__ void arrive() const {
    if (size > 1) Peers::barrier_arrive_relaxed();
  }
  __device__ void wait() const {
    if (size > 1) Peers::barrier_wait();
  }

  // The address of the variable `mine` in another block's shared memory. It is valid from the first sync() until that
  // block ends.
  template <class V>
  __device__ const V* of(int rank, V* mine) const {
    return size > 1 ? Peers::map_shared_rank(mine, rank) : mine;
  }

  // Sleeps until this cluster is to begin. A GPU may sleep for any time from 0 to twice the given one.
  __device__ static void begin(const ClusterConfig& config, int64_t n) {
    if (n > 0 && n < config.first_wave) __nanosleep(static_cast<unsigned>(n) * config.stagger_ns);
  }
  // The sum of the values that all blocks have at mine[i], in the order of their ranks. Eight loads are in flight at
  // once.
  template <class A>
  __device__ A sum(A* mine, int64_t i) const {
    constexpr int kAhead = 8;
    A sum = 0;
    for (int rank0 = 0; rank0 < size; rank0 += kAhead) {
      A values[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (rank0 + j < size) values[j] = of(rank0 + j, mine)[i];
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (rank0 + j < size) sum += values[j];
      }
    }
    return sum;
  }
};
#endif

}  // namespace se::cuda
