// What:   y = post_act(u * s + residual). A whole sample stays in the shared memory of one thread-block cluster.
// Grid:   one cluster of up to 16 blocks per sample; each block has C / size channels of the sample.
//           1. stage x in shared memory
//           2. squeeze the block's channels
//           3. compute the block's part of W1 z
//           4. compute h from the sum of all blocks' parts, and the gates of the block's channels
//           5. compute y from shared memory
// Bytes:  reads x and the residual once and writes y once, which is the minimum. Every weight is read once per sample.
// Needs:  a sample that fits: a block has up to 227 KB of shared memory. sm_90 for more than one block per sample, and
//         sm_80 for one.
// Why:    there is no workspace and no counter, and a block waits only for the blocks of its cluster, which run
// together.
#include "cluster.cuh"
#include "forward.cuh"
#include "gemv.cuh"
#include "kernels.h"

namespace se::cuda {
namespace {

template <class T, class Tile, bool kPlain, class A = Accumulator<T>>
__global__ void __launch_bounds__(kMostForwardThreads, 1)
    forward_cluster_kernel(const __grid_constant__ Forward f, Elementwise e, Divisor by, ClusterConfig config,
                           Reduction reduction) {
#ifdef SE_FUSED_HAS_CLUSTER_KERNELS
  const Tile tile(f, e, by, blockIdx.x);
  const Cluster cluster(config.size);
  const int own = tile.channels, r = static_cast<int>(f.r), depth = static_cast<int>(f.r ? f.r : f.c);
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c}, w2{f.w2, f.weight_dtype, depth};

  const ClusterLayout at(config.work, config.channels, r, depth);
  T* memory = shared_memory<T>();
  A* work = reinterpret_cast<A*>(shared_memory<unsigned char>() + config.staged_bytes);
  A *z = work + at.own, *hidden_part = work + at.part, *h = work + at.whole, *s = work + at.gates;

  Cluster::begin(config, tile.n);
  const StagedTile<T> x = stage_tile(tile, f.x, memory);
  if (tile.n == 0) {  // one cluster prefetches for all samples
    if (f.r) prefetch(w1.from(0, tile.c0), r, own);
    prefetch(w2.from(tile.c0, 0), own, depth);
  }
  // The layers add to their biases, which are loaded while x arrives.
  for (int k = thread(); k < r; k += threads()) h[k] = bias<T>(f.b1, f.weight_dtype, k);
  for (int i = thread(); i < own; i += threads()) s[i] = bias<T>(f.b2, f.weight_dtype, tile.c0 + i);
  await_copies();
  const SqueezeOperation<T, StagedTile<T>, kPlain, const Forward&> squeeze{x, f};
  reduce_tile(tile, squeeze, f.c, reduction, reinterpret_cast<typename decltype(squeeze)::Part*>(work),
              [&](int i, const auto& part) {
                z[i] = squeezed(f.options.squeeze, part, f.l);
                if (f.z) store_one(static_cast<A*>(f.z) + tile.n * f.c + tile.c0 + i, z[i]);
              });
  __syncthreads();
  if (f.r) gemv<1>(w1.from(0, tile.c0), r, own, z, 0, hidden_part, tile.n);
  cluster.sync();
  for (int k = thread(); k < depth; k += threads()) {
    if (f.r == 0) {
      const auto rank = static_cast<int>(k / config.channels);
      h[k] = cluster.of(rank, z)[k - rank * config.channels];
      continue;
    }
    const A p1 = cluster.sum(hidden_part, k) + h[k];
    if (f.p1 && cluster.rank == 0) store_one(static_cast<A*>(f.p1) + tile.n * f.r + k, p1);
    h[k] = activate_one(f.options.act, f.options, p1);
  }
  __syncthreads();
  cluster.arrive();  // this block no longer reads the shared memory of others
  gemv<1>(w2.from(tile.c0, 0), own, depth, h, 0, s, tile.n, true);
  __syncthreads();
  for (int i = thread(); i < own; i += threads()) {
    const A p2 = s[i];
    if (f.p2) store_one(static_cast<A*>(f.p2) + tile.n * f.c + tile.c0 + i, p2);
    s[i] = activate_one(f.options.gate, f.options, p2);
  }
  __syncthreads();
  tile.for_each_vector(ScaleOperation<T, StagedTile<T>, kPlain, Tile>{f, x, s, tile.c0});
  cluster.wait();
#else
  __trap();  // never runs: device_limits() reports no clusters
#endif
}

}  // namespace

void forward_cluster(const Forward& f, const Plan& plan, void* stream) {
  with_map_type(f.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < 8) {
      with_cluster_tile<T>(plan.call, [&](auto* tile) {
        using Tile = std::remove_pointer_t<decltype(tile)>;
        with_form<T>(is_plain(f), [&](auto plain) {
          launch(plan, "forward_cluster", stream, forward_cluster_kernel<T, Tile, plain.value>, f, plan.elementwise,
                 Divisor(f.l), plan.cluster_config, plan.reduction);
        });
      });
    }
  });
}

}  // namespace se::cuda
