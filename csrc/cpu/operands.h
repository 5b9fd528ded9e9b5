// The operands of the loops over maps. A loop runs along a span: one row of a contiguous map, or one position of a
// channels_last map, in blocks that stay in the first-level cache.
#pragma once

#include "activations.h"

namespace se::cpu {
namespace {

// Elements of a block. Three float buffers of this size take 6 KB of a 32 KB first-level cache.
constexpr int64_t kBlock = 512;

// A block as accumulation type after `activation`: the map's own memory if nothing has to be computed, else `buffer`.
template <class T, class A>
SE_INLINE const A* load_activated(const T* block, int64_t n, Activation activation, const Options& o, A* buffer) {
  if constexpr (std::is_same_v<T, A>) {
    if (activation == Activation::kIdentity) return block;
  }
  for_each_vector<A>(n, [&](int64_t i, auto type) { store(buffer + i, load<decltype(type)>(block + i)); });
  apply_activation(activation, o, buffer, n);
  return buffer;
}

// A per-channel operand along a span: along a row (contiguous) every element has the same channel, so its value is
// broadcast; along a position (channels_last) the elements are the channels, so their values are loaded.
template <class A>
struct ChannelBroadcast {
  A value;
  template <class V>
  SE_INLINE V at(int64_t) const {
    return splat<V>(value);
  }
};
template <class A>
struct ChannelVector {
  const A* values;
  template <class V>
  SE_INLINE V at(int64_t i) const {
    return load<V>(values + i);
  }
};

}  // namespace
}  // namespace se::cpu
