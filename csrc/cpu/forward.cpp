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
  Buffers(const Forward& f, Arena& arena) {
    z = arena.take_unless<A>(f.z, f.n * f.c);
    p1 = arena.take_unless<A>(f.p1, f.n * f.r);
    p2 = arena.take_unless<A>(f.p2, f.n * f.c);
    h = arena.take<A>(f.n * f.r);
    s = arena.take<A>(f.n * f.c);
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

// z of one row of L positions.
template <class T, class A = Accumulator<T>>
A squeeze_row(const Forward& f, const T* row) {
  alignas(64) A buffer[kBlock];
  Reduction<A, false> sum;
  Reduction<A, true> max;
  for (int64_t l = 0; l < f.l; l += kBlock) {
    const int64_t n = f.l - l < kBlock ? f.l - l : kBlock;
    const A* u = load_activated(row + l, n, f.options.pre_act, f.options, buffer);
    auto at = [&](int64_t i, auto type) { return load<decltype(type)>(u + i); };
    if (f.options.squeeze != Squeeze::kMax) sum.add(n, at);
    if (f.options.squeeze != Squeeze::kMean) max.add(n, at);
  }
  return squeezed(f.options.squeeze, sum.result(), max.result(), f.l);
}

// z of the rows [begin, end).
template <class T, class A = Accumulator<T>>
void squeeze_rows(const Forward& f, const T* x, A* z, int64_t begin, int64_t end) {
  if (f.options.pre_act != Activation::kIdentity || f.options.squeeze != Squeeze::kMean) {
    for (int64_t row = begin; row < end; ++row) z[row] = squeeze_row(f, x + row * f.l);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    Reduction<A, false> sum;
    sum.add(f.l, [&](int64_t i, auto type) { return load<decltype(type)>(x + row * f.l + i); });
    z[row] = sum.result() / static_cast<A>(f.l);
  }
}

// Sums and maxima over the positions [l0, l1) of one sample, for channels [c0, c1).
template <class T, class A = Accumulator<T>>
void squeeze_positions(const Forward& f, const T* sample, int64_t l0, int64_t l1, int64_t c0, int64_t c1, A* sums,
                       A* maxima) {
  alignas(64) A buffer[kBlock];
  const bool sum = f.options.squeeze != Squeeze::kMax, max = f.options.squeeze != Squeeze::kMean;
  for (int64_t c = c0; c < c1; ++c) {
    if (sum) sums[c] = 0;
    if (max) maxima[c] = -__builtin_huge_val();
  }
  for (int64_t l = l0; l < l1; ++l) {
    for (int64_t c = c0; c < c1; c += kBlock) {
      const int64_t n = c1 - c < kBlock ? c1 - c : kBlock;
      const T* span = sample + l * f.c + c;
      if (f.options.pre_act == Activation::kIdentity && !max) {
        for_each_vector<A>(n, [&](int64_t i, auto type) {
          using V = decltype(type);
          store(sums + c + i, load<V>(sums + c + i) + load<V>(span + i));
        });
        continue;
      }
      const A* u = load_activated(span, n, f.options.pre_act, f.options, buffer);
      for_each_vector<A>(n, [&](int64_t i, auto type) {
        using V = decltype(type);
        if (sum) store(sums + c + i, load<V>(sums + c + i) + load<V>(u + i));
        if (max) store(maxima + c + i, max_keep_nan(load<V>(maxima + c + i), load<V>(u + i)));
      });
    }
  }
}

// y for one block of n <= kBlock elements; `residual` may be null.
template <class T, class Gate, class A = Accumulator<T>>
void scale_block(const Options& o, const T* x, const T* residual, Gate s, int64_t n, T* y) {
  alignas(64) A buffer[kBlock], v[kBlock];
  const A* u = load_activated(x, n, o.pre_act, o, buffer);
  for_each_vector<A>(n, [&](int64_t i, auto type) {
    using V = decltype(type);
    V sum = load<V>(u + i) * s.template at<V>(i);
    if (residual) sum += load<V>(residual + i);
    store(v + i, sum);
  });
  apply_activation(o.post_act, o, v, n);
  for_each_vector<A>(n, [&](int64_t i, auto type) { store(y + i, load<decltype(type)>(v + i)); });
}

// y for the span of `count` elements at `offset`; gate(i) is the gate's operand from element i of the span on. The most
// frequent form, y = x * s, has its own loop: a row of 7 x 7 elements takes less time in it than the general loop needs
// to start.
template <class T, class Gate, class A = Accumulator<T>>
SE_INLINE void scale(const Forward& f, bool plain, int64_t offset, int64_t count, Gate&& gate) {
  const T* x = static_cast<const T*>(f.x) + offset;
  T* y = static_cast<T*>(f.y) + offset;
  if (plain) {
    const auto s = gate(0);
    return for_each_vector<A>(count, [&](int64_t i, auto type) {
      using V = decltype(type);
      store(y + i, load<V>(x + i) * s.template at<V>(i));
    });
  }
  const T* residual = f.residual ? static_cast<const T*>(f.residual) + offset : nullptr;
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t n = count - i < kBlock ? count - i : kBlock;
    scale_block(f.options, x + i, residual ? residual + i : nullptr, gate(i), n, y + i);
  }
}

// z for samples [n0, n1).
template <class T, class A = Accumulator<T>>
void squeeze(const Forward& f, const Buffers<A>& b, ThreadGroup& threads, int64_t n0, int64_t n1) {
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
void excite_hidden(const Forward& f, const Buffers<A>& b, int64_t n0, int64_t n1, int64_t r0, int64_t r1) {
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
void excite_gate(const Forward& f, const Buffers<A>& b, int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
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

template <class T, class A = Accumulator<T>>
void forward_samples(const Forward& f, const Buffers<A>& b, ThreadGroup& threads, int64_t n0, int64_t n1) {
  const bool plain =
      f.options.pre_act == Activation::kIdentity && f.options.post_act == Activation::kIdentity && !f.residual;
  squeeze<T>(f, b, threads, n0, n1);
  threads.parallel_for(f.r, kRowBlock<A>, [&](int64_t r0, int64_t r1) { excite_hidden(f, b, n0, n1, r0, r1); });
  if (!f.channels_last) {
    threads.parallel_for(f.c, kRowBlock<A>, [&](int64_t c0, int64_t c1) {
      excite_gate(f, b, n0, n1, c0, c1);
      for (int64_t n = n1 - 1; n >= n0; --n) {
        for (int64_t row = n * f.c + c0; row < n * f.c + c1; ++row) {
          scale<T>(f, plain, row * f.l, f.l, [&](int64_t) { return ChannelBroadcast<A>{b.s[row]}; });
        }
      }
    });
    return;
  }
  threads.parallel_for(f.c, kRowBlock<A>, [&](int64_t c0, int64_t c1) { excite_gate(f, b, n0, n1, c0, c1); });
  threads.parallel_for((n1 - n0) * f.l, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = n0 * f.l + begin; i < n0 * f.l + end; ++i) {
      const A* s = b.s + i / f.l * f.c;
      scale<T>(f, plain, i * f.c, f.c, [&](int64_t c) { return ChannelVector<A>{s + c}; });
    }
  });
}

}  // namespace

size_t forward_scratch(const Forward& f) { return scratch_bytes<Buffers>(f); }

void forward(const Forward& f, const Pool& pool, void* scratch) {
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
