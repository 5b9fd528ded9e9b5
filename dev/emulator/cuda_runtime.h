// Replaces CUDA's header of this name, with the part of it that the kernels use.
#pragma once

#include <cfloat>
#include <cmath>

#include "machine.h"

#define __global__
#define __device__
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx (::emulator::position().thread)
#define blockIdx (::emulator::position().block)
#define __syncthreads() ::emulator::sync_threads(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, offset) ::emulator::shuffle_xor(mask, value, offset, __FILE__, __LINE__)
#define __ldg ::emulator::read_only
#define __ldcs ::emulator::read

// These are not macros, because members of cudaLaunchConfig_t have the same names.
inline const emulator::Index& blockDim = emulator::position().threads;
inline const emulator::Index& gridDim = emulator::position().blocks;

// Only for integers, because a sum of floats depends on its order.
inline int atomicAdd(int* p, int v) { return emulator::atomic_add(p, v); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return emulator::atomic_add(p, v); }

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

inline float __saturatef(float v) { return v > 0 ? v < 1 ? v : 1 : 0; }  // NaN gives 0

namespace emulator {

// The special function unit with its largest errors: 2 ulp, which the error tables of the CUDA Programming Guide allow
// for exp2f, for __expf near 0 and for __fdividef, which consist of these instructions. A hash of the argument chooses
// the direction of the error; a bit of `directions` reverses it for all arguments. A subnormal result becomes 0, as the
// PTX ISA specifies for .ftz.
inline unsigned directions = 0;
inline float approximation(double exact, float argument, unsigned direction) {
  auto result = static_cast<float>(exact);
  uint32_t bits;
  std::memcpy(&bits, &argument, sizeof(bits));
  const float towards = (bits * 0x9e3779b9 >> 31 ^ direction) & 1 ? INFINITY : -INFINITY;
  if (std::isnormal(result)) result = std::nextafter(std::nextafter(result, towards), towards);
  return std::fabs(result) < FLT_MIN ? std::copysign(0.0f, result) : result;
}
inline float exp2_approx(float v) { return approximation(std::exp2(double{v}), v, directions); }
inline float reciprocal_approx(float v) { return approximation(1 / double{v}, v, directions >> 1); }

}  // namespace emulator

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  ++emulator::runtime.set_attribute;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) emulator::allow_shared(kernel, value);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  ++emulator::runtime.get_device;
  *device = emulator::runtime.device;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "success" : "invalid argument";
}

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

// Runs the launch at once, unless calls are only counted, and raises the errors that it finds.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  ++emulator::runtime.launch;
  if (config->dynamicSmemBytes > emulator::kShared &&
      config->dynamicSmemBytes > emulator::allowed_shared(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidValue;
  }
  if (emulator::runtime.only_counts) return cudaSuccess;
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  emulator::run({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, cluster, config->dynamicSmemBytes,
                [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}
