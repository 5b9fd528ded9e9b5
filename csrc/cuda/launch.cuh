// How the host starts a kernel as the plan says; tests/emulator takes its place on a CPU.
#pragma once

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "device.cuh"

namespace se::cuda {

inline void check(cudaError_t error, const char* name, const Plan& plan) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("se_fused: kernel ") + name + ": " + cudaGetErrorString(error) + "\n" +
                           plan.text());
}

// Lets `kernel` have, on the current device, clusters of 16 blocks and all the shared memory, in as many blocks as the
// plan counts on. Once, under a lock and before the first launch: another thread may be about to launch it too.
inline void allow_clusters(const void* kernel, const char* name, const Plan& plan) {
  static std::mutex mutex;  // of what follows
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check(cudaGetDevice(&device), name, plan);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  auto set = [&](cudaFuncAttribute attribute, int64_t value) {
    check(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(value)), name, plan);
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_per_block);
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  allowed.insert({kernel, device});
}

// `kernel` on the grid that the plan lists under `name`, in the clusters that it says.
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
  config.numAttrs = planned.cluster > 0;
  if (planned.cluster > 0) allow_clusters(reinterpret_cast<const void*>(kernel), name, plan);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name, plan);
}

}  // namespace se::cuda
