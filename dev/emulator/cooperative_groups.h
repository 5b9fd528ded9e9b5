// Replaces CUDA's header of this name, with the part of it that the kernels use.
#pragma once

#include "machine.h"

namespace cooperative_groups {

struct cluster_group {
  static void barrier_arrive() { emulator::cluster_arrive(false); }
  static void barrier_wait() { emulator::cluster_wait(); }
  template <class T>
  static T* map_shared_rank(T* p, unsigned rank) {
    return static_cast<T*>(const_cast<void*>(emulator::read_shared_rank(p, rank)));
  }
};

}  // namespace cooperative_groups

inline void __nanosleep(unsigned ns) { emulator::counters().slept.insert({emulator::position().block.x, ns}); }
inline void __cluster_barrier_arrive_relaxed() { emulator::cluster_arrive(true); }
