// Checks tensors and converts them to the structs of se.h, without a torch header, for the operators and for the fast
// path. Before an operator runs, se_fused/ops.py has checked the arguments of a public call; the checks here keep a
// direct call of the operator from accessing memory outside a tensor. The fast path (fast_path.h) has no other checks,
// so these must accept exactly the calls that se_fused/arguments.py accepts.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "se.h"

namespace se {
// With `inline` functions instead, GCC copies the checks into each call: 57 instead of 28 KB of cpu/binding.o.
namespace {

template <class... Words>
void require(bool condition, const Words&... words) {
  if (condition) return;
  std::ostringstream text;
  text << "se_fused: ";
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// A tensor; with dim = -1, no tensor.
struct View {
  int64_t dim = -1;
  const int64_t *sizes = nullptr, *strides = nullptr;
  DType dtype{};
  void* data = nullptr;

  explicit operator bool() const { return dim >= 0; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dim; ++i) count *= sizes[i];
    return count;
  }
};

// The arguments of an operator, in the order of its schema. scale and shift are those of forward.
struct Inputs {
  View x, w1, b1, w2, b2, residual, scale, shift;
};
struct OptionCodes {
  int64_t act, gate;
  double slope, offset;
  int64_t squeeze, pre_act, post_act;
};

// Whether `t` is dense in the order [N, *spatial, C] if `channels_last`, else row-major. A dimension of size 1 may have
// any stride.
bool is_dense(const View& t, bool channels_last = false) {
  int64_t expected = 1;
  auto dense = [&](int64_t dim) {
    if (t.sizes[dim] != 1 && t.strides[dim] != expected) return false;
    expected *= t.sizes[dim];
    return true;
  };
  if (channels_last && !dense(1)) return false;
  for (int64_t dim = t.dim - 1; dim >= (channels_last ? 2 : 0); --dim) {
    if (!dense(dim)) return false;
  }
  return !channels_last || dense(0);
}

// The memory of `t`, which must have `numel` elements of `dtype`; null for no tensor.
void* data_of(const char* name, const View& t, int64_t numel, DType dtype) {
  if (!t) return nullptr;
  require(t.numel() == numel, name, " has ", t.numel(), " elements; wanted ", numel);
  require(t.dtype == dtype, name, " is of another dtype than was wanted");
  require(t.data || numel == 0, name, " has no memory");
  return t.data;
}

// The memory of a map of the shape and dtype of x, which must be dense in the order that `channels_last` says; null for
// no tensor.
void* map_data(const char* name, const View& t, const View& x, bool channels_last) {
  if (!t) return nullptr;
  require(t.dim == x.dim, name, " has ", t.dim, " dimensions; x has ", x.dim);
  for (int64_t dim = 0; dim < x.dim; ++dim) {
    require(t.sizes[dim] == x.sizes[dim], name, " differs from x in dimension ", dim);
  }
  require(is_dense(t, channels_last), name, " is not dense in the order of x");
  return data_of(name, t, x.numel(), x.dtype);
}

// The memory of a dense weight [rows, columns, 1...] or, if columns = 0, of a bias [rows]; null for no tensor.
const void* weight_data(const char* name, const View& t, int64_t rows, int64_t columns, DType dtype) {
  if (!t) return nullptr;
  const bool is_matrix = columns > 0;
  const bool shape = is_matrix ? t.dim >= 2 && t.dim <= 5 && t.sizes[0] == rows && t.sizes[1] == columns
                               : t.dim == 1 && t.sizes[0] == rows;
  require(shape && is_dense(t), name, " is not a dense [", rows, is_matrix ? ", " : "",
          is_matrix ? std::to_string(columns) : "", "]");
  return data_of(name, t, is_matrix ? rows * columns : rows, dtype);
}

DType accumulator_dtype(const Problem& p) { return p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

void fill_problem(Problem& p, const Inputs& in, const OptionCodes& codes, bool channels_last) {
  const auto& [x, w1, b1, w2, b2, residual, scale, shift] = in;
  for (const int64_t code : {codes.act, codes.gate, codes.pre_act, codes.post_act}) {
    require(code >= 0 && code < kActivations, "activation code ", code);
  }
  require(codes.squeeze >= 0 && codes.squeeze <= 2, "squeeze code ", codes.squeeze);
  require(x.dim >= 3 && x.dim <= 5, "x has ", x.dim, " dimensions");
  require(!w1 || (w1.dim >= 2 && w1.sizes[0] > 0), "w1 is no [R, C]");
  require(static_cast<bool>(w2), "no w2");
  require(w1 || !b1, "b1 without w1");
  auto activation = [](int64_t code) { return static_cast<Activation>(code); };
  p.options = {
      activation(codes.act), activation(codes.gate), activation(codes.pre_act),          activation(codes.post_act),
      codes.slope,           codes.offset,           static_cast<Squeeze>(codes.squeeze)};
  p.n = x.sizes[0];
  p.c = x.sizes[1];
  p.r = w1 ? w1.sizes[0] : 0;
  const int64_t numel = x.numel(), depth = w1 ? p.r : p.c;
  require(numel > 0, "an empty map");
  p.l = numel / (p.n * p.c);
  p.dtype = x.dtype;
  p.weight_dtype = w2.dtype;
  // With one position or one channel, both orders describe the same memory. The order with the longer rows is faster.
  p.channels_last = p.l == 1 || (channels_last && p.c > 1);
  p.x = map_data("x", x, x, channels_last);
  p.residual = map_data("residual", residual, x, channels_last);
  require(p.weight_dtype == p.dtype || (p.weight_dtype == DType::kFloat32 && accumulator_dtype(p) == p.weight_dtype),
          "weights of this dtype beside a map of that one");
  p.w1 = weight_data("w1", w1, p.r, p.c, p.weight_dtype);
  p.b1 = weight_data("b1", b1, p.r, 0, p.weight_dtype);
  p.w2 = weight_data("w2", w2, p.c, depth, p.weight_dtype);
  p.b2 = weight_data("b2", b2, p.c, 0, p.weight_dtype);
}

void fill_forward(Forward& f, const Inputs& in, const OptionCodes& codes, bool channels_last) {
  fill_problem(f, in, codes, channels_last);
  require(static_cast<bool>(in.scale) == static_cast<bool>(in.shift), "scale without shift, or shift without scale");
  f.scale = weight_data("scale", in.scale, f.c, 0, accumulator_dtype(f));
  f.shift = weight_data("shift", in.shift, f.c, 0, accumulator_dtype(f));
}

// Fills all but scale, shift and y.
void fill_batch_norm(BatchNorm& f, const View& x, const View& residual, int64_t act, bool channels_last) {
  require(act >= 0 && act < kActivations, "activation code ", act);
  require(x.dim >= 3 && x.dim <= 5 && x.numel() > 0, "x has ", x.dim, " dimensions, or is empty");
  f.n = x.sizes[0];
  f.c = x.sizes[1];
  f.l = x.numel() / (f.n * f.c);
  f.dtype = x.dtype;
  f.act = static_cast<Activation>(act);
  f.channels_last = f.l == 1 || (channels_last && f.c > 1);  // as in fill_problem
  f.x = map_data("x", x, x, channels_last);
  f.residual = map_data("residual", residual, x, channels_last);
}

// Refuses an output that shares memory with the input `t`.
void require_apart(const char* output_name, const View& output, const char* name, const View& t) {
  if (!t) return;
  const auto *begin = static_cast<const char*>(output.data), *other = static_cast<const char*>(t.data);
  const bool before = other + t.numel() * element_bytes(t.dtype) <= begin;
  require(before || begin + output.numel() * element_bytes(output.dtype) <= other, output_name, " overlaps ", name);
}

// The memory of y. It may be that of x or of residual, which are read element by element before y is written there; it
// must not overlap any other input, nor x or residual in part.
void* y_data(const View& y, const Inputs& in, bool channels_last) {
  void* const data = map_data("y", y, in.x, channels_last);
  require(data, "no y");
  if (in.x.data != data) require_apart("y", y, "x", in.x);
  if (in.residual.data != data) require_apart("y", y, "residual", in.residual);
  require_apart("y", y, "w1", in.w1);
  require_apart("y", y, "b1", in.b1);
  require_apart("y", y, "w2", in.w2);
  require_apart("y", y, "b2", in.b2);
  require_apart("y", y, "scale", in.scale);
  require_apart("y", y, "shift", in.shift);
  return data;
}

}  // namespace
}  // namespace se
