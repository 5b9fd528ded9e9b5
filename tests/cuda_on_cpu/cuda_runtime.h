// Stands in for CUDA's header of this name: as much of it as the kernels use.
#pragma once

#include <cmath>

#include "machine.h"

#define __global__
#define __device__
#define __noinline__
#define __launch_bounds__(...)

#define threadIdx (::cuda_on_cpu::position().thread)
#define blockIdx (::cuda_on_cpu::position().block)
#define __syncthreads() ::cuda_on_cpu::sync_threads(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, offset) ::cuda_on_cpu::shuffle_xor(mask, value, offset, __FILE__, __LINE__)
#define __ldg ::cuda_on_cpu::read
#define __ldcs ::cuda_on_cpu::read
#define __stwb ::cuda_on_cpu::write

// Of integers only: sums of floats have an order.
inline int atomicAdd(int* p, int v) { return cuda_on_cpu::atomic_add(p, v); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return cuda_on_cpu::atomic_add(p, v); }

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "success"; }

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// Runs the launch at once; what it finds is raised.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  cuda_on_cpu::run({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, cluster, config->dynamicSmemBytes,
                   [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}
