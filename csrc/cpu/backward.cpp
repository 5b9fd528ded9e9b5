// What:   the gradients of forward.cpp, from g, x, the weights and what forward saved (z, p1, p2).
//           dv = g post_act'(v)             v = u s + residual, recomputed from x; dresidual = dv
//           ds = sum_l dv u                 dp2 = ds gate'(p2)            dw2 = dp2^T h   db2 = sum_n dp2
//           dh = dp2 W2                     dp1 = dh act'(p1)             dw1 = dp1^T z   db1 = sum_n dp1
//           dz = dp1 W1                     du = dv s + dz / L (mean), or dz / ties where u is the maximum
//           dx = du pre_act'(x)
// How:    for one group of samples at a time: reduce to ds, go back through the excitation, compute dx. The weight
//         gradients dw1, db1, dw2, db2 come last.
// Bytes:  reads g and x from memory once if a group fits the cache, twice if not; writes dx once.
#include "backward_maps.h"
#include "dispatch.h"
#include "gemv.h"

namespace se::cpu {
namespace SE_CPU_ISA {
namespace {

template <class A>
using Buffers = BackwardBuffers<A>;

// h and s from p1 and p2, which forward saved.
template <class A>
void restore_gates(const Backward& f, const Buffers<A>& b, ThreadGroup& threads) {
  auto restore = [&](Activation activation, const void* p, A* v, int64_t count) {
    threads.parallel_for(count, kBlock, [&](int64_t begin, int64_t end) {
      std::memcpy(v + begin, static_cast<const A*>(p) + begin, (end - begin) * sizeof(A));
      apply_activation(activation, f.options, v + begin, end - begin);
    });
  };
  restore(f.options.act, f.p1, b.h, f.n * f.r);
  restore(f.options.gate, f.p2, b.s, f.n * f.c);
}

// dp2 and, if the squeeze has a maximum, its value and ties, for samples [n0, n1).
template <class T, class A = Accumulator<T>>
void backward_reduce(const Backward& f, const Buffers<A>& b, ThreadGroup& threads, int64_t n0, int64_t n1) {
  auto gate_backward = [&](int64_t n, int64_t c0, int64_t c1) {
    apply_activation_backward(f.options.gate, f.options, static_cast<const A*>(f.p2) + n * f.c + c0,
                              b.dp2 + n * f.c + c0, c1 - c0);
  };
  if (!f.channels_last) {
    // Divided by channels, as in backward_samples, so that a thread computes dx of the rows that it has reduced.
    threads.parallel_for(f.c, kWidth<A>, [&](int64_t c0, int64_t c1) {
      for (int64_t n = n0; n < n1; ++n) {
        for (int64_t row = n * f.c + c0; row < n * f.c + c1; ++row) reduce_row<T>(f, b, row);
        gate_backward(n, c0, c1);
      }
    });
    return;
  }
  const bool with_max = f.options.squeeze != Squeeze::kMean;
  const int64_t splits = position_splits(f), plane = f.n * splits * f.c;
  threads.parallel_for((n1 - n0) * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = n0 * splits + begin; i < n0 * splits + end; ++i) {
      const int64_t split = i % splits;
      A* ds = b.partial + i * f.c;
      reduce_positions<T>(f, b, i / splits, f.l * split / splits, f.l * (split + 1) / splits, ds,
                          with_max ? ds + plane : nullptr, with_max ? ds + 2 * plane : nullptr);
    }
  });
  threads.parallel_for(f.c, kBlock, [&](int64_t c0, int64_t c1) {
    for (int64_t n = n0; n < n1; ++n) {
      for_each_vector<A>(c1 - c0, [&](int64_t j, auto type) {
        using V = decltype(type);
        const int64_t c = c0 + j;
        V sum{}, max = splat<V>(-__builtin_huge_val()), ties{};
        for (int64_t i = n * splits; i < (n + 1) * splits; ++i) {
          const A* ds = b.partial + i * f.c + c;
          sum += load<V>(ds);
          if (with_max) merge_ties(load<V>(ds + plane), load<V>(ds + 2 * plane), max, ties);
        }
        store(b.dp2 + n * f.c + c, sum);
        if (!with_max) return;
        store(b.max + n * f.c + c, max);
        store(b.dz_per_maximum + n * f.c + c, ties);
      });
      gate_backward(n, c0, c1);
    }
  });
}

// dp1 for the rows [r0, r1) of the first layer.
template <class A>
void backward_hidden(const Backward& f, const Buffers<A>& b, int64_t n0, int64_t n1, int64_t r0, int64_t r1) {
  with_weight_type<A>(f.weight_dtype, [&](auto type) {
    using W = decltype(type);
    gemv_t(static_cast<const W*>(f.w2), b.dp2, b.dp1, f.c, f.r, n0, n1, r0, r1);
  });
  for (int64_t n = n0; n < n1; ++n) {
    const int64_t i = n * f.r + r0;
    apply_activation_backward(f.options.act, f.options, static_cast<const A*>(f.p1) + i, b.dp1 + i, r1 - r0);
  }
}

// dz, divided by the number of positions that it is added to, for channels [c0, c1).
template <class A>
void backward_squeeze(const Backward& f, const Buffers<A>& b, int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
  with_weight_type<A>(f.weight_dtype, [&](auto type) {
    using W = decltype(type);
    gemv_t(static_cast<const W*>(f.r ? f.w1 : f.w2), f.r ? b.dp1 : b.dp2, b.dz_per_position, f.r ? f.r : f.c, f.c, n0,
           n1, c0, c1);
  });
  const auto half = f.options.squeeze == Squeeze::kMeanMax ? A(0.5) : A(1);
  for (int64_t n = n0; n < n1; ++n) {
    for (int64_t i = n * f.c + c0; i < n * f.c + c1; ++i) {
      const A dz = half * b.dz_per_position[i];
      // A NaN maximum equals no position, so PyTorch divides by 0 ties: mask * dz / ties is NaN along the whole row.
      if (f.options.squeeze != Squeeze::kMean)
        b.dz_per_maximum[i] = b.max[i] == b.max[i] ? dz / b.dz_per_maximum[i] : b.max[i];
      b.dz_per_position[i] = f.options.squeeze == Squeeze::kMax ? A(0) : dz / static_cast<A>(f.l);
    }
  }
}

template <class T, class A = Accumulator<T>>
void backward_samples(const Backward& f, const Buffers<A>& b, ThreadGroup& threads, int64_t n0, int64_t n1) {
  const bool maps = f.dx || f.dresidual;
  backward_reduce<T>(f, b, threads, n0, n1);
  threads.parallel_for(f.r, kWidth<A>, [&](int64_t r0, int64_t r1) { backward_hidden(f, b, n0, n1, r0, r1); });
  threads.parallel_for(f.c, kWidth<A>, [&](int64_t c0, int64_t c1) {
    backward_squeeze(f, b, n0, n1, c0, c1);
    if (f.channels_last || !maps) return;
    for (int64_t n = n0; n < n1; ++n) {
      for (int64_t row = n * f.c + c0; row < n * f.c + c1; ++row) {
        backward_apply<T>(f, b, row * f.l, f.l,
                          [row](const A* values, int64_t) { return ChannelBroadcast<A>{values[row]}; });
      }
    }
  });
  if (!f.channels_last || !maps) return;
  threads.parallel_for((n1 - n0) * f.l, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = n0 * f.l + begin; i < n0 * f.l + end; ++i) {
      const int64_t channel = i / f.l * f.c;
      backward_apply<T>(f, b, i * f.c, f.c,
                        [channel](const A* values, int64_t c) { return ChannelVector<A>{values + channel + c}; });
    }
  });
}

