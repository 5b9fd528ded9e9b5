// What:   dx, dresidual and dp1, from g, x, the weights and the values that forward saved (z, p1, p2).
//           dv = g post_act'(v)    v = u s + residual, computed again from x; dresidual = dv
//           ds = sum_l dv u        dp2 = ds gate'(p2)      dh = dp2 W2    dp1 = dh act'(p1)
//           dz = dp1 W1            du = dv s + dz / L (mean), or dz / ties if u is the maximum
//           dx = du pre_act'(x)
// Grid:   backward_reduce (reduce.cuh). backward_hidden: one block per 32 columns of W2 and kSamples samples.
//         backward_apply: one block per tile of one sample's map; the block first computes s and dz of its channels.
//         The weight gradients are in weight_gradients.cu.
// Bytes:  reads g and x twice (x once if no gradient depends on it), the residual once or twice if there is a post_act;
//         writes dx and dresidual once.
// Needs:  nothing: it runs for any shape, alignment and device.
// Why:    it is the fallback of every faster algorithm. A block reads only the columns of W1 of its own channels.
#include "backward.cuh"
#include "kernels.h"
#include "staged_tile.cuh"

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
    using Staged = Maps<T, StagedTile<T>, StagedTile<T>, kPlain, const Backward&>;
    const auto& maps = this->maps;
    return GateGradientOperation<T, Staged, kPlain>{
        Staged{maps.f, copy(maps.g.map), copy(maps.x.map),
               maps.has_own_residual() ? copy(maps.residual.map) : StagedTile<T>{}}};
  }
  __device__ void store(int64_t row, unsigned split, const typename Base::Part& p) const {
    const int64_t at = partial_index(row, split, out.splits, this->maps.f.c);
    store_one(out.ds + at, p.ds);
    if constexpr (!kPlain) {
      if (!out.maxima) return;
      store_one(out.maxima + at, p.max);
      store_one(out.ties + at, p.ties);
    }
  }
};

template <class Body, class Operation, class... Sizes>
__global__ void __launch_bounds__(kThreads, Operation::kBlocks)
    backward_reduce_kernel(const __grid_constant__ Operation op, Sizes... sizes) {
  Body::run(op, sizes...);
}

template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<true, A>)
    backward_hidden_kernel(const __grid_constant__ Backward f, Partial<A> partial, A* dp1) {
  const auto column_blocks = static_cast<unsigned>((f.r + kColumns - 1) / kColumns);
  const int64_t r0 = int64_t{blockIdx.x % column_blocks} * kColumns;
  const int64_t n0 = int64_t{blockIdx.x / column_blocks} * kSamples;
  const int columns = static_cast<int>(f.r - r0 < kColumns ? f.r - r0 : kColumns);
  const int samples = static_cast<int>(f.n - n0 < kSamples ? f.n - n0 : kSamples);
  A *chunk = shared_memory<A>(), *warps = chunk + kSamples * kGemvChunk, *dh = warps + kWarpSums<T>;
  const Matrix<T> w2{f.w2, f.weight_dtype, f.r};
  staged_gemv_t<kSamples>(w2.from(0, r0), f.c, columns, samples, chunk, warps, dh,
                          [&](int s, int64_t k) { return gate_gradient(f, n0 + s, k, partial.gate(f, n0 + s, k)); });
  for (int i = threadIdx.x; i < samples * columns; i += kThreads) {
    const int64_t n = n0 + i / columns, k = r0 + i % columns;
    store_one(dp1 + n * f.r + k, hidden_gradient(f, n, k, dh[i]));
  }
}

// Computes s and dz of a tile's channels, in shared memory.
template <class T, class Tile, class A = Accumulator<T>>
__device__ Channels<A> channel_values(const Backward& f, const Partial<A>& partial, const A* dp1, const Tile& tile) {
  A *chunk = shared_memory<A>(), *warps = chunk + kGemvChunk, *values = warps + kWarpSums<T>;
  const Channels<A> out(values, tile.channels);
  const int64_t n = tile.n;
  if (f.dx) {
    // One product for both forms (dp1 W1, or dp2 W2 where R = 0), because it is most of the kernel's code.
    const Matrix<T> w{f.r ? f.w1 : f.w2, f.weight_dtype, f.c};
    staged_gemv_t<1>(w.from(0, tile.c0), f.r ? f.r : f.c, tile.channels, 1, chunk, warps, out.dz_per_position,
                     [&](int, int64_t k) {
                       return f.r ? load_one(dp1 + n * f.r + k) : gate_gradient(f, n, k, partial.gate(f, n, k));
                     });
  }
  for (int i = threadIdx.x; i < tile.channels; i += kThreads) {
    A max = 0, ties = 0;
    if (partial.maxima) partial.maximum(f, n, tile.c0 + i, max, ties);
    out.set(f, i, n, tile.c0 + i, f.dx ? out.dz_per_position[i] : A(0), max, ties);
  }
  __syncthreads();
  return out;
}

// The blocks take the tiles in reverse order, because what the reduction read last is still in the L2.
template <class T, class Tile, bool kPlain, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<kPlain, A>)
    backward_apply_kernel(const __grid_constant__ GlobalMaps<T, kPlain> maps, Partial<A> partial, const A* dp1,
                          Elementwise e, Divisor by) {
  const Tile tile(maps.f, e, by, gridDim.x - 1 - blockIdx.x);
  const Channels<A> channels = channel_values<T>(maps.f, partial, dp1, tile);
  tile.for_each_vector(ApplyOperation<T, GlobalMaps<T, kPlain>, kPlain>{maps, channels});
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
      using Operation = StoredGateGradient<T, kPlain>;
      launch_reduction<T>(plan, "backward_reduce", stream, Operation{{maps}, partial}, [](auto body, auto... sizes) {
        return backward_reduce_kernel<decltype(body), Operation, decltype(sizes)...>;
      });
      if (f.r) launch(plan, "backward_hidden", stream, backward_hidden_kernel<T>, f, partial, dp1);
      if (!f.dx && !f.dresidual) return;
      with_tile<T>(plan.call, plan.elementwise, [&](auto* tile) {
        using Tile = std::remove_pointer_t<decltype(tile)>;
        launch(plan, "backward_apply", stream, backward_apply_kernel<T, Tile, kPlain>, maps, partial, dp1,
               plan.elementwise, Divisor(f.l));
      });
    });
    if (f.dw1 || f.db1 || f.dw2 || f.db2) launch_weight_gradients(f, plan, partial, dp1, stream);
  });
}

}  // namespace se::cuda
