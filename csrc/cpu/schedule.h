// How a call is divided: its samples into groups, and the positions of a channels_last map into groups.
#pragma once

#include "team.h"

namespace se::cpu {
namespace {

// The sums of a channels_last map are taken over at most this many groups of positions, then over the groups. The
// grouping follows from the shape alone, so that the number of threads changes no bit.
constexpr int64_t kMaxGroups = 16;
constexpr int64_t kGroupElements = 32768;
inline int64_t position_groups(const Problem& p) {
  const int64_t groups = p.c * p.l / kGroupElements;
  return groups < 1 ? 1 : groups > kMaxGroups ? kMaxGroups : groups;
}

inline int64_t at_least_one(int64_t v) { return v < 1 ? 1 : v; }

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

}  // namespace
}  // namespace se::cpu
