// What:   y = post_act(u * s + residual), with a whole sample in the shared memory of one thread-block cluster.
// Grid:   a cluster of up to 8 (16) blocks a sample. A block has the map of its own channels; in channels_last where
//         these are too short a piece of a position, it has all channels of its own positions, and its own channels
//         are those that it excites.
//           1. x into shared memory    2. squeeze, over all blocks if by positions    3. the own channels' part of W1 z
//           4. h: the sum of all blocks' parts; gates of the own channels, which are then collected if by positions
//           5. y from shared memory
// Bytes:  reads x and the residual once, writes y once: the least there is. Every weight is read once a sample.
// Needs:  sm_90, and a sample that fits: a block has up to 227 KB.
// Why:    no workspace, no counters, and nobody to wait for but the cluster's own blocks, which run together.
#include "cluster.cuh"
#include "excite.cuh"
#include "forward.cuh"
#include "kernels.h"

namespace se::cuda {
namespace {

template <class T, class Share, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kForwardResidents)
    forward_in_cluster(Forward f, Elementwise e, typename Share::Divisors by, Residence residence,
                       Reduction reduction) {
#ifdef SE_FUSED_HAS_CLUSTERS
  const Share share(f, e, by);
  using Operation = SqueezeOperation<T, decltype(share.slab(nullptr))>;
  using Part = typename Operation::Part;
  const Cluster cluster(residence.size);
  const int64_t own0 = cluster.rank * residence.channels, n = share.n;
  const auto own = static_cast<int>(f.c - own0 < residence.channels ? f.c - own0 : residence.channels);

  // As csrc/plan/cluster.cpp counts it.
  unsigned char* memory = shared_memory<unsigned char>();
  A* work = reinterpret_cast<A*>(memory + residence.slab_bytes);
  Part* parts = reinterpret_cast<Part*>(work + residence.work);  // [channels of the share]
  A* z = reinterpret_cast<A*>(parts + e.channels);               // [own]
  A* hidden_part = z + residence.channels;                       // [R]
  A* s = hidden_part + f.r;                                      // [own]

  const Operation squeeze{copy_to_slab(share, f.x, residence.wide, reinterpret_cast<T*>(memory)), f.options};
  await_copies();
  reduce_share(share, squeeze, f, reduction, reinterpret_cast<Part*>(work),
               [&](int64_t i, const Part& part) { parts[i] = part; });
  Share::kSplitsPositions ? cluster.sync() : __syncthreads();
  for (int i = threadIdx.x; i < own; i += kThreads) {
    const int64_t channel = own0 + i;
    const Part part = merge_shares<Share>(cluster, squeeze, parts, channel - share.c0);
    z[i] = squeezed(f.options.squeeze, part.sum, part.max, f.l);
    if (f.z) store_one(static_cast<A*>(f.z) + n * f.c + channel, z[i]);
  }

  const Matrix w1{f.w1, f.weight_dtype, f.c}, w2{f.w2, f.weight_dtype, f.r ? f.r : f.c};
  if (f.r) {
    product<1>(w1.from(0, own0), static_cast<int>(f.r), own, 1, work, hidden_part,
               [&](int, int64_t k) { return z[k]; });
  }
  cluster.sync();
  product<1>(w2.from(own0, 0), own, w2.stride, 1, work, s, [&](int, int64_t k) {
    if (f.r == 0) return cluster.of(static_cast<int>(k / residence.channels), z)[k % residence.channels];
    const A p1 = sum_over_blocks(cluster, hidden_part, k) + bias<A>(f.b1, f.weight_dtype, k);
    if (f.p1 && cluster.rank == 0) store_one(static_cast<A*>(f.p1) + n * f.r + k, p1);
    return activate_one(f.options.act, f.options, p1);
  });
  for (int i = threadIdx.x; i < own; i += kThreads) {
    const A p2 = s[i] + bias<A>(f.b2, f.weight_dtype, own0 + i);
    if (f.p2) store_one(static_cast<A*>(f.p2) + n * f.c + own0 + i, p2);
    s[i] = activate_one(f.options.gate, f.options, p2);
  }
  const A* gates = s;
  if (Share::kSplitsPositions) {
    A* all = reinterpret_cast<A*>(parts);  // which no block reads any more
    cluster.sync();
    for (int i = threadIdx.x; i < share.channels; i += kThreads) {
      all[i] = cluster.of(static_cast<int>(i / residence.channels), s)[i % residence.channels];
    }
    gates = all;
  }
  __syncthreads();
  cluster.arrive();  // this block has read all that it reads of others
  share.walk([&](auto width, const Place& place) {
    A along[decltype(width)::value];
    share.along(gates, place, along);
    scale<T>(f, squeeze.x, place.at, along);
  });
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
      with_cluster_share<T>(plan, [&](auto* share, const auto& by) {
        using Share = std::remove_pointer_t<decltype(share)>;
        launch(plan, "forward", stream, forward_in_cluster<T, Share>, f, plan.elementwise, by, plan.residence,
               plan.reduction);
      });
    }
  });
}

}  // namespace se::cuda
