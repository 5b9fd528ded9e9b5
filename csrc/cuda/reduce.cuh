// What:   an operation's Part over positions of one channel, by a fixed share for each thread and a fixed order of
//         merging, so that two runs give the same bits: inside a block, and as kernels that leave partial results
//         [N, splits, C], which the consumer merges in their order.
// Grid:   rows: groups of 8, 32 or all threads, each along one share of a row of L positions.
//         positions: a block takes `lanes` vectors of channels, and every so many-th position of a share.
// Bytes:  what the operation loads, once, in accesses of V elements; kAhead of them are under way.
//
// An operation has: kBlocks for __launch_bounds__, kAhead, Part, empty(), merge(Part, Part), shuffle_xor(Part, offset),
// Context<V> context(row, step) for V rows of [N, C] from `row` on (step 0: one row, V positions), Fetched<V>
// fetch(Index) for V elements, and add(fetched, context, Part (&)[V]); for the kernels also store(row, split, Part),
// for those of slab.cuh problem() and staged(copy), the same operation over copies of its maps.
#pragma once

#include "device.cuh"

namespace se::cuda {

// Accesses to a map at equal distances: the first of them, and from one to the next.
struct Line {
  Index first;
  int64_t step_at;
  unsigned step_e;

  __device__ Index operator[](unsigned i) const { return {first.at + i * step_at, first.e + i * step_e}; }
};

template <int V, class Operation, class Context, class Part = typename Operation::Part>
__device__ void reduce_line(const Operation& op, const Context& context, const Line& line, unsigned begin, unsigned end,
                            unsigned step, Part (&parts)[V]) {
  in_batches<Operation::kAhead>(
      begin, end, step, [&](unsigned i) { return op.template fetch<V>(line[i]); },
      [&](unsigned, const auto& fetched) { op.add(fetched, context, parts); });
}

// Over the accesses [begin, end) of a row, by a group of `lanes` threads: complete in the group's first. V independent
// parts per thread, so that their additions overlap. Shared memory: warps, one for each of the block.
template <int V, class Operation, class Part = typename Operation::Part>
__device__ Part reduce_row(const Operation& op, bool exists, int64_t row, const Line& line, unsigned begin,
                           unsigned end, int lanes, Part* warps) {
  const unsigned lane = thread() & (lanes - 1);
  Part parts[V];
#pragma unroll
  for (int i = 0; i < V; ++i) parts[i] = op.empty();
  if (exists) reduce_line<V>(op, op.template context<V>(row, 0), line, begin + lane, end, lanes, parts);
  Part part = parts[0];
#pragma unroll
  for (int i = 1; i < V; ++i) part = op.merge(part, parts[i]);
  for (int offset = (lanes < kWarp ? lanes : kWarp) / 2; offset > 0; offset /= 2) {
    part = op.merge(part, op.shuffle_xor(part, offset));
  }
  if (lanes > kWarp) {
    if (lane % kWarp == 0) warps[lane / kWarp] = part;
    __syncthreads();
    part = warps[0];
    for (int i = 1; i < lanes / kWarp; ++i) part = op.merge(part, warps[i]);
  }
  return part;
}

// Over the positions [begin, end), for the channels [channel0, channel0 + lanes * V) as far as they lie below
// `channels`, the rows row0 + channel of [N, C]: store(channel, Part). line(channel): its positions. Shared memory:
// all, [warps][V][lanes].
template <int V, class Operation, class LineOf, class Store, class Part = typename Operation::Part>
__device__ void reduce_positions_of(const Operation& op, int64_t row0, int channel0, int channels, unsigned begin,
                                    unsigned end, int lanes, Part* all, LineOf&& line, Store&& store) {
  const Groups groups(lanes);
  const int lane = groups.lane();
  const int channel = channel0 + lane * V;
  Part parts[V];
#pragma unroll
  for (int i = 0; i < V; ++i) parts[i] = op.empty();
  if (channel < channels) {  // then all V channels do, since V divides both
    reduce_line<V>(op, op.template context<V>(row0 + channel, 1), line(channel), begin + groups.group(), end,
                   groups.count(), parts);
  }
  for (int offset = kWarp / 2; offset >= lanes; offset /= 2) {
#pragma unroll
    for (int i = 0; i < V; ++i) parts[i] = op.merge(parts[i], op.shuffle_xor(parts[i], offset));
  }
  const int warp = thread() / kWarp, columns = V * lanes;
  if (thread() % kWarp < lanes) {
#pragma unroll
    for (int i = 0; i < V; ++i) all[warp * columns + i * lanes + lane] = parts[i];
  }
  __syncthreads();
  for (int column = thread(); column < columns; column += threads()) {
    Part part = all[column];
    for (int i = 1; i < threads() / kWarp; ++i) part = op.merge(part, all[i * columns + column]);
    const int to = channel0 + column % lanes * V + column / lanes;
    if (to < channels) store(to, part);
  }
}

// The bodies of the kernels that reduce: each is the one parameter of squeeze_kernel or backward_reduce_kernel, which
// calls run(). per_split: accesses of a row, or positions.
template <int V, class Operation>
struct RowReduction {
  static constexpr int kBlocks = Operation::kBlocks;

  Operation op;
  int64_t rows, l;
  int lanes;
  unsigned splits, per_split;

  __device__ void run() const {
    const Groups groups(lanes);
    const unsigned block = blockIdx.x / splits, split = blockIdx.x - block * splits;
    const int64_t row = int64_t{block} * groups.count() + groups.group();
    const unsigned begin = split * per_split, vectors = static_cast<unsigned>(l) / V, end = begin + per_split;
    const auto part = reduce_row<V>(op, row < rows, row, {{row * l, 0}, V, 0}, begin, end < vectors ? end : vectors,
                                    lanes, shared_memory<typename Operation::Part>());
    if (row < rows && groups.lane() == 0) op.store(row, split, part);
  }
};

template <int V, class Operation>
struct PositionReduction {
  static constexpr int kBlocks = Operation::kBlocks;

  Operation op;
  int64_t c, l;
  int lanes;
  unsigned chunks, splits, per_split;

  __device__ void run() const {
    const unsigned split = blockIdx.x % splits, chunk = blockIdx.x / splits % chunks;
    const int64_t n = blockIdx.x / splits / chunks;
    const unsigned begin = split * per_split, end = begin + per_split, positions = static_cast<unsigned>(l);
    reduce_positions_of<V>(
        op, n * c, static_cast<int>(chunk * lanes * V), static_cast<int>(c), begin, end < positions ? end : positions,
        lanes, shared_memory<typename Operation::Part>(),
        [&](int channel) -> Line { return {{n * l * c + channel, 0}, c, 0}; },
        [&](int channel, const auto& part) { op.store(n * c + channel, split, part); });
  }
};

}  // namespace se::cuda
