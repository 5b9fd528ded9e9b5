// The two passes of backward over the maps: the reduction to ds, the gradient of the gates, and the computation of dx.
#pragma once

#include "operands.h"
#include "schedule.h"
#include "scratch.h"

namespace se::cpu {
namespace {

// Updates the maximum and its ties, the number of positions where u is the maximum, with one more position.
template <class V>
SE_INLINE void count_ties(V u, V& max, V& ties) {
  const V one = splat<V>(1);
  ties = select<V>((u > max) | (u != u), one, select<V>(u == max, ties + one, ties));
  max = max_keep_nan(max, u);
}
// Updates them with the maximum and the ties of other positions.
template <class V>
SE_INLINE void merge_ties(V other_max, V other_ties, V& max, V& ties) {
  const V sum = ties + other_ties;
  ties = select<V>(other_max > max, other_ties, select<V>(other_max == max, sum, ties));
  max = max_keep_nan(max, other_max);
}

template <class A>
struct BackwardBuffers {
  A *h, *s;            // [N, R], [N, C]
  A *dp2, *dp1;        // [N, C], [N, R]
  A* dz_per_position;  // [N, C]: dz / L, which is added at every position
  A* max;              // [N, C]: the maximum of u
  A* dz_per_maximum;   // [N, C]: dz / ties, which is added where u is the maximum; until dz is known, ties
  A* partial;          // channels_last: [N, splits, C] of ds, then of the maxima, then of ties
  BackwardBuffers(const Backward& f, Arena& arena) {
    h = arena.take<A>(f.n * f.r);
    s = arena.take<A>(f.n * f.c);
    dp2 = arena.take<A>(f.n * f.c);
    dp1 = arena.take<A>(f.n * f.r);
    dz_per_position = arena.take<A>(f.n * f.c);
    const int64_t maxima = f.options.squeeze == Squeeze::kMean ? 0 : f.n * f.c;
    max = arena.take<A>(maxima);
    dz_per_maximum = arena.take<A>(maxima);
    partial = arena.take<A>(f.channels_last ? (maxima ? 3 : 1) * f.n * position_splits(f) * f.c : 0);
  }
};

// A block of n <= kBlock elements of the maps: u and dv in the accumulation type.
template <class T, class A, class PerChannel>
struct Block {
  const Backward& f;
  int64_t offset, n;
  PerChannel s;
  alignas(64) A u_buffer[kBlock], dv_buffer[kBlock], v_buffer[kBlock];

  // There is a constructor because aggregate initialization would clear the buffers.
  Block(const Backward& f, int64_t offset, int64_t n, PerChannel s) : f(f), offset(offset), n(n), s(s) {}

