// Scratch memory: a call's temporary arrays in one piece of memory, which the binding allocates.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../se.h"

namespace se::cpu {
namespace {

// Takes arrays from `memory` one after the other. Null memory is allowed: the arena then only counts bytes.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class A>
  A* take(int64_t count) {
    A* out = reinterpret_cast<A*>(memory_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(A) + 63) / 64 * 64;
    return out;
  }
  // `given` if it is not null, else a new array.
  template <class A>
  A* take_unless(void* given, int64_t count) {
    return given ? static_cast<A*>(given) : take<A>(count);
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

// The bytes that Buffers<A>(p, arena) takes.
template <template <class> class Buffers, class P>
size_t scratch_bytes(const P& p) {
  Arena arena(nullptr);
  if (p.dtype == DType::kFloat64) {
    Buffers<double>(p, arena);
  } else {
    Buffers<float>(p, arena);
  }
  return arena.bytes();
}

}  // namespace
}  // namespace se::cpu
