// The two fully connected layers inside a block: a few rows or columns of a weight matrix times vectors in shared
// memory, where they lie whole or are staged a tile at a time. Every sum is taken in an order that depends only on its
// length.
#pragma once

#include "activations.cuh"

namespace se::cuda {

// Rows of `stride` weights beside maps of T; `from` gives the part of it that begins at a row and column.
template <class T>
struct Matrix {
  const void* data;
  DType dtype;
  int64_t stride;

  __device__ Matrix from(int64_t row, int64_t column) const {
    const int bytes = dtype == DType::kFloat32 ? sizeof(float) : sizeof(T);
    return {static_cast<const char*>(data) + (row * stride + column) * bytes, dtype, stride};
  }
};

// b[i], or 0 where there is none.
template <class T, class A = Accumulator<T>>
__device__ A bias(const void* b, DType dtype, int64_t i) {
  A value = 0;
  if (b) with_weight_type<T>(dtype, [&](auto type) { value = load_one(static_cast<const decltype(type)*>(b) + i); });
  return value;
}

// tile[s][k] = v(s, k0 + k) for k < width; v(s, .) is not asked for s >= samples.
template <int kS, class A, class Source>
__device__ void stage(A* tile, int samples, int64_t k0, int width, Source&& v) {
  __syncthreads();  // the last tile has been read
  for (int i = threadIdx.x; i < kS * width; i += kThreads) {
    const int s = i / width, k = i % width;
    tile[s * kTile + k] = s < samples ? v(s, k0 + k) : A(0);
  }
  __syncthreads();
}

// sums[s][i] = sum_k m[i, k] v[s * stride + k] for i < rows, k < width, or that more. A warp takes every kWarps-th row.
template <int kS, class T, class A>
__device__ void multiply(const Matrix<T>& m, int rows, int width, const A* v, int64_t stride, A* sums,
                         bool more = false) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  with_weight_type<T>(m.dtype, [&](auto type) {
    using W = decltype(type);
    for (int i = warp; i < rows; i += kWarps) {
      const W* row = static_cast<const W*>(m.data) + i * m.stride;
      A partial[kS]{};
      for (int k = lane; k < width; k += kWarp) {
        const A weight = load_one(row + k);
#pragma unroll
        for (int s = 0; s < kS; ++s) partial[s] += weight * v[s * stride + k];
      }
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        const A sum = warp_sum(partial[s]);
        if (lane == 0) sums[s * rows + i] = more ? sums[s * rows + i] + sum : sum;
      }
    }
  });
}

// sums[s][i] = sum_k m[i, k] v(s, k) for i < rows, k < depth.
// Shared memory: tile [kS][kTile], sums [kS][rows]; complete for all threads at the end.
template <int kS, class T, class A, class Source>
__device__ void product(const Matrix<T>& m, int rows, int64_t depth, int samples, A* tile, A* sums, Source&& v) {
  for (int64_t k0 = 0; k0 < depth; k0 += kTile) {
    const int width = depth - k0 < kTile ? static_cast<int>(depth - k0) : kTile;
    stage<kS>(tile, samples, k0, width, v);
    multiply<kS>(m.from(0, k0), rows, width, tile, kTile, sums, k0 > 0);
  }
  __syncthreads();
}

// partial[s] += sum_k v[s * stride + k] m[k, column] for the k < width of this warp: every kWarps-th.
template <int kS, class T, class A>
__device__ void add_column(const Matrix<T>& m, int width, int column, const A* v, int64_t stride, A (&partial)[kS]) {
  with_weight_type<T>(m.dtype, [&](auto type) {
    using W = decltype(type);
    for (int k = threadIdx.x / kWarp; k < width; k += kWarps) {
      const A weight = load_one(static_cast<const W*>(m.data) + k * m.stride + column);
#pragma unroll
      for (int s = 0; s < kS; ++s) partial[s] += weight * v[s * stride + k];
    }
  });
}

// sums[s][j0 + j]: what the warps have for each lane j of the columns, in their order. Complete for all threads at the
// end. Shared memory: warps [kS][kThreads].
template <int kS, class A>
__device__ void sum_over_warps(const A (&partial)[kS], int j0, int columns, A* warps, A* sums) {
#pragma unroll
  for (int s = 0; s < kS; ++s) warps[s * kThreads + threadIdx.x] = partial[s];
  __syncthreads();
  for (int i = threadIdx.x; i < kS * kColumns; i += kThreads) {
    const int s = i / kColumns, j = i % kColumns;
    A sum = warps[s * kThreads + j];
    for (int w = 1; w < kWarps; ++w) sum += warps[s * kThreads + w * kWarp + j];
    if (j0 + j < columns) sums[s * columns + j0 + j] = sum;
  }
  __syncthreads();
}

// sums[j] = sum_k v[k] m[k, j] for j < columns, k < depth. A lane takes a column. Shared memory: warps [kThreads].
template <class T, class A>
__device__ void transposed_multiply(const Matrix<T>& m, int depth, int columns, const A* v, A* warps, A* sums) {
  for (int j0 = 0; j0 < columns; j0 += kColumns) {
    const int column = j0 + static_cast<int>(threadIdx.x) % kWarp;
    A partial[1]{};
    if (column < columns) add_column(m, depth, column, v, 0, partial);
    sum_over_warps(partial, j0, columns, warps, sums);
  }
}

// sums[s][j] = sum_k a(s, k) m[k, j] for j < columns, k < depth. Shared memory: tile [kS][kTile], warps [kS][kThreads],
// sums [kS][columns].
template <int kS, class T, class A, class Source>
__device__ void transposed_product(const Matrix<T>& m, int64_t depth, int columns, int samples, A* tile, A* warps,
                                   A* sums, Source&& a) {
  for (int j0 = 0; j0 < columns; j0 += kColumns) {
    const int column = j0 + static_cast<int>(threadIdx.x) % kWarp;
    A partial[kS]{};
    for (int64_t k0 = 0; k0 < depth; k0 += kTile) {
      const int width = depth - k0 < kTile ? static_cast<int>(depth - k0) : kTile;
      stage<kS>(tile, samples, k0, width, a);
      if (column < columns) add_column(m.from(k0, 0), width, column, tile, kTile, partial);
    }
    sum_over_warps(partial, j0, columns, warps, sums);
  }
}

}  // namespace se::cuda
