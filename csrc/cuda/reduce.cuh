// What:   an operation's Part over a share of the positions of each (sample, channel), for every share: partial results
//         [N, splits, C], which the consumer merges in their order.
// Grid:   rows: groups of 8, 32 or 256 threads, each along one share of a row of L positions.
//         positions: a block takes `lanes` vectors of channels, and every so many-th position of a share.
// Bytes:  what the operation loads, once, in accesses of V elements.
// Why:    a fixed share of positions for each thread and a fixed order of merging: two runs give the same bits.
//
// An operation has: kBlocks for __launch_bounds__, Part, empty(), merge(Part, Part), shuffle_xor(Part, offset),
// Context<V> context(n, c, step) for V channels from c on (step 0: one channel, V positions), add(at, context, Part
// (&)[V]) for V elements from `at` on, and store(n, split, c, Part).
#pragma once

#include "device.cuh"

namespace se::cuda {

// V independent parts a thread, so that their additions overlap.
template <int V, class Operation>
__global__ void __launch_bounds__(kThreads, Operation::kBlocks)
    reduce_rows(Operation op, int64_t rows, int64_t c, int64_t l, int lanes, unsigned splits) {
  using Part = typename Operation::Part;
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes, split = blockIdx.x % splits;
  const int64_t row = int64_t{blockIdx.x / splits} * (kThreads / lanes) + group;
  const bool exists = row < rows;
  Part parts[V];
#pragma unroll
  for (int i = 0; i < V; ++i) parts[i] = op.empty();
  if (exists) {
    const auto context = op.template context<V>(row / c, row % c, 0);
    const int64_t vectors = l / V, begin = vectors * split / splits, end = vectors * (split + 1) / splits;
    for (int64_t v = begin + lane; v < end; v += lanes) op.add(row * l + v * V, context, parts);
  }
  Part part = parts[0];
#pragma unroll
  for (int i = 1; i < V; ++i) part = op.merge(part, parts[i]);
  for (int offset = (lanes < kWarp ? lanes : kWarp) / 2; offset > 0; offset /= 2) {
    part = op.merge(part, op.shuffle_xor(part, offset));
  }
  if (lanes == kThreads) {
    Part* warps = shared_memory<Part>();
    if (lane % kWarp == 0) warps[lane / kWarp] = part;
    __syncthreads();
    part = warps[0];
    for (int i = 1; i < kWarps; ++i) part = op.merge(part, warps[i]);
  }
  if (exists && lane == 0) op.store(row / c, split, row % c, part);
}

template <int V, class Operation>
__global__ void __launch_bounds__(kThreads, Operation::kBlocks)
    reduce_positions(Operation op, int64_t c, int64_t l, int lanes, unsigned chunks, unsigned splits) {
  using Part = typename Operation::Part;
  const unsigned split = blockIdx.x % splits, chunk = blockIdx.x / splits % chunks;
  const int64_t n = blockIdx.x / splits / chunks;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes;
  const int64_t channel = (int64_t{chunk} * lanes + lane) * V;
  const bool exists = channel < c;  // then all V channels do, since V divides C
  Part parts[V];
#pragma unroll
  for (int i = 0; i < V; ++i) parts[i] = op.empty();
  if (exists) {
    const auto context = op.template context<V>(n, channel, 1);
    const int64_t begin = l * split / splits, end = l * (split + 1) / splits;
    for (int64_t at = begin + group; at < end; at += groups) op.add((n * l + at) * c + channel, context, parts);
  }
  Part* all = shared_memory<Part>();  // [groups][V][lanes]
#pragma unroll
  for (int i = 0; i < V; ++i) all[(group * V + i) * lanes + lane] = parts[i];
  __syncthreads();
  const int columns = V * lanes;
  for (int column = threadIdx.x; column < columns; column += kThreads) {
    Part part = all[column];
    for (int i = 1; i < groups; ++i) part = op.merge(part, all[i * columns + column]);
    const int64_t to = (int64_t{chunk} * lanes + column % lanes) * V + column / lanes;
    if (to < c) op.store(n, split, to, part);
  }
}

template <class T, class Operation>
void launch_reduction(const Plan& plan, const char* name, void* stream, const Operation& op) {
  const Call& call = plan.call;
  const Reduction& r = plan.reduction;
  if (call.channels_last) {
    with_width<T, false>(r.width, [&](auto width) {
      constexpr int V = decltype(width)::value;
      launch(plan, name, stream, reduce_positions<V, Operation>, op, call.c, call.l, r.lanes, r.chunks, r.splits);
    });
  } else {
    with_width<T, true>(r.width, [&](auto width) {
      constexpr int V = decltype(width)::value;
      launch(plan, name, stream, reduce_rows<V, Operation>, op, call.n * call.c, call.c, call.l, r.lanes, r.splits);
    });
  }
}

}  // namespace se::cuda
