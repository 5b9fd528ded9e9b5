// What both algorithms of forward use: the squeeze of a channel, and y of V elements. kPlain: the mean, without
// activations of the maps and without a residual. Most networks call this form, so it does no work for other options.
#pragma once

#include "activations.cuh"

namespace se::cuda {

inline bool is_plain(const Problem& p) {
  return p.options.squeeze == Squeeze::kMean && p.options.pre_act == Activation::kIdentity &&
         p.options.post_act == Activation::kIdentity && !p.residual;
}

template <class A, bool kPlain>
struct SqueezePart {
  A sum, max;
};
template <class A>
struct SqueezePart<A, true> {
  A sum;
};

// A reduction (reduce.cuh) of u = pre_act(x). X: the place from which x is read (device.cuh). O: Options, or a
// reference to the options of a kernel's parameter, whose copy would be in local memory.
template <class T, class X, bool kPlain, class O = Options>
struct SqueezeOperation {
  using A = Accumulator<T>;
  using Part = SqueezePart<A, kPlain>;
  template <int V>
  struct Context {};
  template <int V>
  using Fetched = Vector<V, T>;
  static constexpr int kBlocks = kForwardBlocks<kPlain, A>, kAhead = kPlain ? 4 : X::kAhead;

  X x;
  O options;

  __device__ bool has_sum() const { return options.squeeze != Squeeze::kMax; }
  __device__ bool has_max() const { return options.squeeze != Squeeze::kMean; }
  __device__ Part empty() const {
    if constexpr (kPlain)
      return {0};
    else
      return {0, -INFINITY};
  }
  __device__ Part merge(const Part& a, const Part& b) const {
    if constexpr (kPlain)
      return {a.sum + b.sum};
    else
      return {a.sum + b.sum, max_keep_nan(a.max, b.max)};
  }
  __device__ Part shuffle_xor(const Part& p, int offset) const {
    if constexpr (kPlain)
      return {cuda::shuffle_xor(p.sum, offset)};
    else
      return {cuda::shuffle_xor(p.sum, offset), cuda::shuffle_xor(p.max, offset)};
  }
  template <int V>
  __device__ Context<V> context(int64_t, int) const {
    return {};
  }
  template <int V>
  __device__ Vector<V, T> fetch(Index at) const {
    return x.template load<V>(at);
  }
  template <int V>
  __device__ void add(const Vector<V, T>& fetched, const Context<V>&, Part (&parts)[V]) const {
    A u[V];
    fetched.unpack(u);
    if constexpr (!kPlain) activate<T>(options.pre_act, options, u);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (kPlain || has_sum()) parts[i].sum += u[i];
      if constexpr (!kPlain) {
        if (has_max()) parts[i].max = max_keep_nan(parts[i].max, u[i]);
      }
    }
  }
};

// z of one channel
template <class A>
__device__ A squeezed(Squeeze squeeze, A sum, A max, int64_t l) {
  const A mean = sum / static_cast<A>(l);
  return squeeze == Squeeze::kMean ? mean : squeeze == Squeeze::kMax ? max : (mean + max) / 2;
}
template <class A, bool kPlain>
__device__ A squeezed(Squeeze squeeze, const SqueezePart<A, kPlain>& part, int64_t l) {
  if constexpr (kPlain)
    return part.sum / static_cast<A>(l);
  else
    return squeezed(squeeze, part.sum, part.max, l);
}

// Computes y of a tile's elements (elementwise.cuh). s: the gates of its channels.
template <class T, class X, bool kPlain>
struct ScaleOperation {
  using A = Accumulator<T>;
  static constexpr int kAhead = kPlain ? X::kAhead : 2;
  template <int V>
  struct Fetched {
    Vector<V, T> x, residual;
  };
  template <int V>
  struct ChannelValues {
    A s[V];
  };

  const Forward& f;
  X x;
  const A* s;

  __device__ bool has_own_residual() const { return !kPlain && f.residual && f.residual != f.x; }
  template <int V>
  __device__ Fetched<V> fetch(Index at) const {
    Fetched<V> fetched{};
    fetched.x = x.template load<V>(at);
    if (has_own_residual()) fetched.residual = load_streaming<V>(static_cast<const T*>(f.residual) + at.at);
    return fetched;
  }
  template <int V, class Load>
  __device__ ChannelValues<V> load_channels(Load&& load) const {
    ChannelValues<V> values;
    load(s, values.s);
    return values;
  }
  template <int V>
  __device__ void finish(Index at, const ChannelValues<V>& values, const Fetched<V>& fetched) const {
    A v[V];
    fetched.x.unpack(v);
    if constexpr (kPlain) {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] *= values.s[i];
    } else {
      A residual[V];
      fetched.x.unpack(residual);
      if (has_own_residual()) fetched.residual.unpack(residual);
      activate<T>(f.options.pre_act, f.options, v);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = f.residual ? v[i] * values.s[i] + residual[i] : v[i] * values.s[i];
      activate<T>(f.options.post_act, f.options, v);
    }
    store<V>(static_cast<T*>(f.y) + at.at, v);
  }
};

}  // namespace se::cuda
