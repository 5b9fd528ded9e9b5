// What:   dx, dresidual and dp1, from g, x, the weights and what forward saved (z, p1, p2).
//           dv = g post_act'(v)    v = u s + residual, computed again from x; dresidual = dv
//           ds = sum_l dv u        dp2 = ds gate'(p2)      dh = dp2 W2    dp1 = dh act'(p1)
//           dz = dp1 W1            du = dv s + dz / L (mean), or dz / ties where u is the maximum
//           dx = du pre_act'(x)
// Grid:   backward_reduce (reduce.cuh); backward_hidden: 32 columns of W2 for kSamples samples a block; backward_apply:
// a share of
//         one sample's map a block, which first computes s and dz of its channels; the weights' in weight_gradients.cu.
// Bytes:  reads g and x twice (x once, where dx does not depend on it), writes dx once.
// Needs:  nothing: any shape, alignment and device.
// Why:    the fallback of every faster algorithm; W1 is read once per sample, because a block needs its own columns
// only.
#include "backward.cuh"
#include "kernels.h"
#include "slab.cuh"

namespace se::cuda {
namespace {

template <class T, bool kPlain>
using GlobalMaps = Maps<T, Global<T>, Global<T>, kPlain>;

template <class T, bool kPlain, class A = Accumulator<T>>
struct StoredGateGradient : GateGradientOperation<T, GlobalMaps<T, kPlain>, kPlain> {
  using Base = GateGradientOperation<T, GlobalMaps<T, kPlain>, kPlain>;
  Partial<A> out;

  __device__ const Problem& problem() const { return this->maps.f; }
  template <class Copy>
  __device__ auto staged(Copy&& copy) const {
    using Staged = Maps<T, Slab<T>, Slab<T>, kPlain, const Backward&>;
    const auto& maps = this->maps;
    return GateGradientOperation<T, Staged, kPlain>{Staged{
        maps.f, copy(maps.g.map), copy(maps.x.map), maps.has_own_residual() ? copy(maps.residual.map) : Slab<T>{}}};
  }
  __device__ void store(int64_t row, unsigned split, const typename Base::Part& p) const {
    const int64_t at = place_of_split(row, split, out.splits, this->maps.f.c);
    store_one(out.ds + at, p.ds);
    if constexpr (!kPlain) {
      if (!out.maxima) return;
      store_one(out.maxima + at, p.max);
      store_one(out.ties + at, p.ties);
    }
  }
};

template <class Body>
__global__ void __launch_bounds__(kThreads, Body::kBlocks) backward_reduce_kernel(const __grid_constant__ Body body) {
  body.run();
}

template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<true, A>)
    backward_hidden_kernel(const __grid_constant__ Backward f, Partial<A> partial, A* dp1) {
  const auto column_blocks = static_cast<unsigned>((f.r + kColumns - 1) / kColumns);
  const int64_t r0 = int64_t{blockIdx.x % column_blocks} * kColumns;
  const int64_t n0 = int64_t{blockIdx.x / column_blocks} * kSamples;
  const int columns = static_cast<int>(f.r - r0 < kColumns ? f.r - r0 : kColumns);
  const int samples = static_cast<int>(f.n - n0 < kSamples ? f.n - n0 : kSamples);
  A *tile = shared_memory<A>(), *warps = tile + kSamples * kTile, *dh = warps + kWarpSums<T>;
  const Matrix<T> w2{f.w2, f.weight_dtype, f.r};
  transposed_product<kSamples>(w2.from(0, r0), f.c, columns, samples, tile, warps, dh, [&](int s, int64_t k) {
    return gate_gradient(f, n0 + s, k, partial.gate(f, n0 + s, k));
  });
  for (int i = threadIdx.x; i < samples * columns; i += kThreads) {
    const int64_t n = n0 + i / columns, k = r0 + i % columns;
    store_one(dp1 + n * f.r + k, hidden_gradient_of(f, n, k, dh[i]));
  }
}

template <class T, class Share, class A = Accumulator<T>>
__device__ Channels<A> excite_backward(const Backward& f, const Partial<A>& partial, const A* dp1, const Share& share) {
  A *tile = shared_memory<A>(), *warps = tile + kTile, *values = warps + kWarpSums<T>;
  const Channels<A> out(values, share.channels);
  const int64_t n = share.n;
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c}, w2{f.w2, f.weight_dtype, f.c};
  if (f.dx && f.r) {
    transposed_product<1>(w1.from(0, share.c0), f.r, share.channels, 1, tile, warps, out.mean_share,
                          [&](int, int64_t k) { return load_one(dp1 + n * f.r + k); });
  } else if (f.dx) {
    transposed_product<1>(w2.from(0, share.c0), f.c, share.channels, 1, tile, warps, out.mean_share,
                          [&](int, int64_t k) { return gate_gradient(f, n, k, partial.gate(f, n, k)); });
  }
  for (int i = threadIdx.x; i < share.channels; i += kThreads) {
    A max = 0, ties = 0;
    if (partial.maxima) partial.maximum(f, n, share.c0 + i, max, ties);
    out.set(f, i, n, share.c0 + i, f.dx ? out.mean_share[i] : A(0), max, ties);
  }
  __syncthreads();
  return out;
}

// In reverse: what the reduction has read last is still in the L2.
template <class T, class Share, bool kPlain, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<kPlain, A>)
    backward_apply_kernel(const __grid_constant__ GlobalMaps<T, kPlain> maps, Partial<A> partial, const A* dp1,
                          Elementwise e, Divisor by) {
  const Share share(maps.f, e, by, gridDim.x - 1 - blockIdx.x);
  const Channels<A> channels = excite_backward<T>(maps.f, partial, dp1, share);
  share.walk(ApplyOperation<T, GlobalMaps<T, kPlain>, kPlain>{maps, channels});
}

}  // namespace

void backward_two_pass(const Backward& f, const Plan& plan, void* scratch, void* stream) {
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
    with_form<T>(is_plain(f), [&](auto plain) {
      constexpr bool kPlain = plain.value;
      const GlobalMaps<T, kPlain> maps{
          f, {static_cast<const T*>(f.g)}, {static_cast<const T*>(f.x)}, {static_cast<const T*>(f.residual)}};
      launch_reduction<T>(plan, "backward_reduce", stream, StoredGateGradient<T, kPlain>{{maps}, partial},
                          [](const auto& body) { return backward_reduce_kernel<std::decay_t<decltype(body)>>; });
      if (f.r) launch(plan, "backward_hidden", stream, backward_hidden_kernel<T>, f, partial, dp1);
      if (!f.dx && !f.dresidual) return;
      with_share<T>(plan.call, plan.elementwise, [&](auto* share) {
        using Share = std::remove_pointer_t<decltype(share)>;
        launch(plan, "backward_apply", stream, backward_apply_kernel<T, Share, kPlain>, maps, partial, dp1,
               plan.elementwise, Divisor(f.l));
      });
    });
    if (f.dw1 || f.db1 || f.dw2 || f.db2) launch_weight_gradients(f, plan, partial, dp1, stream);
  });
}

}  // namespace se::cuda
