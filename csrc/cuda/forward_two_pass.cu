// What:   y = post_act(u * s + residual), all of it (se.h), on any GPU from sm_75 on.
// Grid:   squeeze (reduce.cuh); hidden: a warp for each row of W1, for kSamples samples; scale: a share of one sample's
//         map a block, which first computes the gates of its channels (and h too, where W1 is small).
// Bytes:  reads x twice and the residual once, writes y once: accesses of 16 bytes wherever the data allows.
// Needs:  nothing: any shape, alignment and device; no workspace but partial sums, no state between calls.
// Why:    the fallback of every faster algorithm; W2 is read once a sample, because a block needs its own rows only.
#include "elementwise.cuh"
#include "excite.cuh"
#include "forward.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace se::cuda {
namespace {

template <class T>
struct StoredSqueeze : SqueezeOperation<T, Global<T>> {
  using Base = SqueezeOperation<T, Global<T>>;
  int64_t c;
  int splits;
  Accumulator<T>*sums, *maxima;  // [N, splits, C], each where `squeeze` needs it, else null

  __device__ void store(int64_t n, int64_t split, int64_t channel, const typename Base::Part& p) const {
    const int64_t at = (n * splits + split) * c + channel;
    if (sums) store_one(sums + at, p.sum);
    if (maxima) store_one(maxima + at, p.max);
  }
};

// z of one channel, from the partial results in their order.
template <class A>
struct Squeezed {
  const A *sums, *maxima;  // [N, splits, C], or null
  Squeeze squeeze;
  int64_t c, l;
  int splits;

  __device__ A operator()(int64_t n, int64_t channel) const {
    A sum = 0, max = -INFINITY;
    for (int split = 0; split < splits; ++split) {
      const int64_t at = (n * splits + split) * c + channel;
      if (sums) sum += load_one(sums + at);
      if (maxima) max = max_keep_nan(max, load_one(maxima + at));
    }
    return squeezed(squeeze, sum, max, l);
  }
};

// p1, and z where it is wanted.
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<A>) hidden(Forward f, Squeezed<A> z) {
  const auto row_blocks = static_cast<unsigned>((f.r + kWarps - 1) / kWarps);
  const int64_t r0 = int64_t{blockIdx.x % row_blocks} * kWarps, n0 = int64_t{blockIdx.x / row_blocks} * kSamples;
  const int rows = static_cast<int>(f.r - r0 < kWarps ? f.r - r0 : kWarps);
  const int samples = static_cast<int>(f.n - n0 < kSamples ? f.n - n0 : kSamples);
  A *tile = shared_memory<A>(), *sums = tile + kSamples * kTile;
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c};
  product<kSamples>(w1.from(r0, 0), rows, f.c, samples, tile, sums, [&](int s, int64_t k) {
    const A value = z(n0 + s, k);
    if (f.z && r0 == 0) store_one(static_cast<A*>(f.z) + (n0 + s) * f.c + k, value);
    return value;
  });
  for (int i = threadIdx.x; i < samples * rows; i += kThreads) {
    const int64_t n = n0 + i / rows, row = r0 + i % rows;
    store_one(static_cast<A*>(f.p1) + n * f.r + row, sums[i] + bias<T>(f.b1, f.weight_dtype, row));
  }
}

// s for the channels of a share, in shared memory.
template <class T, class Share, class A = Accumulator<T>>
__device__ const A* gates(const Forward& f, const Squeezed<A>& z, bool fused_hidden, const Share& share) {
  A *tile = shared_memory<A>(), *h = tile + kTile, *s = h + (fused_hidden ? f.r : 0);
  const int64_t n = share.n;
  auto squeezed = [&](int, int64_t k) {
    const A value = z(n, k);
    if (f.z && share.sample_first()) store_one(static_cast<A*>(f.z) + n * f.c + k, value);
    return value;
  };
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c}, w2{f.w2, f.weight_dtype, f.r ? f.r : f.c};
  const Matrix<T> rows = w2.from(share.c0, 0);
  if (f.r == 0) {
    product<1>(rows, share.channels, f.c, 1, tile, s, squeezed);
  } else if (fused_hidden) {
    product<1>(w1, static_cast<int>(f.r), f.c, 1, tile, h, squeezed);
    for (int i = threadIdx.x; i < f.r; i += kThreads) {
      const A p1 = h[i] + bias<T>(f.b1, f.weight_dtype, i);
      if (f.p1 && share.sample_first()) store_one(static_cast<A*>(f.p1) + n * f.r + i, p1);
      h[i] = activate_one(f.options.act, f.options, p1);
    }
    __syncthreads();
    product<1>(rows, share.channels, f.r, 1, tile, s, [&](int, int64_t k) { return h[k]; });
  } else {
    product<1>(rows, share.channels, f.r, 1, tile, s, [&](int, int64_t k) {
      return activate_one(f.options.act, f.options, load_one(static_cast<const A*>(f.p1) + n * f.r + k));
    });
  }
  for (int i = threadIdx.x; i < share.channels; i += kThreads) {
    const A p2 = s[i] + bias<T>(f.b2, f.weight_dtype, share.c0 + i);
    if (f.p2 && share.owns(i)) store_one(static_cast<A*>(f.p2) + n * f.c + share.c0 + i, p2);
    s[i] = activate_one(f.options.gate, f.options, p2);
  }
  __syncthreads();
  return s;
}

template <class T, class Share, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<A>)
    scale_share(Forward f, Squeezed<A> z, bool fused_hidden, Elementwise e, Divisor by) {
  const Share share(f, e, by);
  const A* s = gates<T>(f, z, fused_hidden, share);
  const Streamed<T> x{static_cast<const T*>(f.x)};
  share.walk([&](auto width, const Place& place) {
    A along[decltype(width)::value];
    share.along(s, place, along);
    scale<T>(f, x, place.at, along);
  });
}

}  // namespace

void forward_two_pass(const Forward& given, const Plan& plan, void* scratch, void* stream) {
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

    launch_reduction<T>(plan, "squeeze", stream,
                        StoredSqueeze<T>{{{static_cast<const T*>(f.x)}, f.options}, f.c, splits, sums, maxima});
    const Squeezed<A> z{sums, maxima, f.options.squeeze, f.c, f.l, splits};
    if (has_hidden) launch(plan, "hidden", stream, hidden<T>, f, z);
    with_share<T>(plan.call, plan.elementwise, [&](auto* share, const Divisor& by) {
      using Share = std::remove_pointer_t<decltype(share)>;
      launch(plan, "scale", stream, scale_share<T, Share>, f, z, plan.fused_hidden, plan.elementwise, by);
    });
  });
}

}  // namespace se::cuda
