// The two fully connected layers inside a block: products of some rows or columns of a weight matrix with vectors in
// shared memory. The vectors are there whole, or are staged a chunk at a time. The order of every sum depends only on
// its length and on the size of the accesses to the weights.
//
//   gemv     W v: a group of threads takes a row, with several accesses per thread, and adds up its threads' sums
//   gemv_t   W^T v: a group of threads takes the columns of several rows, and the groups' sums are added up
//   staged_gemv, staged_gemv_t   the same for a vector that is computed and staged chunk by chunk
#pragma once

#include "activations.cuh"

namespace se::cuda {

// Weights in rows of `stride`, for maps of T. `from` gives the part that begins at a row and column.
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

// Prefetches rows x columns of weights into the L2.
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

// b[i], or 0 if there is no bias.
template <class T, class A = Accumulator<T>>
__device__ A bias(const void* b, DType dtype, int64_t i) {
  A value = 0;
  if (b) with_weight_type<T>(dtype, [&](auto type) { value = load_one(static_cast<const decltype(type)*>(b) + i); });
  return value;
}

// Calls body(data, std::integral_constant<int, W>()) with the weights by their type. W is the number of weights per
// access, which divides a row of `length` weights: 16 bytes, 4 bytes, or one weight.
template <class T, class Body>
__device__ void with_weights(const Matrix<T>& m, int length, Body&& body) {
  with_weight_type<T>(m.dtype, [&](auto type) {
    using Weight = decltype(type);
    const auto* data = static_cast<const Weight*>(m.data);
    const uint64_t bits = reinterpret_cast<uintptr_t>(data) | (m.stride | length) * sizeof(Weight);
    if (bits % 16 == 0) return body(data, std::integral_constant<int, 16 / sizeof(Weight)>());
    if constexpr (sizeof(Weight) < 4) {
      if (bits % 4 == 0) return body(data, std::integral_constant<int, 4 / sizeof(Weight)>());
    }
    body(data, std::integral_constant<int, 1>());
  });
}

// The threads per row of `length` weights, where each thread takes W weights at a time.
template <int W>
__device__ int threads_along(int length) {
  int threads = 1;
  while (threads < kWarp && threads * W < length) threads *= 2;
  return threads;
}

constexpr int kRotation = 19;  // rows between the first rows of two consecutive rotations

// sums[s][i] = sum_k m[i, k] v[s * stride + k] for i < rows, k < length; `more` adds to sums instead. Blocks with
// different `rotation` begin at different rows, so that blocks that run at the same time do not all read the same part
// of the L2.
template <int kS, class T, class A>
__device__ void gemv(const Matrix<T>& m, int rows, int length, const A* v, int stride, A* sums, int64_t rotation,
                     bool more = false) {
  with_weights(m, length, [&](const auto* data, auto weights) {
    constexpr int W = decltype(weights)::value, kMost = 16 / sizeof(A), kPart = W < kMost ? W : kMost;
    constexpr int kLoads = kS == 1 ? 4 : 2;  // loads in flight per thread
    const Groups groups(threads_along<kLoads * W>(length));
    const int rank = groups.rank(), step = groups.size * W;
    const int first = static_cast<unsigned>(rotation) * kRotation % static_cast<unsigned>(rows);
#pragma unroll 1
    for (int i0 = 0; i0 < rows; i0 += groups.count()) {
      const int i = i0 + groups.group();
      const bool exists = i < rows;
      const int row = !exists ? 0 : first + i < rows ? first + i : first + i - rows;
      const decltype(data) first_of_row = data + row * m.stride;
      A partial[kS]{};
#pragma unroll 1
      for (int k0 = rank * W; k0 < length; k0 += kLoads * step) {
        const decltype(data) from = first_of_row + k0;
        decltype(load<W>(data)) raw[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j) raw[j] = load<W>(from + (k0 + j * step < length ? j * step : 0));
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          if (k0 + j * step >= length) continue;
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
        for (int offset = groups.size / 2; offset > 0; offset /= 2) partial[s] += shuffle_xor(partial[s], offset);
        if (rank > 0 || !exists) continue;
        A& sum = sums[s * rows + row];
        sum = more ? sum + partial[s] : partial[s];
      }
    }
  });
}

// A vector v(s, k) = finish(fetch(s, k), s, k) to be staged, with four fetches in flight before the first is finished.
template <class Fetch, class Finish>
struct PipelinedVector {
  Fetch fetch;
  Finish finish;
};
template <class Fetch, class Finish>
__device__ PipelinedVector<Fetch, Finish> pipelined(Fetch fetch, Finish finish) {
  return {fetch, finish};
}

// chunk[k] = v(s, k0 + k) for k < length <= kGemvChunk, by a block of kThreads. A PipelinedVector overlaps its fetches.
template <class A, class V>
__device__ void stage_vector(A* chunk, int s, int k0, int length, const V& v) {
  for (int k = thread(); k < length; k += threads()) chunk[k] = v(s, k0 + k);
}
template <class A, class Fetch, class Finish>
__device__ void stage_vector(A* chunk, int s, int k0, int length, const PipelinedVector<Fetch, Finish>& v) {
  constexpr int kAll = kGemvChunk / kThreads;
  decltype(v.fetch(s, k0)) fetched[kAll]{};
#pragma unroll
  for (int j = 0; j < kAll; ++j) {
    if (const int k = thread() + j * kThreads; k < length) fetched[j] = v.fetch(s, k0 + k);
  }
#pragma unroll
  for (int j = 0; j < kAll; ++j) {
    if (const int k = thread() + j * kThreads; k < length) chunk[k] = v.finish(fetched[j], s, k0 + k);
  }
}

// chunk[s][k] = v(s, k0 + k) for k < length. v is not called for s >= samples, whose chunk is 0.
template <int kS, class A, class V>
__device__ void stage_chunk(A* chunk, int samples, int k0, int length, const V& v) {
  __syncthreads();  // all threads have read the last chunk
  for (int s = 0; s < kS; ++s) {
    if (s < samples) {
      stage_vector(chunk + s * kGemvChunk, s, k0, length, v);
    } else {
      for (int k = thread(); k < length; k += threads()) chunk[s * kGemvChunk + k] = 0;
    }
  }
  __syncthreads();
}

// sums[s][i] = sum_k m[i, k] v(s, k) for i < rows, k < depth.
// Shared memory: chunk [kS][kGemvChunk], sums [kS][rows]. All threads see the sums at the end.
template <int kS, class T, class A, class V>
__device__ void staged_gemv(const Matrix<T>& m, int rows, int depth, int samples, A* chunk, A* sums, int64_t rotation,
                            const V& v) {
  for (int k0 = 0; k0 < depth; k0 += kGemvChunk) {
    const int length = depth - k0 < kGemvChunk ? depth - k0 : kGemvChunk;
    stage_chunk<kS>(chunk, samples, k0, length, v);
    gemv<kS>(m.from(0, k0), rows, length, chunk, kGemvChunk, sums, rotation, k0 > 0);
  }
  __syncthreads();
}

// The numbers in shared memory that gemv_t needs for the warps of a block of kThreads.
template <class T>
constexpr int kWarpSums = kWarps * kWarp * 16 / sizeof(T);

// sums[s][j] = sum_k v[s * stride + k] m[k, j] for j < columns, k < depth; `more` adds to sums instead. All threads see
// the sums at the end. Shared memory: warps [kWarpSums]. A function of its own, so that it is compiled once for all
// kernels of a source.
template <int kS, class T, class A>
__noinline__ __device__ void gemv_t(Matrix<T> m, int depth, int columns, const A* v, int stride, A* warps, A* sums,
                                    bool more = false) {
  assume_shared(v), assume_shared(warps), assume_shared(sums);
  constexpr int kRows = kS == 1 ? 4 : 1;
  with_weights(m, columns, [&](const auto* data, auto weights) {
    constexpr int W = decltype(weights)::value;
    const Groups by_row(threads_along<W>(columns));
    const int rank = by_row.rank(), columns_per_step = by_row.size * W, groups = by_row.count(),
              warp_count = threads() / kWarp;
#pragma unroll 1
    for (int j0 = 0; j0 < columns; j0 += columns_per_step) {
      const int column = j0 + rank * W;
      A partial[kS][W]{};
      if (column < columns) {
#pragma unroll 1
        for (int k0 = by_row.group(); k0 < depth; k0 += kRows * groups) {
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
        for (int offset = kWarp / 2; offset >= by_row.size; offset /= 2) {
#pragma unroll
          for (int i = 0; i < W; ++i) partial[s][i] += shuffle_xor(partial[s][i], offset);
        }
        if (thread() % kWarp < by_row.size) {
          A* to = warps + thread() / kWarp * columns_per_step + rank * W;
#pragma unroll
          for (int i = 0; i < W; ++i) to[i] = partial[s][i];
        }
        __syncthreads();
        for (int j = thread(); j < columns_per_step && j0 + j < columns; j += threads()) {
          A sum = more ? sums[s * columns + j0 + j] : A(0);
          for (int w = 0; w < warp_count; ++w) sum += warps[w * columns_per_step + j];
          sums[s * columns + j0 + j] = sum;
        }
        __syncthreads();
      }
    }
  });
}

// sums[s][j] = sum_k v(s, k) m[k, j] for j < columns, k < depth. Shared memory: chunk [kS][kGemvChunk], warps as for
// gemv_t, sums [kS][columns].
template <int kS, class T, class A, class V>
__device__ void staged_gemv_t(const Matrix<T>& m, int depth, int columns, int samples, A* chunk, A* warps, A* sums,
                              const V& v) {
  for (int k0 = 0; k0 < depth; k0 += kGemvChunk) {
    const int length = depth - k0 < kGemvChunk ? depth - k0 : kGemvChunk;
    stage_chunk<kS>(chunk, samples, k0, length, v);
    gemv_t<kS>(m.from(k0, 0), length, columns, chunk, kGemvChunk, warps, sums, k0 > 0);
  }
}

}  // namespace se::cuda
