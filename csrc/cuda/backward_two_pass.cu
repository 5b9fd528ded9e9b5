// What:   dx, dresidual and dp1, from g, x, the weights and what forward saved (z, p1, p2).
//           dv = g post_act'(v)    v = u s + residual, computed again from x; dresidual = dv
//           ds = sum_l dv u        dp2 = ds gate'(p2)      dh = dp2 W2    dp1 = dh act'(p1)
//           dz = dp1 W1            du = dv s + dz / L (mean), or dz / ties where u is the maximum
//           dx = du pre_act'(x)
// Grid:   reduce (reduce.cuh); hidden_gradient: 32 columns of W2 for kSamples samples a block; distribute: a share of
//         one sample's map a block, which first computes s and dz of its channels; the weights' in weight_gradients.cu.
// Bytes:  reads g and x twice (x once, where dx does not depend on it), writes dx once.
// Needs:  nothing: any shape, alignment and device.
// Why:    the fallback of every faster algorithm; W1 is read once a sample, because a block needs its own columns only.
#include "elementwise.cuh"
#include "gradients.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace se::cuda {
namespace {

// u and dv of V elements from `at` on, whose gates are s; raw: x as it was.
template <class T, int V, class A = Accumulator<T>>
__device__ void gradient_of_v(const Backward& f, int64_t at, bool reads_x, const A (&s)[V], A (&raw)[V], A (&u)[V],
                              A (&dv)[V]) {
  load<V>(static_cast<const T*>(f.g) + at, dv);
  if (!reads_x) return;
  load<V>(static_cast<const T*>(f.x) + at, raw);
#pragma unroll
  for (int i = 0; i < V; ++i) u[i] = raw[i];
  activate(f.options.pre_act, f.options, u);
  if (f.options.post_act == Activation::kIdentity) return;
  A v[V], residual[V];
#pragma unroll
  for (int i = 0; i < V; ++i) residual[i] = raw[i];
  if (f.residual && f.residual != f.x) load<V>(static_cast<const T*>(f.residual) + at, residual);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = f.residual ? u[i] * s[i] + residual[i] : u[i] * s[i];
  chain(f.options.post_act, f.options, v, dv);
}

// ds, and for the maximum its value and the number of positions that share it.
template <class T>
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
  Partial<A> out;

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
    gradient_of_v<T>(f, at, true, context.s, raw, u, dv);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      parts[i].ds += dv[i] * u[i];
      if (out.maxima) parts[i] = merge({0, u[i], 1}, parts[i]);
    }
  }
  __device__ void store(int64_t n, int64_t split, int64_t channel, const Part& p) const {
    const int64_t at = (n * out.splits + split) * f.c + channel;
    store_one(out.ds + at, p.ds);
    if (!out.maxima) return;
    store_one(out.maxima + at, p.max);
    store_one(out.ties + at, p.ties);
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) hidden_gradient(Backward f, Partial<A> partial, A* dp1) {
  const auto column_blocks = static_cast<unsigned>((f.r + kColumns - 1) / kColumns);
  const int64_t r0 = int64_t{blockIdx.x % column_blocks} * kColumns;
  const int64_t n0 = int64_t{blockIdx.x / column_blocks} * kSamples;
  const int columns = static_cast<int>(f.r - r0 < kColumns ? f.r - r0 : kColumns);
  const int samples = static_cast<int>(f.n - n0 < kSamples ? f.n - n0 : kSamples);
  A *tile = shared_memory<A>(), *warps = tile + kSamples * kTile, *dh = warps + kSamples * kThreads;
  transposed_product<kSamples>({f.w2, f.weight_dtype, f.r}, f.c, r0, columns, samples, tile, warps, dh,
                               [&](int s, int64_t k) { return gate_gradient(f, partial, n0 + s, k); });
  for (int i = threadIdx.x; i < samples * columns; i += kThreads) {
    const int64_t at = (n0 + i / columns) * f.r + r0 + i % columns;
    store_one(dp1 + at, chain_one(f.options.act, f.options, load_one(static_cast<const A*>(f.p1) + at), dh[i]));
  }
}

// What `distribute` needs to know of each channel of its block.
template <class A>
struct Channels {
  A *s, *mean_share;   // mean_share: dz / L, to be added at every position
  A *max, *max_share;  // max_share: dz / ties
};

