// The operators of a backend, registered by the LibTorch stable ABI: a tensor of torch becomes a View (arguments.h).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "arguments.h"

namespace se {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: throw std::runtime_error("se_fused: a tensor of an unsupported dtype");
  }
}

View view(const Tensor& t) {
  if (!t.defined()) return {};
  return {t.dim(), t.sizes().data(), t.strides().data(), dtype_of(t), t.data_ptr()};
}
View view(const OptionalTensor& t) { return t ? view(*t) : View{}; }

// The operators, for a Backend with run(const Forward&, const Tensor& x) and run(const Backward&, const Tensor& x).
template <class Backend>
void forward_out(const Tensor& x, const OptionalTensor& w1, const OptionalTensor& b1, const Tensor& w2,
                 const OptionalTensor& b2, const OptionalTensor& residual, int64_t act, int64_t gate, double slope,
                 double offset, int64_t squeeze, int64_t pre_act, int64_t post_act, bool channels_last, const Tensor& y,
                 const OptionalTensor& z, const OptionalTensor& p1, const OptionalTensor& p2) {
  Forward f{};
  const Inputs in{view(x), view(w1), view(b1), view(w2), view(b2), view(residual)};
  fill(f, in, {act, gate, slope, offset, squeeze, pre_act, post_act}, channels_last);
  f.y = result(view(y), in, channels_last);
  f.z = row_major("z", view(z), f.n * f.c, accumulator(f));
  f.p1 = row_major("p1", view(p1), f.n * f.r, accumulator(f));
  f.p2 = row_major("p2", view(p2), f.n * f.c, accumulator(f));
  Backend::run(f, x);
}

template <class Backend>
void backward_out(const Tensor& g, const Tensor& x, const OptionalTensor& w1, const OptionalTensor& b1,
                  const Tensor& w2, const OptionalTensor& b2, const OptionalTensor& residual, const Tensor& z,
                  const Tensor& p1, const Tensor& p2, int64_t act, int64_t gate, double slope, double offset,
                  int64_t squeeze, int64_t pre_act, int64_t post_act, bool channels_last, bool residual_is_x,
                  const OptionalTensor& dx, const OptionalTensor& dw1, const OptionalTensor& db1,
                  const OptionalTensor& dw2, const OptionalTensor& db2, const OptionalTensor& dresidual) {
  Backward f{};
  const Inputs in{view(x), view(w1), view(b1), view(w2), view(b2), view(residual)};
  fill(f, in, {act, gate, slope, offset, squeeze, pre_act, post_act}, channels_last);
  f.g = map("g", view(g), in.x, channels_last);
  f.z = row_major("z", view(z), f.n * f.c, accumulator(f));
  f.p1 = row_major("p1", view(p1), f.n * f.r, accumulator(f));
  f.p2 = row_major("p2", view(p2), f.n * f.c, accumulator(f));
  require(f.g && f.z && f.p2 && (f.p1 || f.r == 0), "no g, z, p1 or p2");
  f.residual_is_x = residual_is_x;
  f.dx = map("dx", view(dx), in.x, channels_last);
  f.dw1 = row_major("dw1", view(dw1), f.r * f.c, f.weight_dtype);
  f.db1 = row_major("db1", view(db1), f.r, f.weight_dtype);
  f.dw2 = row_major("dw2", view(dw2), f.c * (f.r ? f.r : f.c), f.weight_dtype);
  f.db2 = row_major("db2", view(db2), f.c, f.weight_dtype);
  f.dresidual = map("dresidual", view(dresidual), in.x, channels_last);
  Backend::run(f, x);
}

}  // namespace
}  // namespace se
