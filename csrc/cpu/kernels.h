// The interface of the CPU kernels to their binding. The kernels include no torch header.
//
// forward.cpp, backward.cpp and batch_norm.cpp are compiled once for each instruction set, into one library. The
// headers that they include therefore keep everything in unnamed namespaces: with external linkage, the linker would
// keep one copy of each function for all instruction sets (one-definition rule), and a CPU without AVX-512 could get
// AVX-512 code.
#pragma once

#include <cstddef>

#include "../se.h"

namespace se::cpu {

// A parallel loop: body(context, begin, end) over [0, count) in chunks of at least `grain`.
struct Pool {
  void (*run)(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  int threads;
};

struct Kernels {
  const char* name;                                // the instruction set
  size_t (*forward_scratch)(const BlockForward&);  // bytes; the caller allocates them, aligned to 64
  void (*forward)(const BlockForward&, const Pool&, void* scratch);
  size_t (*backward_scratch)(const Backward&);
  void (*backward)(const Backward&, const Pool&, void* scratch);
  void (*batch_norm)(const BatchNorm&, const Pool&);
};

#define SE_DECLARE_KERNELS(isa)                          \
  namespace isa {                                        \
  size_t forward_scratch(const BlockForward&);           \
  void forward(const BlockForward&, const Pool&, void*); \
  size_t backward_scratch(const Backward&);              \
  void backward(const Backward&, const Pool&, void*);    \
  void batch_norm(const BatchNorm&, const Pool&);        \
  }
SE_DECLARE_KERNELS(baseline)
SE_DECLARE_KERNELS(v3)  // x86-64-v3: AVX2, FMA, F16C
SE_DECLARE_KERNELS(v4)  // x86-64-v4: AVX-512 F, BW, CD, DQ, VL
#undef SE_DECLARE_KERNELS

}  // namespace se::cpu
