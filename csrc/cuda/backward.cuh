// What both algorithms of backward use: the reduction that gives ds, the values per channel that follow from it, dx of
// V elements, and the launch for the weight gradients.
#pragma once

#include "gemv.cuh"

namespace se::cuda {

// No activation of the maps and no maximum. A residual then only adds to the result.
inline bool is_plain(const Backward& f) {
  return f.options.squeeze == Squeeze::kMean && f.options.pre_act == Activation::kIdentity &&
         f.options.post_act == Activation::kIdentity;
}

// Partial results, [N, splits, C] each; maxima and ties are null if `squeeze` is the mean.
template <class A>
struct Partial {
  A *ds, *maxima, *ties;
  int splits;

  __device__ A gate(const Backward& f, int64_t n, int64_t channel) const {
    const A* partial = ds + n * splits * f.c + channel;
    A sum = load_one(partial);
    merge_splits(partial, splits, f.c, [&](A other) { sum += other; });
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

// s of a row of [N, C].
template <class A>
__device__ A gate_of(const Backward& f, int64_t row) {
  return activate_one(f.options.gate, f.options, load_one(static_cast<const A*>(f.p2) + row));
}

// dp2 = ds gate'(p2)
template <class A>
__device__ A gate_gradient(const Backward& f, int64_t n, int64_t channel, A ds) {
  return activation_backward_one(f.options.gate, f.options, load_one(static_cast<const A*>(f.p2) + n * f.c + channel),
                                 ds);
}

// dp1 = dh act'(p1)
template <class A>
__device__ A hidden_gradient(const Backward& f, int64_t n, int64_t k, A dh) {
  return activation_backward_one(f.options.act, f.options, load_one(static_cast<const A*>(f.p1) + n * f.r + k), dh);
}

__device__ inline bool has_max(const Backward& f) { return f.options.squeeze != Squeeze::kMean; }

// The maps, each read from one of the places in device.cuh. kPlain: no activation of the maps and no maximum, so that
// dx does not depend on x. F: Backward, or a reference to a kernel's parameter, whose copy would be in local memory.
template <class T, class G, class X, bool kPlain, class F = Backward>
struct Maps {
  using A = Accumulator<T>;
  template <int V>
  struct Fetched {
    Vector<V, T> g, x, residual;
  };

  F f;
  G g;
  X x, residual;

  __device__ bool has_post() const { return !kPlain && f.options.post_act != Activation::kIdentity; }
  __device__ bool has_own_residual() const { return has_post() && f.residual && f.residual != f.x; }
  template <int V>
  __device__ Fetched<V> fetch(Index at, bool reads_x) const {
    Fetched<V> fetched{};
    fetched.g = g.template load<V>(at);
    if (reads_x) fetched.x = x.template load<V>(at);
    if (has_own_residual()) fetched.residual = residual.template load<V>(at);
    return fetched;
  }
  // u and dv of V elements with the gates s; raw: x itself.
  template <int V>
  __device__ void gradient_of_v(const Fetched<V>& fetched, bool reads_x, const A (&s)[V], A (&raw)[V], A (&u)[V],
                                A (&dv)[V]) const {
    fetched.g.unpack(dv);
    if (!reads_x) return;
    fetched.x.unpack(raw);
    fetched.x.unpack(u);
    if constexpr (!kPlain) activate<T>(f.options.pre_act, f.options, u);
    if (!has_post()) return;
    A v[V], residual[V];
    fetched.x.unpack(residual);
    if (has_own_residual()) fetched.residual.unpack(residual);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = f.residual ? u[i] * s[i] + residual[i] : u[i] * s[i];
    activation_backward<T>(f.options.post_act, f.options, v, dv);
  }
};

template <class A, bool kPlain>
struct GateGradient {
  A ds, max, ties;
};
template <class A>
struct GateGradient<A, true> {
  A ds;
};

// A reduction (reduce.cuh) to ds; for the maximum also to its value and the number of positions that have it.
template <class T, class M, bool kPlain>
struct GateGradientOperation {
  using A = Accumulator<T>;
  using Part = GateGradient<A, kPlain>;
  template <int V>
  struct Context {
    A s[V];
  };
  static constexpr int kBlocks = kBackwardBlocks<kPlain, A>, kAhead = kPlain ? 4 : 2;

  M maps;

  __device__ Part empty() const {
    if constexpr (kPlain)
      return {0};
    else
      return {0, -INFINITY, 0};
  }
  __device__ Part merge(const Part& a, const Part& b) const {
    if constexpr (kPlain) {
      return {a.ds + b.ds};
    } else {
      const A ties = a.max > b.max ? a.ties : a.max == b.max ? a.ties + b.ties : b.ties;
      return {a.ds + b.ds, max_keep_nan(a.max, b.max), ties};
    }
  }
  __device__ Part shuffle_xor(const Part& p, int offset) const {
    const A ds = cuda::shuffle_xor(p.ds, offset);
    if constexpr (kPlain)
      return {ds};
    else
      return {ds, cuda::shuffle_xor(p.max, offset), cuda::shuffle_xor(p.ties, offset)};
  }
  template <int V>
  __device__ Context<V> context(int64_t row, int step) const {
    Context<V> context{};
    if (!maps.has_post()) return context;
#pragma unroll
    for (int i = 0; i < V; ++i) context.s[i] = gate_of<A>(maps.f, row + i * step);
    return context;
  }
  template <int V>
  __device__ auto fetch(Index at) const {
    return maps.template fetch<V>(at, true);
  }
  template <int V>
  __device__ void add(const typename M::template Fetched<V>& fetched, const Context<V>& context,
                      Part (&parts)[V]) const {
    A raw[V], u[V], dv[V];
    maps.gradient_of_v(fetched, true, context.s, raw, u, dv);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      parts[i].ds += dv[i] * u[i];
      if constexpr (!kPlain) {
        if (has_max(maps.f)) parts[i] = merge({0, u[i], 1}, parts[i]);
      }
    }
  }
};

// The values per channel of a block that ApplyOperation needs, in shared memory.
template <class A>
struct Channels {
  A *s, *dz_per_position;  // dz_per_position: dz / L, added at every position
  A *max, *dz_per_tie;     // dz_per_tie: dz / ties; both for the maximum only

