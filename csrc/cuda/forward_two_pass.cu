// What:   y = post_act(u * s + residual), all of it (se.h), on any GPU from sm_75 on.
// Grid:   squeeze (reduce.cuh); hidden: a warp for each row of W1, for kSamples samples; scale: a share of one sample's
//         map a block, which first computes the gates of its channels (and h too, where W1 is small).
// Bytes:  reads x twice and the residual once, writes y once: accesses of 16 bytes wherever the data allows.
// Needs:  nothing: any shape, alignment and device; no workspace but partial sums, no state between calls.
// Why:    the fallback of every faster algorithm; W2 is read once per sample, because a block needs its own rows only.
#include "excite.cuh"
#include "forward.cuh"
#include "kernels.h"
#include "slab.cuh"

namespace se::cuda {
namespace {

template <class T, bool kPlain>
struct StoredSqueeze : SqueezeOperation<T, Global<T>, kPlain> {
  using Base = SqueezeOperation<T, Global<T>, kPlain>;
  int splits;
  Accumulator<T>*sums, *maxima;  // [N, splits, C], each where `squeeze` needs it, else null
  Problem shape;

  __device__ const Problem& problem() const { return shape; }
  template <class Copy>
  __device__ auto staged(Copy&& copy) const {
    return SqueezeOperation<T, Slab<T>, kPlain, const Options&>{copy(this->x.map), this->options};
  }

  __device__ void store(int64_t row, unsigned split, const typename Base::Part& p) const {
    const int64_t at = place_of_split(row, split, splits, shape.c);
    if (sums) store_one(sums + at, p.sum);
    if constexpr (!kPlain) {
      if (maxima) store_one(maxima + at, p.max);
    }
  }
};

template <class Body>
__global__ void __launch_bounds__(kThreads, Body::kBlocks) squeeze_kernel(const __grid_constant__ Body body) {
  body.run();
}

// z of one channel, from the partial results in their order.
template <class A>
struct Squeezed {
  struct Part {
    A sum, max;
  };
  const A *sums, *maxima;  // [N, splits, C], or null
  Squeeze squeeze;
  int64_t c, l;
  int splits;

  __device__ Part first(int64_t n, int64_t channel) const {
    const int64_t at = n * splits * c + channel;
    return {sums ? load_one(sums + at) : A(0), maxima ? load_one(maxima + at) : A(0)};
  }
  __device__ A all(Part part, int64_t n, int64_t channel) const {
    const int64_t first = n * splits * c + channel;
    if (sums) merge_splits(sums + first, splits, c, [&](A sum) { part.sum += sum; });
    if (maxima) merge_splits(maxima + first, splits, c, [&](A max) { part.max = max_keep_nan(part.max, max); });
    return squeezed(squeeze, part.sum, part.max, l);
  }
};

// z of samples from n0 on, as a vector of the layers (excite.cuh); kept, if `keeps` and it is wanted.
template <class A>
__device__ auto squeezed_source(const Forward& f, const Squeezed<A>& z, int64_t n0, bool keeps) {
  return source([=](int s, int64_t k) { return z.first(n0 + s, k); },
                [=, &f](const auto& part, int s, int64_t k) {
                  const A value = z.all(part, n0 + s, k);
                  if (f.z && keeps) store_one(static_cast<A*>(f.z) + (n0 + s) * f.c + k, value);
                  return value;
                });
}

// p1, and z where it is wanted.
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<false, A>)
    hidden_kernel(const __grid_constant__ Forward f, Squeezed<A> z) {
  const auto row_blocks = static_cast<unsigned>((f.r + kWarps - 1) / kWarps);
  const int64_t r0 = int64_t{blockIdx.x % row_blocks} * kWarps, n0 = int64_t{blockIdx.x / row_blocks} * kSamples;
  const int rows = static_cast<int>(f.r - r0 < kWarps ? f.r - r0 : kWarps);
  const int samples = static_cast<int>(f.n - n0 < kSamples ? f.n - n0 : kSamples);
  A *tile = shared_memory<A>(), *sums = tile + kSamples * kTile;
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c};
  product<kSamples>(w1.from(r0, 0), rows, f.c, samples, tile, sums, n0, squeezed_source(f, z, n0, r0 == 0));
  for (int i = threadIdx.x; i < samples * rows; i += kThreads) {
    const int64_t n = n0 + i / rows, row = r0 + i % rows;
    store_one(static_cast<A*>(f.p1) + n * f.r + row, sums[i] + bias<T>(f.b1, f.weight_dtype, row));
  }
}

