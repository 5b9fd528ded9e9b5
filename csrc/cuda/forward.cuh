// What the algorithms of forward share: the squeeze of a channel, and y of V elements.
#pragma once

#include "activations.cuh"

namespace se::cuda {

// A reduction (reduce.cuh) of u = pre_act(x). X: where x is read.
template <class T, class X>
struct SqueezeOperation {
  using A = Accumulator<T>;
  struct Part {
    A sum, max;
  };
  template <int V>
  struct Context {};
  static constexpr int kBlocks = kForwardBlocks<A>;

  X x;
  Options options;

  __device__ bool has_sum() const { return options.squeeze != Squeeze::kMax; }
  __device__ bool has_max() const { return options.squeeze != Squeeze::kMean; }
  __device__ Part empty() const { return {0, -INFINITY}; }
  __device__ Part merge(const Part& a, const Part& b) const { return {a.sum + b.sum, max_keep_nan(a.max, b.max)}; }
  __device__ Part shuffle_xor(const Part& p, int offset) const {
    return {cuda::shuffle_xor(p.sum, offset), cuda::shuffle_xor(p.max, offset)};
  }
  template <int V>
  __device__ Context<V> context(int64_t, int64_t, int) const {
    return {};
  }
  template <int V>
  __device__ void add(int64_t at, const Context<V>&, Part (&parts)[V]) const {
    A u[V];
    x.load(at, u);
    activate<T>(options.pre_act, options, u);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (has_sum()) parts[i].sum += u[i];
      if (has_max()) parts[i].max = max_keep_nan(parts[i].max, u[i]);
    }
  }
};

// z of one channel.
template <class A>
__device__ A squeezed(Squeeze squeeze, A sum, A max, int64_t l) {
  const A mean = sum / static_cast<A>(l);
  return squeeze == Squeeze::kMean ? mean : squeeze == Squeeze::kMax ? max : (mean + max) / 2;
}

// y of the V elements from `at` on, whose gates are s.
template <class T, int V, class X, class A = Accumulator<T>>
__device__ void scale(const Forward& f, const X& map, int64_t at, const A (&s)[V]) {
  A x[V], v[V], residual[V];
  map.load(at, x);
#pragma unroll
  for (int i = 0; i < V; ++i) residual[i] = v[i] = x[i];
  activate<T>(f.options.pre_act, f.options, v);
  if (f.residual && f.residual != f.x) load_streaming<V>(static_cast<const T*>(f.residual) + at, residual);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = f.residual ? v[i] * s[i] + residual[i] : v[i] * s[i];
  activate<T>(f.options.post_act, f.options, v);
  store<V>(static_cast<T*>(f.y) + at, v);
}

}  // namespace se::cuda
