// What the kernels of backward share: the partial sums of ds and what follows from them.
#pragma once

#include "excite.cuh"

namespace se::cuda {

// [N, splits, C] each; maxima and ties are null where `squeeze` is the mean.
template <class A>
struct Partial {
  A *ds, *maxima, *ties;
  int splits;

  __device__ A gate(const Backward& f, int64_t n, int64_t channel) const {
    A sum = 0;
    for (int split = 0; split < splits; ++split) sum += load_one(ds + (n * splits + split) * f.c + channel);
    return sum;
  }
  __device__ void maximum(const Backward& f, int64_t n, int64_t channel, A& max, A& count) const {
    max = -INFINITY, count = 0;
    for (int split = 0; split < splits; ++split) {
      const int64_t at = (n * splits + split) * f.c + channel;
      const A other = load_one(maxima + at), others = load_one(ties + at);
      count = other > max ? others : other == max ? count + others : count;
      max = max_keep_nan(max, other);
    }
  }
};

template <class A>
__device__ A gate_of(const Backward& f, int64_t n, int64_t channel) {
  return activate_one(f.options.gate, f.options, load_one(static_cast<const A*>(f.p2) + n * f.c + channel));
}

// dp2 = ds gate'(p2)
template <class A>
__device__ A gate_gradient(const Backward& f, const Partial<A>& partial, int64_t n, int64_t channel) {
  const A p2 = load_one(static_cast<const A*>(f.p2) + n * f.c + channel);
  return chain_one(f.options.gate, f.options, p2, partial.gate(f, n, channel));
}

template <class A>
void launch_weight_gradients(const Backward& f, const Plan& plan, const Partial<A>& partial, const A* dp1,
                             void* stream);

}  // namespace se::cuda
