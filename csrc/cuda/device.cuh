// What every kernel uses: element types, 2- to 16-byte accesses, warp reductions, shared memory.
// Kernels access global memory only through load, load_streaming, load_one and store, and get their shared memory only
// from shared_memory(), so that dev/emulator can run the same sources on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../plan.h"
#include "../se.h"

namespace se::cuda {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;
// Minimum blocks per SM for __launch_bounds__ of two_pass. They set the registers per thread: 4 blocks allow 64, 3
// allow 80 and 2 allow 128. With fewer registers the compiler spills: 64 suffice only for the plain forms on sm_90;
// float64 and the general form of backward need 128. Three blocks of 256 threads with four 16-byte loads each have 48
// KB in flight; at a latency of 1 us the 4.3 TB/s of an H200 need 32 KB on each of its 132 SMs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kPlainBlocks = 4;
#else
constexpr int kPlainBlocks = 3;
#endif
template <bool kPlain, class A>
constexpr int kForwardBlocks = sizeof(A) == 8 ? 2
                               : kPlain       ? kPlainBlocks
                                              : 3;
template <bool kPlain, class A>
constexpr int kBackwardBlocks = sizeof(A) == 8 || !kPlain ? 2 : 3;

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int threads() { return static_cast<int>(blockDim.x); }

// The threads of a block in groups of `size`, a power of two.
struct Groups {
  int size, shift;

  __device__ explicit Groups(int size) : size(size) { shift = __popc(size - 1); }
  __device__ int rank() const { return thread() & (size - 1); }
  __device__ int group() const { return thread() >> shift; }
  __device__ int count() const { return threads() >> shift; }
};

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ Accumulator<T> widen(T v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(v);
  } else {
    return v;
  }
}

template <class T>
__device__ T narrow(Accumulator<T> v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

// The type of a kBytes-byte access.
template <int kBytes>
struct Access;
template <>
struct Access<2> {
  using Type = unsigned short;
};
template <>
struct Access<4> {
  using Type = unsigned int;
};
template <>
struct Access<8> {
  using Type = uint2;
};
template <>
struct Access<16> {
  using Type = uint4;
};

// V consecutive elements as one access loads them. Loads return it by value, because reading 16 bytes of shared memory
// in place, element by element, would take eight accesses.
template <int V, class T>
struct Vector {
  typename Access<V * sizeof(T)>::Type raw;

  __device__ void unpack(Accumulator<T> (&v)[V]) const {
    T elements[V];
    memcpy(elements, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = widen(elements[i]);
  }
};

// Loads from memory that the launch does not write. For all loads p is aligned to V * sizeof(T).
template <int V, class T>
__device__ Vector<V, T> load(const T* p) {
  return {__ldg(reinterpret_cast<const typename Access<V * sizeof(T)>::Type*>(p))};
}

// Loads what is not read again, so that it is evicted first from the caches. The load is coherent, because y may be
// written over x.
template <int V, class T>
__device__ Vector<V, T> load_streaming(const T* p) {
  return {__ldcs(reinterpret_cast<const typename Access<V * sizeof(T)>::Type*>(p))};
}

// Loads from shared memory.
template <int V, class T>
__device__ Vector<V, T> load_shared(const T* p) {
  const auto* raw = reinterpret_cast<const typename Access<V * sizeof(T)>::Type*>(p);
#ifdef __CUDACC__
  return {*raw};
#else
  return {emulator::read_shared(raw, sizeof(T))};
#endif
}

// Lets a function that is not inlined access what its parameter points to as shared memory.
__device__ inline void assume_shared([[maybe_unused]] const void* p) {
#ifdef __CUDACC__
  __builtin_assume(__isShared(p));
#endif
}

template <class T>
__device__ Accumulator<T> load_one(const T* p) {
  Accumulator<T> v[1];
  load<1>(p).unpack(v);
  return v[0];
}

// A plain store, because the compiler moves no memory access past __stwb. 16 bytes are stored as one __int128, because
// the compiler may store each member of a uint4 alone.
template <class Raw>
__device__ void write_global(Raw* p, const Raw& raw) {
#ifdef __CUDACC__
  if constexpr (sizeof(Raw) == 16) {
    __int128 whole;
    memcpy(&whole, &raw, sizeof(whole));
    *reinterpret_cast<__int128*>(p) = whole;
  } else {
    *p = raw;
  }
#else
  emulator::write(p, raw);
#endif
}

// Leaves the data in the L2, as any store does, because the next layer reads it.
template <int V, class T>
__device__ void store(T* p, const Accumulator<T> (&v)[V]) {
  T elements[V];
#pragma unroll
  for (int i = 0; i < V; ++i) elements[i] = narrow<T>(v[i]);
  typename Access<V * sizeof(T)>::Type raw;
  memcpy(&raw, elements, sizeof(raw));
  write_global(reinterpret_cast<typename Access<V * sizeof(T)>::Type*>(p), raw);
}

template <class T>
__device__ void store_one(T* p, Accumulator<T> v) {
  const Accumulator<T> one[1] = {v};
  store<1>(p, one);
}

// Prefetches the cache line of p into the L2.
__device__ inline void prefetch(const void* p) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  emulator::check_access(p, 1);
#endif
}

// The index of an element: `at` in its map, `e` in the staged tile of the block.
struct Index {
  int64_t at;
  unsigned e;
};

// The places from which a kernel reads a map: Global, global memory; Streamed, global memory for the last time;
// StagedTile, shared memory. kAhead: loads in flight per thread. Shared memory needs fewer, because other threads hide
// its latency.
template <class T>
struct Global {
  static constexpr int kAhead = 4;
  const T* map;
  template <int V>
  __device__ Vector<V, T> load(Index i) const {
    return cuda::load<V>(map + i.at);
  }
};
template <class T>
struct Streamed {
  static constexpr int kAhead = 4;
  const T* map;
  template <int V>
  __device__ Vector<V, T> load(Index i) const {
    return load_streaming<V>(map + i.at);
  }
};
template <class T>
struct StagedTile {
  static constexpr int kAhead = 2;
  T* memory;
  template <int V>
  __device__ Vector<V, T> load(Index i) const {
    return load_shared<V>(memory + i.e);
  }
};

// finish(i, fetch(i)) for i = first, first + step, ... < end. kAhead fetches precede the first finish, so that as many
// loads are in flight.
template <int kAhead, class Fetch, class Finish>
__device__ void in_batches(unsigned first, unsigned end, unsigned step, Fetch&& fetch, Finish&& finish) {
  decltype(fetch(first)) fetched[kAhead]{};
  unsigned i = first;
  for (; i + (kAhead - 1) * step < end; i += kAhead * step) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) fetched[j] = fetch(i + j * step);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) finish(i + j * step, fetched[j]);
  }
  if constexpr (kAhead > 1) {
#pragma unroll
    for (int j = 0; j < kAhead - 1; ++j) {
      if (i + j * step < end) fetched[j] = fetch(i + j * step);
    }
#pragma unroll
    for (int j = 0; j < kAhead - 1; ++j) {
      if (i + j * step < end) finish(i + j * step, fetched[j]);
    }
  }
}

