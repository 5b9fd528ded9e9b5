// What:   dw2 = dp2^T h, db2 = sum_n dp2, dw1 = dp1^T z, db1 = sum_n dp1, all in one launch.
// Grid:   one block per 32 x 32 tile of dw2, then of dw1. The blocks of the first column of tiles also sum the bias.
// Bytes:  reads the small vectors once per tile of rows or columns and writes the gradients once.
// Needs:  nothing: it runs for any shape and device.
// Why:    one block has the whole of a tile and adds the samples in their order. There are no atomics, and two
//         runs give the same bits.
#include "backward.cuh"
#include "launch.cuh"

namespace se::cuda {
namespace {

constexpr int kRowsPerThread = kColumns / kWarps;

// out[i, j] = sum_n a(n, i) b(n, j) for the tile that begins at row i0 and column j0, and sums[i] = sum_n a(n, i).
// Either output may be null.
template <class A, class W, class Rows, class Columns>
__device__ void outer_product(W* out, W* sums, int64_t samples, int64_t rows, int64_t columns, int64_t i0, int64_t j0,
                              Rows&& a, Columns&& b) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  A *tile_a = shared_memory<A>(), *tile_b = tile_a + kColumns * kColumns;  // [sample][row or column]
  A products[kRowsPerThread]{}, sum[kRowsPerThread]{};
  for (int64_t n0 = 0; n0 < samples; n0 += kColumns) {
    __syncthreads();
    for (int s = warp; s < kColumns; s += kWarps) {
      const bool exists = n0 + s < samples;
      tile_a[s * kColumns + lane] = exists && i0 + lane < rows ? a(n0 + s, i0 + lane) : A(0);
      tile_b[s * kColumns + lane] = exists && j0 + lane < columns ? b(n0 + s, j0 + lane) : A(0);
    }
    __syncthreads();
    for (int s = 0; s < kColumns; ++s) {
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        const A value = tile_a[s * kColumns + warp + i * kWarps];
        products[i] += value * tile_b[s * kColumns + lane];
        sum[i] += value;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int64_t row = i0 + warp + i * kWarps;
    if (row >= rows) continue;
    if (out && j0 + lane < columns) store_one(out + row * columns + j0 + lane, products[i]);
    if (sums && j0 == 0 && lane == 0) store_one(sums + row, sum[i]);
  }
}

template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<false, A>)
    weight_gradients_kernel(const __grid_constant__ Backward f, Partial<A> partial, const A* dp1) {
  auto z = [&](int64_t n, int64_t i) { return load_one(static_cast<const A*>(f.z) + n * f.c + i); };
  auto h = [&](int64_t n, int64_t i) {
    if (f.r == 0) return z(n, i);
    return activate_one(f.options.act, f.options, load_one(static_cast<const A*>(f.p1) + n * f.r + i));
  };
  auto tiles = [](int64_t size) { return static_cast<unsigned>((size + kColumns - 1) / kColumns); };
  const int64_t depth = f.r ? f.r : f.c;
  const unsigned depth_tiles = tiles(depth), channel_tiles = tiles(f.c), second = channel_tiles * depth_tiles;
  with_weight_type<T>(f.weight_dtype, [&](auto type) {
    using W = decltype(type);
    if (blockIdx.x < second) {
      if (!f.dw2 && !f.db2) return;
      outer_product<A>(
          static_cast<W*>(f.dw2), static_cast<W*>(f.db2), f.n, f.c, depth, int64_t{blockIdx.x / depth_tiles} * kColumns,
          int64_t{blockIdx.x % depth_tiles} * kColumns,
          [&](int64_t n, int64_t i) { return gate_gradient(f, n, i, partial.gate(f, n, i)); }, h);
    } else {
      if (!f.dw1 && !f.db1) return;
      const unsigned tile = blockIdx.x - second;
      outer_product<A>(
          static_cast<W*>(f.dw1), static_cast<W*>(f.db1), f.n, f.r, f.c, int64_t{tile / channel_tiles} * kColumns,
          int64_t{tile % channel_tiles} * kColumns, [&](int64_t n, int64_t i) { return load_one(dp1 + n * f.r + i); },
          z);
    }
  });
}

}  // namespace

template <class A>
void launch_weight_gradients(const Backward& f, const Plan& plan, const Partial<A>& partial, const A* dp1,
                             void* stream) {
  with_map_type(f.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<Accumulator<T>, A>) {
      launch(plan, "weight_gradients", stream, weight_gradients_kernel<T>, f, partial, dp1);
    }
  });
}
template void launch_weight_gradients(const Backward&, const Plan&, const Partial<float>&, const float*, void*);
template void launch_weight_gradients(const Backward&, const Plan&, const Partial<double>&, const double*, void*);

}  // namespace se::cuda
