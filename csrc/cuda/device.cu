#include <cuda_runtime.h>

#include <stdexcept>

#include "kernels.h"

namespace se::cuda {

Device device_limits(int index) {
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, index);
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("se_fused: device limits: ") + cudaGetErrorString(error));
    return value;
  };
  return {"cuda:" + std::to_string(index),
          10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount)};
}

}  // namespace se::cuda
