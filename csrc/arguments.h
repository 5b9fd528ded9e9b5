// From the tensors of an operator to se.h's structs, by the LibTorch stable ABI: what every backend's binding shares.
// se_fused/ops.py checks the arguments and brings them into form; what is checked here again keeps a direct call from
// reading outside a tensor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <stdexcept>

#include "se.h"

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

// The memory of `t`, which must have `numel` elements of `dtype`; null for none.
const void* data(const char* name, const Tensor& t, int64_t numel, DType dtype) {
  STD_TORCH_CHECK(t.defined() && t.numel() == numel && dtype_of(t) == dtype, "se_fused: ", name, " has ",
                  t.defined() ? t.numel() : 0, " elements; wanted ", numel, " of the expected dtype");
  return t.data_ptr();
}

// The memory of a dense weight [rows, columns, 1...] or, with no columns, bias [rows].
const void* weight(const char* name, const OptionalTensor& t, int64_t rows, int64_t columns, DType dtype) {
  if (!t) return nullptr;
  const bool shape =
      columns ? t->dim() >= 2 && t->size(0) == rows && t->size(1) == columns : t->dim() == 1 && t->size(0) == rows;
  STD_TORCH_CHECK(shape && t->is_contiguous(), "se_fused: ", name, " is not a dense [", rows, ", ", columns, "]");
  return data(name, *t, columns ? rows * columns : rows, dtype);
}
const void* data(const char* name, const OptionalTensor& t, int64_t numel, DType dtype) {
  return t ? data(name, *t, numel, dtype) : nullptr;
}
template <class Optional>
void* output(const char* name, const Optional& t, int64_t numel, DType dtype) {
  return const_cast<void*>(data(name, t, numel, dtype));
}

// Dense strides in the order that `channels_last` says; sizes of 1 may have any.
void check_order(const char* name, const Tensor& t, bool channels_last) {
  int64_t expected = 1;
  auto dense = [&](int64_t dim) {
    STD_TORCH_CHECK(t.size(dim) == 1 || t.stride(dim) == expected, "se_fused: ", name, " has stride ", t.stride(dim),
                    " in dimension ", dim, "; wanted ", expected);
    expected *= t.size(dim);
  };
  if (channels_last) dense(1);
  for (int64_t dim = t.dim() - 1; dim >= 2; --dim) dense(dim);
  if (!channels_last) dense(1);
  dense(0);
}

DType accumulator(const Problem& p) { return p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

void fill(Problem& p, const Tensor& x, const OptionalTensor& w1, const OptionalTensor& b1, const Tensor& w2,
          const OptionalTensor& b2, const OptionalTensor& residual, int64_t act, int64_t gate, double slope,
          double offset, int64_t squeeze, int64_t pre_act, int64_t post_act, bool channels_last) {
  for (const int64_t code : {act, gate, pre_act, post_act}) {
    STD_TORCH_CHECK(code >= 0 && code < kActivations, "se_fused: activation code ", code);
  }
  STD_TORCH_CHECK(squeeze >= 0 && squeeze <= 2, "se_fused: squeeze code ", squeeze);
  STD_TORCH_CHECK(x.dim() >= 3 && x.dim() <= 5, "se_fused: x has ", x.dim(), " dimensions");
  STD_TORCH_CHECK(!w1 || w1->dim() >= 2 && w1->size(0) > 0, "se_fused: w1 is no [R, C]");
  STD_TORCH_CHECK(w1 || !b1, "se_fused: b1 without w1");
  auto activation = [](int64_t code) { return static_cast<Activation>(code); };
  p.options = {activation(act), activation(gate), activation(pre_act),          activation(post_act),
               slope,           offset,           static_cast<Squeeze>(squeeze)};
  p.n = x.size(0);
  p.c = x.size(1);
  p.r = w1 ? w1->size(0) : 0;
  const int64_t numel = x.numel(), depth = w1 ? p.r : p.c;
  STD_TORCH_CHECK(numel > 0, "se_fused: an empty map");
  p.l = numel / (p.n * p.c);
  p.dtype = dtype_of(x);
  p.weight_dtype = dtype_of(w2);
  check_order("x", x, channels_last);
  if (residual) {
    STD_TORCH_CHECK(residual->dim() == x.dim(), "se_fused: residual has ", residual->dim(), " dimensions");
    for (int64_t dim = 0; dim < x.dim(); ++dim) {
      STD_TORCH_CHECK(residual->size(dim) == x.size(dim), "se_fused: residual differs from x in dimension ", dim);
    }
    check_order("residual", *residual, channels_last);
  }
  // A row of one element, or one channel: the two orders are the same memory, and the longer span is the faster.
  p.channels_last = p.l == 1 || (channels_last && p.c > 1);
  p.x = data("x", x, numel, p.dtype);
  p.residual = data("residual", residual, numel, p.dtype);
  STD_TORCH_CHECK(p.weight_dtype == p.dtype || p.weight_dtype == DType::kFloat32 && accumulator(p) == p.weight_dtype,
                  "se_fused: weights of this dtype beside a map of that one");
  p.w1 = weight("w1", w1, p.r, p.c, p.weight_dtype);
  p.b1 = weight("b1", b1, p.r, 0, p.weight_dtype);
  p.w2 = weight("w2", w2, p.c, depth, p.weight_dtype);
  p.b2 = weight("b2", b2, p.c, 0, p.weight_dtype);
}

// The operators, for a Backend with run(const Forward&, const Tensor& x) and run(const Backward&, const Tensor& x).
template <class Backend>
void forward_out(const Tensor& x, const OptionalTensor& w1, const OptionalTensor& b1, const Tensor& w2,
                 const OptionalTensor& b2, const OptionalTensor& residual, int64_t act, int64_t gate, double slope,
                 double offset, int64_t squeeze, int64_t pre_act, int64_t post_act, bool channels_last, const Tensor& y,
                 const OptionalTensor& z, const OptionalTensor& p1, const OptionalTensor& p2) {
  Forward f{};
  fill(f, x, w1, b1, w2, b2, residual, act, gate, slope, offset, squeeze, pre_act, post_act, channels_last);
  check_order("y", y, channels_last);
  f.y = output("y", y, x.numel(), f.dtype);
  f.z = output("z", z, f.n * f.c, accumulator(f));
  f.p1 = output("p1", p1, f.n * f.r, accumulator(f));
  f.p2 = output("p2", p2, f.n * f.c, accumulator(f));
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
  fill(f, x, w1, b1, w2, b2, residual, act, gate, slope, offset, squeeze, pre_act, post_act, channels_last);
  const int64_t numel = x.numel();
  check_order("g", g, channels_last);
  if (dx) check_order("dx", *dx, channels_last);
  if (dresidual) check_order("dresidual", *dresidual, channels_last);
  f.g = data("g", g, numel, f.dtype);
  f.z = data("z", z, f.n * f.c, accumulator(f));
  f.p1 = data("p1", p1, f.n * f.r, accumulator(f));
  f.p2 = data("p2", p2, f.n * f.c, accumulator(f));
  f.residual_is_x = residual_is_x;
  f.dx = output("dx", dx, numel, f.dtype);
  f.dw1 = output("dw1", dw1, f.r * f.c, f.weight_dtype);
  f.db1 = output("db1", db1, f.r, f.weight_dtype);
  f.dw2 = output("dw2", dw2, f.c * (f.r ? f.r : f.c), f.weight_dtype);
  f.db2 = output("db2", db2, f.c, f.weight_dtype);
  f.dresidual = output("dresidual", dresidual, numel, f.dtype);
  Backend::run(f, x);
}

}  // namespace
}  // namespace se
