// Registers the CUDA kernels as the operators of se_fused/ops.py that fill memory, through the LibTorch stable ABI.
#include <exception>
#include <memory>
#include <string>

#include "../plan/cache.h"
#include "../torch_binding.h"
#include "kernels.h"

namespace {

using se::Tensor;

se::Plans plans(se::cuda::device_limits);

class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    DeviceGuardHandle guard = nullptr;
    se::check(aoti_torch_create_device_guard(index, &guard), "taking the device");
    guard_.reset(guard);
  }

 private:
  std::unique_ptr<DeviceGuardOpaque, se::Deleter<DeviceGuardHandle, aoti_torch_delete_device_guard>> guard_;
};

void* current_stream(int index) {
  void* stream = nullptr;
  se::require(aoti_torch_get_current_cuda_stream != nullptr, "this torch is not for CUDA");
  se::check(aoti_torch_get_current_cuda_stream(index, &stream), "the current stream");
  return stream;
}

// Memory from torch's caching allocator, which is safe in CUDA graphs and on any number of streams and threads. None
// for 0 bytes, because torch takes as long for them as for more.
se::OptionalTensor scratch(int64_t bytes, int index) {
  if (bytes == 0) return {};
  const int64_t stride = 1;
  AtenTensorHandle memory = nullptr;
  se::check(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(), index,
                                     &memory),
            "allocating scratch memory");
  return Tensor(memory);
}

struct Cuda {
  static constexpr bool kHasBatchNorm = true;
  template <class Direction>
  static void run(const Direction& f, const Tensor& x) {
    const int index = x.device_index();
    const DeviceGuard guard(index);
    void* const stream = current_stream(index);
    const std::shared_ptr<const se::Plan> plan = plans.plan(se::call_of(f), index);
    const se::OptionalTensor memory = scratch(plan->scratch_bytes, index);
    se::cuda::run(f, *plan, memory ? memory->data() : nullptr, stream);
  }
  static void run(const se::BatchNorm& f, const se::Norm& norm, const Tensor& x) {
    const int index = x.device_index();
    const DeviceGuard guard(index);
    se::cuda::batch_norm(f, norm, se::plan_batch_norm(se::call_of(f), plans.device(index)), current_stream(index));
  }
  static void run(const se::Norm& norm, void* scale, void* shift, const Tensor& mean) {
    const int index = mean.device_index();
    const DeviceGuard guard(index);
    se::cuda::scale_shift(norm, scale, shift, se::plan_scale_shift(norm.c), current_stream(index));
  }
};

const se::Registered<Cuda> registered("CUDA");

}  // namespace

// Both are called through ctypes. se_fused_device_limits writes the numbers of csrc/plan.h's Device in their order and
// returns null. If the kernels do not run on the device, it returns the reason, a text that lives until this thread
// asks again, and out[0] tells whether that is permanent. se_fused_force_plan forces the plan of this thread's calls
// that follow; "" forces none.
extern "C" __attribute__((visibility("default"))) const char* se_fused_device_limits(int index, int64_t* out) try {
  const DeviceGuard guard(index);
  const se::Device& device = plans.device(index);
  *out++ = device.capability;
  *out++ = device.sm_count;
  *out++ = device.shared_per_block;
  *out++ = device.shared_per_sm;
  for (const int clusters : device.clusters) *out++ = clusters;
  *out++ = static_cast<int64_t>(device.bytes_per_us);
  *out++ = device.l2_bytes;
  return nullptr;
} catch (const std::exception& error) {
  thread_local std::string reason;
  reason = error.what();
  *out = dynamic_cast<const se::cuda::NeverRuns*>(&error) != nullptr;
  return reason.c_str();
}
extern "C" __attribute__((visibility("default"))) void se_fused_force_plan(const char* text) { se::Plans::force(text); }
