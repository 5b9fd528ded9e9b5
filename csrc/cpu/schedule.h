// How a call is divided: its samples into groups, and the positions of a channels_last map into splits.
#pragma once

#include "thread_group.h"

namespace se::cpu {
namespace {

// A sum over the positions of a channels_last map is first taken over each of at most kMaxSplits ranges of positions,
// then over the ranges. Their number depends on the shape alone, so the number of threads does not change the result.
constexpr int64_t kMaxSplits = 16;
constexpr int64_t kSplitElements = 32768;
inline int64_t position_splits(const Problem& p) {
  const int64_t splits = p.c * p.l / kSplitElements;
  return splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : splits;
}

inline int64_t at_least_one(int64_t v) { return v < 1 ? 1 : v; }

// The weights are read once for each group of samples. A group has as many samples as it takes for their maps to be
// larger than the weights, but at most kGroupBytes of maps (one thread's part of a shared cache), and at least one.
constexpr int64_t kGroupBytes = 4 << 20;
inline int64_t samples_per_group(const Problem& p, int64_t element_bytes) {
  const int64_t map_bytes = at_least_one(p.c * p.l * element_bytes);
  const int64_t weight_bytes = 2 * p.c * (p.r ? p.r : p.c) * element_bytes;
  const int64_t wanted = divide_up(weight_bytes, map_bytes), fit = at_least_one(kGroupBytes / map_bytes);
  return wanted < fit ? at_least_one(wanted) : fit;
}

// body(threads, n0, n1) for each group of samples [n0, n1). If the samples divide well among the threads, each thread
// computes its own sample groups alone; otherwise all threads work on every sample group. Both give the same bits,
// because the body is the same.
template <class Body>
void for_each_sample_group(const Problem& p, ThreadGroup& threads, int64_t element_bytes, Body&& body) {
  const int64_t count = threads.size();
  auto groups = [&](ThreadGroup& inner, int64_t begin, int64_t end, int64_t samples) {
    for (int64_t n0 = begin; n0 < end; n0 += samples) body(inner, n0, n0 + samples < end ? n0 + samples : end);
  };
  const int64_t samples = samples_per_group(p, element_bytes);
  if (p.n % count != 0 && p.n < 4 * count) return groups(threads, 0, p.n, samples);
  const int64_t own = divide_up(p.n, count), even = divide_up(own, divide_up(own, samples));
  threads.parallel_for(p.n, even, [&](int64_t begin, int64_t end) {
    ThreadGroup single;
    groups(single, begin, end, even);
  });
}

}  // namespace
}  // namespace se::cpu
