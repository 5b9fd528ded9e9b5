// Launches a kernel as the plan says. On a CPU, dev/emulator replaces the CUDA runtime that it calls.
#pragma once

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>

#include "device.cuh"

namespace se::cuda {

inline void check(cudaError_t error, const char* name, const Plan& plan) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("se_fused: kernel ") + name + ": " + cudaGetErrorString(error) + "\n" +
                           plan.text());
}

// Allows `kernel` all shared memory on the current device, so that as many blocks fit on an SM as the plan assumes,
// and, if there are `several` blocks per cluster, clusters of 16. It is done once, under a lock and before the first
// launch, because another thread may be about to launch the same kernel.
inline void allow_clusters(const void* kernel, bool several, const char* name, const Plan& plan) {
  static std::mutex mutex;  // guards `allowed`
  static std::set<std::tuple<const void*, int, bool>> allowed;
  int device = 0;
  check(cudaGetDevice(&device), name, plan);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device, several})) return;
  auto set = [&](cudaFuncAttribute attribute, int64_t value) {
    check(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(value)), name, plan);
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_per_block);
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (several) set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  allowed.insert({kernel, device, several});
}

// Launches `kernel` with the grid, clusters and shared memory of the plan's launch `name`.
template <class... Parameters, class... Arguments>
void launch(const Plan& plan, const char* name, void* stream, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  const Launch& planned = plan.launch(name);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(planned.blocks));
  config.blockDim = dim3(planned.threads);
  config.dynamicSmemBytes = planned.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(planned.cluster), 1, 1};
  config.attrs = &attribute;
  const bool several = planned.cluster > 1;  // a launch without the attribute has clusters of one block on every GPU
  config.numAttrs = several;
  if (planned.cluster > 0) allow_clusters(reinterpret_cast<const void*>(kernel), several, name, plan);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name, plan);
}

}  // namespace se::cuda
