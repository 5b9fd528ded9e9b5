// What:   dx, dresidual, and ds and dp1 for the weights' launch, by the formulas of backward_two_pass.cu, with the maps
//         that are needed twice in the shared memory of one thread-block cluster.
// Grid:   as forward_cluster.cu: a cluster a sample, a block its own channels or positions.
//           1. g into shared memory (and x and the residual, where dx depends on them)    2. ds, over all blocks if by
//           positions; dp2 of the own channels    3. their part of dp2 W2    4. dp1: from the sum of all blocks' parts;
//           dz of the own channels, which are then collected if by positions    5. dx from shared memory
// Bytes:  reads g, x and (with a post_act) the residual once, writes dx once: the least there is.
// Needs:  a sample of each map that stays in shared memory.
// Why:    g alone stays in the common case, so that as large samples fit as forward.
#include "backward.cuh"
#include "cluster.cuh"
#include "kernels.h"

namespace se::cuda {
namespace {

// A map in shared memory, or where it stays in global memory (slab null) there.
template <class T, class Slab>
struct MaybeResident {
  Slab resident;
  const T* map;
  template <int V>
  __device__ void load(int64_t at, Accumulator<T> (&v)[V]) const {
    if (resident.slab) return resident.load(at, v);
    cuda::load<V>(map + at, v);
  }
};

template <class T, class Share, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kBackwardResidents)
    backward_in_cluster(Backward f, A* ds, A* dp1, Elementwise e, typename Share::Divisors by, Residence residence,
                        Reduction reduction) {
#ifdef SE_FUSED_HAS_CLUSTERS
  const Share share(f, e, by);
  using Slab = decltype(share.slab(nullptr));
  using Operation = GateGradientOperation<T, Maps<Slab, MaybeResident<T, Slab>>>;
  using Part = typename Operation::Part;
  const Cluster cluster(residence.size);
  const int64_t own0 = cluster.rank * residence.channels, n = share.n;
  const auto own = static_cast<int>(f.c - own0 < residence.channels ? f.c - own0 : residence.channels);

  // As csrc/plan/cluster.cpp counts it.
  unsigned char* free = shared_memory<unsigned char>();
  auto copy = [&](const void* map) {
    T* slab = reinterpret_cast<T*>(free);
    free += residence.slab_bytes;
    return copy_to_slab(share, map, residence.wide, slab);
  };
  auto copy_if = [&](bool keeps, const void* map) -> MaybeResident<T, Slab> {
    return {keeps ? copy(map) : share.slab(nullptr), static_cast<const T*>(map)};
  };
  const Slab g = copy(f.g);
  const MaybeResident<T, Slab> x = copy_if(residence.keeps_x, f.x);
  const Operation op{f, {g, x, copy_if(residence.keeps_residual, f.residual)}};
  const int depth = static_cast<int>(f.r ? f.r : f.c);
  A* work = reinterpret_cast<A*>(free);
  Part* parts = reinterpret_cast<Part*>(work + residence.work);  // [channels of the share]
  A* dp2 = reinterpret_cast<A*>(parts + e.channels);             // [own]
  A* hidden_part = dp2 + residence.channels;                     // [R]
  A* whole = hidden_part + f.r;                                  // dp1 [R], or dp2 [C]
  const Channels<A> mine(whole + depth, residence.channels);

  await_copies();
  reduce_share(share, op, f, reduction, reinterpret_cast<Part*>(work),
               [&](int64_t i, const Part& part) { parts[i] = part; });
  Share::kSplitsPositions ? cluster.sync() : __syncthreads();
  for (int i = threadIdx.x; i < own; i += kThreads) {
    const A sum = merge_shares<Share>(cluster, op, parts, own0 + i - share.c0).ds;
    if (ds) store_one(ds + n * f.c + own0 + i, sum);
    dp2[i] = gate_gradient(f, n, own0 + i, sum);
  }

  __syncthreads();
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c}, w2{f.w2, f.weight_dtype, depth};
  if (f.r) transposed_multiply(w2.from(own0, 0), own, depth, dp2, work, hidden_part);
  cluster.sync();
  for (int k = threadIdx.x; k < depth; k += kThreads) {
    if (f.r == 0) {
      whole[k] = cluster.of(static_cast<int>(k / residence.channels), dp2)[k % residence.channels];
      continue;
    }
    whole[k] = hidden_gradient_of(f, n, k, sum_over_blocks(cluster, hidden_part, k));
    if (dp1 && cluster.rank == 0) store_one(dp1 + n * f.r + k, whole[k]);
  }
  __syncthreads();
  transposed_multiply((f.r ? w1 : w2).from(0, own0), depth, own, whole, work, mine.mean_share);
  for (int i = threadIdx.x; i < own; i += kThreads) {
    const Part part = merge_shares<Share>(cluster, op, parts, own0 + i - share.c0);
    mine.set(f, i, n, own0 + i, mine.mean_share[i], part.max, part.ties);
  }
  Channels<A> channels = mine;
  if (Share::kSplitsPositions) {
    const int64_t kinds = has_max(f) ? 4 : 2;
    A* all = mine.s + kinds * residence.channels;
    channels = Channels<A>(all, f.c);
    cluster.sync();
    for (int i = threadIdx.x; i < f.c; i += kThreads) {
      const A* from = cluster.of(static_cast<int>(i / residence.channels), mine.s) + i % residence.channels;
      for (int kind = 0; kind < kinds; ++kind) all[kind * f.c + i] = from[kind * residence.channels];
    }
  }
  __syncthreads();
  cluster.arrive();  // this block has read all that it reads of others
  share.walk([&](auto width, const Place& place) {
    constexpr int W = decltype(width)::value;
    distribute<T, W>(f, op.maps, channels, place.at,
                     [&](const A* values, A(&along)[W]) { share.along(values, place, along); });
  });
  cluster.wait();
#else
  __trap();  // device_limits() says that there are no clusters
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
      with_cluster_share<T>(plan, [&](auto* share, const auto& by) {
        using Share = std::remove_pointer_t<decltype(share)>;
        launch(plan, "backward", stream, backward_in_cluster<T, Share>, f, ds, dp1, plan.elementwise, by,
               plan.residence, plan.reduction);
      });
      if (dw) launch_weight_gradients(f, plan, Partial<A>{ds, nullptr, nullptr, 1}, static_cast<const A*>(dp1), stream);
    }
  });
}

}  // namespace se::cuda
