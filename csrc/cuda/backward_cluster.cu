// What:   dx, dresidual, and ds and dp1 for the weights' launch, by the formulas of backward_two_pass.cu, with the maps
//         that are needed twice in the shared memory of one thread-block cluster.
// Grid:   as forward_cluster.cu: a cluster for each sample, each block its own channels.
//           1. g into shared memory (and x and the residual, where dx depends on them)    2. ds and dp2 of the own
//           channels    3. their part of dp2 W2    4. dp1: from the sum of all blocks' parts; dz of the own channels
//           5. dx from shared memory
// Bytes:  reads g, x and (with a post_act) the residual once, writes dx once: the least there is.
// Needs:  a sample of each map that stays in shared memory.
// Why:    g alone stays in the common case, so that as large samples fit as forward.
#include "backward.cuh"
#include "cluster.cuh"
#include "kernels.h"

namespace se::cuda {
namespace {

// A map in shared memory, or where it stays in global memory there.
template <class T>
struct MaybeSlab {
  Slab<T> slab;
  Global<T> global;
  bool in_slab;
  template <int V>
  __device__ Vector<V, T> load(Index at) const {
    if (in_slab) return slab.template load<V>(at);
    return global.template load<V>(at);
  }
};

template <class T, class Share, bool kPlain, class A = Accumulator<T>>
__global__ void __launch_bounds__(kMostBackwardThreads, 1)
    backward_cluster_kernel(const __grid_constant__ Backward f, A* ds, A* dp1, Elementwise e, Divisor by,
                            Residence residence, Reduction reduction) {
#ifdef SE_FUSED_HAS_CLUSTERS
  using X = std::conditional_t<kPlain, Global<T>, MaybeSlab<T>>;
  using M = Maps<T, Slab<T>, X, kPlain, const Backward&>;
  using Operation = GateGradientOperation<T, M, kPlain>;
  const Share share(f, e, by, blockIdx.x);
  const Cluster cluster(residence.size);
  const int own = share.channels, r = static_cast<int>(f.r), depth = static_cast<int>(f.r ? f.r : f.c);
  const int64_t n = share.n, c0 = share.c0;
  const Matrix<T> w1{f.w1, f.weight_dtype, f.c}, w2{f.w2, f.weight_dtype, depth};

  const ClusterLayout at(residence.work, residence.channels, r, depth);
  unsigned char* free = shared_memory<unsigned char>();
  auto copy = [&](const void* map) {
    T* memory = reinterpret_cast<T*>(free);
    free += residence.slab_bytes;
    return copy_to_slab(share, map, memory);
  };
  auto read = [&](bool keeps, const void* map) -> X {
    const Global<T> global{static_cast<const T*>(map)};
    if constexpr (kPlain)
      return global;
    else
      return {keeps ? copy(map) : Slab<T>{}, global, keeps};
  };
  Cluster::begin(residence, n);
  const Slab<T> g = copy(f.g);
  const X x = read(residence.keeps_x, f.x);
  const M maps{f, g, x, read(residence.keeps_residual, f.residual)};
  A* work = reinterpret_cast<A*>(free);
  A *dp2 = work + at.own, *hidden_part = work + at.part, *whole = work + at.whole;
  const Channels<A> channels(work + at.gates, residence.channels);

  if (n == 0) {  // for all samples
    prefetch(w2.from(f.r ? c0 : 0, f.r ? 0 : c0), f.r ? own : depth, f.r ? depth : own);
    if (f.r) prefetch(w1.from(0, c0), r, own);
  }
  await_copies();
  reduce_share(share, Operation{maps}, f.c, reduction, reinterpret_cast<typename Operation::Part*>(work),
               [&](int i, const auto& part) {
                 if (ds) store_one(ds + n * f.c + c0 + i, part.ds);
                 dp2[i] = gate_gradient(f, n, c0 + i, part.ds);
                 if constexpr (!kPlain) {
                   if (has_max(f)) channels.max[i] = part.max, channels.max_share[i] = part.ties;
                 }
               });
  __syncthreads();
  if (f.r) transposed_multiply<1>(w2.from(c0, 0), own, depth, dp2, 0, work, hidden_part);
  cluster.sync();
  for (int k = thread(); k < depth; k += threads()) {
    if (f.r == 0) {
      const auto peer = static_cast<int>(k / residence.channels);
      whole[k] = cluster.of(peer, dp2)[k - peer * residence.channels];
      continue;
    }
    whole[k] = hidden_gradient_of(f, n, k, cluster.sum(hidden_part, k));
    if (dp1 && cluster.rank == 0) store_one(dp1 + n * f.r + k, whole[k]);
  }
  __syncthreads();
  cluster.arrive();  // this block has read all that it reads of others
  transposed_multiply<1>((f.r ? w1 : w2).from(0, c0), depth, own, whole, 0, work, channels.mean_share);
  for (int i = thread(); i < own; i += threads()) {
    const bool max = !kPlain && has_max(f);
    channels.set(f, i, n, c0 + i, channels.mean_share[i], max ? channels.max[i] : A(0),
                 max ? channels.max_share[i] : A(0));
  }
  __syncthreads();
  share.walk(ApplyOperation<T, M, kPlain>{maps, channels});
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
      with_cluster_share<T>(plan.call, [&](auto* share) {
        using Share = std::remove_pointer_t<decltype(share)>;
        with_form<T>(is_plain(f), [&](auto plain) {
          launch(plan, "backward_cluster", stream, backward_cluster_kernel<T, Share, plain.value>, f, ds, dp1,
                 plan.elementwise, Divisor(f.l), plan.residence, plan.reduction);
        });
      });
      if (dw) launch_weight_gradients(f, plan, Partial<A>{ds, nullptr, nullptr, 1}, static_cast<const A*>(dp1), stream);
    }
  });
}

}  // namespace se::cuda