// The index in partial results [N, splits, C] of a row of [N, C]. Most calls have one split and skip the 64-bit
// division, which is a long routine.
__device__ inline int64_t partial_index(int64_t row, unsigned split, int splits, int64_t c) {
  if (splits == 1) return row;
  const int64_t n = row / c;
  return (n * splits + split) * c + row - n * c;
}

// merge(partial[split * c]) for split = 1, ..., splits - 1; the caller has the first one already.
template <class A, class Merge>
__device__ void merge_splits(const A* partial, int splits, int64_t c, Merge&& merge) {
  in_batches<8>(
      1, splits, 1, [&](unsigned split) { return load_one(partial + split * c); },
      [&](unsigned, A value) { merge(value); });
}

// The maximum, which keeps a NaN as PyTorch's amax does; fmax would drop it.
template <class A>
__device__ A max_keep_nan(A a, A b) {
  return a != a || a > b ? a : b;
}

template <class A>
__device__ A shuffle_xor(A v, int offset) {
  return __shfl_xor_sync(0xffffffffu, v, offset);
}

// The sum over a warp, returned to every lane.
template <class A>
__device__ A warp_sum(A v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += shuffle_xor(v, offset);
  return v;
}

template <class T>
__device__ T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char memory[];
#else
  unsigned char* memory = emulator::shared_memory();
#endif
  return reinterpret_cast<T*>(memory);
}

// body(T()) for the element type of maps.
template <class Body>
void with_map_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float());
    case DType::kFloat64: return body(double());
    case DType::kFloat16: return body(__half());
    case DType::kBFloat16: return body(__nv_bfloat16());
  }
}

// Calls body(W()) for the type W of the weights: T, or float if T is half precision.
template <class T, class Body>
__device__ void with_weight_type(DType dtype, Body&& body) {
  if constexpr (sizeof(T) < sizeof(float)) {
    if (dtype == DType::kFloat32) return body(float());
  }
  body(T());
}

// Calls body(std::bool_constant<kPlain>()) for maps of T. float64 has only the general form, because it exists to check
// the other types.
template <class T, class Body>
void with_form(bool plain, Body&& body) {
  if constexpr (sizeof(T) < sizeof(double)) {
    if (plain) return body(std::true_type());
  }
  body(std::false_type());
}

// Calls body(std::integral_constant<int, V>()) for accesses of V elements. kHalfWide: whether 8-byte accesses of types
// smaller than 8 bytes are compiled.
template <class T, bool kHalfWide, class Body>
void with_vec_bytes(int bytes, Body&& body) {
  constexpr int kElement = sizeof(T);
  if constexpr (kElement < 8) {
    if (bytes == 16) return body(std::integral_constant<int, 16 / kElement>());
    if constexpr (kHalfWide) {
      if (bytes == 8) return body(std::integral_constant<int, 8 / kElement>());
    }
  }
  body(std::integral_constant<int, 1>());
}

}  // namespace se::cuda
