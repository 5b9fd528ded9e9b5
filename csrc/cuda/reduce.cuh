// What:   reduces values over the positions of each channel to an operation's Part, a partial result. Each thread takes
//         fixed positions, and partial results are merged in a fixed order, so that two runs give the same bits. A
//         block calls reduce_row or reduce_positions_of; the kernels (RowReduction, PositionReduction) store partial
//         results [N, splits, C], which their consumer merges in order.
// Grid:   rows: a group of 8, 32 or all threads reduces one split of a row of L positions.
//         positions: a block takes threads_per_row vectors of channels, and all positions of one split.
// Bytes:  reads what the operation loads once, in accesses of V elements; kAhead of them are in flight.
// Needs:  an operation with these members:
//           kBlocks, kAhead              for __launch_bounds__; loads in flight
//           Part, empty(), merge(Part, Part), shuffle_xor(Part, offset)
//           Context<V> context(row, step)  what add() needs of V rows of [N, C] from `row` on; step 0: of one row
//           Fetched<V> fetch(Index)      loads V elements
//           add(fetched, context, Part (&)[V])
//         and for the kernels:
//           store(row, split, Part)
//           problem(), staged(copy)      for staged_tile.cuh: the same operation over copies of its maps
#pragma once

#include "device.cuh"

namespace se::cuda {

// Accesses to a map at equal distances: the first one, and the step to the next.
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

// Reduces the accesses [begin, end) of a row by a group of `threads_per_row` threads; the group's first thread returns
// the whole result. Each thread has V independent parts, so that their additions overlap. Shared memory: `warps`, one
// Part per warp of the block.
template <int V, class Operation, class Part = typename Operation::Part>
__device__ Part reduce_row(const Operation& op, bool exists, int64_t row, const Line& line, unsigned begin,
                           unsigned end, int threads_per_row, Part* warps) {
  const unsigned rank = thread() & (threads_per_row - 1);
  Part parts[V];
#pragma unroll
  for (int i = 0; i < V; ++i) parts[i] = op.empty();
  if (exists) reduce_line<V>(op, op.template context<V>(row, 0), line, begin + rank, end, threads_per_row, parts);
  Part part = parts[0];
#pragma unroll
  for (int i = 1; i < V; ++i) part = op.merge(part, parts[i]);
  for (int offset = (threads_per_row < kWarp ? threads_per_row : kWarp) / 2; offset > 0; offset /= 2) {
    part = op.merge(part, op.shuffle_xor(part, offset));
  }
  if (threads_per_row > kWarp) {
    if (rank % kWarp == 0) warps[rank / kWarp] = part;
    __syncthreads();
    part = warps[0];
    for (int i = 1; i < threads_per_row / kWarp; ++i) part = op.merge(part, warps[i]);
  }
  return part;
}

// Reduces the positions [begin, end) of the channels from channel0 to channel0 + threads_per_row * V - 1, as far as
// they are less than `channels`, and calls store(channel, Part). Their rows of [N, C] are row0 + channel; line(channel)
// gives their accesses. Shared memory: all [warps][V][threads_per_row].
template <int V, class Operation, class LineOf, class Store, class Part = typename Operation::Part>
__device__ void reduce_positions_of(const Operation& op, int64_t row0, int channel0, int channels, unsigned begin,
                                    unsigned end, int threads_per_row, Part* all, LineOf&& line, Store&& store) {
  const Groups groups(threads_per_row);
  const int rank = groups.rank();
  const int channel = channel0 + rank * V;
  Part parts[V];
#pragma unroll
  for (int i = 0; i < V; ++i) parts[i] = op.empty();
  if (channel < channels) {  // then all V channels are, since V divides both
    reduce_line<V>(op, op.template context<V>(row0 + channel, 1), line(channel), begin + groups.group(), end,
                   groups.count(), parts);
  }
  for (int offset = kWarp / 2; offset >= threads_per_row; offset /= 2) {
#pragma unroll
    for (int i = 0; i < V; ++i) parts[i] = op.merge(parts[i], op.shuffle_xor(parts[i], offset));
  }
  const int warp = thread() / kWarp, columns = V * threads_per_row;
  if (thread() % kWarp < threads_per_row) {
#pragma unroll
    for (int i = 0; i < V; ++i) all[warp * columns + i * threads_per_row + rank] = parts[i];
  }
  __syncthreads();
  for (int column = thread(); column < columns; column += threads()) {
    Part part = all[column];
    for (int i = 1; i < threads() / kWarp; ++i) part = op.merge(part, all[i * columns + column]);
    const int to = channel0 + column % threads_per_row * V + column / threads_per_row;
    if (to < channels) store(to, part);
  }
}

// The bodies of squeeze_kernel and backward_reduce_kernel, which are templates over the body. The kernels take the
// sizes as separate parameters, because nvcc compiles members of one struct to other code. per_split: accesses of a
// row, or positions, per split.
template <int V>
struct RowReduction {
  template <class Operation>
  static __device__ void run(const Operation& op, int64_t rows, int64_t l, int threads_per_row, unsigned splits,
                             unsigned per_split) {
    const Groups groups(threads_per_row);
    const unsigned block = blockIdx.x / splits, split = blockIdx.x - block * splits;
    const int64_t row = int64_t{block} * groups.count() + groups.group();
    const unsigned begin = split * per_split, vectors = static_cast<unsigned>(l) / V, end = begin + per_split;
    const auto part = reduce_row<V>(op, row < rows, row, {{row * l, 0}, V, 0}, begin, end < vectors ? end : vectors,
                                    threads_per_row, shared_memory<typename Operation::Part>());
    if (row < rows && groups.rank() == 0) op.store(row, split, part);
  }
};

template <int V>
struct PositionReduction {
  template <class Operation>
  static __device__ void run(const Operation& op, int64_t c, int64_t l, int threads_per_row, unsigned channel_blocks,
                             unsigned splits, unsigned per_split) {
    const unsigned split = blockIdx.x % splits, channel_block = blockIdx.x / splits % channel_blocks;
    const int64_t n = blockIdx.x / splits / channel_blocks;
    const unsigned begin = split * per_split, end = begin + per_split, positions = static_cast<unsigned>(l);
    reduce_positions_of<V>(
        op, n * c, static_cast<int>(channel_block * threads_per_row * V), static_cast<int>(c), begin,
        end < positions ? end : positions, threads_per_row, shared_memory<typename Operation::Part>(),
        [&](int channel) -> Line { return {{n * l * c + channel, 0}, c, 0}; },
        [&](int channel, const auto& part) { op.store(n * c + channel, split, part); });
  }
};

}  // namespace se::cuda
