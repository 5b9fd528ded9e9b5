// What:   y = post_act(u * s + residual), with a whole sample in the shared memory of one thread-block cluster.
// Grid:   a cluster of up to 8 (16) blocks for one sample, or for kSamples that share one reading of the weights. A
//         block has the map of its own channels; in channels_last where these are too short a piece of a position, it
//         has all channels of its own positions of one sample, and its own channels are those that it excites.
//           1. x into shared memory    2. squeeze, over all blocks if by positions    3. the own channels' part of W1 z
//           4. h: the sum of all blocks' parts; gates of the own channels, which are then collected if by positions
//           5. y from shared memory
// Bytes:  reads x and the residual once, writes y once: the least there is. Every weight is read once a cluster.
// Needs:  sm_90, and a sample that fits: a block has up to 227 KB.
// Why:    no workspace, no counters, and nobody to wait for but the cluster's own blocks, which run together.
#include "cluster.cuh"
#include "excite.cuh"
#include "forward.cuh"
#include "kernels.h"

namespace se::cuda {
namespace {

template <class T, class Share, int kS, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kForwardResidents)
    forward_in_cluster(Forward f, Elementwise e, typename Share::Divisors by, Residence residence,
                       Reduction reduction) {
#ifdef SE_FUSED_HAS_CLUSTERS
  const Share first(f, e, by);
  const Cluster cluster(residence.size);
  const int64_t n0 = first.n * kS;
  const int samples = kS == 1 || f.n - n0 > kS ? kS : static_cast<int>(f.n - n0);
  const int64_t own0 = cluster.rank * residence.channels;
  const auto own = static_cast<int>(f.c - own0 < residence.channels ? f.c - own0 : residence.channels);
  const auto depth = static_cast<int>(f.r ? f.r : f.c);

  // As csrc/plan/cluster.cpp counts it.
  unsigned char* memory = shared_memory<unsigned char>();  // [samples] slabs
  using Operation = SqueezeOperation<T, decltype(first.slab(nullptr))>;
  using Part = typename Operation::Part;
  A* work = reinterpret_cast<A*>(memory + kS * residence.slab_bytes);
  Part* parts = reinterpret_cast<Part*>(work + residence.work);  // [samples][channels of the share]
  A* z = reinterpret_cast<A*>(parts + kS * e.channels);          // [samples][residence.channels]
  A* hidden_part = z + kS * residence.channels;                  // [samples][R]
  A* h = hidden_part + kS * f.r;                                 // [samples][R], or z [samples][C]
  A* s = h + kS * depth;                                         // [samples][own]
  auto memory_of = [&](int b) { return reinterpret_cast<T*>(memory + b * residence.slab_bytes); };
  auto share_of = [&](int b) { return of_sample(first, f, n0 + b); };
  auto each = [&](int count, auto&& body) {
    for (int b = 0; b < samples; ++b) {
      for (int i = threadIdx.x; i < count; i += kThreads) body(b, i);
    }
  };
  auto squeeze_of = [&](int b) -> Operation { return {slab_in(share_of(b), residence.wide, memory_of(b)), f.options}; };

  for (int b = 0; b < samples; ++b) copy_to_slab(share_of(b), f.x, residence.wide, memory_of(b));
  await_copies();
  for (int b = 0; b < samples; ++b) {
    reduce_share(share_of(b), squeeze_of(b), f, reduction, reinterpret_cast<Part*>(work),
                 [&](int64_t i, const Part& part) { parts[b * e.channels + i] = part; });
  }
  Share::kSplitsPositions ? cluster.sync() : __syncthreads();
  each(own, [&](int b, int i) {
    const int64_t channel = own0 + i;
    const Part part = merge_shares<Share>(cluster, squeeze_of(b), parts + b * e.channels, channel - first.c0);
    const A value = squeezed(f.options.squeeze, part.sum, part.max, f.l);
    z[b * residence.channels + i] = value;
    if (f.z) store_one(static_cast<A*>(f.z) + (n0 + b) * f.c + channel, value);
  });

  __syncthreads();
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c}, w2{f.w2, f.weight_dtype, depth};
  if (f.r) multiply<kS>(w1.from(0, own0), depth, own, z, residence.channels, hidden_part);
  cluster.sync();
  each(depth, [&](int b, int k) {
    if (f.r == 0) {
      const auto peer = static_cast<int>(k / residence.channels);
      h[b * depth + k] = cluster.of(peer, z)[b * residence.channels + k % residence.channels];
      return;
    }
    const A p1 = sum_over_blocks(cluster, hidden_part, b * f.r + k) + bias<T>(f.b1, f.weight_dtype, k);
    if (f.p1 && cluster.rank == 0) store_one(static_cast<A*>(f.p1) + (n0 + b) * f.r + k, p1);
    h[b * depth + k] = activate_one(f.options.act, f.options, p1);
  });
  __syncthreads();
  multiply<kS>(w2.from(own0, 0), own, depth, h, depth, s);
  __syncthreads();
  each(own, [&](int b, int i) {
    const A p2 = s[b * own + i] + bias<T>(f.b2, f.weight_dtype, own0 + i);
    if (f.p2) store_one(static_cast<A*>(f.p2) + (n0 + b) * f.c + own0 + i, p2);
    s[b * own + i] = activate_one(f.options.gate, f.options, p2);
  });
  const A* gates = s;
  if (Share::kSplitsPositions) {
    A* all = reinterpret_cast<A*>(parts);  // which no block reads any more
    cluster.sync();
    for (int i = threadIdx.x; i < first.channels; i += kThreads) {
      all[i] = cluster.of(static_cast<int>(i / residence.channels), s)[i % residence.channels];
    }
    gates = all;
  }
  __syncthreads();
  cluster.arrive();  // this block has read all that it reads of others
  for (int b = 0; b < samples; ++b) {
    const Share share = share_of(b);
    const Operation squeeze = squeeze_of(b);
    share.walk([&](auto width, const Place& place) {
      A along[decltype(width)::value];
      share.along(gates + b * own, place, along);
      scale<T>(f, squeeze.x, place.at, along);
    });
  }
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
        auto with = [&](auto samples) {
          launch(plan, "forward", stream, forward_in_cluster<T, Share, samples.value>, f, plan.elementwise, by,
                 plan.residence, plan.reduction);
        };
        if constexpr (!Share::kSplitsPositions) {
          if (plan.residence.samples > 1) return with(std::integral_constant<int, kSamples>());
        }
        with(std::integral_constant<int, 1>());
      });
    }
  });
}

}  // namespace se::cuda