  const A* u() {
    return load_activated(static_cast<const T*>(f.x) + offset, n, f.options.pre_act, f.options, u_buffer);
  }
  const A* dv(const A* u) {
    const T* g = static_cast<const T*>(f.g) + offset;
    const A* out = load_activated(g, n, Activation::kIdentity, f.options, dv_buffer);
    if (f.options.post_act == Activation::kIdentity) return out;
    const T* residual = f.residual ? static_cast<const T*>(f.residual) + offset : nullptr;
    for_each_vector<A>(n, [&](int64_t i, auto type) {
      using V = decltype(type);
      V v = load<V>(u + i) * s.template at<V>(i);
      if (residual) v += load<V>(residual + i);
      store(v_buffer + i, v);
      store(dv_buffer + i, load<V>(out + i));
    });
    apply_activation_backward(f.options.post_act, f.options, v_buffer, dv_buffer, n);
    return dv_buffer;
  }
};

// ds of one row and, if the squeeze has a maximum, its value and ties.
template <class T, class A = Accumulator<T>>
void reduce_row(const Backward& f, const BackwardBuffers<A>& b, int64_t row) {
  const bool with_max = f.options.squeeze != Squeeze::kMean;
  Reduction<A, false> ds;
  A max = -__builtin_huge_val(), ties = 0;
  for (int64_t l = 0; l < f.l; l += kBlock) {
    const int64_t n = f.l - l < kBlock ? f.l - l : kBlock;
    Block<T, A, ChannelBroadcast<A>> block(f, row * f.l + l, n, {b.s[row]});
    const A* u = block.u();
    const A* dv = block.dv(u);
    ds.add(n, [&](int64_t i, auto type) {
      using V = decltype(type);
      return load<V>(dv + i) * load<V>(u + i);
    });
    if (!with_max) continue;
    Vec<A> maxima = splat<Vec<A>>(-__builtin_huge_val()), counts{};
    for_each_vector<A>(n, [&](int64_t i, auto type) {
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
    b.dz_per_maximum[row] = ties;
  }
}

// As reduce_row, but over the positions [l0, l1) of sample n, for every channel.
template <class T, class A = Accumulator<T>>
void reduce_positions(const Backward& f, const BackwardBuffers<A>& b, int64_t n, int64_t l0, int64_t l1, A* ds, A* max,
                      A* ties) {
  for (int64_t c = 0; c < f.c; ++c) {
    ds[c] = 0;
    if (max) max[c] = -__builtin_huge_val(), ties[c] = 0;
  }
  for (int64_t l = l0; l < l1; ++l) {
    for (int64_t c = 0; c < f.c; c += kBlock) {
      const int64_t count = f.c - c < kBlock ? f.c - c : kBlock;
      Block<T, A, ChannelVector<A>> block(f, (n * f.l + l) * f.c + c, count, {b.s + n * f.c + c});
      const A* u = block.u();
      const A* dv = block.dv(u);
      for_each_vector<A>(count, [&](int64_t i, auto type) {
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

// dx and dresidual for the span of `count` elements at `offset`; per_channel(values, i) makes an operand of one value
// per channel, from element i of the span on.
template <class T, class PerChannel, class A = Accumulator<T>>
void backward_apply(const Backward& f, const BackwardBuffers<A>& b, int64_t offset, int64_t count,
                    PerChannel&& per_channel) {
  const bool with_max = f.options.squeeze != Squeeze::kMean;
  alignas(64) A du[kBlock], raw[kBlock];
  for (int64_t done = 0; done < count; done += kBlock) {
    const int64_t n = count - done < kBlock ? count - done : kBlock;
    const auto s = per_channel(b.s, done), dz_per_position = per_channel(b.dz_per_position, done);
    const auto max = per_channel(with_max ? b.max : b.s, done),
               dz_per_maximum = per_channel(with_max ? b.dz_per_maximum : b.s, done);
    Block<T, A, std::remove_const_t<decltype(s)>> block(f, offset + done, n, s);
    const A* u = with_max || f.options.post_act != Activation::kIdentity ? block.u() : nullptr;
    const A* dv = block.dv(u);
    if (f.dresidual) {
      T* out = static_cast<T*>(f.dresidual) + offset + done;
      for_each_vector<A>(n, [&](int64_t i, auto type) { store(out + i, load<decltype(type)>(dv + i)); });
    }
    if (!f.dx) continue;
    T* dx = static_cast<T*>(f.dx) + offset + done;
    auto write = [&](auto* out) {
      for_each_vector<A>(n, [&](int64_t i, auto type) {
        using V = decltype(type);
        V d = load<V>(dv + i) * s.template at<V>(i) + dz_per_position.template at<V>(i);
        if (with_max) {
          // A product, as in PyTorch: an infinite or NaN dz makes the other positions NaN.
          const V ties = select<V>(load<V>(u + i) == max.template at<V>(i), splat<V>(1), V{});
          d += ties * dz_per_maximum.template at<V>(i);
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
    apply_activation_backward(f.options.pre_act, f.options, load_activated(x, n, Activation::kIdentity, f.options, raw),
                              du, n);
    for_each_vector<A>(n, [&](int64_t i, auto type) {
      using V = decltype(type);
      V d = load<V>(du + i);
      if (f.residual_is_x) d += load<V>(dv + i);
      store(dx + i, d);
    });
  }
}

}  // namespace
}  // namespace se::cpu
