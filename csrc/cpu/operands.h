// The operands of the loops over maps: spans of one row (contiguous) or one position (channels_last).
#pragma once

#include "activations.h"

namespace se::cpu {
namespace {

// Elements of a span that are staged at once; three float buffers of it are 6 KB of the 32 KB first-level cache.
constexpr int64_t kBlock = 512;

// The span as accumulation type after `activation`: the map's own memory where nothing has to be done, else `buffer`.
template <class T, class A>
SE_INLINE const A* stage(const T* span, int64_t n, Activation activation, const Options& o, A* buffer) {
  if constexpr (std::is_same_v<T, A>) {
    if (activation == Activation::kIdentity) return span;
  }
  lanes<A>(n, [&](int64_t i, auto type) { store(buffer + i, load<decltype(type)>(span + i)); });
  activate(activation, o, buffer, n);
  return buffer;
}

// A value for each channel, read along a span: the same value all along a row (contiguous), another one for each
// element of a position (channels_last).
template <class A>
struct AlongRow {
  A value;
  template <class V>
  SE_INLINE V at(int64_t) const {
    return splat<V>(value);
  }
};
template <class A>
struct AlongPosition {
  const A* values;
  template <class V>
  SE_INLINE V at(int64_t i) const {
    return load<V>(values + i);
  }
};

}  // namespace
}  // namespace se::cpu
