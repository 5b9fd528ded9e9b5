// The two fully connected layers and their gradients: matrix-vector products for a few samples at once. Tiles of
// accumulators in registers let a matrix be read once for several samples, and a sample once for several rows. The
// order of each sum depends only on its length, not on the tile, the number of samples or the threads.
#pragma once

#include "simd.h"

namespace se::cpu {
namespace {

// A tile has 4 x 2 accumulators, each a vector: eight are enough to hide the latency of a multiply-add, and they leave
// registers for operands.
constexpr int kTileLong = 4, kTileShort = 2;
// Rows of a tile for a single sample, and the unit in which rows are divided among threads.
template <class A>
constexpr int kRowBlock = kWidth<A> > kTileLong* kTileShort ? kWidth<A> : kTileLong * kTileShort;

using One = std::integral_constant<int, 1>;

// body(i, size) for tiles of [begin, end), first of size kTile, then of size 1. The size is a compile-time constant.
template <int kTile, class Body>
SE_INLINE void for_each_tile(int64_t begin, int64_t end, Body&& body) {
  int64_t i = begin;
  for (; i + kTile <= end; i += kTile) body(i, std::integral_constant<int, kTile>{});
  for (; i < end; ++i) body(i, One{});
}

// body(i, size, V{}) for tiles of elements [begin, end) of a row: first of kTile vectors, then of one vector, then of
// one element.
template <int kTile, class A, class Body>
SE_INLINE void for_each_vector_tile(int64_t begin, int64_t end, Body&& body) {
  int64_t i = begin;
  for (; i + kTile * kWidth<A> <= end; i += kTile * kWidth<A>) body(i, std::integral_constant<int, kTile>{}, Vec<A>{});
  for_each_vector<A>(end - i, [&](int64_t j, auto type) { body(i + j, One{}, type); });
}

// Clears the sums one by one: GCC would clear a whole array by a string instruction that takes longer than the tile.
template <class V, int kI, int kJ>
SE_INLINE void clear(V (&sums)[kI][kJ]) {
  for (auto& row : sums) {
    for (V& sum : row) sum = V{};
  }
}

// out[n, i] = bias[i] + sum_k m[i, k] v[n, k] for rows i in [i0, i1) and samples n in [n0, n1). m is [I, K], v [N, K],
// out [N, I]; bias may be null.
template <class A, class W>
void gemv(const W* m, const W* bias, const A* v, A* out, int64_t rows, int64_t depth, int64_t n0, int64_t n1,
          int64_t i0, int64_t i1) {
  auto tile = [&](int64_t i, int64_t n, auto tile_rows, auto tile_samples) {
    constexpr int kI = decltype(tile_rows)::value, kN = decltype(tile_samples)::value;
    Vec<A> sums[kI][kN];
    A rest[kI][kN];
    clear(sums);
    clear(rest);
    int64_t k = 0;
    for (; k + kWidth<A> <= depth; k += kWidth<A>) {
      for (int b = 0; b < kI; ++b) {
        const auto weights = load<Vec<A>>(m + (i + b) * depth + k);
        for (int s = 0; s < kN; ++s) {
          sums[b][s] = multiply_add(weights, load<Vec<A>>(v + (n + s) * depth + k), sums[b][s]);
        }
      }
    }
    for (; k < depth; ++k) {
      for (int b = 0; b < kI; ++b) {
        for (int s = 0; s < kN; ++s) {
          rest[b][s] = multiply_add(load<A>(m + (i + b) * depth + k), v[(n + s) * depth + k], rest[b][s]);
        }
      }
    }
    if constexpr (kN == 1 && kI % kWidth<A> == 0) {
      for (int b = 0; b < kI; b += kWidth<A>) {
        const Vec<A> sum = horizontal_sums<A>(&sums[b][0]) + load<Vec<A>>(&rest[b][0]);
        store(out + n * rows + i + b, bias ? sum + load<Vec<A>>(bias + i + b) : sum);
      }
      return;
    }
    for (int b = 0; b < kI; ++b) {
      for (int s = 0; s < kN; ++s) {
        const A sum = horizontal_sum<A>(sums[b][s]) + rest[b][s];
        out[(n + s) * rows + i + b] = bias ? sum + load<A>(bias + i + b) : sum;
      }
    }
  };
  if (n1 - n0 == 1) {
    return for_each_tile<kRowBlock<A>>(i0, i1, [&](int64_t i, auto tile_rows) { tile(i, n0, tile_rows, One{}); });
  }
  for_each_tile<kTileLong>(i0, i1, [&](int64_t i, auto tile_rows) {
    for_each_tile<kTileShort>(n0, n1, [&](int64_t n, auto tile_samples) { tile(i, n, tile_rows, tile_samples); });
  });
}

// The transposed product: out[n, j] = sum_k m[k, j] a[n, k] for columns j in [j0, j1) and samples n in [n0, n1). m is
// [K, J], a [N, K], out [N, J].
template <class A, class W>
void gemv_t(const W* m, const A* a, A* out, int64_t depth, int64_t columns, int64_t n0, int64_t n1, int64_t j0,
            int64_t j1) {
  for_each_tile<kTileShort>(n0, n1, [&](int64_t n, auto tile_samples) {
    for_each_vector_tile<kTileLong, A>(j0, j1, [&](int64_t j, auto tile_columns, auto type) {
      using V = decltype(type);
      constexpr int kJ = decltype(tile_columns)::value, kN = decltype(tile_samples)::value;
      constexpr int kStep = sizeof(V) / sizeof(A);
      V sums[kN][kJ];
      clear(sums);
      for (int64_t k = 0; k < depth; ++k) {
        for (int b = 0; b < kJ; ++b) {
          const V row = load<V>(m + k * columns + j + b * kStep);
          for (int s = 0; s < kN; ++s) sums[s][b] = multiply_add(splat<V>(a[(n + s) * depth + k]), row, sums[s][b]);
        }
      }
      for (int s = 0; s < kN; ++s) {
        for (int b = 0; b < kJ; ++b) store(out + (n + s) * columns + j + b * kStep, sums[s][b]);
      }
    });
  });
}

// out[i, j] = sum_n a[n, i] b[n, j] and bias[i] = sum_n a[n, i] for rows i in [i0, i1). out and bias may be null.
template <class A, class W>
void sum_outer_products(const A* a, const A* b, W* out, W* bias, int64_t samples, int64_t rows, int64_t columns,
                        int64_t i0, int64_t i1) {
  for (int64_t i = i0; bias && i < i1; ++i) {
    A sum = 0;
    for (int64_t n = 0; n < samples; ++n) sum += a[n * rows + i];
    store(bias + i, sum);
  }
  if (!out) return;
  for_each_tile<kTileLong>(i0, i1, [&](int64_t i, auto tile_rows) {
    for_each_vector_tile<kTileShort, A>(0, columns, [&](int64_t j, auto tile_columns, auto type) {
      using V = decltype(type);
      constexpr int kI = decltype(tile_rows)::value, kJ = decltype(tile_columns)::value;
      constexpr int kStep = sizeof(V) / sizeof(A);
      V sums[kI][kJ];
      clear(sums);
      for (int64_t n = 0; n < samples; ++n) {
        for (int t = 0; t < kJ; ++t) {
          const V row = load<V>(b + n * columns + j + t * kStep);
          for (int s = 0; s < kI; ++s) sums[s][t] = multiply_add(splat<V>(a[n * rows + i + s]), row, sums[s][t]);
        }
      }
      for (int s = 0; s < kI; ++s) {
        for (int t = 0; t < kJ; ++t) store(out + (i + s) * columns + j + t * kStep, sums[s][t]);
      }
    });
  });
}

}  // namespace
}  // namespace se::cpu
