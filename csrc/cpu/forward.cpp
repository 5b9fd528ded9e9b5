// What:   y = post_act(u * s + residual), the whole operation (se.h), for every dtype and both orders of the maps.
// How:    squeeze, excite and scale one group of samples at a time. Scale begins with the last sample, which is still
//         in cache, but takes its rows in ascending order: in descending order prefetching fails, and they cost 1.3 to
//         1.5 times as much at 16x1024x14x14.
// Bytes:  reads x from memory once if a group fits the cache, twice if not; writes y once; reads the weights once per
//         group.
// Tried:  for in-place calls at 16x96x112x112 and 16x256x56x56, where a bare multiplication takes 0.70 to 0.82 of the
//         time: dividing each sample among the threads (1.05 and 1.16 times the time), and prefetching the next sample
//         while one is scaled (1.03 to 1.07).
#include "dispatch.h"
#include "gemv.h"
#include "operands.h"
#include "schedule.h"
#include "scratch.h"

namespace se::cpu {
namespace SE_CPU_ISA {
namespace {

template <class A>
struct Buffers {
  A *z, *p1, *p2;    // saved for backward, or scratch
  A *h, *s;          // [N, R], [N, C]
  A *sums, *maxima;  // channels_last: [N, splits, C], each only if `squeeze` needs it
  Buffers(const BlockForward& f, Arena& arena) {
    z = arena.take_unless<A>(f.z, f.n * f.c);
    p1 = arena.take_unless<A>(f.p1, f.n * f.r);
    p2 = arena.take_unless<A>(f.p2, f.n * f.c);
    h = arena.take<A>(f.n * f.r);
    s = arena.take_unless<A>(f.s, f.n * f.c);
    const int64_t partial = f.channels_last ? f.n * position_splits(f) * f.c : 0;
    sums = arena.take<A>(f.options.squeeze == Squeeze::kMax ? 0 : partial);
    maxima = arena.take<A>(f.options.squeeze == Squeeze::kMean ? 0 : partial);
  }
};

template <class V>
SE_INLINE V squeezed(Squeeze squeeze, V sum, V max, int64_t l) {
  const auto count = static_cast<typename Traits<V>::Element>(l);
  if (squeeze == Squeeze::kMean) return sum / count;
  return squeeze == Squeeze::kMax ? max : (sum / count + max) / 2;
}

// Whether squeeze writes u over y, where scale reads it: if u is asked for, or would be computed twice. A residual that
// is y must stay as it is, and u in half precision would be rounded.
inline bool writes_u(const BlockForward& f) {
  const bool is_exact = element_bytes(f.dtype) == accumulator_bytes(f.dtype);
  return f.s || (f.scale && f.options.pre_act != Activation::kIdentity && is_exact && f.residual != f.y);
}

inline bool u_is_x(const BlockForward& f) { return !f.scale && f.options.pre_act == Activation::kIdentity; }

// scale and shift along a span of the map: a Channel is ChannelBroadcast or ChannelVector.
template <class Channel>
struct Affine {
  Channel scale, shift;
  bool given;
  template <Activation kPreAct, class V, class T>
  SE_INLINE V u(const T* x, int64_t i, const Options& o) const {
    V v = load<V>(x + i);
    if (given) v = multiply_add(v, scale.template at<V>(i), shift.template at<V>(i));
    return activation_forward<kPreAct>(v, o);
  }
};
template <class A>
SE_INLINE Affine<ChannelBroadcast<A>> affine_of_channel(const BlockForward& f, int64_t c) {
  if (!f.scale) return {{A{}}, {A{}}, false};
  return {{static_cast<const A*>(f.scale)[c]}, {static_cast<const A*>(f.shift)[c]}, true};
}
// From channel c on.
template <class A>
SE_INLINE Affine<ChannelVector<A>> affine_from_channel(const BlockForward& f, int64_t c) {
  if (!f.scale) return {{nullptr}, {nullptr}, false};
  return {{static_cast<const A*>(f.scale) + c}, {static_cast<const A*>(f.shift) + c}, true};
}

// z of the rows [begin, end).
template <class T, class A = Accumulator<T>>
void squeeze_rows(const BlockForward& f, const T* x, A* z, int64_t begin, int64_t end) {
  T* const y = writes_u(f) ? static_cast<T*>(f.y) : nullptr;
  if (u_is_x(f) && !y && f.options.squeeze == Squeeze::kMean) {
    for (int64_t row = begin; row < end; ++row) {
      Reduction<A, false> sum;
      sum.add(f.l, [&](int64_t i, auto type) { return load<decltype(type)>(x + row * f.l + i); });
      z[row] = sum.result() / static_cast<A>(f.l);
    }
    return;
  }
  with_activation(f.options.pre_act, [&](auto tag) {
    for (int64_t row = begin; row < end; ++row) {
      const auto affine = affine_of_channel<A>(f, row % f.c);
      const T* const from = x + row * f.l;
      T* const to = y ? y + row * f.l : nullptr;
      auto compute = [&](int64_t i, auto type) {
        const auto u = affine.template u<decltype(tag)::kValue, decltype(type)>(from, i, f.options);
        if (to) store(to + i, u);
        return u;
      };
      Reduction<A, false> sum;
      Reduction<A, true> max;
      if (f.options.squeeze == Squeeze::kMean) {
        sum.add(f.l, compute);
      } else if (f.options.squeeze == Squeeze::kMax) {
        max.add(f.l, compute);
      } else {
        alignas(64) A buffer[kBlock];  // because x is read once, and may be overwritten by u
        for (int64_t l = 0; l < f.l; l += kBlock) {
          const int64_t n = f.l - l < kBlock ? f.l - l : kBlock;
          auto load_u = [&](int64_t i, auto type) { return load<decltype(type)>(buffer + i); };
          for_each_vector<A>(n, [&](int64_t i, auto type) { store(buffer + i, compute(l + i, type)); });
          sum.add(n, load_u);
          max.add(n, load_u);
        }
      }
      z[row] = squeezed(f.options.squeeze, sum.result(), max.result(), f.l);
    }
  });
}

// Sums and maxima over the positions [l0, l1) of one sample, for channels [c0, c1).
template <class T, class A = Accumulator<T>>
void squeeze_positions(const BlockForward& f, const T* sample, int64_t l0, int64_t l1, int64_t c0, int64_t c1, A* sums,
                       A* maxima) {
  const bool sum = f.options.squeeze != Squeeze::kMax, max = f.options.squeeze != Squeeze::kMean;
  for (int64_t c = c0; c < c1; ++c) {
    if (sum) sums[c] = 0;
    if (max) maxima[c] = -__builtin_huge_val();
  }
  const auto affine = affine_from_channel<A>(f, c0);
  if (u_is_x(f) && !writes_u(f) && !max) {
    for (int64_t l = l0; l < l1; ++l) {
      const T* const from = sample + l * f.c;
      for_each_vector<A>(c1 - c0, [&](int64_t i, auto type) {
        using V = decltype(type);
        store(sums + c0 + i, load<V>(sums + c0 + i) + load<V>(from + c0 + i));
      });
    }
    return;
  }
  T* const y = writes_u(f) ? static_cast<T*>(f.y) + (sample - static_cast<const T*>(f.x)) : nullptr;
  with_activation(f.options.pre_act, [&](auto tag) {
    for (int64_t l = l0; l < l1; ++l) {
      const T* const from = sample + l * f.c + c0;
      T* const to = y ? y + l * f.c + c0 : nullptr;
      for_each_vector<A>(c1 - c0, [&](int64_t i, auto type) {
        using V = decltype(type);
        const V u = affine.template u<decltype(tag)::kValue, V>(from, i, f.options);
        if (to) store(to + i, u);
        if (sum) store(sums + c0 + i, load<V>(sums + c0 + i) + u);
        if (max) store(maxima + c0 + i, max_keep_nan(load<V>(maxima + c0 + i), u));
      });
    }
  });
}

// y of the span of `count` elements at `offset`: one channel (contiguous) or one position (channels_last). s and affine
// are the span's operands. plain: y = x * s, the most frequent form, has its own loop: a row of 7 x 7 elements takes
// less time in it than the general loops need to start.
template <class T, class Channel, class A = Accumulator<T>>
SE_INLINE void scale(const BlockForward& f, bool plain, int64_t offset, int64_t count, const Channel& s,
                     const Affine<Channel>& affine) {
  const T* x = static_cast<const T*>(f.x) + offset;
  T* y = static_cast<T*>(f.y) + offset;
  if (plain) {
    return for_each_vector<A>(count, [&](int64_t i, auto type) {
      using V = decltype(type);
      store(y + i, load<V>(x + i) * s.template at<V>(i));
    });
  }
  const T* residual = f.residual ? static_cast<const T*>(f.residual) + offset : nullptr;
  const Options& o = f.options;
  auto add_residual_and_activate = [&](int64_t i, auto tag, auto v) {
    if (residual) v += load<decltype(v)>(residual + i);
    store(y + i, activation_forward<decltype(tag)::kValue>(v, o));
  };
  if (o.pre_act == Activation::kIdentity) {
    return with_activation(o.post_act, [&](auto tag) {
      for_each_vector<A>(count, [&](int64_t i, auto type) {
        using V = decltype(type);
        const V u = affine.template u<Activation::kIdentity, V>(x, i, o);
        add_residual_and_activate(i, tag, u * s.template at<V>(i));
      });
    });
  }
  alignas(64) A v[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = count - begin < kBlock ? count - begin : kBlock;
    with_activation(o.pre_act, [&](auto tag) {
      for_each_vector<A>(n, [&](int64_t i, auto type) {
        using V = decltype(type);
        const V u = affine.template u<decltype(tag)::kValue, V>(x, begin + i, o);
        store(v + i, u * s.template at<V>(begin + i));
      });
    });
    with_activation(o.post_act, [&](auto tag) {
      for_each_vector<A>(
          n, [&](int64_t i, auto type) { add_residual_and_activate(begin + i, tag, load<decltype(type)>(v + i)); });
    });
  }
}

// z for samples [n0, n1).
template <class T, class A = Accumulator<T>>
void squeeze(const BlockForward& f, const Buffers<A>& b, ThreadGroup& threads, int64_t n0, int64_t n1) {
  const T* x = static_cast<const T*>(f.x);
  if (!f.channels_last) {
    // Divided by channels, as in forward_samples, so that a thread scales the rows that it has squeezed.
    threads.parallel_for(f.c, kRowBlock<A>, [&](int64_t c0, int64_t c1) {
      for (int64_t n = n0; n < n1; ++n) squeeze_rows(f, x, b.z, n * f.c + c0, n * f.c + c1);
    });
    return;
  }
  // Reading whole positions is faster than reading parts of them: 0.81 of the time at 16x1024x14x14.
  const int64_t splits = position_splits(f), ranges = (n1 - n0) * splits;
  const int64_t blocks = ranges < threads.size() ? divide_up(f.c, kBlock) : 1, width = blocks > 1 ? kBlock : f.c;
  threads.parallel_for(ranges * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t range = n0 * splits + i / blocks, n = range / splits, split = range % splits;
      const int64_t c0 = i % blocks * width, c1 = c0 + width < f.c ? c0 + width : f.c;
      squeeze_positions(f, x + n * f.c * f.l, f.l * split / splits, f.l * (split + 1) / splits, c0, c1,
                        b.sums + range * f.c, b.maxima + range * f.c);
    }
  });
  threads.parallel_for(f.c, kBlock, [&](int64_t c0, int64_t c1) {
    for (int64_t n = n0; n < n1; ++n) {
      for_each_vector<A>(c1 - c0, [&](int64_t j, auto type) {
        using V = decltype(type);
        V sum{}, max = splat<V>(-__builtin_huge_val());
        for (int64_t i = n * splits; i < (n + 1) * splits; ++i) {
          if (f.options.squeeze != Squeeze::kMax) sum += load<V>(b.sums + i * f.c + c0 + j);
          if (f.options.squeeze != Squeeze::kMean) max = max_keep_nan(max, load<V>(b.maxima + i * f.c + c0 + j));
        }
        store(b.z + n * f.c + c0 + j, squeezed(f.options.squeeze, sum, max, f.l));
      });
    }
  });
}

// p1 and h for the rows [r0, r1) of the first layer.
template <class A>
void excite_hidden(const BlockForward& f, const Buffers<A>& b, int64_t n0, int64_t n1, int64_t r0, int64_t r1) {
  with_weight_type<A>(f.weight_dtype, [&](auto type) {
    using W = decltype(type);
    gemv(static_cast<const W*>(f.w1), static_cast<const W*>(f.b1), b.z, b.p1, f.r, f.c, n0, n1, r0, r1);
  });
  for (int64_t n = n0; n < n1; ++n) {
    std::memcpy(b.h + n * f.r + r0, b.p1 + n * f.r + r0, (r1 - r0) * sizeof(A));
    apply_activation(f.options.act, f.options, b.h + n * f.r + r0, r1 - r0);
  }
}

// p2 and s for channels [c0, c1).
template <class A>
void excite_gate(const BlockForward& f, const Buffers<A>& b, int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
  with_weight_type<A>(f.weight_dtype, [&](auto type) {
    using W = decltype(type);
    gemv(static_cast<const W*>(f.w2), static_cast<const W*>(f.b2), f.r ? b.h : b.z, b.p2, f.c, f.r ? f.r : f.c, n0, n1,
         c0, c1);
  });
  for (int64_t n = n0; n < n1; ++n) {
    std::memcpy(b.s + n * f.c + c0, b.p2 + n * f.c + c0, (c1 - c0) * sizeof(A));
    apply_activation(f.options.gate, f.options, b.s + n * f.c + c0, c1 - c0);
  }
}

// What is left after squeeze has written u over y: a call that reads u there.
inline BlockForward from_u(BlockForward f) {
  f.x = f.y;
  f.scale = f.shift = nullptr;
  f.options.pre_act = Activation::kIdentity;
  return f;
}

template <class T, class A = Accumulator<T>>
void forward_samples(const BlockForward& given, const Buffers<A>& b, ThreadGroup& threads, int64_t n0, int64_t n1) {
  squeeze<T>(given, b, threads, n0, n1);
  const BlockForward f = writes_u(given) ? from_u(given) : given;
  const bool plain = u_is_x(f) && f.options.post_act == Activation::kIdentity && !f.residual;
  threads.parallel_for(f.r, kRowBlock<A>, [&](int64_t r0, int64_t r1) { excite_hidden(f, b, n0, n1, r0, r1); });
  if (!f.channels_last) {
    threads.parallel_for(f.c, kRowBlock<A>, [&](int64_t c0, int64_t c1) {
      excite_gate(f, b, n0, n1, c0, c1);
      for (int64_t n = f.s ? n0 - 1 : n1 - 1; n >= n0; --n) {
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t row = n * f.c + c;
          scale<T>(f, plain, row * f.l, f.l, ChannelBroadcast<A>{b.s[row]}, affine_of_channel<A>(f, c));
        }
      }
    });
    return;
  }
  threads.parallel_for(f.c, kRowBlock<A>, [&](int64_t c0, int64_t c1) { excite_gate(f, b, n0, n1, c0, c1); });
  if (f.s) return;
  threads.parallel_for((n1 - n0) * f.l, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = n0 * f.l + begin; i < n0 * f.l + end; ++i) {
      scale<T>(f, plain, i * f.c, f.c, ChannelVector<A>{b.s + i / f.l * f.c}, affine_from_channel<A>(f, 0));
    }
  });
}

}  // namespace

size_t forward_scratch(const BlockForward& f) { return scratch_bytes<Buffers>(f); }

void forward(const BlockForward& f, const Pool& pool, void* scratch) {
  with_map_type(f.dtype, [&](auto type) {
    using T = decltype(type);
    Arena arena(scratch);
    const Buffers<Accumulator<T>> buffers(f, arena);
    parallel_region(pool, f.n * f.c * (f.l + 2 * f.r), [&](ThreadGroup& all) {
      for_each_sample_group(f, all, sizeof(T), [&](ThreadGroup& threads, int64_t n0, int64_t n1) {
        forward_samples<T>(f, buffers, threads, n0, n1);
      });
    });
  });
}

}  // namespace SE_CPU_ISA
}  // namespace se::cpu
