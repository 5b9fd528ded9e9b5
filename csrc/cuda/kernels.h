// The host side of the CUDA kernels: what the binding calls, without a CUDA or torch header.
#pragma once

#include "../plan.h"
#include "../se.h"

namespace se::cuda {

// The limits of the device with this index.
Device device_limits(int index);

// Enqueue the operation on `stream`, a cudaStream_t; `scratch` has plan.scratch_bytes bytes. Raise std::runtime_error
// with the kernel and the plan where a launch fails.
void forward(const Forward& f, const Plan& plan, void* scratch, void* stream);
void backward(const Backward& f, const Plan& plan, void* scratch, void* stream);

}  // namespace se::cuda
