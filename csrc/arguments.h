// Converts tensors to the structs of se.h, without a torch header, for both ways into the kernels. Behind the
// dispatcher, se_fused/ops.py has checked the arguments already, and these checks keep a call of the bare operator from
// reading outside a tensor. The fast path (fast_path.h) has no other checks, so these must accept exactly what
// se_fused/arguments.py accepts.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "se.h"

namespace se {
namespace {

template <class... Words>
void require(bool condition, const Words&... words) {
  if (condition) return;
  std::ostringstream text;
  text << "se_fused: ";
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// A tensor, or with dim = -1 none.
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

// The arguments of an operator, in the order of its schema.
struct Inputs {
  View x, w1, b1, w2, b2, residual;
};
struct Codes {
  int64_t act, gate;
  double slope, offset;
  int64_t squeeze, pre_act, post_act;
};

// Dense strides in the order that `channels_last` says; sizes of 1 may have any.
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

// The memory of `t`, which must have `numel` elements of `dtype`; null for none.
void* data(const char* name, const View& t, int64_t numel, DType dtype) {
  if (!t) return nullptr;
  require(t.numel() == numel, name, " has ", t.numel(), " elements; wanted ", numel);
  require(t.dtype == dtype, name, " is of another dtype than was wanted");
  require(t.data || numel == 0, name, " has no memory");
  return t.data;
}

// As `data`, of a row-major tensor.
void* row_major(const char* name, const View& t, int64_t numel, DType dtype) {
  require(!t || numel == 0 || is_dense(t), name, " is not row-major");
  return data(name, t, numel, dtype);
}

// The memory of a map like x, which must be dense in the order that `channels_last` says; null for none.
void* map(const char* name, const View& t, const View& x, bool channels_last) {
  if (!t) return nullptr;
  require(t.dim == x.dim, name, " has ", t.dim, " dimensions; x has ", x.dim);
  for (int64_t dim = 0; dim < x.dim; ++dim) {
    require(t.sizes[dim] == x.sizes[dim], name, " differs from x in dimension ", dim);
  }
  require(is_dense(t, channels_last), name, " is not dense in the order of x");
  return data(name, t, x.numel(), x.dtype);
}

// The memory of a dense weight [rows, columns, 1...] or, with no columns, bias [rows]; null for none.
const void* weight(const char* name, const View& t, int64_t rows, int64_t columns, DType dtype) {
  if (!t) return nullptr;
  const bool is_matrix = columns > 0;
  const bool shape = is_matrix ? t.dim >= 2 && t.dim <= 5 && t.sizes[0] == rows && t.sizes[1] == columns
                               : t.dim == 1 && t.sizes[0] == rows;
  require(shape && is_dense(t), name, " is not a dense [", rows, is_matrix ? ", " : "",
          is_matrix ? std::to_string(columns) : "", "]");
  return data(name, t, is_matrix ? rows * columns : rows, dtype);
}

DType accumulator(const Problem& p) { return p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

void fill(Problem& p, const Inputs& in, const Codes& codes, bool channels_last) {
  const auto& [x, w1, b1, w2, b2, residual] = in;
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
  // A row of one element, or one channel: the two orders are the same memory, and the longer span is the faster.
  p.channels_last = p.l == 1 || (channels_last && p.c > 1);
  p.x = map("x", x, x, channels_last);
  p.residual = map("residual", residual, x, channels_last);
  require(p.weight_dtype == p.dtype || (p.weight_dtype == DType::kFloat32 && accumulator(p) == p.weight_dtype),
          "weights of this dtype beside a map of that one");
  p.w1 = weight("w1", w1, p.r, p.c, p.weight_dtype);
  p.b1 = weight("b1", b1, p.r, 0, p.weight_dtype);
  p.w2 = weight("w2", w2, p.c, depth, p.weight_dtype);
  p.b2 = weight("b2", b2, p.c, 0, p.weight_dtype);
}

// The memory of y, which is that of x or apart from all that is read after some of it is written.
void* result(const View& y, const Inputs& in, bool channels_last) {
  auto* begin = static_cast<char*>(map("y", y, in.x, channels_last));
  require(begin, "no y");
  auto apart = [&](const char* name, const View& t, bool element_by_element) {
    if (!t || (element_by_element && t.data == y.data)) return;
    const auto* other = static_cast<const char*>(t.data);
    const bool before = other + t.numel() * element_bytes(t.dtype) <= begin;
    require(before || begin + y.numel() * element_bytes(y.dtype) <= other, "y overlaps ", name);
  };
  apart("x", in.x, true);
  apart("residual", in.residual, true);
  apart("w1", in.w1, false);
  apart("b1", in.b1, false);
  apart("w2", in.w2, false);
  apart("b2", in.b2, false);
  return begin;
}

}  // namespace
}  // namespace se
