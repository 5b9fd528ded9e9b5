// What:   y = post_act(u * s + residual), with every option (se.h), on any GPU from sm_75 on.
// Grid:   squeeze (reduce.cuh). hidden: one warp per row of W1 and kSamples samples. scale: one block per tile of one
//         sample's map; the block first computes the gates of its channels (and h too, if W1 is small).
// Bytes:  reads x twice and the residual once and writes y once, in 16-byte accesses wherever the data allows.
// Needs:  nothing: it runs for any shape, alignment and device. The only workspace is partial sums (and p1), and no
//         state is left between calls.
// Why:    it is the fallback of every faster algorithm. A block reads only the rows of W2 of its own channels.
#include "forward.cuh"
#include "gemv.cuh"
#include "kernels.h"
#include "staged_tile.cuh"

namespace se::cuda {
namespace {

template <class T, bool kPlain>
struct StoredSqueeze : SqueezeOperation<T, Global<T>, kPlain> {
  using Base = SqueezeOperation<T, Global<T>, kPlain>;
  int splits;
  Accumulator<T>*sums, *maxima;  // [N, splits, C]; null if `squeeze` does not need them

  __device__ const Problem& problem() const { return this->f; }
  template <class Copy>
  __device__ auto staged(Copy&& copy) const {
    return SqueezeOperation<T, StagedTile<T>, kPlain, const Forward&>{copy(this->x.map), this->f};
  }

  __device__ void store(int64_t row, unsigned split, const typename Base::Part& p) const {
    const int64_t at = partial_index(row, split, splits, this->f.c);
    if (sums) store_one(sums + at, p.sum);
    if constexpr (!kPlain) {
      if (maxima) store_one(maxima + at, p.max);
    }
  }
};

template <class Body, class Operation, class... Sizes>
__global__ void __launch_bounds__(kThreads, Operation::kBlocks)
    squeeze_kernel(const __grid_constant__ Operation op, Sizes... sizes) {
  Body::run(op, sizes...);
}

// z of one channel, from its partial results, which are added in their order. kPlain: of the mean.
template <class A, bool kPlain>
struct Squeezed {
  using Part = SqueezePart<A, kPlain>;
  const A *sums, *maxima;  // [N, splits, C], or null
  Squeeze squeeze;
  int64_t c, l;
  int splits;

  __device__ Part first(int64_t n, int64_t channel) const {
    const int64_t at = n * splits * c + channel;
    Part part{};
    if (kPlain || sums) part.sum = load_one(sums + at);
    if constexpr (!kPlain) {
      if (maxima) part.max = load_one(maxima + at);
    }
    return part;
  }
  __device__ A all(Part part, int64_t n, int64_t channel) const {
    const int64_t first = n * splits * c + channel;
    if (kPlain || sums) merge_splits(sums + first, splits, c, [&](A sum) { part.sum += sum; });
    if constexpr (!kPlain) {
      if (maxima) merge_splits(maxima + first, splits, c, [&](A max) { part.max = max_keep_nan(part.max, max); });
    }
    return squeezed(squeeze, part, l);
  }
  // z of the samples from n0 on, as a vector for the layers (gemv.cuh). Stored if `stores` and if z is an output.
  __device__ auto vector(const Forward& f, int64_t n0, bool stores) const {
    return pipelined([=](int s, int64_t k) { return first(n0 + s, k); },
                     [=, &f](const auto& part, int s, int64_t k) {
                       const A value = all(part, n0 + s, k);
                       if (f.z && stores) store_one(static_cast<A*>(f.z) + (n0 + s) * f.c + k, value);
                       return value;
                     });
  }
};

// Computes p1, and stores z if it is an output.
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<false, A>)
    hidden_kernel(const __grid_constant__ Forward f, const __grid_constant__ Squeezed<A, false> z) {
  const auto row_blocks = static_cast<unsigned>((f.r + kWarps - 1) / kWarps);
  const int64_t r0 = int64_t{blockIdx.x % row_blocks} * kWarps, n0 = int64_t{blockIdx.x / row_blocks} * kSamples;
  const int rows = static_cast<int>(f.r - r0 < kWarps ? f.r - r0 : kWarps);
  const int samples = static_cast<int>(f.n - n0 < kSamples ? f.n - n0 : kSamples);
  A *chunk = shared_memory<A>(), *sums = chunk + kSamples * kGemvChunk;
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c};
  staged_gemv<kSamples>(w1.from(r0, 0), rows, f.c, samples, chunk, sums, n0, z.vector(f, n0, r0 == 0));
  for (int i = threadIdx.x; i < samples * rows; i += kThreads) {
    const int64_t n = n0 + i / rows, row = r0 + i % rows;
    store_one(static_cast<A*>(f.p1) + n * f.r + row, sums[i] + bias<T>(f.b1, f.weight_dtype, row));
  }
}

