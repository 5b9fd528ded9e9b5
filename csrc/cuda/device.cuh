// What every kernel is made of: element types, 2- to 16-byte accesses, warp reductions, shared memory, the launch.
// The kernels touch global memory through load, load_streaming, load_one and store, take all their shared memory from
// shared_memory() and start through launch(), so that tests/cuda_on_cpu can run the same sources on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "../plan.h"
#include "../se.h"

namespace se::cuda {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;
// Blocks a multiprocessor must be able to hold: 64 registers a thread forward in float32, 128 else, where the general
// form (any activation, ties of the maximum) spills with fewer.
template <class A>
constexpr int kForwardBlocks = sizeof(A) == 8 ? 2 : 4;
constexpr int kBackwardBlocks = 2;

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

// The type of one access of so many bytes.
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

template <int V, class T, class Raw>
__device__ void unpack(const Raw& raw, Accumulator<T> (&v)[V]) {
  T elements[V];
  memcpy(elements, &raw, sizeof(raw));
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = widen(elements[i]);
}

// V consecutive elements, aligned to V * sizeof(T), of memory that the launch does not write.
template <int V, class T>
__device__ void load(const T* p, Accumulator<T> (&v)[V]) {
  unpack<V, T>(__ldg(reinterpret_cast<const typename Access<V * sizeof(T)>::Type*>(p)), v);
}

// The same for what is not read again: first to leave the caches. Coherent, because y may be written over x.
template <int V, class T>
__device__ void load_streaming(const T* p, Accumulator<T> (&v)[V]) {
  unpack<V, T>(__ldcs(reinterpret_cast<const typename Access<V * sizeof(T)>::Type*>(p)), v);
}

template <class T>
__device__ Accumulator<T> load_one(const T* p) {
  Accumulator<T> v[1];
  load<1>(p, v);
  return v[0];
}

// Not __stwb, past which the compiler moves no access to memory. 16 bytes are one number to it: of a uint4 it may store
// each member alone.
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
  cuda_on_cpu::write(p, raw);
#endif
}

// Left in the L2 as any store is: the next layer reads it.
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

// Where a kernel reads a map: Global, in global memory; Streamed, there for the last time; Resident, in shared memory,
// where a block's share of it begins with element `first` of the map. at: an index into the map.
template <class T>
struct Global {
  const T* map;
  template <int V>
  __device__ void load(int64_t at, Accumulator<T> (&v)[V]) const {
    cuda::load<V>(map + at, v);
  }
};
template <class T>
struct Streamed {
  const T* map;
  template <int V>
  __device__ void load(int64_t at, Accumulator<T> (&v)[V]) const {
    load_streaming<V>(map + at, v);
  }
};
template <class T>
struct Resident {
  T* slab;
  int64_t first;
  template <int V>
  __device__ void load(int64_t at, Accumulator<T> (&v)[V]) const {
    unpack<V, T>(*reinterpret_cast<const typename Access<V * sizeof(T)>::Type*>(slab + (at - first)), v);
  }
};

// A NaN stays, as in PyTorch's amax; fmax would drop it.
template <class A>
__device__ A max_keep_nan(A a, A b) {
  return a != a || a > b ? a : b;
}

template <class A>
__device__ A shuffle_xor(A v, int offset) {
  return __shfl_xor_sync(0xffffffffu, v, offset);
}

// The sum over a warp, in every lane.
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
  unsigned char* memory = cuda_on_cpu::shared_memory();
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

// body(W()) for the element type of weights beside maps of T: T, or float beside half precision.
template <class T, class Body>
__device__ void with_weight_type(DType dtype, Body&& body) {
  if constexpr (sizeof(T) < sizeof(float)) {
    if (dtype == DType::kFloat32) return body(float());
  }
  body(T());
}

// body(std::integral_constant<int, V>()) for accesses of `bytes`; kHalfWide: whether 8 bytes of a smaller type are
// among them.
template <class T, bool kHalfWide, class Body>
void with_width(int bytes, Body&& body) {
  constexpr int kElement = sizeof(T);
  if constexpr (kElement < 8) {
    if (bytes == 16) return body(std::integral_constant<int, 16 / kElement>());
    if constexpr (kHalfWide) {
      if (bytes == 8) return body(std::integral_constant<int, 8 / kElement>());
    }
  }
  body(std::integral_constant<int, 1>());
}

inline void check(cudaError_t error, const char* name, const Plan& plan) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("se_fused: kernel ") + name + ": " + cudaGetErrorString(error) + "\n" +
                           plan.text());
}

// Lets `kernel` have, on the current device, clusters of 16 blocks and all the shared memory, in as many blocks as the
// plan counts on. Once, under a lock and before the first launch: another thread may be about to launch it too.
inline void allow_clusters(const void* kernel, const char* name, const Plan& plan) {
  static std::mutex mutex;  // of what follows
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check(cudaGetDevice(&device), name, plan);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  auto set = [&](cudaFuncAttribute attribute, int64_t value) {
    check(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(value)), name, plan);
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_per_block);
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  allowed.insert({kernel, device});
}

// `kernel` on the grid that the plan lists under `name`, in the clusters that it says.
template <class... Parameters, class... Arguments>
void launch(const Plan& plan, const char* name, void* stream, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  const Launch& planned = plan.launch(name);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(planned.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = planned.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(planned.cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = planned.cluster > 0;
  if (planned.cluster > 0) allow_clusters(reinterpret_cast<const void*>(kernel), name, plan);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name, plan);
}

}  // namespace se::cuda
