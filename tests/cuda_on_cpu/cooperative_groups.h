// Stands in for CUDA's header of this name: as much of it as the kernels use.
#pragma once

#include "machine.h"

namespace cooperative_groups {

struct cluster_group {
  static void barrier_arrive() { cuda_on_cpu::cluster_arrive(false); }
  static void barrier_wait() { cuda_on_cpu::cluster_wait(); }
  template <class T>
  static T* map_shared_rank(T* p, unsigned rank) {
    return static_cast<T*>(const_cast<void*>(cuda_on_cpu::read_shared_rank(p, rank)));
  }
};

}  // namespace cooperative_groups

inline void __nanosleep(unsigned ns) { cuda_on_cpu::counters().slept.insert({cuda_on_cpu::position().block.x, ns}); }
inline void __cluster_barrier_arrive_relaxed() { cuda_on_cpu::cluster_arrive(true); }
