// Registers the CUDA kernels as se_fused::forward_out and se_fused::backward_out, by the LibTorch stable ABI.
#include <torch/csrc/stable/accelerator.h>

#include <mutex>
#include <unordered_map>

#include "../arguments.h"
#include "kernels.h"

// torch's current stream. In torch >= 2.10, but declared only where CUDA's headers are.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace {

using se::Tensor;

const se::Device& limits(int index) {
  static std::mutex mutex;
  static std::unordered_map<int, se::Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  return found != known.end() ? found->second : known.emplace(index, se::cuda::device_limits(index)).first->second;
}

struct Cuda {
  template <class Direction>
  static void run(const Direction& f, const Tensor& x) {
    const int index = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(index, &stream) == 0,
                    "se_fused: this torch gives no CUDA stream");
    const se::Plan plan = se::make_plan(se::call_of(f), limits(index));
    // From torch's caching allocator: safe in CUDA graphs, and on any number of streams and threads.
    const int64_t size[] = {plan.scratch_bytes};
    const Tensor scratch = torch::stable::new_empty(x, {size, 1}, torch::headeronly::ScalarType::Byte);
    launch(f, plan, scratch.data_ptr(), stream);
  }
  static void launch(const se::Forward& f, const se::Plan& plan, void* scratch, void* stream) {
    se::cuda::forward(f, plan, scratch, stream);
  }
  static void launch(const se::Backward& f, const se::Plan& plan, void* scratch, void* stream) {
    se::cuda::backward(f, plan, scratch, stream);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(se_fused, CUDA, m) {
  m.impl("forward_out", TORCH_BOX(&se::forward_out<Cuda>));
  m.impl("backward_out", TORCH_BOX(&se::backward_out<Cuda>));
}