template <class A>
__device__ Channels<A> excite_backward(const Backward& f, const Partial<A>& partial, const A* dp1, int64_t n,
                                       int64_t c0, int channels) {
  A *tile = shared_memory<A>(), *warps = tile + kTile, *s = warps + kThreads;
  const Channels<A> out{s, s + channels, s + 2 * channels, s + 3 * channels};
  if (f.dx && f.r) {
    transposed_product<1>({f.w1, f.weight_dtype, f.c}, f.r, c0, channels, 1, tile, warps, out.mean_share,
                          [&](int, int64_t k) { return load_one(dp1 + n * f.r + k); });
  } else if (f.dx) {
    transposed_product<1>({f.w2, f.weight_dtype, f.c}, f.c, c0, channels, 1, tile, warps, out.mean_share,
                          [&](int, int64_t k) { return gate_gradient(f, partial, n, k); });
  }
  for (int i = threadIdx.x; i < channels; i += kThreads) {
    out.s[i] = gate_of<A>(f, n, c0 + i);
    if (!f.dx) continue;
    const A dz = f.options.squeeze == Squeeze::kMeanMax ? out.mean_share[i] / 2 : out.mean_share[i];
    if (partial.maxima) {
      A ties;
      partial.maximum(f, n, c0 + i, out.max[i], ties);
      out.max_share[i] = dz / ties;
    }
    out.mean_share[i] = f.options.squeeze == Squeeze::kMax ? A(0) : dz / static_cast<A>(f.l);
  }
  __syncthreads();
  return out;
}

// expand(values, along): the values of the channels of the V elements.
template <class T, int V, class Expand, class A = Accumulator<T>>
__device__ void distribute(const Backward& f, const Channels<A>& channels, bool with_max, int64_t at, Expand&& expand) {
  const bool reads_x =
      f.options.post_act != Activation::kIdentity || (f.dx && (with_max || f.options.pre_act != Activation::kIdentity));
  A s[V], raw[V], u[V], dv[V], du[V], along[V];
  expand(channels.s, s);
  gradient_of_v<T>(f, at, reads_x, s, raw, u, dv);
  if (f.dresidual) store<V>(static_cast<T*>(f.dresidual) + at, dv);
  if (!f.dx) return;
  expand(channels.mean_share, along);
#pragma unroll
  for (int i = 0; i < V; ++i) du[i] = dv[i] * s[i] + along[i];
  if (with_max) {
    A max[V];
    expand(channels.max, max);
    expand(channels.max_share, along);
    // A NaN maximum makes the whole row NaN, as PyTorch's mask * dz / ties does: nothing equals it, so 0 / 0.
#pragma unroll
    for (int i = 0; i < V; ++i) du[i] += u[i] == max[i] ? along[i] : max[i] != max[i] ? max[i] : A(0);
  }
  if (f.options.pre_act != Activation::kIdentity) chain(f.options.pre_act, f.options, raw, du);
  if (f.residual_is_x) {
#pragma unroll
    for (int i = 0; i < V; ++i) du[i] += dv[i];
  }
  store<V>(static_cast<T*>(f.dx) + at, du);
}

template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    distribute_rows(Backward f, Partial<A> partial, const A* dp1, Elementwise e, Divisor by_l) {
  const RowShare share(f.c, f.l, e);
  const Channels<A> channels = excite_backward(f, partial, dp1, share.n, share.c0, share.channels);
  share.walk(static_cast<const T*>(f.g), f.c, f.l, by_l, e.width == 16, [&](auto width, int64_t at, int i, unsigned r) {
    constexpr int V = decltype(width)::value;
    distribute<T, V>(f, channels, partial.maxima != nullptr, at,
                     [&](const A* values, A(&along)[V]) { along_row(values, i, r, f.l, along); });
  });
}

template <class T, int V, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    distribute_positions(Backward f, Partial<A> partial, const A* dp1, Elementwise e) {
  const PositionShare share(f.c, f.l, V, e);
  const Channels<A> channels = excite_backward(f, partial, dp1, share.n, share.c0, share.channels);
  share.template walk<V>(f.c, f.l, e.lanes, [&](int64_t at, int i) {
    distribute<T, V>(f, channels, partial.maxima != nullptr, at, [&](const A* values, A(&along)[V]) {
#pragma unroll
      for (int k = 0; k < V; ++k) along[k] = values[i + k];
    });
  });
}

}  // namespace

void backward(const Backward& f, const Plan& plan, void* scratch, void* stream) {
  with_map_type(f.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const int64_t parts = f.n * plan.reduction.splits * f.c;
    Partial<A> partial{static_cast<A*>(scratch), nullptr, nullptr, plan.reduction.splits};
    A* free = partial.ds + parts;
    if (f.options.squeeze != Squeeze::kMean) {
      partial.maxima = free;
      partial.ties = free + parts;
      free += 2 * parts;
    }
    A* dp1 = free;
    launch_reduction<T>(plan, "reduce", stream, GateGradientOperation<T>{f, partial});
    if (f.r) launch(plan, "hidden_gradient", stream, hidden_gradient<A>, f, partial, dp1);
    const Elementwise& e = plan.elementwise;
    if ((f.dx || f.dresidual) && f.channels_last) {
      with_width<T, false>(e.width, [&](auto width) {
        launch(plan, "distribute", stream, distribute_positions<T, decltype(width)::value>, f, partial, dp1, e);
      });
    } else if (f.dx || f.dresidual) {
      launch(plan, "distribute", stream, distribute_rows<T>, f, partial, dp1, e, Divisor(f.l));
    }
    if (f.dw1 || f.db1 || f.dw2 || f.db2) launch_weight_gradients(f, plan, partial, dp1, stream);
  });
}

}  // namespace se::cuda
