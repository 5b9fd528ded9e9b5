// What both algorithms of forward use: the squeeze of a channel, and y of V elements. kPlain: the mean, without
// activations of the maps, scale and shift, and a residual. Most networks call this form, so it does no work for other
// options.
#pragma once

#include "activations.cuh"

namespace se::cuda {

inline bool is_plain(const Forward& f) {
  return f.options.squeeze == Squeeze::kMean && f.options.pre_act == Activation::kIdentity &&
         f.options.post_act == Activation::kIdentity && !f.residual && !f.scale;
}

// scale and shift of the channels of V elements, which are set if the call has them.
template <int V, class A, bool kPlain>
struct Affine {
  A scale[V], shift[V];

  __device__ void apply(A (&v)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = std::fma(v[i], scale[i], shift[i]);
  }
};
template <int V, class A>
struct Affine<V, A, true> {};

// A vector in global memory that the launch does not write.
template <class A>
struct GlobalVector {
  const A* values;
  __device__ A operator[](int64_t i) const { return load_one(values + i); }
};

template <class A, bool kPlain>
struct SqueezePart {
  A sum, max;
};
template <class A>
struct SqueezePart<A, true> {
  A sum;
};

// A reduction (reduce.cuh) of u = pre_act(scale * x + shift). X: the place from which x is read (device.cuh). F:
// Forward, or a reference to a kernel's parameter, whose copy would be in local memory.
template <class T, class X, bool kPlain, class F = Forward>
struct SqueezeOperation {
  using A = Accumulator<T>;
  using Part = SqueezePart<A, kPlain>;
  template <int V>
  using Context = Affine<V, A, kPlain>;
  template <int V>
  using Fetched = Vector<V, T>;
  static constexpr int kBlocks = kForwardBlocks<kPlain, A>;
  // With the partial results, scale and shift of eight channels, the registers suffice for half the loads.
  static constexpr int kAhead = kPlain ? 4 : sizeof(T) == 2 ? X::kAhead / 2 : X::kAhead;

  X x;
  F f;

  __device__ bool has_sum() const { return f.options.squeeze != Squeeze::kMax; }
  __device__ bool has_max() const { return f.options.squeeze != Squeeze::kMean; }
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
  __device__ Context<V> context([[maybe_unused]] int64_t row, [[maybe_unused]] int step) const {
    Context<V> affine{};
    if constexpr (!kPlain) {
      if (f.scale) {
        const int64_t channel = row % f.c;
#pragma unroll
        for (int i = 0; i < (step ? V : 1); ++i) {
          affine.scale[i] = load_one(static_cast<const A*>(f.scale) + channel + i);
          affine.shift[i] = load_one(static_cast<const A*>(f.shift) + channel + i);
        }
      }
      // Copied outside of the condition, so that one channel takes one register of each.
#pragma unroll
      for (int i = 1; i < V && step == 0; ++i) affine.scale[i] = affine.scale[0], affine.shift[i] = affine.shift[0];
    }
    return affine;
  }
  template <int V>
  __device__ Vector<V, T> fetch(Index at) const {
    return x.template load<V>(at);
  }
  template <int V>
  __device__ void add(const Vector<V, T>& fetched, [[maybe_unused]] const Context<V>& affine, Part (&parts)[V]) const {
    A u[V];
    fetched.unpack(u);
    if constexpr (!kPlain) {
      if (f.scale) affine.apply(u);
      activate<T>(f.options.pre_act, f.options, u);
    }
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

// Computes y of a tile's elements (elementwise.cuh). s: the gates of its channels, of which c0 is the first.
template <class T, class X, bool kPlain, class Tile>
struct ScaleOperation {
  using A = Accumulator<T>;
  // With s, scale and shift of eight channels, the registers suffice for one load.
  static constexpr int kAhead = kPlain ? X::kAhead : Tile::kHeldChannels == 8 ? 1 : 2;
  template <int V>
  struct Fetched {
    Vector<V, T> x, residual;
  };
  template <int V>
  struct ChannelValues : Affine<V, A, kPlain> {
    A s[V];
  };

  const Forward& f;
  X x;
  const A* s;
  int64_t c0;

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
    ChannelValues<V> values{};
    load(s, values.s);
    if constexpr (!kPlain) {
      if (f.scale) {
        load(GlobalVector<A>{static_cast<const A*>(f.scale) + c0}, values.scale);
        load(GlobalVector<A>{static_cast<const A*>(f.shift) + c0}, values.shift);
      }
    }
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
      if (f.scale) values.apply(v);
      activate<T>(f.options.pre_act, f.options, v);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = f.residual ? v[i] * values.s[i] + residual[i] : v[i] * values.s[i];
      activate<T>(f.options.post_act, f.options, v);
    }
    store<V>(static_cast<T*>(f.y) + at.at, v);
  }
};

}  // namespace se::cuda
