// mbarriers, bulk copies, and pushes to another block of the cluster, in PTX from sm_90 on (PTX ISA 8.1, "Asynchronous
// copies and mbarrier"). On a CPU, dev/emulator replaces them.
#pragma once

#include "../../csrc/cuda/cluster.cuh"

namespace se::cuda {

#ifdef SE_FUSED_HAS_CLUSTERS
#ifdef __CUDACC__
__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
__device__ inline unsigned shared_address(const void* p, int rank) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
  return there;
}
#endif

// A barrier in shared memory. A phase ends when all arrivals are made and all bytes that they announced have arrived.
struct Mbarrier {
  uint64_t word;

  // One thread calls it. Other threads may use the mbarrier after a barrier of the block, or, for pushes, of the
  // cluster.
  __device__ void init(unsigned count) {
#ifdef __CUDACC__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(count) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
    emulator::mbarrier_init(this, count);
#endif
  }

  __device__ void arrive(unsigned expected_bytes) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
                 "r"(expected_bytes)
                 : "memory");
#else
    emulator::mbarrier_arrive(this, expected_bytes);
#endif
  }

  // Waits until the phase of this parity has ended; phases are counted from 0.
  __device__ void wait(unsigned parity) {
#ifdef __CUDACC__
    unsigned done = 0;
    while (!done) {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
          "}"
          : "=r"(done)
          : "r"(shared_address(this)), "r"(parity)
          : "memory");
    }
#else
    emulator::mbarrier_wait(this, parity);
#endif
  }
};

// One thread copies from global memory to this block's shared memory. Addresses and size are multiples of 16 bytes, and
// the bytes count at `mbarrier`.
__device__ inline void copy_bulk(void* to, const void* from, unsigned bytes, Mbarrier* mbarrier) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(mbarrier))
               : "memory");
#else
  emulator::copy_bulk(to, from, bytes, mbarrier);
#endif
}

// Stores to the variable that corresponds to `mine` in the block `rank`, and counts at that block's `mbarrier`.
__device__ inline void push(float* mine, float value, Mbarrier* mbarrier, int rank) {
#ifdef __CUDACC__
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(shared_address(mine, rank)),
      "r"(__float_as_uint(value)), "r"(shared_address(mbarrier, rank))
      : "memory");
#else
  emulator::push(mine, &value, sizeof(value), mbarrier, rank);
#endif
}
#endif

}  // namespace se::cuda
