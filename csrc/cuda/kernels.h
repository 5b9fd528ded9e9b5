// The functions that the binding calls to run the CUDA kernels, without a CUDA or torch header.
#pragma once

#include <stdexcept>

#include "../plan.h"
#include "../se.h"

namespace se::cuda {

// The kernels will never run on a device, because its driver is too old or the library has no code for it.
struct NeverRuns : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The limits of the device with this index. Raises NeverRuns, or std::runtime_error for an error that may pass.
Device device_limits(int index);

// Each enqueues the operation on `stream`, a cudaStream_t; `scratch` has plan.scratch_bytes bytes. If a launch fails,
// they raise std::runtime_error with the launch and the plan.
void forward_two_pass(const Forward& f, const Plan& plan, void* scratch, void* stream);
void forward_cluster(const Forward& f, const Plan& plan, void* stream);
void backward_two_pass(const Backward& f, const Plan& plan, void* scratch, void* stream);
void backward_cluster(const Backward& f, const Plan& plan, void* scratch, void* stream);
void batch_norm(const BatchNorm& f, const Norm& norm, const Plan& plan, void* stream);
// Writes scale and shift of `norm`, which are float [C], or double [C] if its vectors are.
void scale_shift(const Norm& norm, void* scale, void* shift, const Plan& plan, void* stream);

inline void run(const Forward& f, const Plan& plan, void* scratch, void* stream) {
  if (plan.algorithm == Algorithm::kCluster) return forward_cluster(f, plan, stream);
  forward_two_pass(f, plan, scratch, stream);
}
inline void run(const Backward& f, const Plan& plan, void* scratch, void* stream) {
  if (plan.algorithm == Algorithm::kCluster) return backward_cluster(f, plan, scratch, stream);
  backward_two_pass(f, plan, scratch, stream);
}

}  // namespace se::cuda