  __device__ Channels(A* memory, int64_t count)
      : s(memory), dz_per_position(s + count), max(dz_per_position + count), dz_per_tie(max + count) {}

  __device__ void set(const Backward& f, int i, int64_t n, int64_t channel, A dz, A maximum, A ties) const {
    s[i] = gate_of<A>(f, n * f.c + channel);
    if (f.options.squeeze == Squeeze::kMeanMax) dz /= 2;
    dz_per_position[i] = f.options.squeeze == Squeeze::kMax ? A(0) : dz / static_cast<A>(f.l);
    if (!has_max(f)) return;
    max[i] = maximum;
    // A NaN maximum has no ties in PyTorch, so that its mask * dz / ties is NaN along the whole row.
    dz_per_tie[i] = maximum == maximum ? dz / ties : maximum;
  }
};

// Computes dx and dresidual of a tile's elements (elementwise.cuh).
template <class T, class M, bool kPlain>
struct ApplyOperation {
  using A = Accumulator<T>;
  static constexpr int kAhead = kPlain ? 3 : 1;
  template <int V>
  using Fetched = typename M::template Fetched<V>;
  template <int V>
  struct ChannelValues {
    A s[V], dz_per_position[V], max[V], dz_per_tie[V];
  };

  M maps;
  Channels<A> channels;

  __device__ bool reads_x() const {
    const Backward& f = maps.f;
    return !kPlain && (f.options.post_act != Activation::kIdentity ||
                       (f.dx && (has_max(f) || f.options.pre_act != Activation::kIdentity)));
  }
  template <int V>
  __device__ Fetched<V> fetch(Index at) const {
    return maps.template fetch<V>(at, reads_x());
  }
  template <int V, class Load>
  __device__ ChannelValues<V> load_channels(Load&& load) const {
    ChannelValues<V> values{};
    load(channels.s, values.s);
    load(channels.dz_per_position, values.dz_per_position);
    if (!kPlain && has_max(maps.f)) {
      load(channels.max, values.max);
      load(channels.dz_per_tie, values.dz_per_tie);
    }
    return values;
  }
  template <int V>
  __device__ void finish(Index at, const ChannelValues<V>& values, const Fetched<V>& fetched) const {
    const Backward& f = maps.f;
    A raw[V], u[V], dv[V], du[V];
    maps.gradient_of_v(fetched, reads_x(), values.s, raw, u, dv);
    if (f.dresidual) store<V>(static_cast<T*>(f.dresidual) + at.at, dv);
    if (!f.dx) return;
#pragma unroll
    for (int i = 0; i < V; ++i) du[i] = dv[i] * values.s[i] + values.dz_per_position[i];
    if constexpr (!kPlain) {
      if (has_max(f)) {
        // PyTorch multiplies as well: an infinite or NaN dz makes the other positions NaN.
#pragma unroll
        for (int i = 0; i < V; ++i) du[i] += (u[i] == values.max[i] ? A(1) : A(0)) * values.dz_per_tie[i];
      }
      if (f.options.pre_act != Activation::kIdentity) activation_backward<T>(f.options.pre_act, f.options, raw, du);
    }
    if (f.residual_is_x) {
#pragma unroll
      for (int i = 0; i < V; ++i) du[i] += dv[i];
    }
    store<V>(static_cast<T*>(f.dx) + at.at, du);
  }
};

template <class A>
void launch_weight_gradients(const Backward& f, const Plan& plan, const Partial<A>& partial, const A* dp1,
                             void* stream);

}  // namespace se::cuda
