// What the CPU kernels offer to their binding. They are compiled once for each instruction set, without a torch header.
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
  const char* name;                           // the instruction set
  size_t (*forward_scratch)(const Forward&);  // bytes, which the caller provides aligned to 64
  void (*forward)(const Forward&, const Pool&, void* scratch);
  size_t (*backward_scratch)(const Backward&);
  void (*backward)(const Backward&, const Pool&, void* scratch);
};

#define SE_DECLARE_KERNELS(isa)                       \
  namespace isa {                                     \
  size_t forward_scratch(const Forward&);             \
  void forward(const Forward&, const Pool&, void*);   \
  size_t backward_scratch(const Backward&);           \
  void backward(const Backward&, const Pool&, void*); \
  }
SE_DECLARE_KERNELS(baseline)
SE_DECLARE_KERNELS(v3)  // x86-64-v3: AVX2, FMA, F16C
SE_DECLARE_KERNELS(v4)  // x86-64-v4: AVX-512 F, BW, CD, DQ, VL
#undef SE_DECLARE_KERNELS

}  // namespace se::cpu
