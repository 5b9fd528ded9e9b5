// What:   y = post_act(u * s + residual), all of it (se.h), on any GPU from sm_75 on.
// Grid:   squeeze (reduce.cuh); hidden: a warp for each row of W1, for kSamples samples; scale: a share of one sample's
//         map a block, which first computes the gates of its channels (and h too, where W1 is small).
// Bytes:  reads x twice and the residual once, writes y once: accesses of 16 bytes wherever the data allows.
// Needs:  nothing: any shape, alignment and device; no workspace but partial sums, no state between calls.
// Why:    the fallback of every faster algorithm; W2 is read once a sample, because a block needs its own rows only.
#include "elementwise.cuh"
#include "excite.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace se::cuda {
namespace {

template <class T>
struct SqueezeOperation {
  using A = Accumulator<T>;
  struct Part {
    A sum, max;
  };
  template <int V>
  struct Context {};
  static constexpr int kBlocks = kForwardBlocks<A>;

  const T* x;
  Options options;
  int64_t c;
  int splits;
  A *sums, *maxima;  // [N, splits, C], each where `squeeze` needs it, else null

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
    load<V>(x + at, u);
    activate(options.pre_act, options, u);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (sums) parts[i].sum += u[i];
      if (maxima) parts[i].max = max_keep_nan(parts[i].max, u[i]);
    }
  }
  __device__ void store(int64_t n, int64_t split, int64_t channel, const Part& p) const {
    const int64_t at = (n * splits + split) * c + channel;
    if (sums) store_one(sums + at, p.sum);
    if (maxima) store_one(maxima + at, p.max);
  }
};

// z of one channel, from the partial results in their order.
template <class A>
struct Squeezed {
  const A *sums, *maxima;  // [N, splits, C], or null
  int64_t c, l;
  int splits;

  __device__ A operator()(int64_t n, int64_t channel) const {
    A sum = 0, max = -INFINITY;
    for (int split = 0; split < splits; ++split) {
      const int64_t at = (n * splits + split) * c + channel;
      if (sums) sum += load_one(sums + at);
      if (maxima) max = max_keep_nan(max, load_one(maxima + at));
    }
    const A mean = sum / static_cast<A>(l);
    return !maxima ? mean : !sums ? max : (mean + max) / 2;
  }
};

// p1, and z where it is wanted.
template <class A>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<A>) hidden(Forward f, Squeezed<A> z) {
  const auto row_blocks = static_cast<unsigned>((f.r + kWarps - 1) / kWarps);
  const int64_t r0 = int64_t{blockIdx.x % row_blocks} * kWarps, n0 = int64_t{blockIdx.x / row_blocks} * kSamples;
  const int rows = static_cast<int>(f.r - r0 < kWarps ? f.r - r0 : kWarps);
  const int samples = static_cast<int>(f.n - n0 < kSamples ? f.n - n0 : kSamples);
  A *tile = shared_memory<A>(), *sums = tile + kSamples * kTile;
  product<kSamples>({f.w1, f.weight_dtype, f.c}, r0, rows, samples, tile, sums, [&](int s, int64_t k) {
    const A value = z(n0 + s, k);
    if (f.z && r0 == 0) store_one(static_cast<A*>(f.z) + (n0 + s) * f.c + k, value);
    return value;
  });
  for (int i = threadIdx.x; i < samples * rows; i += kThreads) {
    const int64_t n = n0 + i / rows, row = r0 + i % rows;
    store_one(static_cast<A*>(f.p1) + n * f.r + row, sums[i] + bias<A>(f.b1, f.weight_dtype, row));
  }
}

