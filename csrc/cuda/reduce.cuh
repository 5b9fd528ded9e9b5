// What:   an operation's Part over positions of one channel, by a fixed share for each thread and a fixed order of
//         merging, so that two runs give the same bits: inside a block, and as kernels that leave partial results
//         [N, splits, C], which the consumer merges in their order.
// Grid:   rows: groups of 8, 32 or 256 threads, each along one share of a row of L positions.
//         positions: a block takes `lanes` vectors of channels, and every so many-th position of a share.
// Bytes:  what the operation loads, once, in accesses of V elements.
//
// An operation has: kBlocks for __launch_bounds__, Part, empty(), merge(Part, Part), shuffle_xor(Part, offset),
// Context<V> context(n, c, step) for V channels from c on (step 0: one channel, V positions) and add(at, context, Part
// (&)[V]) for V elements from `at` on in the map; for the kernels also store(n, split, c, Part).
#pragma once

#include "device.cuh"

namespace se::cuda {

// Over the accesses [begin, end) of row `row` of the map, by a group of `lanes` threads: complete in the group's first.
// V independent parts a thread, so that their additions overlap. Shared memory: warps [kWarps].
template <int V, class Operation, class Part = typename Operation::Part>
__device__ Part reduce_row(const Operation& op, bool exists, int64_t row, int64_t c, int64_t l, int64_t begin,
                           int64_t end, int lanes, Part* warps) {
  const int lane = threadIdx.x % lanes;
  Part parts[V];
#pragma unroll
  for (int i = 0; i < V; ++i) parts[i] = op.empty();
  if (exists) {
    const auto context = op.template context<V>(row / c, row % c, 0);
    for (int64_t v = begin + lane; v < end; v += lanes) op.add(row * l + v * V, context, parts);
  }
  Part part = parts[0];
#pragma unroll
  for (int i = 1; i < V; ++i) part = op.merge(part, parts[i]);
  for (int offset = (lanes < kWarp ? lanes : kWarp) / 2; offset > 0; offset /= 2) {
    part = op.merge(part, op.shuffle_xor(part, offset));
  }
  if (lanes == kThreads) {
    if (lane % kWarp == 0) warps[lane / kWarp] = part;
    __syncthreads();
    part = warps[0];
    for (int i = 1; i < kWarps; ++i) part = op.merge(part, warps[i]);
  }
  return part;
}

// Over the positions [begin, end) of sample n, for the lanes * V channels from `channel0` on, as far as they lie below
// `channels`: store(channel, Part). Shared memory: all [kThreads * V].
template <int V, class Operation, class Store, class Part = typename Operation::Part>
__device__ void reduce_positions_of(const Operation& op, int64_t n, int64_t channel0, int64_t channels, int64_t c,
                                    int64_t l, int64_t begin, int64_t end, int lanes, Part* all, Store&& store) {
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes;
  const int64_t channel = channel0 + lane * V;
  Part parts[V];
#pragma unroll
  for (int i = 0; i < V; ++i) parts[i] = op.empty();
  if (channel < channels) {  // then all V channels do, since V divides both
    const auto context = op.template context<V>(n, channel, 1);
    for (int64_t at = begin + group; at < end; at += groups) op.add((n * l + at) * c + channel, context, parts);
  }
  // [groups][V][lanes]
#pragma unroll
  for (int i = 0; i < V; ++i) all[(group * V + i) * lanes + lane] = parts[i];
  __syncthreads();
  const int columns = V * lanes;
  for (int column = threadIdx.x; column < columns; column += kThreads) {
    Part part = all[column];
    for (int i = 1; i < groups; ++i) part = op.merge(part, all[i * columns + column]);
    const int64_t to = channel0 + column % lanes * V + column / lanes;
    if (to < channels) store(to, part);
  }
}

template <int V, class Operation>
__global__ void __launch_bounds__(kThreads, Operation::kBlocks)
    reduce_rows(Operation op, int64_t rows, int64_t c, int64_t l, int lanes, unsigned splits) {
  const int group = threadIdx.x / lanes, split = blockIdx.x % splits;
  const int64_t row = int64_t{blockIdx.x / splits} * (kThreads / lanes) + group, vectors = l / V;
  const auto part = reduce_row<V>(op, row < rows, row, c, l, vectors * split / splits, vectors * (split + 1) / splits,
                                  lanes, shared_memory<typename Operation::Part>());
  if (row < rows && threadIdx.x % lanes == 0) op.store(row / c, split, row % c, part);
}

template <int V, class Operation>
__global__ void __launch_bounds__(kThreads, Operation::kBlocks)
    reduce_positions(Operation op, int64_t c, int64_t l, int lanes, unsigned chunks, unsigned splits) {
  const unsigned split = blockIdx.x % splits, chunk = blockIdx.x / splits % chunks;
  const int64_t n = blockIdx.x / splits / chunks;
  using Part = typename Operation::Part;
  reduce_positions_of<V>(op, n, int64_t{chunk} * lanes * V, c, c, l, l * split / splits, l * (split + 1) / splits,
                         lanes, shared_memory<Part>(),
                         [&](int64_t channel, const Part& part) { op.store(n, split, channel, part); });
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
