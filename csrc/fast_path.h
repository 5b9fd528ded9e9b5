// The fast path from Python to the CPU kernels, without the dispatcher. With an empty kernel a call takes 2.3 us, and
// 6.5 us through the dispatcher.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace se::fast_path {

// Makes forward() call the function at this address, for tensors of these types. Returns false if this torch has no
// DLPack exchange.
bool connect(uintptr_t forward, const pybind11::tuple& types, pybind11::object empty_like);
// Returns y, or None if the call must take the dispatcher; then nothing has been computed. scale, shift and s are those
// of BlockForward (se.h), or None.
pybind11::object forward(pybind11::handle x, pybind11::handle w1, pybind11::handle b1, pybind11::handle w2,
                         pybind11::handle b2, pybind11::handle residual, bool inplace, int64_t act, int64_t gate,
                         double slope, double offset, int64_t squeeze, int64_t pre_act, int64_t post_act,
                         pybind11::handle scale, pybind11::handle shift, pybind11::handle s);

// Fills `out` [2, C] with scale and shift of an eval-mode batch norm: BatchNorm(x + bias of the convolution) = scale *
// x + shift. Returns false, without a result, for tensors that are not plain, dense and of one dtype on the CPU.
bool batch_norm(pybind11::handle weight, pybind11::handle bias, pybind11::handle mean, pybind11::handle variance,
                pybind11::handle convolution_bias, double epsilon, pybind11::handle out);

}  // namespace se::fast_path