// Computes s of a tile's channels, in shared memory: from z if W1 is small or R = 0, else from p1. Each of the two has
// one product, because the products are most of the kernel's code.
template <class T, class Tile, bool kPlain, class A = Accumulator<T>>
__device__ const A* gates(const Forward& f, const Squeezed<A, kPlain>& z, bool fused_hidden, const Tile& tile) {
  A *chunk = shared_memory<A>(), *h = chunk + kGemvChunk, *s = h + (fused_hidden ? padded(f.r) : 0);
  const int64_t n = tile.n;
  if (fused_hidden || f.r == 0) {  // to h; where R = 0, h and s are the same
    const Matrix<T> first{f.r ? f.w1 : f.w2, f.weight_dtype, f.c};
    staged_gemv<1>(first.from(f.r ? 0 : tile.c0, 0), f.r ? static_cast<int>(f.r) : tile.channels, f.c, 1, chunk, h, n,
                   z.vector(f, n, tile.sample_first()));
  }
  if (fused_hidden) {
    for (int i = threadIdx.x; i < f.r; i += kThreads) {
      h[i] += bias<T>(f.b1, f.weight_dtype, i);
      if (f.p1 && tile.sample_first()) store_one(static_cast<A*>(f.p1) + n * f.r + i, h[i]);
    }
    __syncthreads();
  }
  if (f.r) {
    const Matrix<T> w2{f.w2, f.weight_dtype, f.r};
    staged_gemv<1>(
        w2.from(tile.c0, 0), tile.channels, f.r, 1, chunk, s, n,
        pipelined(
            [&](int, int64_t k) { return fused_hidden ? h[k] : load_one(static_cast<const A*>(f.p1) + n * f.r + k); },
            [&](A value, int, int64_t) { return activate_one(f.options.act, f.options, value); }));
  }
  for (int i = threadIdx.x; i < tile.channels; i += kThreads) {
    const A p2 = s[i] + bias<T>(f.b2, f.weight_dtype, tile.c0 + i);
    if (f.p2 && tile.owns(i)) store_one(static_cast<A*>(f.p2) + n * f.c + tile.c0 + i, p2);
    s[i] = activate_one(f.options.gate, f.options, p2);
  }
  __syncthreads();
  return s;
}

// The blocks take the tiles in reverse order, because what the squeeze read last is still in the L2.
template <class T, class Tile, bool kPlain, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<kPlain, A>)
    scale_kernel(const __grid_constant__ Forward f, const __grid_constant__ Squeezed<A, kPlain> z, bool fused_hidden,
                 Elementwise e, Divisor by) {
  const Tile tile(f, e, by, gridDim.x - 1 - blockIdx.x);
  const A* s = gates<T>(f, z, fused_hidden, tile);
  tile.for_each_vector(ScaleOperation<T, Streamed<T>, kPlain, Tile>{f, {static_cast<const T*>(f.x)}, s, tile.c0});
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

    const Squeezed<A, false> z{sums, maxima, f.options.squeeze, f.c, f.l, splits};
    with_form<T>(is_plain(f), [&](auto plain) {
      using Operation = StoredSqueeze<T, plain.value>;
      launch_reduction<T>(
          plan, "squeeze", stream, Operation{{{static_cast<const T*>(f.x)}, f}, splits, sums, maxima},
          [](auto body, auto... sizes) { return squeeze_kernel<decltype(body), Operation, decltype(sizes)...>; });
      if (has_hidden) launch(plan, "hidden", stream, hidden_kernel<T>, f, z);
      with_tile<T>(plan.call, plan.elementwise, [&](auto* tile) {
        using Tile = std::remove_pointer_t<decltype(tile)>;
        launch(plan, "scale", stream, scale_kernel<T, Tile, plain.value>, f,
               Squeezed<A, plain.value>{sums, maxima, f.options.squeeze, f.c, f.l, splits}, plan.fused_hidden,
               plan.elementwise, Divisor(f.l));
      });
    });
  });
}

}  // namespace se::cuda
