// What:   y = act(scale * x + shift + residual), an eval-mode BatchNorm and what follows it (se.h); and scale and shift
//         alone, for a forward call that has them. On any GPU from sm_75 on.
// Grid:   batch_norm: one block per tile of one sample's map; the block first computes scale and shift of its channels.
//         scale_shift: one thread per channel.
// Bytes:  reads x and the residual once and writes y once, in 16-byte accesses wherever the data allows.
// Needs:  nothing: it runs for any shape and alignment.
#include <cmath>

#include "activations.cuh"
#include "elementwise.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace se::cuda {
namespace {

// Computes scale and shift of one channel of a batch norm whose vectors are of W.
template <class W, class A>
__device__ void compute_scale_shift(const Norm& norm, int64_t channel, A& scale, A& shift) {
  auto element = [&](const void* vector, A otherwise) {
    return vector ? static_cast<A>(load_one(static_cast<const W*>(vector) + channel)) : otherwise;
  };
  const A variance = element(norm.variance, 1) + static_cast<A>(norm.epsilon);
  scale = element(norm.weight, 1) / std::sqrt(variance);
  shift = element(norm.bias, 0) - element(norm.mean, 0) * scale;
}

template <int V, class T, bool kPlain>
struct FetchedMaps {
  Vector<V, T> x, residual;
};
template <int V, class T>
struct FetchedMaps<V, T, true> {
  Vector<V, T> x;
};

// Computes y of a tile's elements (elementwise.cuh). scale, shift: those of its channels, in shared memory. kPlain:
// without a residual.
template <class T, bool kPlain>
struct NormOperation {
  using A = Accumulator<T>;
  static constexpr int kAhead = kPlain ? Streamed<T>::kAhead : Streamed<T>::kAhead / 2;  // of each map
  template <int V>
  using Fetched = FetchedMaps<V, T, kPlain>;
  template <int V>
  struct ChannelValues {
    A scale[V], shift[V];
  };

  const BatchNorm& f;
  const A *scale, *shift;

  template <int V>
  __device__ Fetched<V> fetch(Index at) const {
    Fetched<V> fetched{};
    fetched.x = load_streaming<V>(static_cast<const T*>(f.x) + at.at);
    if constexpr (!kPlain) {
      if (f.residual) fetched.residual = load_streaming<V>(static_cast<const T*>(f.residual) + at.at);
    }
    return fetched;
  }
  template <int V, class Load>
  __device__ ChannelValues<V> load_channels(Load&& load) const {
    ChannelValues<V> values{};
    load(scale, values.scale);
    load(shift, values.shift);
    return values;
  }
  template <int V>
  __device__ void finish(Index at, const ChannelValues<V>& values, const Fetched<V>& fetched) const {
    A v[V];
    fetched.x.unpack(v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = std::fma(v[i], values.scale[i], values.shift[i]);
    if constexpr (!kPlain) {
      A residual[V]{};
      if (f.residual) fetched.residual.unpack(residual);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] += residual[i];
    }
    activate<T>(f.act, Options{}, v);
    store<V>(static_cast<T*>(f.y) + at.at, v);
  }
};

template <class T, class Tile, bool kPlain, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<false, A>)
    batch_norm_kernel(const __grid_constant__ BatchNorm f, const __grid_constant__ Norm norm, Elementwise e,
                      Divisor by) {
  const Tile tile(f, e, by, blockIdx.x);
  A *scale = shared_memory<A>(), *shift = scale + padded(tile.channels);
  with_weight_type<T>(norm.dtype, [&](auto type) {
    for (int i = threadIdx.x; i < tile.channels; i += kThreads) {
      compute_scale_shift<decltype(type)>(norm, tile.c0 + i, scale[i], shift[i]);
    }
  });
  __syncthreads();
  tile.for_each_vector(NormOperation<T, kPlain>{f, scale, shift});
}

template <class W, class A = Accumulator<W>>
__global__ void __launch_bounds__(kThreads) scale_shift_kernel(Norm norm, A* scale, A* shift) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel >= norm.c) return;
  A k, b;
  compute_scale_shift<W>(norm, channel, k, b);
  store_one(scale + channel, k);
  store_one(shift + channel, b);
}

}  // namespace

void batch_norm(const BatchNorm& f, const Norm& norm, const Plan& plan, void* stream) {
  with_map_type(f.dtype, [&](auto type) {
    using T = decltype(type);
    with_tile<T>(plan.call, plan.elementwise, [&](auto* tile) {
      using Tile = std::remove_pointer_t<decltype(tile)>;
      with_form<T>(!f.residual, [&](auto plain) {
        launch(plan, "batch_norm", stream, batch_norm_kernel<T, Tile, plain.value>, f, norm, plan.elementwise,
               Divisor(f.l));
      });
    });
  });
}

void scale_shift(const Norm& norm, void* scale, void* shift, const Plan& plan, void* stream) {
  with_map_type(norm.dtype, [&](auto type) {
    using A = Accumulator<decltype(type)>;
    launch(plan, "scale_shift", stream, scale_shift_kernel<decltype(type)>, norm, static_cast<A*>(scale),
           static_cast<A*>(shift));
  });
}

}  // namespace se::cuda
