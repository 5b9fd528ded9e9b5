// What:   the gradients of forward.cpp, from g, x, the weights and what forward saved (z, p1, p2).
//           dv = g post_act'(v)             v = u s + residual, computed again from x; dresidual = dv
//           ds = sum_l dv u                 dp2 = ds gate'(p2)            dw2 = dp2^T h   db2 = sum_n dp2
//           dh = dp2 W2                     dp1 = dh act'(p1)             dw1 = dp1^T z   db1 = sum_n dp1
//           dz = dp1 W1                     du = dv s + dz / L (mean), or dz / ties where u is the maximum
//           dx = du pre_act'(x)
// How:    a group of samples at a time: reduce to ds, back through the excitation, then dx; the weights' gradients
// last. Bytes:  g and x from memory once if a group fits the cache, twice if not; dx once.
#include "excite.h"

namespace se::cpu {
namespace SE_CPU_ISA {
namespace {

// For the maximum: its value in u, and how many positions share it.
template <class V>
SE_INLINE void count_ties(V u, V& max, V& ties) {
  const V one = splat<V>(1);
  ties = select<V>((u > max) | (u != u), one, select<V>(u == max, ties + one, ties));
  max = max_keep_nan(max, u);
}
template <class V>
SE_INLINE void merge_ties(V other_max, V other_ties, V& max, V& ties) {
  const V sum = ties + other_ties;
  ties = select<V>(other_max > max, other_ties, select<V>(other_max == max, sum, ties));
  max = max_keep_nan(max, other_max);
}

template <class A>
struct Buffers {
  A *h, *s;            // [N, R], [N, C]
  A *dp2, *dp1;        // [N, C], [N, R]
  A* mean_share;       // [N, C]: dz / L, to be added at every position
  A *max, *max_share;  // [N, C]: the maximum of u and dz / ties (first: ties)
  A* partial;          // channels_last: [N, groups, C] of ds, then of the maxima, then of ties
  Buffers(const Backward& f, Arena& arena) {
    h = arena.take<A>(f.n * f.r);
    s = arena.take<A>(f.n * f.c);
    dp2 = arena.take<A>(f.n * f.c);
    dp1 = arena.take<A>(f.n * f.r);
    mean_share = arena.take<A>(f.n * f.c);
    const int64_t maxima = f.options.squeeze == Squeeze::kMean ? 0 : f.n * f.c;
    max = arena.take<A>(maxima);
    max_share = arena.take<A>(maxima);
    partial = arena.take<A>(f.channels_last ? (maxima ? 3 : 1) * f.n * position_groups(f) * f.c : 0);
  }
};

// What is known along a span of at most kBlock elements of the maps.
template <class T, class A, class PerChannel>
struct Span {
  const Backward& f;
  int64_t offset, n;
  PerChannel s;
  alignas(64) A u_buffer[kBlock], dv_buffer[kBlock], v_buffer[kBlock];

  // A constructor, because aggregate initialisation would clear the buffers.
  Span(const Backward& f, int64_t offset, int64_t n, PerChannel s) : f(f), offset(offset), n(n), s(s) {}

