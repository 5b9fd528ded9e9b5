// Queries the limits of a device.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "kernels.h"

namespace se::cuda {
namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it
  const char* text = cudaGetErrorString(error);
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion: throw NeverRuns(text);
    default: throw std::runtime_error(text);
  }
}

// The fraction of the memory's peak that a copy reaches: 0.86 of an H200's 4.9 TB/s (benchmarks/results/h200/run.json).
constexpr double kCopyEfficiency = 0.86;

// Is never launched: the occupancy of its clusters is queried.
__global__ void __launch_bounds__(kThreads) occupant() {}

// The clusters that this device can run at once with one block per SM; 0 if it cannot run them at all, or not in its
// present configuration.
int max_active_clusters(int size, int64_t shared_bytes) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(size);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, occupant, &config) == cudaSuccess) return clusters;
  cudaGetLastError();  // or the next launch would report it
  return 0;
}

}  // namespace

Device device_limits(int index) {
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  Device device{
      "cuda:" + std::to_string(index),
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
      attribute(cudaDevAttrMultiProcessorCount),
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      {},
      kCopyEfficiency * 2e-3 * attribute(cudaDevAttrMemoryClockRate) * attribute(cudaDevAttrGlobalMemoryBusWidth) / 8,
      attribute(cudaDevAttrL2CacheSize)};
  // A library for older GPUs runs on a newer one by its PTX, which has what the older ones have.
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, occupant));
  const int version = std::min(device.capability, code.ptxVersion);
  if (version >= 80) device.clusters[0] = device.sm_count;
  if (version < 90) return device;
  const auto shared = static_cast<int>(device.shared_per_block);
  check(cudaFuncSetAttribute(occupant, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  check(cudaFuncSetAttribute(occupant, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (int log = 0; log < 5; ++log) device.clusters[log] = max_active_clusters(1 << log, shared);
  return device;
}

}  // namespace se::cuda
