// What the algorithms of backward share: the reduction that ds comes from, what follows from it for each channel, dx of
// V elements, and the launch for the weights.
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
__device__ A gate_gradient(const Backward& f, int64_t n, int64_t channel, A ds) {
  return chain_one(f.options.gate, f.options, load_one(static_cast<const A*>(f.p2) + n * f.c + channel), ds);
}

// dp1 = dh act'(p1)
template <class A>
__device__ A hidden_gradient_of(const Backward& f, int64_t n, int64_t k, A dh) {
  return chain_one(f.options.act, f.options, load_one(static_cast<const A*>(f.p1) + n * f.r + k), dh);
}

__device__ inline bool has_max(const Backward& f) { return f.options.squeeze != Squeeze::kMean; }

// Where the maps are read (device.cuh).
template <class G, class X>
struct Maps {
  G g;
  X x, residual;
};

// u and dv of V elements from `at` on, whose gates are s; raw: x as it was.
template <class T, int V, class M, class A = Accumulator<T>>
__device__ void gradient_of_v(const Backward& f, const M& maps, int64_t at, bool reads_x, const A (&s)[V], A (&raw)[V],
                              A (&u)[V], A (&dv)[V]) {
  maps.g.load(at, dv);
  if (!reads_x) return;
  maps.x.load(at, raw);
#pragma unroll
  for (int i = 0; i < V; ++i) u[i] = raw[i];
  activate<T>(f.options.pre_act, f.options, u);
  if (f.options.post_act == Activation::kIdentity) return;
  A v[V], residual[V];
#pragma unroll
  for (int i = 0; i < V; ++i) residual[i] = raw[i];
  if (f.residual && f.residual != f.x) maps.residual.load(at, residual);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = f.residual ? u[i] * s[i] + residual[i] : u[i] * s[i];
  chain<T>(f.options.post_act, f.options, v, dv);
}

// A reduction (reduce.cuh) to ds, and for the maximum its value and the number of positions that share it.
template <class T, class M>
struct GateGradientOperation {
  using A = Accumulator<T>;
  struct Part {
    A ds, max, ties;
  };
  template <int V>
  struct Context {
    A s[V];
  };
  static constexpr int kBlocks = kBackwardBlocks;

  Backward f;
  M maps;

  __device__ Part empty() const { return {0, -INFINITY, 0}; }
  __device__ Part merge(const Part& a, const Part& b) const {
    const A ties = a.max > b.max ? a.ties : a.max == b.max ? a.ties + b.ties : b.ties;
    return {a.ds + b.ds, max_keep_nan(a.max, b.max), ties};
  }
  __device__ Part shuffle_xor(const Part& p, int offset) const {
    return {cuda::shuffle_xor(p.ds, offset), cuda::shuffle_xor(p.max, offset), cuda::shuffle_xor(p.ties, offset)};
  }
  template <int V>
  __device__ Context<V> context(int64_t n, int64_t channel, int step) const {
    Context<V> context{};
    if (f.options.post_act == Activation::kIdentity) return context;
#pragma unroll
    for (int i = 0; i < V; ++i) context.s[i] = gate_of<A>(f, n, channel + i * step);
    return context;
  }
  template <int V>
  __device__ void add(int64_t at, const Context<V>& context, Part (&parts)[V]) const {
    A raw[V], u[V], dv[V];
    gradient_of_v<T>(f, maps, at, true, context.s, raw, u, dv);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      parts[i].ds += dv[i] * u[i];
      if (has_max(f)) parts[i] = merge({0, u[i], 1}, parts[i]);
    }
  }
};

// What `distribute` needs to know of each channel of its block, in shared memory.
template <class A>
struct Channels {
  A *s, *mean_share;   // mean_share: dz / L, to be added at every position
  A *max, *max_share;  // max_share: dz / ties; both for the maximum only

  __device__ Channels(A* memory, int64_t count)
      : s(memory), mean_share(s + count), max(mean_share + count), max_share(max + count) {}

  __device__ void set(const Backward& f, int i, int64_t n, int64_t channel, A dz, A maximum, A ties) const {
    s[i] = gate_of<A>(f, n, channel);
    if (f.options.squeeze == Squeeze::kMeanMax) dz /= 2;
    mean_share[i] = f.options.squeeze == Squeeze::kMax ? A(0) : dz / static_cast<A>(f.l);
    if (!has_max(f)) return;
    max[i] = maximum;
    // A NaN maximum has no ties in PyTorch, so that its mask * dz / ties is NaN along the whole row.
    max_share[i] = maximum == maximum ? dz / ties : maximum;
  }
};

// dx and dresidual of the V elements from `at` on. expand(values, along): the values of their channels.
template <class T, int V, class M, class Expand, class A = Accumulator<T>>
__device__ void distribute(const Backward& f, const M& maps, const Channels<A>& channels, int64_t at, Expand&& expand) {
  const bool reads_x = f.options.post_act != Activation::kIdentity ||
                       (f.dx && (has_max(f) || f.options.pre_act != Activation::kIdentity));
  A s[V], raw[V], u[V], dv[V], du[V], along[V];
  expand(channels.s, s);
  gradient_of_v<T>(f, maps, at, reads_x, s, raw, u, dv);
  if (f.dresidual) store<V>(static_cast<T*>(f.dresidual) + at, dv);
  if (!f.dx) return;
  expand(channels.mean_share, along);
#pragma unroll
  for (int i = 0; i < V; ++i) du[i] = dv[i] * s[i] + along[i];
  if (has_max(f)) {
    A max[V];
    expand(channels.max, max);
    expand(channels.max_share, along);
    // A product, as PyTorch's: an infinite or NaN dz makes the other positions NaN.
#pragma unroll
    for (int i = 0; i < V; ++i) du[i] += (u[i] == max[i] ? A(1) : A(0)) * along[i];
  }
  if (f.options.pre_act != Activation::kIdentity) chain<T>(f.options.pre_act, f.options, raw, du);
  if (f.residual_is_x) {
#pragma unroll
    for (int i = 0; i < V; ++i) du[i] += dv[i];
  }
  store<V>(static_cast<T*>(f.dx) + at, du);
}

template <class A>
void launch_weight_gradients(const Backward& f, const Plan& plan, const Partial<A>& partial, const A* dp1,
                             void* stream);

}  // namespace se::cuda
