// How the kernels walk maps: in spans of one row (contiguous) or one position (channels_last), a cache-sized block at a
// time.
#pragma once

#include "activations.h"
#include "team.h"

namespace se::cpu {
namespace {

// Elements of a span that are staged at once; three float buffers of it are 6 KB of the 32 KB first-level cache.
constexpr int64_t kBlock = 512;

// Work that is worth one more thread, in elements: 56448, of 1x72x28x28, take 7.4 us by two threads and 8.0 by one.
constexpr int64_t kGrain = 24576;

// The sums of a channels_last map are taken over at most this many groups of positions, then over the groups. The
// grouping follows from the shape alone, so that the number of threads changes no bit.
constexpr int64_t kMaxGroups = 16;
constexpr int64_t kGroupElements = 32768;
inline int64_t position_groups(const Problem& p) {
  const int64_t groups = p.c * p.l / kGroupElements;
  return groups < 1 ? 1 : groups > kMaxGroups ? kMaxGroups : groups;
}

// body(worker), run by as many workers as the work, in elements, is worth.
constexpr int kMaxWorkers = 64;
template <class Body>
void with_team(const Pool& pool, int64_t work, Body&& body) {
  int64_t workers = pool.threads < kMaxWorkers ? pool.threads : kMaxWorkers;
  if (work / kGrain < workers) workers = work / kGrain;
  if (workers <= 1) {
    Worker alone;
    return body(alone);
  }
  alignas(64) unsigned char memory[(kMaxWorkers + 1) * sizeof(Counter)];
  auto* counters = reinterpret_cast<Counter*>(memory);
  for (int64_t i = 0; i <= workers; ++i) new (counters + i) Counter;
  auto run = [&](int64_t index) {
    Worker worker(counters, static_cast<int>(workers), static_cast<int>(index));
    body(worker);
  };
  using Run = decltype(run);
  pool.run(workers, 1, [](void* context, int64_t begin, int64_t) { (*static_cast<Run*>(context))(begin); }, &run);
}

// How many samples share one pass over the weights: as many as it takes for the maps to outweigh them, at most
// kGroupBytes of maps (a thread's part of a shared cache), at least one.
constexpr int64_t kGroupBytes = 4 << 20;
inline int64_t samples_at_once(const Problem& p, int64_t element_bytes) {
  const int64_t map_bytes = at_least_one(p.c * p.l * element_bytes);
  const int64_t weight_bytes = 2 * p.c * (p.r ? p.r : p.c) * element_bytes;
  const int64_t wanted = divide_up(weight_bytes, map_bytes), fit = at_least_one(kGroupBytes / map_bytes);
  return wanted < fit ? at_least_one(wanted) : fit;
}

// body(worker, n0, n1) for groups of samples: each worker has its own groups where the samples divide well among them,
// else all workers share every group. The same body in both cases gives the same bits.
template <class Body>
void for_each_group(const Problem& p, Worker& worker, int64_t element_bytes, Body&& body) {
  const int64_t workers = worker.count();
  auto groups = [&](Worker& inner, int64_t begin, int64_t end, int64_t at_once) {
    for (int64_t n0 = begin; n0 < end; n0 += at_once) body(inner, n0, n0 + at_once < end ? n0 + at_once : end);
  };
  const int64_t at_once = samples_at_once(p, element_bytes);
  if (p.n % workers != 0 && p.n < 4 * workers) return groups(worker, 0, p.n, at_once);
  const int64_t own = divide_up(p.n, workers), even = divide_up(own, divide_up(own, at_once));
  worker.share(p.n, even, [&](int64_t begin, int64_t end) {
    Worker alone;
    groups(alone, begin, end, even);
  });
}

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

// body(T{}) with the element type of `dtype`; body(float{}) etc. for the maps, with A fixed for the weights.
template <class Body>
void with_map_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kFloat64: return body(double{});
    case DType::kFloat16: return body(Half{});
    case DType::kBFloat16: return body(BFloat16{});
  }
}
template <class A, class Body>
void with_weight_type(DType dtype, Body&& body) {
  if constexpr (std::is_same_v<A, double>) {
    body(double{});
  } else {
    switch (dtype) {
      case DType::kFloat16: return body(Half{});
      case DType::kBFloat16: return body(BFloat16{});
      default: return body(float{});
    }
  }
}

// Consecutive arrays in one piece of memory; with null memory it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class A>
  A* take(int64_t count) {
    A* out = reinterpret_cast<A*>(memory_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(A) + 63) / 64 * 64;
    return out;
  }
  // `given` where there is one, else a new array.
  template <class A>
  A* take_unless(void* given, int64_t count) {
    return given ? static_cast<A*>(given) : take<A>(count);
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

// What Buffers<A>(p, arena) take.
template <template <class> class Buffers, class P>
size_t scratch_bytes(const P& p) {
  Arena arena(nullptr);
  if (p.dtype == DType::kFloat64) {
    Buffers<double>(p, arena);
  } else {
    Buffers<float>(p, arena);
  }
  return arena.bytes();
}

}  // namespace
}  // namespace se::cpu
