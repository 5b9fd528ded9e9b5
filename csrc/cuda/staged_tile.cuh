// A staged tile: a block's tile of a map in shared memory. It is copied in 16-byte accesses for any L, and reduced
// there.
#pragma once

#include <cuda_pipeline.h>

#include "elementwise.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace se::cuda {

// Begins to copy a tile of a map to `memory`; await_copies() waits for it. An element keeps its address modulo 16, so
// that vector accesses stay aligned.
template <class T>
__device__ StagedTile<T> stage_tile(const NchwTile<T>& tile, const void* map, T* memory) {
  constexpr int V = 16 / sizeof(T);
  const T* from = static_cast<const T*>(map) + tile.first;
  T* to = memory + (tile.wide ? tile.first % V : 0);
  const unsigned head = tile.head(), vectors = (tile.count - head) / V;
#pragma unroll 4
  for (unsigned v = threadIdx.x; v < vectors; v += blockDim.x) {
    __pipeline_memcpy_async(to + head + v * V, from + head + v * V, 16);
  }
  // The elements before the vectors and after them.
  for (unsigned i = threadIdx.x; i < tile.count - vectors * V; i += blockDim.x) {
    const unsigned e = i < head ? i : i + vectors * V;
    Accumulator<T> value[1];
    load_streaming<1>(from + e).unpack(value);
    to[e] = narrow<T>(value[0]);
  }
  return {to};
}
template <class T, int V>
__device__ StagedTile<T> stage_tile(const NhwcTile<T, V>& tile, const void* map, T* memory) {
  tile.columns([&](int i, unsigned position, unsigned step) {
#pragma unroll 4
    for (unsigned at = position; at < tile.positions; at += step) {
      const Index index = tile.index(at, i);
      __pipeline_memcpy_async(memory + index.e, static_cast<const T*>(map) + index.at, 16);
    }
  });
  return {memory};
}

// Reduces a tile of whole rows over the positions and calls store(i, Part) for each channel c0 + i.
template <int V, class T, class Operation, class Store>
__device__ void reduce_rows_of(const NchwTile<T>& tile, const Operation& op, int64_t c, int threads_per_row,
                               typename Operation::Part* work, Store&& store) {
  const Groups groups(threads_per_row);
  const int64_t row0 = tile.n * c + tile.c0;
  for (int i0 = 0; i0 < tile.channels; i0 += groups.count()) {
    const int i = i0 + groups.group();
    if (threads_per_row > kWarp) __syncthreads();  // `work` has been read
    const auto part = reduce_row<V>(op, i < tile.channels, row0 + i, {tile.index(i * tile.l), V, V}, 0, tile.l / V,
                                    threads_per_row, work);
    if (i < tile.channels && groups.rank() == 0) store(i, part);
  }
}
// The size of the accesses is chosen at run time. As a template parameter of the kernels it would triple their number.
template <class T, class Operation, class Store>
__device__ void reduce_tile(const NchwTile<T>& tile, const Operation& op, int64_t c, const Reduction& r,
                            typename Operation::Part* work, Store&& store) {
  if (r.vec_bytes == 16) return reduce_rows_of<16 / sizeof(T)>(tile, op, c, r.threads_per_row, work, store);
  if (r.vec_bytes == 8) return reduce_rows_of<8 / sizeof(T)>(tile, op, c, r.threads_per_row, work, store);
  reduce_rows_of<1>(tile, op, c, r.threads_per_row, work, store);
}
template <class T, int V, class Operation, class Store>
__device__ void reduce_tile(const NhwcTile<T, V>& tile, const Operation& op, int64_t c, const Reduction& r,
                            typename Operation::Part* work, Store&& store) {
  for (int i0 = 0; i0 < tile.channels; i0 += r.threads_per_row * V) {
    if (i0 > 0) __syncthreads();  // `work` has been read
    reduce_positions_of<V>(
        op, tile.n * c + tile.c0, i0, tile.channels, 0, tile.positions, r.threads_per_row, work,
        [&](int i) -> Line { return {tile.index(0, i), tile.c, static_cast<unsigned>(tile.channels)}; }, store);
  }
}

__device__ inline void await_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
}

// Reduces rows that are not a multiple of 16 bytes by way of shared memory. A block takes whole channels of a sample.
// Shared memory: [maps][staged_bytes], then the partial results.
template <class T>
struct StagedRowReduction {
  template <class Operation>
  static __device__ void run(const Operation& op, Elementwise e, Divisor by, Reduction r, int64_t staged_bytes) {
    const NchwTile<T> tile(op.problem(), e, by, blockIdx.x);
    unsigned char* free = shared_memory<unsigned char>();
    const auto staged = op.staged([&](const void* map) {
      T* memory = reinterpret_cast<T*>(free);
      free += staged_bytes;
      return stage_tile(tile, map, memory);
    });
    await_copies();
    reduce_tile(tile, staged, op.problem().c, r, reinterpret_cast<typename Operation::Part*>(free),
                [&](int i, const auto& part) { op.store(tile.n * op.problem().c + tile.c0 + i, 0, part); });
  }
};

// kernel_of(body, sizes...) returns the kernel that runs this body with parameters of these types.
template <class T, class Operation, class KernelOf>
void launch_reduction(const Plan& plan, const char* name, void* stream, const Operation& op, KernelOf&& kernel_of) {
  const Call& call = plan.call;
  const Reduction& r = plan.reduction;
  auto start = [&](auto body, auto... sizes) { launch(plan, name, stream, kernel_of(body, sizes...), op, sizes...); };
  auto per_split = [&](int64_t of) { return static_cast<unsigned>((of + r.splits - 1) / r.splits); };
  if (r.rows > 0) {
    Elementwise e{};
    e.vec_bytes = 16;
    e.per_block = r.rows * call.l;
    e.ranges = (call.c + r.rows - 1) / r.rows;
    start(StagedRowReduction<T>{}, e, Divisor(call.l), r, r.staged_bytes);
  } else if (call.channels_last) {
    with_vec_bytes<T, false>(r.vec_bytes, [&](auto size) {
      constexpr int V = decltype(size)::value;
      start(PositionReduction<V>{}, call.c, call.l, r.threads_per_row, static_cast<unsigned>(r.channel_blocks),
            static_cast<unsigned>(r.splits), per_split(call.l));
    });
  } else {
    with_vec_bytes<T, true>(r.vec_bytes, [&](auto size) {
      constexpr int V = decltype(size)::value;
      start(RowReduction<V>{}, call.n * call.c, call.l, r.threads_per_row, static_cast<unsigned>(r.splits),
            per_split(call.l / V));
    });
  }
}

}  // namespace se::cuda
