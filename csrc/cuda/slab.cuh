// A block's share of a map in shared memory: copied in accesses of 16 bytes whatever L is, and reduced there.
#pragma once

#include <cuda_pipeline.h>

#include "elementwise.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace se::cuda {

// Begins to copy a share of a map to `memory`, where it is after await_copies(). An element's address has the same
// remainder of 16 as in the map, so that accesses are as wide as there.
template <class T>
__device__ Slab<T> copy_to_slab(const RowShare<T>& share, const void* map, T* memory) {
  constexpr int V = 16 / sizeof(T);
  const T* from = static_cast<const T*>(map) + share.first;
  T* to = memory + (share.wide ? share.first % V : 0);
  const unsigned head = share.head(), vectors = (share.count - head) / V;
#pragma unroll 4
  for (unsigned v = threadIdx.x; v < vectors; v += blockDim.x) {
    __pipeline_memcpy_async(to + head + v * V, from + head + v * V, 16);
  }
  // Before the vectors and after them.
  for (unsigned i = threadIdx.x; i < share.count - vectors * V; i += blockDim.x) {
    const unsigned e = i < head ? i : i + vectors * V;
    Accumulator<T> value[1];
    load_streaming<1>(from + e).unpack(value);
    to[e] = narrow<T>(value[0]);
  }
  return {to};
}
template <class T, int W>
__device__ Slab<T> copy_to_slab(const PositionShare<T, W>& share, const void* map, T* memory) {
  share.columns([&](int i, unsigned position, unsigned step) {
#pragma unroll 4
    for (unsigned at = position; at < share.positions; at += step) {
      const Index index = share.index(at, i);
      __pipeline_memcpy_async(memory + index.e, static_cast<const T*>(map) + index.at, 16);
    }
  });
  return {memory};
}

// store(i, Part) over the positions of a share, for each of its channels c0 + i, all of whose positions it has.
template <int V, class T, class Operation, class Store>
__device__ void reduce_rows_of(const RowShare<T>& share, const Operation& op, int64_t c, int lanes,
                               typename Operation::Part* work, Store&& store) {
  const Groups groups(lanes);
  const int64_t row0 = share.n * c + share.c0;
  for (int i0 = 0; i0 < share.channels; i0 += groups.count()) {
    const int i = i0 + groups.group();
    if (lanes > kWarp) __syncthreads();  // `work` has been read
    const auto part =
        reduce_row<V>(op, i < share.channels, row0 + i, {share.index(i * share.l), V, V}, 0, share.l / V, lanes, work);
    if (i < share.channels && groups.lane() == 0) store(i, part);
  }
}
// The width is no template parameter of the kernels: there would be three of each to compile.
template <class T, class Operation, class Store>
__device__ void reduce_share(const RowShare<T>& share, const Operation& op, int64_t c, const Reduction& r,
                             typename Operation::Part* work, Store&& store) {
  if (r.width == 16) return reduce_rows_of<16 / sizeof(T)>(share, op, c, r.lanes, work, store);
  if (r.width == 8) return reduce_rows_of<8 / sizeof(T)>(share, op, c, r.lanes, work, store);
  reduce_rows_of<1>(share, op, c, r.lanes, work, store);
}
template <class T, int W, class Operation, class Store>
__device__ void reduce_share(const PositionShare<T, W>& share, const Operation& op, int64_t c, const Reduction& r,
                             typename Operation::Part* work, Store&& store) {
  for (int i0 = 0; i0 < share.channels; i0 += r.lanes * W) {
    if (i0 > 0) __syncthreads();  // `work` has been read
    reduce_positions_of<W>(
        op, share.n * c + share.c0, i0, share.channels, 0, share.positions, r.lanes, work,
        [&](int i) -> Line { return {share.index(0, i), share.c, static_cast<unsigned>(share.channels)}; }, store);
  }
}

__device__ inline void await_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
}

// Rows that accesses of 16 bytes do not fit, by way of shared memory: a block takes whole channels of a sample. slabs:
// [maps][slab_bytes], then the partial results.
template <class T, class Operation>
struct StagedRowReduction {
  static constexpr int kBlocks = Operation::kBlocks;

  Operation op;
  Elementwise e;
  Divisor by;
  Reduction r;

  __device__ void run() const {
    const RowShare<T> share(op.problem(), e, by, blockIdx.x);
    unsigned char* free = shared_memory<unsigned char>();
    const auto staged = op.staged([&](const void* map) {
      T* memory = reinterpret_cast<T*>(free);
      free += r.slab_bytes;
      return copy_to_slab(share, map, memory);
    });
    await_copies();
    reduce_share(share, staged, op.problem().c, r, reinterpret_cast<typename Operation::Part*>(free),
                 [&](int i, const auto& part) { op.store(share.n * op.problem().c + share.c0 + i, 0, part); });
  }
};

// kernel_of(body): the kernel that runs a body of this type.
template <class T, class Operation, class KernelOf>
void launch_reduction(const Plan& plan, const char* name, void* stream, const Operation& op, KernelOf&& kernel_of) {
  const Call& call = plan.call;
  auto start = [&](const auto& body) { launch(plan, name, stream, kernel_of(body), body); };
  const Reduction& r = plan.reduction;
  auto per_split = [&](int64_t of) { return static_cast<unsigned>((of + r.splits - 1) / r.splits); };
  if (r.rows > 0) {
    Elementwise e{};
    e.width = 16;
    e.per_block = r.rows * call.l;
    e.ranges = (call.c + r.rows - 1) / r.rows;
    start(StagedRowReduction<T, Operation>{op, e, Divisor(call.l), r});
  } else if (call.channels_last) {
    with_width<T, false>(r.width, [&](auto width) {
      constexpr int V = decltype(width)::value;
      start(PositionReduction<V, Operation>{op, call.c, call.l, r.lanes, static_cast<unsigned>(r.chunks),
                                            static_cast<unsigned>(r.splits), per_split(call.l)});
    });
  } else {
    with_width<T, true>(r.width, [&](auto width) {
      constexpr int V = decltype(width)::value;
      start(RowReduction<V, Operation>{op, call.n * call.c, call.l, r.lanes, static_cast<unsigned>(r.splits),
                                       per_split(call.l / V)});
    });
  }
}

}  // namespace se::cuda
