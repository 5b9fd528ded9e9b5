// The two fully connected layers inside a block: a few rows or columns of a weight matrix times vectors in shared
// memory, where they lie whole or are staged a tile at a time. Every sum is taken in an order that depends only on its
// length and on how wide the weights can be read.
//
//   multiply: a group of lanes takes a row, each of them several accesses; then the sum over its lanes
//   transposed_multiply: a group of lanes takes the columns of several rows; then the sum over the groups
#pragma once

#include "activations.cuh"

namespace se::cuda {

// Rows of `stride` weights beside maps of T; `from` gives the part of it that begins at a row and column.
template <class T>
struct Matrix {
  const void* data;
  DType dtype;
  int64_t stride;

  __device__ int bytes() const { return dtype == DType::kFloat32 ? sizeof(float) : sizeof(T); }
  __device__ Matrix from(int64_t row, int64_t column) const {
    return {static_cast<const char*>(data) + (row * stride + column) * bytes(), dtype, stride};
  }
};

// Asks for rows x columns of weights, so that they are in the L2 when they are needed.
template <class T>
__device__ void prefetch(const Matrix<T>& m, int64_t rows, int64_t columns) {
  constexpr int kLine = 128;
  const char* data = static_cast<const char*>(m.data);
  const int64_t stride = m.stride * m.bytes(), bytes = columns * m.bytes();
  for (int64_t row = thread() / kWarp; row < rows; row += threads() / kWarp) {
    for (int64_t i = thread() % kWarp * kLine; i < bytes + kLine; i += kWarp * kLine) {
      prefetch(data + row * stride + (i < bytes ? i : bytes - 1));
    }
  }
}

// b[i], or 0 where there is none.
template <class T, class A = Accumulator<T>>
__device__ A bias(const void* b, DType dtype, int64_t i) {
  A value = 0;
  if (b) with_weight_type<T>(dtype, [&](auto type) { value = load_one(static_cast<const decltype(type)*>(b) + i); });
  return value;
}

// body(data, std::integral_constant<int, W>()): the weights by their type, and how many of `width` in a row an access
// brings: 16 bytes, 4, or one weight.
template <class T, class Body>
__device__ void with_weights(const Matrix<T>& m, int width, Body&& body) {
  with_weight_type<T>(m.dtype, [&](auto type) {
    using Weight = decltype(type);
    const auto* data = static_cast<const Weight*>(m.data);
    const uint64_t bits = reinterpret_cast<uintptr_t>(data) | (m.stride | width) * sizeof(Weight);
    if (bits % 16 == 0) return body(data, std::integral_constant<int, 16 / sizeof(Weight)>());
    if constexpr (sizeof(Weight) < 4) {
      if (bits % 4 == 0) return body(data, std::integral_constant<int, 4 / sizeof(Weight)>());
    }
    body(data, std::integral_constant<int, 1>());
  });
}

// Threads that take a row of `width` together, W weights each at a time.
template <int W>
__device__ int lanes_along(int width) {
  int lanes = 1;
  while (lanes < kWarp && lanes * W < width) lanes *= 2;
  return lanes;
}

constexpr int kTurn = 19;  // rows from one turn to the next

// sums[s][i] = sum_k m[i, k] v[s * stride + k] for i < rows, k < width, or that more. turn: blocks with different ones
// begin at different rows, so that those which run side by side do not all ask for the same part of the L2.
template <int kS, class T, class A>
__device__ void multiply(const Matrix<T>& m, int rows, int width, const A* v, int stride, A* sums, int64_t turn,
                         bool more = false) {
  with_weights(m, width, [&](const auto* data, auto weights) {
    constexpr int W = decltype(weights)::value, kMost = 16 / sizeof(A), kPart = W < kMost ? W : kMost;
    constexpr int kAlong = kS == 1 ? 4 : 2;  // loads of a thread under way
    const Groups groups(lanes_along<kAlong * W>(width));
    const int lane = groups.lane(), step = groups.lanes * W;
    const int first = static_cast<unsigned>(turn) * kTurn % static_cast<unsigned>(rows);
#pragma unroll 1
    for (int i0 = 0; i0 < rows; i0 += groups.count()) {
      const int i = i0 + groups.group();
      const bool exists = i < rows;
      const int row = !exists ? 0 : first + i < rows ? first + i : first + i - rows;
      const decltype(data) first_of_row = data + row * m.stride;
      A partial[kS]{};
#pragma unroll 1
      for (int k0 = lane * W; k0 < width; k0 += kAlong * step) {
        const decltype(data) from = first_of_row + k0;
        decltype(load<W>(data)) raw[kAlong];
#pragma unroll
        for (int j = 0; j < kAlong; ++j) raw[j] = load<W>(from + (k0 + j * step < width ? j * step : 0));
#pragma unroll
        for (int j = 0; j < kAlong; ++j) {
          if (k0 + j * step >= width) continue;
          A weight[W];
          raw[j].unpack(weight);
#pragma unroll
          for (int s = 0; s < kS; ++s) {
#pragma unroll
            for (int part = 0; part < W; part += kPart) {
              A values[kPart];
              load_shared<kPart>(v + s * stride + k0 + j * step + part).unpack(values);
#pragma unroll
              for (int p = 0; p < kPart; ++p) partial[s] += weight[part + p] * values[p];
            }
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        for (int offset = groups.lanes / 2; offset > 0; offset /= 2) partial[s] += shuffle_xor(partial[s], offset);
        if (lane > 0 || !exists) continue;
        A& sum = sums[s * rows + row];
        sum = more ? sum + partial[s] : partial[s];
      }
    }
  });
}

// A vector that is staged: v(s, k) = finish(fetch(s, k), s, k), with four fetched before the first is finished.
template <class Fetch, class Finish>
struct Source {
  Fetch fetch;
  Finish finish;
};
template <class Fetch, class Finish>
__device__ Source<Fetch, Finish> source(Fetch fetch, Finish finish) {
  return {fetch, finish};
}

// tile[k] = v(s, k0 + k) for k < width, one after the other; or as a Source has it.
template <class A, class V>
__device__ void stage_one(A* tile, int s, int64_t k0, int width, const V& v) {
  for (int k = thread(); k < width; k += threads()) tile[k] = v(s, k0 + k);
}
template <class A, class Fetch, class Finish>
__device__ void stage_one(A* tile, int s, int64_t k0, int width, const Source<Fetch, Finish>& v) {
  in_batches<4>(
      thread(), width, threads(), [&](int k) { return v.fetch(s, k0 + k); },
      [&](int k, const auto& fetched) { tile[k] = v.finish(fetched, s, k0 + k); });
}

// tile[s][k] = v(s, k0 + k) for k < width; v(s, .) is not asked for s >= samples.
template <int kS, class A, class V>
__device__ void stage(A* tile, int samples, int64_t k0, int width, const V& v) {
  __syncthreads();  // the last tile has been read
  for (int s = 0; s < kS; ++s) {
    if (s < samples) {
      stage_one(tile + s * kTile, s, k0, width, v);
    } else {
      for (int k = thread(); k < width; k += threads()) tile[s * kTile + k] = 0;
    }
  }
  __syncthreads();
}

// sums[s][i] = sum_k m[i, k] v(s, k) for i < rows, k < depth.
// Shared memory: tile [kS][kTile], sums [kS][rows]; complete for all threads at the end.
template <int kS, class T, class A, class V>
__device__ void product(const Matrix<T>& m, int rows, int64_t depth, int samples, A* tile, A* sums, int64_t turn,
                        const V& v) {
  for (int64_t k0 = 0; k0 < depth; k0 += kTile) {
    const int width = depth - k0 < kTile ? static_cast<int>(depth - k0) : kTile;
    stage<kS>(tile, samples, k0, width, v);
    multiply<kS>(m.from(0, k0), rows, width, tile, kTile, sums, turn, k0 > 0);
  }
  __syncthreads();
}

// Numbers of shared memory that transposed_multiply needs, for each warp of kThreads.
template <class T>
constexpr int kWarpSums = kWarps * kWarp * 16 / sizeof(T);

// sums[s][j] = sum_k v[s * stride + k] m[k, j] for j < columns, k < depth, or that more: complete for all threads at
// the end. Shared memory: warps [kWarpSums].
template <int kS, class T, class A>
__device__ void transposed_multiply(const Matrix<T>& m, int depth, int columns, const A* v, int stride, A* warps,
                                    A* sums, bool more = false) {
  constexpr int kRows = kS == 1 ? 4 : 1;
  with_weights(m, columns, [&](const auto* data, auto weights) {
    constexpr int W = decltype(weights)::value;
    const Groups along(lanes_along<W>(columns));
    const int lane = along.lane(), width = along.lanes * W, groups = along.count(), warp_count = threads() / kWarp;
#pragma unroll 1
    for (int j0 = 0; j0 < columns; j0 += width) {
      const int column = j0 + lane * W;
      A partial[kS][W]{};
      if (column < columns) {
#pragma unroll 1
        for (int k0 = along.group(); k0 < depth; k0 += kRows * groups) {
          decltype(load<W>(data)) raw[kRows];
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
            if (k0 + j * groups < depth) raw[j] = load<W>(data + (k0 + j * groups) * m.stride + column);
          }
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
            if (k0 + j * groups >= depth) continue;
            A weight[W];
            raw[j].unpack(weight);
#pragma unroll
            for (int s = 0; s < kS; ++s) {
              const A value = v[s * stride + k0 + j * groups];
#pragma unroll
              for (int i = 0; i < W; ++i) partial[s][i] += weight[i] * value;
            }
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kS; ++s) {
#pragma unroll
        for (int i = 0; i < W; ++i) {
          for (int offset = kWarp / 2; offset >= along.lanes; offset /= 2) {
            partial[s][i] += shuffle_xor(partial[s][i], offset);
          }
          if (thread() % kWarp < along.lanes) warps[thread() / kWarp * width + lane * W + i] = partial[s][i];
        }
        __syncthreads();
        for (int j = thread(); j < width && j0 + j < columns; j += threads()) {
          A sum = more ? sums[s * columns + j0 + j] : A(0);
          for (int w = 0; w < warp_count; ++w) sum += warps[w * width + j];
          sums[s * columns + j0 + j] = sum;
        }
        __syncthreads();
      }
    }
  });
}

// sums[s][j] = sum_k v(s, k) m[k, j] for j < columns, k < depth. Shared memory: tile [kS][kTile], warps as
// transposed_multiply has it, sums [kS][columns].
template <int kS, class T, class A, class V>
__device__ void transposed_product(const Matrix<T>& m, int64_t depth, int columns, int samples, A* tile, A* warps,
                                   A* sums, const V& v) {
  for (int64_t k0 = 0; k0 < depth; k0 += kTile) {
    const int width = depth - k0 < kTile ? static_cast<int>(depth - k0) : kTile;
    stage<kS>(tile, samples, k0, width, v);
    transposed_multiply<kS>(m.from(k0, 0), width, columns, tile, kTile, warps, sums, k0 > 0);
  }
}

}  // namespace se::cuda