  const A* u() { return stage(static_cast<const T*>(f.x) + offset, n, f.options.pre_act, f.options, u_buffer); }
  const A* dv(const A* u) {
    const T* g = static_cast<const T*>(f.g) + offset;
    const A* out = stage(g, n, Activation::kIdentity, f.options, dv_buffer);
    if (f.options.post_act == Activation::kIdentity) return out;
    const T* residual = f.residual ? static_cast<const T*>(f.residual) + offset : nullptr;
    lanes<A>(n, [&](int64_t i, auto type) {
      using V = decltype(type);
      V v = load<V>(u + i) * s.template at<V>(i);
      if (residual) v += load<V>(residual + i);
      store(v_buffer + i, v);
      store(dv_buffer + i, load<V>(out + i));
    });
    chain(f.options.post_act, f.options, v_buffer, dv_buffer, n);
    return dv_buffer;
  }
};

// ds of one row, and for the maximum its value and ties.
template <class T, class A = Accumulator<T>>
void reduce_row(const Backward& f, const Buffers<A>& b, int64_t row) {
  const bool with_max = f.options.squeeze != Squeeze::kMean;
  Reduction<A, false> ds;
  A max = -__builtin_huge_val(), ties = 0;
  for (int64_t l = 0; l < f.l; l += kBlock) {
    const int64_t n = f.l - l < kBlock ? f.l - l : kBlock;
    Span<T, A, AlongRow<A>> span(f, row * f.l + l, n, {b.s[row]});
    const A* u = span.u();
    const A* dv = span.dv(u);
    ds.add(n, [&](int64_t i, auto type) {
      using V = decltype(type);
      return load<V>(dv + i) * load<V>(u + i);
    });
    if (!with_max) continue;
    Vec<A> maxima = splat<Vec<A>>(-__builtin_huge_val()), counts{};
    lanes<A>(n, [&](int64_t i, auto type) {
      using V = decltype(type);
      if constexpr (std::is_same_v<V, A>) {
        count_ties(u[i], max, ties);
      } else {
        count_ties(load<V>(u + i), maxima, counts);
      }
    });
    for (int i = 0; i < kWidth<A>; ++i) merge_ties<A>(maxima[i], counts[i], max, ties);
  }
  b.dp2[row] = ds.result();
  if (with_max) {
    b.max[row] = max;
    b.max_share[row] = ties;
  }
}

// The same over positions [l0, l1) of sample n, for every channel.
template <class T, class A = Accumulator<T>>
void reduce_positions(const Backward& f, const Buffers<A>& b, int64_t n, int64_t l0, int64_t l1, A* ds, A* max,
                      A* ties) {
  for (int64_t c = 0; c < f.c; ++c) {
    ds[c] = 0;
    if (max) max[c] = -__builtin_huge_val(), ties[c] = 0;
  }
  for (int64_t l = l0; l < l1; ++l) {
    for (int64_t c = 0; c < f.c; c += kBlock) {
      const int64_t count = f.c - c < kBlock ? f.c - c : kBlock;
      Span<T, A, AlongPosition<A>> span(f, (n * f.l + l) * f.c + c, count, {b.s + n * f.c + c});
      const A* u = span.u();
      const A* dv = span.dv(u);
      lanes<A>(count, [&](int64_t i, auto type) {
        using V = decltype(type);
        const V v = load<V>(u + i);
        store(ds + c + i, load<V>(ds + c + i) + load<V>(dv + i) * v);
        if (!max) return;
        V m = load<V>(max + c + i), t = load<V>(ties + c + i);
        count_ties(v, m, t);
        store(max + c + i, m);
        store(ties + c + i, t);
      });
    }
  }
}

template <class T, class A = Accumulator<T>>
void reduce(const Backward& f, const Buffers<A>& b, const Pool& pool, int64_t n0, int64_t n1) {
  if (!f.channels_last) {
    parallel(pool, (n1 - n0) * f.c, at_least_one(kGrain / f.l), [&](int64_t begin, int64_t end) {
      for (int64_t row = n0 * f.c + begin; row < n0 * f.c + end; ++row) reduce_row<T>(f, b, row);
    });
    return;
  }
  const bool with_max = f.options.squeeze != Squeeze::kMean;
  const int64_t groups = position_groups(f), plane = f.n * groups * f.c;
  parallel(pool, (n1 - n0) * groups, at_least_one(kGrain * groups / (f.c * f.l)), [&](int64_t begin, int64_t end) {
    for (int64_t i = n0 * groups + begin; i < n0 * groups + end; ++i) {
      const int64_t group = i % groups;
      A* ds = b.partial + i * f.c;
      reduce_positions<T>(f, b, i / groups, f.l * group / groups, f.l * (group + 1) / groups, ds,
                          with_max ? ds + plane : nullptr, with_max ? ds + 2 * plane : nullptr);
    }
  });
  for (int64_t n = n0; n < n1; ++n) {
    lanes<A>(f.c, [&](int64_t c, auto type) {
      using V = decltype(type);
      V sum{}, max = splat<V>(-__builtin_huge_val()), ties{};
      for (int64_t i = n * groups; i < (n + 1) * groups; ++i) {
        const A* ds = b.partial + i * f.c + c;
        sum += load<V>(ds);
        if (with_max) merge_ties(load<V>(ds + plane), load<V>(ds + 2 * plane), max, ties);
      }
      store(b.dp2 + n * f.c + c, sum);
      if (!with_max) return;
      store(b.max + n * f.c + c, max);
      store(b.max_share + n * f.c + c, ties);
    });
  }
}

// From ds (in dp2) to the shares of dz, for samples [n0, n1).
template <class A>
void excite_backward(const Backward& f, const Buffers<A>& b, const Pool& pool, int64_t n0, int64_t n1) {
  const int64_t samples = n1 - n0, first = n0 * f.c, count = samples * f.c;
  chain(f.options.gate, f.options, static_cast<const A*>(f.p2) + first, b.dp2 + first, count);
  with_weight_type<A>(f.weight_dtype, [&](auto type) {
    using W = decltype(type);
    const auto* w1 = static_cast<const W*>(f.w1);
    const auto* w2 = static_cast<const W*>(f.w2);
    const int64_t grain = at_least_one(kGrain / (samples * f.c));
    if (f.r) {
      parallel(pool, f.r, grain, [&](int64_t r0, int64_t r1) {
        transposed_product(w2, b.dp2, b.dp1, f.c, f.r, n0, n1, r0, r1);
        for (int64_t n = n0; n < n1; ++n) {
          const int64_t i = n * f.r + r0;
          chain(f.options.act, f.options, static_cast<const A*>(f.p1) + i, b.dp1 + i, r1 - r0);
        }
      });
    }
    parallel(pool, f.c, at_least_one(kGrain / (samples * (f.r ? f.r : f.c))), [&](int64_t c0, int64_t c1) {
      if (f.r) {
        transposed_product(w1, b.dp1, b.mean_share, f.r, f.c, n0, n1, c0, c1);
      } else {
        transposed_product(w2, b.dp2, b.mean_share, f.c, f.c, n0, n1, c0, c1);
      }
    });
  });
  const auto half = f.options.squeeze == Squeeze::kMeanMax ? A(0.5) : A(1);
  for (int64_t i = first; i < first + count; ++i) {
    const A dz = half * b.mean_share[i];
    if (f.options.squeeze != Squeeze::kMean) b.max_share[i] = dz / b.max_share[i];
    b.mean_share[i] = f.options.squeeze == Squeeze::kMax ? A(0) : dz / static_cast<A>(f.l);
  }
}

// dx and dresidual along `count` elements from `offset`; per_channel(values, i): the values of the channels from i on.
template <class T, class PerChannel, class A = Accumulator<T>>
void distribute(const Backward& f, const Buffers<A>& b, int64_t offset, int64_t count, PerChannel&& per_channel) {
  const bool with_max = f.options.squeeze != Squeeze::kMean;
  alignas(64) A du[kBlock], raw[kBlock];
  for (int64_t done = 0; done < count; done += kBlock) {
    const int64_t n = count - done < kBlock ? count - done : kBlock;
    const auto s = per_channel(b.s, done), mean_share = per_channel(b.mean_share, done);
    const auto max = per_channel(with_max ? b.max : b.s, done),
               max_share = per_channel(with_max ? b.max_share : b.s, done);
    Span<T, A, std::remove_const_t<decltype(s)>> span(f, offset + done, n, s);
    const A* u = with_max || f.options.post_act != Activation::kIdentity ? span.u() : nullptr;
    const A* dv = span.dv(u);
    if (f.dresidual) {
      T* out = static_cast<T*>(f.dresidual) + offset + done;
      lanes<A>(n, [&](int64_t i, auto type) { store(out + i, load<decltype(type)>(dv + i)); });
    }
    if (!f.dx) continue;
    T* dx = static_cast<T*>(f.dx) + offset + done;
    auto write = [&](auto* out) {
      lanes<A>(n, [&](int64_t i, auto type) {
        using V = decltype(type);
        V d = load<V>(dv + i) * s.template at<V>(i) + mean_share.template at<V>(i);
        if (with_max) {
          // A NaN maximum makes the whole row NaN, as PyTorch's mask * dz / ties does: nothing equals it, so 0 / 0.
          const V share = max_share.template at<V>(i), m = max.template at<V>(i);
          d += select<V>(load<V>(u + i) == m, share, select<V>(m != m, m, V{}));
        }
        store(out + i, d);
      });
    };
    if (f.options.pre_act == Activation::kIdentity && !f.residual_is_x) {
      write(dx);
      continue;
    }
    write(du);
    const T* x = static_cast<const T*>(f.x) + offset + done;
    chain(f.options.pre_act, f.options, stage(x, n, Activation::kIdentity, f.options, raw), du, n);
    lanes<A>(n, [&](int64_t i, auto type) {
      using V = decltype(type);
      V d = load<V>(du + i);
      if (f.residual_is_x) d += load<V>(dv + i);
      store(dx + i, d);
    });
  }
}

template <class T, class A = Accumulator<T>>
void backward_group(const Backward& f, const Buffers<A>& b, const Pool& pool, int64_t n0, int64_t n1) {
  reduce<T>(f, b, pool, n0, n1);
  excite_backward<A>(f, b, pool, n0, n1);
  if (!f.dx && !f.dresidual) return;
  if (!f.channels_last) {
    parallel(pool, (n1 - n0) * f.c, at_least_one(kGrain / f.l), [&](int64_t begin, int64_t end) {
      for (int64_t row = n0 * f.c + begin; row < n0 * f.c + end; ++row) {
        distribute<T>(f, b, row * f.l, f.l, [row](const A* values, int64_t) { return AlongRow<A>{values[row]}; });
      }
    });
    return;
  }
  parallel(pool, (n1 - n0) * f.l, at_least_one(kGrain / f.c), [&](int64_t begin, int64_t end) {
    for (int64_t i = n0 * f.l + begin; i < n0 * f.l + end; ++i) {
      const int64_t channel = i / f.l * f.c;
      distribute<T>(f, b, i * f.c, f.c,
                    [channel](const A* values, int64_t c) { return AlongPosition<A>{values + channel + c}; });
    }
  });
}

// dw1, db1, dw2, db2: sums over the samples in their order.
template <class A>
void weight_gradients(const Backward& f, const Buffers<A>& b, const Pool& pool) {
  with_weight_type<A>(f.weight_dtype, [&](auto type) {
    using W = decltype(type);
    const A* hidden = f.r ? b.h : static_cast<const A*>(f.z);
    const int64_t depth = f.r ? f.r : f.c;
    if (f.dw2 || f.db2) {
      parallel(pool, f.c, at_least_one(kGrain / (f.n * depth)), [&](int64_t c0, int64_t c1) {
        outer_product(b.dp2, hidden, static_cast<W*>(f.dw2), static_cast<W*>(f.db2), f.n, f.c, depth, c0, c1);
      });
    }
    if (f.dw1 || f.db1) {
      parallel(pool, f.r, at_least_one(kGrain / (f.n * f.c)), [&](int64_t r0, int64_t r1) {
        outer_product(b.dp1, static_cast<const A*>(f.z), static_cast<W*>(f.dw1), static_cast<W*>(f.db1), f.n, f.r, f.c,
                      r0, r1);
      });
    }
  });
}

}  // namespace

size_t backward_scratch(const Backward& f) {
  Arena arena(nullptr);
  if (f.dtype == DType::kFloat64) {
    Buffers<double>(f, arena);
  } else {
    Buffers<float>(f, arena);
  }
  return arena.bytes();
}

void backward(const Backward& f, const Pool& pool, void* scratch) {
  with_map_type(f.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    Arena arena(scratch);
    const Buffers<A> b(f, arena);
    if (f.r) std::memcpy(b.h, f.p1, f.n * f.r * sizeof(A));
    activate(f.options.act, f.options, b.h, f.n * f.r);
    std::memcpy(b.s, f.p2, f.n * f.c * sizeof(A));
    activate(f.options.gate, f.options, b.s, f.n * f.c);
    for_each_group(f, pool, 2 * sizeof(T),
                   [&](const Pool& inner, int64_t n0, int64_t n1) { backward_group<T>(f, b, inner, n0, n1); });
    weight_gradients(f, b, pool);
  });
}

}  // namespace SE_CPU_ISA
}  // namespace se::cpu
