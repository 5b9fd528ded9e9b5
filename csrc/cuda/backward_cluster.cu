// What:   dx and dresidual, and ds and dp1 for the weight gradients, by the formulas of backward_two_pass.cu. The maps
//         that are needed twice stay in the shared memory of one thread-block cluster.
// Grid:   as forward_cluster.cu: one cluster per sample, and each block has its own channels.
//           1. stage g in shared memory (also x and the residual, if dx depends on them)
//           2. reduce to ds and dp2 of the block's channels
//           3. compute the block's part of dp2 W2
//           4. compute dp1 from the sum of all blocks' parts, and dz of the block's channels
//           5. compute dx from shared memory
// Bytes:  reads g, x and (with a post_act) the residual once and writes dx once, which is the minimum.
// Needs:  the shared memory of a cluster must hold a sample of each staged map.
// Why:    in the common case only g is staged, so that samples as large as in forward fit.
#include "backward.cuh"
#include "cluster.cuh"
#include "kernels.h"

namespace se::cuda {
namespace {

// A map that is read from shared memory if it is staged, and else from global memory.
template <class T>
struct MaybeStaged {
  StagedTile<T> staged;
  Global<T> global;
  bool is_staged;
  template <int V>
  __device__ Vector<V, T> load(Index at) const {
    if (is_staged) return staged.template load<V>(at);
    return global.template load<V>(at);
  }
};

template <class T, class Tile, bool kPlain, class A = Accumulator<T>>
__global__ void __launch_bounds__(kMostBackwardThreads, 1)
    backward_cluster_kernel(const __grid_constant__ Backward f, A* ds, A* dp1, Elementwise e, Divisor by,
                            ClusterConfig config, Reduction reduction) {
#ifdef SE_FUSED_HAS_CLUSTER_KERNELS
  using X = std::conditional_t<kPlain, Global<T>, MaybeStaged<T>>;
  using M = Maps<T, StagedTile<T>, X, kPlain, const Backward&>;
  using Operation = GateGradientOperation<T, M, kPlain>;
  const Tile tile(f, e, by, blockIdx.x);
  const Cluster cluster(config.size);
  const int own = tile.channels, r = static_cast<int>(f.r), depth = static_cast<int>(f.r ? f.r : f.c);
  const int64_t n = tile.n, c0 = tile.c0;
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c}, w2{f.w2, f.weight_dtype, depth};

  const ClusterLayout at(config.work, config.channels, r, depth);
  unsigned char* free = shared_memory<unsigned char>();
  auto copy = [&](const void* map) {
    T* memory = reinterpret_cast<T*>(free);
    free += config.staged_bytes;
    return stage_tile(tile, map, memory);
  };
  auto read = [&](bool stages, const void* map) -> X {
    const Global<T> global{static_cast<const T*>(map)};
    if constexpr (kPlain)
      return global;
    else
      return {stages ? copy(map) : StagedTile<T>{}, global, stages};
  };
  Cluster::begin(config, n);
  const StagedTile<T> g = copy(f.g);
  const X x = read(config.stages_x, f.x);
  const M maps{f, g, x, read(config.stages_residual, f.residual)};
  A* work = reinterpret_cast<A*>(free);
  A *dp2 = work + at.own, *hidden_part = work + at.part, *whole = work + at.whole;
  const Channels<A> channels(work + at.gates, config.channels);

  if (n == 0) {  // one cluster prefetches for all samples
    prefetch(w2.from(f.r ? c0 : 0, f.r ? 0 : c0), f.r ? own : depth, f.r ? depth : own);
    if (f.r) prefetch(w1.from(0, c0), r, own);
  }
  await_copies();
  reduce_tile(tile, Operation{maps}, f.c, reduction, reinterpret_cast<typename Operation::Part*>(work),
              [&](int i, const auto& part) {
                if (ds) store_one(ds + n * f.c + c0 + i, part.ds);
                dp2[i] = gate_gradient(f, n, c0 + i, part.ds);
                if constexpr (!kPlain) {
                  if (has_max(f)) channels.max[i] = part.max, channels.dz_per_tie[i] = part.ties;
                }
              });
  __syncthreads();
  if (f.r) gemv_t<1>(w2.from(c0, 0), own, depth, dp2, 0, work, hidden_part);
  cluster.sync();
  for (int k = thread(); k < depth; k += threads()) {
    if (f.r == 0) {
      const auto rank = static_cast<int>(k / config.channels);
      whole[k] = cluster.of(rank, dp2)[k - rank * config.channels];
      continue;
    }
    whole[k] = hidden_gradient(f, n, k, cluster.sum(hidden_part, k));
    if (dp1 && cluster.rank == 0) store_one(dp1 + n * f.r + k, whole[k]);
  }
  __syncthreads();
  cluster.arrive();  // this block no longer reads the shared memory of others
  gemv_t<1>((f.r ? w1 : w2).from(0, c0), depth, own, whole, 0, work, channels.dz_per_position);
  for (int i = thread(); i < own; i += threads()) {
    const bool max = !kPlain && has_max(f);
    channels.set(f, i, n, c0 + i, channels.dz_per_position[i], max ? channels.max[i] : A(0),
                 max ? channels.dz_per_tie[i] : A(0));
  }
  __syncthreads();
  tile.for_each_vector(ApplyOperation<T, M, kPlain>{maps, channels});
  cluster.wait();
#else
  __trap();  // never runs: device_limits() reports no clusters
#endif
}

}  // namespace

void backward_cluster(const Backward& f, const Plan& plan, void* scratch, void* stream) {
  with_map_type(f.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    if constexpr (sizeof(T) < 8) {
      const bool dw = f.dw1 || f.db1 || f.dw2 || f.db2;
      A* ds = dw ? static_cast<A*>(scratch) : nullptr;
      A* dp1 = dw ? ds + f.n * f.c : nullptr;
      with_cluster_tile<T>(plan.call, [&](auto* tile) {
        using Tile = std::remove_pointer_t<decltype(tile)>;
        with_form<T>(is_plain(f), [&](auto plain) {
          launch(plan, "backward_cluster", stream, backward_cluster_kernel<T, Tile, plain.value>, f, ds, dp1,
                 plan.elementwise, Divisor(f.l), plan.cluster_config, plan.reduction);
        });
      });
      if (dw) launch_weight_gradients(f, plan, Partial<A>{ds, nullptr, nullptr, 1}, static_cast<const A*>(dp1), stream);
    }
  });
}

}  // namespace se::cuda
