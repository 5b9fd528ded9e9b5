// Registers the CUDA kernels as se_fused::forward_out and se_fused::backward_out, by the LibTorch stable ABI.
#include <torch/csrc/stable/accelerator.h>

#include <exception>
#include <mutex>
#include <string>
#include <unordered_map>

#include "../stable.h"
#include "kernels.h"

// torch's current stream. In torch >= 2.10, but declared only where CUDA's headers are.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace {

using se::Tensor;

std::mutex mutex;  // of what follows
std::string forced;
std::unordered_map<int, se::Device> known;

const se::Device& limits(int index) {
  const auto found = known.find(index);
  return found != known.end() ? found->second : known.emplace(index, se::cuda::device_limits(index)).first->second;
}

se::Plan plan(const se::Call& call, int index) {
  const std::lock_guard<std::mutex> lock(mutex);
  return se::make_plan(call, limits(index), forced);
}

struct Cuda {
  template <class Direction>
  static void run(const Direction& f, const Tensor& x) {
    const int index = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(index, &stream) == 0,
                    "se_fused: this torch gives no CUDA stream");
    const se::Plan plan = ::plan(se::call_of(f), index);
    // From torch's caching allocator: safe in CUDA graphs, and on any number of streams and threads.
    const int64_t size[] = {plan.scratch_bytes};
    const Tensor scratch = torch::stable::new_empty(x, {size, 1}, torch::headeronly::ScalarType::Byte);
    se::cuda::run(f, plan, scratch.data_ptr(), stream);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(se_fused, CUDA, m) {
  m.impl("forward_out", TORCH_BOX(&se::forward_out<Cuda>));
  m.impl("backward_out", TORCH_BOX(&se::backward_out<Cuda>));
}

// For ctypes: the numbers of csrc/plan.h's Device, in its order, and null, or why the kernels do not run on it: a text
// that lives until this thread asks again, and in out[0] whether that will stay so. Then the forced plan of the calls
// that follow, or "".
extern "C" __attribute__((visibility("default"))) const char* se_fused_device_limits(int index, int64_t* out) try {
  const torch::stable::accelerator::DeviceGuard guard(index);
  const std::lock_guard<std::mutex> lock(mutex);
  const se::Device& device = limits(index);
  *out++ = device.capability;
  *out++ = device.multiprocessors;
  *out++ = device.shared_per_block;
  *out++ = device.shared_per_multiprocessor;
  for (const int clusters : device.clusters) *out++ = clusters;
  return nullptr;
} catch (const std::exception& error) {
  thread_local std::string reason;
  reason = error.what();
  *out = dynamic_cast<const se::cuda::NeverRuns*>(&error) != nullptr;
  return reason.c_str();
}
extern "C" __attribute__((visibility("default"))) void se_fused_force_plan(const char* text) {
  const std::lock_guard<std::mutex> lock(mutex);
  forced = text;
}
