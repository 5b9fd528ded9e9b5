// What:   y = post_act(u * s + residual), with a whole sample in the shared memory of one thread-block cluster.
// Grid:   a cluster of up to 16 blocks for each sample; each block has C / size channels of it.
//           1. x into shared memory    2. squeeze of the own channels    3. their part of W1 z
//           4. h: the sum of all blocks' parts; gates of the own channels    5. y from shared memory
// Bytes:  reads x and the residual once, writes y once: the least there is. Every weight is read once per sample.
// Needs:  sm_90, and a sample that fits: a block has up to 227 KB.
// Why:    no workspace, no counters, and nobody to wait for but the cluster's own blocks, which run together.
#include "cluster.cuh"
#include "excite.cuh"
#include "forward.cuh"
#include "kernels.h"

namespace se::cuda {
namespace {

template <class T, class Share, bool kPlain, class A = Accumulator<T>>
__global__ void __launch_bounds__(kMostForwardThreads, 1)
    forward_cluster_kernel(const __grid_constant__ Forward f, Elementwise e, Divisor by, Residence residence,
                           Reduction reduction) {
#ifdef SE_FUSED_HAS_CLUSTERS
  const Share share(f, e, by, blockIdx.x);
  const Cluster cluster(residence.size);
  const int own = share.channels, r = static_cast<int>(f.r), depth = static_cast<int>(f.r ? f.r : f.c);
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c}, w2{f.w2, f.weight_dtype, depth};

  const ClusterLayout at(residence.work, residence.channels, r, depth);
  T* memory = shared_memory<T>();
  A* work = reinterpret_cast<A*>(shared_memory<unsigned char>() + residence.slab_bytes);
  A *z = work + at.own, *hidden_part = work + at.part, *h = work + at.whole, *s = work + at.gates;

  Cluster::begin(residence, share.n);
  const Slab<T> x = copy_to_slab(share, f.x, memory);
  if (share.n == 0) {  // for all samples
    if (f.r) prefetch(w1.from(0, share.c0), r, own);
    prefetch(w2.from(share.c0, 0), own, depth);
  }
  // The layers add to their biases, which come while x does.
  for (int k = thread(); k < r; k += threads()) h[k] = bias<T>(f.b1, f.weight_dtype, k);
  for (int i = thread(); i < own; i += threads()) s[i] = bias<T>(f.b2, f.weight_dtype, share.c0 + i);
  await_copies();
  const SqueezeOperation<T, Slab<T>, kPlain, const Options&> squeeze{x, f.options};
  reduce_share(share, squeeze, f.c, reduction, reinterpret_cast<typename decltype(squeeze)::Part*>(work),
               [&](int i, const auto& part) {
                 z[i] = squeezed(f.options.squeeze, part, f.l);
                 if (f.z) store_one(static_cast<A*>(f.z) + share.n * f.c + share.c0 + i, z[i]);
               });
  __syncthreads();
  if (f.r) multiply<1>(w1.from(0, share.c0), r, own, z, 0, hidden_part, share.n);
  cluster.sync();
  for (int k = thread(); k < depth; k += threads()) {
    if (f.r == 0) {
      const auto peer = static_cast<int>(k / residence.channels);
      h[k] = cluster.of(peer, z)[k - peer * residence.channels];
      continue;
    }
    const A p1 = cluster.sum(hidden_part, k) + h[k];
    if (f.p1 && cluster.rank == 0) store_one(static_cast<A*>(f.p1) + share.n * f.r + k, p1);
    h[k] = activate_one(f.options.act, f.options, p1);
  }
  __syncthreads();
  cluster.arrive();  // this block has read all that it reads of others
  multiply<1>(w2.from(share.c0, 0), own, depth, h, 0, s, share.n, true);
  __syncthreads();
  for (int i = thread(); i < own; i += threads()) {
    const A p2 = s[i];
    if (f.p2) store_one(static_cast<A*>(f.p2) + share.n * f.c + share.c0 + i, p2);
    s[i] = activate_one(f.options.gate, f.options, p2);
  }
  __syncthreads();
  share.walk(ScaleOperation<T, Slab<T>, kPlain>{f, x, s});
  cluster.wait();
#else
  __trap();  // device_limits() says that there are no clusters
#endif
}

}  // namespace

void forward_cluster(const Forward& f, const Plan& plan, void* stream) {
  with_map_type(f.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < 8) {
      with_cluster_share<T>(plan.call, [&](auto* share) {
        using Share = std::remove_pointer_t<decltype(share)>;
        with_form<T>(is_plain(f), [&](auto plain) {
          launch(plan, "forward_cluster", stream, forward_cluster_kernel<T, Share, plain.value>, f, plan.elementwise,
                 Divisor(f.l), plan.residence, plan.reduction);
        });
      });
    }
  });
}

}  // namespace se::cuda
