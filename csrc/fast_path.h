// The fast path from Python to the CPU kernels, without the dispatcher. With an empty kernel a call takes 2.3 us, and
// 6.5 us through the dispatcher.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace se::fast_path {

// Makes forward() call the function at this address, for tensors of these types. Returns false if this torch has no
// DLPack exchange.
bool connect(uintptr_t forward, uintptr_t batch_norm, const pybind11::tuple& types, pybind11::object empty_like);

// The functions below return None, without having computed anything, for tensors that are not plain, dense and on the
// CPU, and for arguments that are not valid. `norm` is an eval-mode batch norm: the tuple (weight or None, bias or
// None, mean, variance, epsilon).

// y, the result of a call of se_fused.squeeze_excite. out: x (in place), a map apart from all inputs, or None for a new
// one. norm: None, or in place of scale and shift. s: that of BlockForward (se.h), or None.
pybind11::object forward(pybind11::handle x, pybind11::handle w1, pybind11::handle b1, pybind11::handle w2,
                         pybind11::handle b2, pybind11::handle residual, pybind11::handle out, int64_t act,
                         int64_t gate, double slope, double offset, int64_t squeeze, int64_t pre_act, int64_t post_act,
                         pybind11::handle scale, pybind11::handle shift, const pybind11::object& norm,
                         pybind11::handle s);

// act(norm(x) + residual), over x if `inplace`. residual: a map or None.
pybind11::object batch_norm(pybind11::handle x, pybind11::handle residual, bool inplace, int64_t act,
                            const pybind11::tuple& norm);

// (weight, bias) of a convolution with `norm` after it, as one convolution. weight: [C, ...]. bias: [C] or None.
pybind11::object fold(pybind11::handle weight, pybind11::handle bias, const pybind11::tuple& norm);

}  // namespace se::fast_path