// s for the channels [c0, c0 + channels) of sample n, in shared memory. `first`: this block reports z and p1; owns(i):
// it reports p2 of channel c0 + i.
template <class A, class Owns>
__device__ const A* gates(const Forward& f, const Squeezed<A>& z, bool fused_hidden, bool first, int64_t n, int64_t c0,
                          int channels, Owns&& owns) {
  A *tile = shared_memory<A>(), *h = tile + kTile, *s = h + (fused_hidden ? f.r : 0);
  auto squeezed = [&](int, int64_t k) {
    const A value = z(n, k);
    if (f.z && first) store_one(static_cast<A*>(f.z) + n * f.c + k, value);
    return value;
  };
  const Matrix w2{f.w2, f.weight_dtype, f.r ? f.r : f.c};
  if (f.r == 0) {
    product<1>(w2, c0, channels, 1, tile, s, squeezed);
  } else if (fused_hidden) {
    product<1>({f.w1, f.weight_dtype, f.c}, 0, static_cast<int>(f.r), 1, tile, h, squeezed);
    for (int i = threadIdx.x; i < f.r; i += kThreads) {
      const A p1 = h[i] + bias<A>(f.b1, f.weight_dtype, i);
      if (f.p1 && first) store_one(static_cast<A*>(f.p1) + n * f.r + i, p1);
      h[i] = activate_one(f.options.act, f.options, p1);
    }
    __syncthreads();
    product<1>(w2, c0, channels, 1, tile, s, [&](int, int64_t k) { return h[k]; });
  } else {
    product<1>(w2, c0, channels, 1, tile, s, [&](int, int64_t k) {
      return activate_one(f.options.act, f.options, load_one(static_cast<const A*>(f.p1) + n * f.r + k));
    });
  }
  for (int i = threadIdx.x; i < channels; i += kThreads) {
    const A p2 = s[i] + bias<A>(f.b2, f.weight_dtype, c0 + i);
    if (f.p2 && owns(i)) store_one(static_cast<A*>(f.p2) + n * f.c + c0 + i, p2);
    s[i] = activate_one(f.options.gate, f.options, p2);
  }
  __syncthreads();
  return s;
}

template <class T, int V, class A = Accumulator<T>>
__device__ void scale(const Forward& f, int64_t at, const A (&s)[V]) {
  A x[V], v[V], residual[V];
  load_streaming<V>(static_cast<const T*>(f.x) + at, x);
#pragma unroll
  for (int i = 0; i < V; ++i) residual[i] = v[i] = x[i];
  activate(f.options.pre_act, f.options, v);
  if (f.residual && f.residual != f.x) load_streaming<V>(static_cast<const T*>(f.residual) + at, residual);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = f.residual ? v[i] * s[i] + residual[i] : v[i] * s[i];
  activate(f.options.post_act, f.options, v);
  store<V>(static_cast<T*>(f.y) + at, v);
}

template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<A>)
    scale_rows(Forward f, Squeezed<A> z, bool fused_hidden, Elementwise e, Divisor by_l) {
  const RowShare share(f.c, f.l, e);
  const A* s = gates<A>(f, z, fused_hidden, share.range == 0, share.n, share.c0, share.channels,
                        [&](int i) { return share.owns(i, f.l); });
  share.walk(static_cast<const T*>(f.x), f.c, f.l, by_l, e.width == 16, [&](auto width, int64_t at, int i, unsigned r) {
    A along[decltype(width)::value];
    along_row(s, i, r, f.l, along);
    scale<T>(f, at, along);
  });
}

template <class T, int V, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<A>)
    scale_positions(Forward f, Squeezed<A> z, bool fused_hidden, Elementwise e) {
  const PositionShare share(f.c, f.l, V, e);
  const A* s = gates<A>(f, z, fused_hidden, share.owns() && share.c0 == 0, share.n, share.c0, share.channels,
                        [&](int) { return share.owns(); });
  share.template walk<V>(f.c, f.l, e.lanes, [&](int64_t at, int i) {
    A along[V];
#pragma unroll
    for (int k = 0; k < V; ++k) along[k] = s[i + k];
    scale<T>(f, at, along);
  });
}

}  // namespace

void forward(const Forward& given, const Plan& plan, void* scratch, void* stream) {
  with_map_type(given.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    Forward f = given;
    const int splits = plan.reduction.splits;
    const int64_t parts = f.n * splits * f.c;
    A* free = static_cast<A*>(scratch);
    A* sums = f.options.squeeze == Squeeze::kMax ? nullptr : free;
    if (sums) free += parts;
    A* maxima = f.options.squeeze == Squeeze::kMean ? nullptr : free;
    if (maxima) free += parts;
    const bool has_hidden = f.r > 0 && !plan.fused_hidden;
    if (has_hidden && !f.p1) f.p1 = free;

    const SqueezeOperation<T> squeeze{static_cast<const T*>(f.x), f.options, f.c, splits, sums, maxima};
    launch_reduction<T>(plan, "squeeze", stream, squeeze);
    const Squeezed<A> z{sums, maxima, f.c, f.l, splits};
    if (has_hidden) launch(plan, "hidden", stream, hidden<A>, f, z);
    const Elementwise& e = plan.elementwise;
    if (f.channels_last) {
      with_width<T, false>(e.width, [&](auto width) {
        launch(plan, "scale", stream, scale_positions<T, decltype(width)::value>, f, z, plan.fused_hidden, e);
      });
    } else {
      launch(plan, "scale", stream, scale_rows<T>, f, z, plan.fused_hidden, e, Divisor(f.l));
    }
  });
}

}  // namespace se::cuda