// s for the channels of a share, in shared memory.
template <class T, class Share, class A = Accumulator<T>>
__device__ const A* gates(const Forward& f, const Squeezed<A>& z, bool fused_hidden, const Share& share) {
  A *tile = shared_memory<A>(), *h = tile + kTile, *s = h + (fused_hidden ? padded(f.r) : 0);
  const int64_t n = share.n;
  const auto squeezed = squeezed_source(f, z, n, share.sample_first());
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c}, w2{f.w2, f.weight_dtype, f.r ? f.r : f.c};
  const Matrix<T> rows = w2.from(share.c0, 0);
  if (f.r == 0) {
    product<1>(rows, share.channels, f.c, 1, tile, s, n, squeezed);
  } else if (fused_hidden) {
    product<1>(w1, static_cast<int>(f.r), f.c, 1, tile, h, n, squeezed);
    for (int i = threadIdx.x; i < f.r; i += kThreads) {
      const A p1 = h[i] + bias<T>(f.b1, f.weight_dtype, i);
      if (f.p1 && share.sample_first()) store_one(static_cast<A*>(f.p1) + n * f.r + i, p1);
      h[i] = activate_one(f.options.act, f.options, p1);
    }
    __syncthreads();
    product<1>(rows, share.channels, f.r, 1, tile, s, n, [=](int, int64_t k) { return h[k]; });
  } else {
    const A* p1 = static_cast<const A*>(f.p1) + n * f.r;
    product<1>(rows, share.channels, f.r, 1, tile, s, n,
               source([=](int, int64_t k) { return load_one(p1 + k); },
                      [&](A value, int, int64_t) { return activate_one(f.options.act, f.options, value); }));
  }
  for (int i = threadIdx.x; i < share.channels; i += kThreads) {
    const A p2 = s[i] + bias<T>(f.b2, f.weight_dtype, share.c0 + i);
    if (f.p2 && share.owns(i)) store_one(static_cast<A*>(f.p2) + n * f.c + share.c0 + i, p2);
    s[i] = activate_one(f.options.gate, f.options, p2);
  }
  __syncthreads();
  return s;
}

// In reverse: what the squeeze has read last is still in the L2.
template <class T, class Share, bool kPlain, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<kPlain, A>)
    scale_kernel(const __grid_constant__ Forward f, Squeezed<A> z, bool fused_hidden, Elementwise e, Divisor by) {
  const Share share(f, e, by, gridDim.x - 1 - blockIdx.x);
  const A* s = gates<T>(f, z, fused_hidden, share);
  share.walk(ScaleOperation<T, Streamed<T>, kPlain>{f, {static_cast<const T*>(f.x)}, s});
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

    const Squeezed<A> z{sums, maxima, f.options.squeeze, f.c, f.l, splits};
    with_form<T>(is_plain(f), [&](auto plain) {
      using Operation = StoredSqueeze<T, plain.value>;
      launch_reduction<T>(plan, "squeeze", stream,
                          Operation{{{static_cast<const T*>(f.x)}, f.options}, splits, sums, maxima, f},
                          [](const auto& body) { return squeeze_kernel<std::decay_t<decltype(body)>>; });
      if (has_hidden) launch(plan, "hidden", stream, hidden_kernel<T>, f, z);
      with_share<T>(plan.call, plan.elementwise, [&](auto* share) {
        using Share = std::remove_pointer_t<decltype(share)>;
        launch(plan, "scale", stream, scale_kernel<T, Share, plain.value>, f, z, plan.fused_hidden, plan.elementwise,
               Divisor(f.l));
      });
    });
  });
}

}  // namespace se::cuda