// dw1, db1, dw2 and db2. They are sums over the samples, in ascending order.
template <class A>
void weight_gradients(const Backward& f, const Buffers<A>& b, ThreadGroup& threads) {
  with_weight_type<A>(f.weight_dtype, [&](auto type) {
    using W = decltype(type);
    const A* z = static_cast<const A*>(f.z);
    if (f.dw2 || f.db2) {
      threads.parallel_for(f.c, kTileLong, [&](int64_t c0, int64_t c1) {
        sum_outer_products(b.dp2, f.r ? b.h : z, static_cast<W*>(f.dw2), static_cast<W*>(f.db2), f.n, f.c,
                           f.r ? f.r : f.c, c0, c1);
      });
    }
    if (f.dw1 || f.db1) {
      threads.parallel_for(f.r, kTileLong, [&](int64_t r0, int64_t r1) {
        sum_outer_products(b.dp1, z, static_cast<W*>(f.dw1), static_cast<W*>(f.db1), f.n, f.r, f.c, r0, r1);
      });
    }
  });
}

}  // namespace

size_t backward_scratch(const Backward& f) { return scratch_bytes<BackwardBuffers>(f); }

void backward(const Backward& f, const Pool& pool, void* scratch) {
  with_map_type(f.dtype, [&](auto type) {
    using T = decltype(type);
    Arena arena(scratch);
    const Buffers<Accumulator<T>> buffers(f, arena);
    parallel_region(pool, f.n * f.c * (f.l + 2 * f.r), [&](ThreadGroup& all) {
      restore_gates(f, buffers, all);
      for_each_sample_group(f, all, 2 * sizeof(T), [&](ThreadGroup& threads, int64_t n0, int64_t n1) {
        backward_samples<T>(f, buffers, threads, n0, n1);
      });
      weight_gradients(f, buffers, all);
    });
  });
}

}  // namespace SE_CPU_ISA
}  // namespace se::cpu
