// What:   y = act(scale * x + shift + residual), an eval-mode BatchNorm and what follows it (se.h), for every dtype and
//         both orders of the maps.
// How:    one pass along rows (contiguous) or positions (channels_last).
// Bytes:  reads x and the residual once, writes y once.
#include "dispatch.h"
#include "operands.h"
#include "thread_group.h"

namespace se::cpu {
namespace SE_CPU_ISA {
namespace {

// y of the span of `count` elements at `offset`: one row or one position.
template <Activation kAct, class T, class Channel, class A = Accumulator<T>>
SE_INLINE void normalise(const BatchNorm& f, int64_t offset, int64_t count, const Channel& scale,
                         const Channel& shift) {
  const T* const x = static_cast<const T*>(f.x) + offset;
  const T* const residual = f.residual ? static_cast<const T*>(f.residual) + offset : nullptr;
  T* const y = static_cast<T*>(f.y) + offset;
  for_each_vector<A>(count, [&](int64_t i, auto type) {
    using V = decltype(type);
    V v = multiply_add(load<V>(x + i), scale.template at<V>(i), shift.template at<V>(i));
    if (residual) v += load<V>(residual + i);
    store(y + i, activation_forward<kAct>(v, Options{}));
  });
}

template <class T, class A = Accumulator<T>>
void normalise_spans(const BatchNorm& f, int64_t begin, int64_t end) {
  const A *scale = static_cast<const A*>(f.scale), *shift = static_cast<const A*>(f.shift);
  with_activation(f.act, [&](auto tag) {
    constexpr Activation kAct = decltype(tag)::kValue;
    for (int64_t i = begin; i < end; ++i) {
      if (f.channels_last) {
        normalise<kAct, T>(f, i * f.c, f.c, ChannelVector<A>{scale}, ChannelVector<A>{shift});
      } else {
        const int64_t c = i % f.c;
        normalise<kAct, T>(f, i * f.l, f.l, ChannelBroadcast<A>{scale[c]}, ChannelBroadcast<A>{shift[c]});
      }
    }
  });
}

}  // namespace

void batch_norm(const BatchNorm& f, const Pool& pool) {
  with_map_type(f.dtype, [&](auto type) {
    parallel_region(pool, f.n * f.c * f.l, [&](ThreadGroup& threads) {
      threads.parallel_for(f.n * (f.channels_last ? f.l : f.c), 1,
                           [&](int64_t begin, int64_t end) { normalise_spans<decltype(type)>(f, begin, end); });
    });
  });
}

}  // namespace SE_CPU_ISA
}  // namespace se::cpu
