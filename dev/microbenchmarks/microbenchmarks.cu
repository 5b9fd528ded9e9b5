// What:   compares bulk copies and pushes with the methods of the cluster kernels, each alone.
//           exchange   every block of a cluster has `count` numbers, and sums those of all blocks in the order of their
//                      ranks; this is repeated `rounds` times
//           stage      a block copies its `bytes` of global memory into shared memory and sums them
// Needs:  sm_90.
// Why:    they show whether bulk copies and pushes would make the cluster kernels faster.
#include <exception>
#include <string>

#include "async.cuh"

namespace se::cuda {
namespace {

#ifdef SE_FUSED_HAS_CLUSTERS
// The numbers of block `rank` in round `round`. They are small integers, so that every sum is exact.
__device__ inline float number(int rank, int i, int round) {
  return static_cast<float>((rank + 1) * (i % 7) + round % 5);
}
#endif

// out [blocks, count]: the sums of all rounds. The method of csrc/cuda/cluster.cuh: a barrier of the cluster, then
// reads of the other blocks' shared memory. There are two buffers, because a block may be one round ahead of its
// readers.
__global__ void __launch_bounds__(kThreads) exchange_by_barrier(float* out, int count, int size, int rounds) {
#ifdef SE_FUSED_HAS_CLUSTERS
  const Cluster cluster(size);
  float* parts = shared_memory<float>();  // [2][count]
  const int i = static_cast<int>(threadIdx.x);
  float total = 0;
  for (int round = 0; round < rounds; ++round) {
    float* mine = parts + round % 2 * count;
    if (i < count) mine[i] = number(cluster.rank, i, round);
    cluster.sync();
    if (i < count) total += cluster.sum(mine, i);
  }
  if (i < count) store_one(out + int64_t{blockIdx.x} * count + i, total);
  cluster.sync();
#else
  __trap();
#endif
}

// The same by pushes, again with two buffers and two mbarriers. Thread i writes slot i of another block again two
// rounds later, after that block's push of the round between, which its thread i makes after it has read that slot.
__global__ void __launch_bounds__(kThreads) exchange_by_push(float* out, int count, int size, int rounds) {
#ifdef SE_FUSED_HAS_CLUSTERS
  const Cluster cluster(size);
  Mbarrier* arrived = shared_memory<Mbarrier>();         // [2]
  float* slots = reinterpret_cast<float*>(arrived + 2);  // [2][size][count]
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) {
    arrived[0].init(1);
    arrived[1].init(1);
  }
  cluster.sync();
  float total = 0;
  for (int round = 0; round < rounds; ++round) {
    const int buffer = round % 2;
    float* from = slots + buffer * size * count;
    if (i == 0) arrived[buffer].arrive(static_cast<unsigned>(size * count * sizeof(float)));
    if (i < count) {
      const float value = number(cluster.rank, i, round);
      for (int rank = 0; rank < size; ++rank) push(from + cluster.rank * count + i, value, arrived + buffer, rank);
    }
    if (i < count) {  // nobody waits for a thread that pushes nothing, so it could miss a whole phase
      arrived[buffer].wait(round / 2 % 2);
      for (int rank = 0; rank < size; ++rank) total += from[rank * count + i];
    }
  }
  if (i < count) store_one(out + int64_t{blockIdx.x} * count + i, total);
  cluster.sync();
#else
  __trap();
#endif
}

#ifdef SE_FUSED_HAS_CLUSTERS
// out[block]: the sum of the threads' sums.
__device__ inline void store_sum(float* out, float sum, float* warps) {
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kWarps; ++warp) sum += warps[warp];
  store_one(out + blockIdx.x, sum);
}

__device__ inline float sum_of(const float* staged, int begin, int end) {
  float sum = 0;
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) sum += staged[i];
  return sum;
}
#endif

// The method of csrc/cuda/staged_tile.cuh: 16-byte copies by all threads.
__global__ void __launch_bounds__(kThreads) stage_by_threads(const float* from, float* out, int bytes, int) {
#ifdef SE_FUSED_HAS_CLUSTERS
  float* warps = shared_memory<float>();  // [kWarps]
  float* staged = warps + kWarps;
  from += int64_t{blockIdx.x} * bytes / 4;
  for (int i = static_cast<int>(threadIdx.x) * 4; i < bytes / 4; i += kThreads * 4) {
    __pipeline_memcpy_async(staged + i, from + i, 16);
  }
  await_copies();
  store_sum(out, sum_of(staged, 0, bytes / 4), warps);
#else
  __trap();
#endif
}

// The same in `chunks` bulk copies; each is summed while the next ones are in flight.
__global__ void __launch_bounds__(kThreads) stage_by_bulk(const float* from, float* out, int bytes, int chunks) {
#ifdef SE_FUSED_HAS_CLUSTERS
  float* warps = shared_memory<float>();                            // [kWarps]
  Mbarrier* arrived = reinterpret_cast<Mbarrier*>(warps + kWarps);  // [kWarps], of which `chunks` are used
  float* staged = reinterpret_cast<float*>(arrived + kWarps);
  from += int64_t{blockIdx.x} * bytes / 4;
  auto begin = [&](int chunk) { return bytes / 16 * chunk / chunks * 4; };
  if (threadIdx.x == 0) {
    for (int chunk = 0; chunk < chunks; ++chunk) arrived[chunk].init(1);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const auto size = static_cast<unsigned>((begin(chunk + 1) - begin(chunk)) * sizeof(float));
      arrived[chunk].arrive(size);
      copy_bulk(staged + begin(chunk), from + begin(chunk), size, arrived + chunk);
    }
  }
  __syncthreads();
  float sum = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    arrived[chunk].wait(0);
    sum += sum_of(staged, begin(chunk), begin(chunk + 1));
  }
  store_sum(out, sum, warps);
#else
  __trap();
#endif
}

template <class... Parameters, class... Arguments>
const char* run(void (*kernel)(Parameters...), int blocks, int cluster, size_t shared_bytes, void* stream,
                const Arguments&... arguments) try {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
} catch (const std::exception& error) {
  static thread_local std::string text;
  text = error.what();
  return text.c_str();
}

}  // namespace
}  // namespace se::cuda

// The functions that Python calls through ctypes. They return null or an error. `size` is the blocks per cluster and
// divides `blocks`; count <= kThreads; bytes is a multiple of 16; chunks <= 8.
#define SE_MICROBENCHMARK extern "C" __attribute__((visibility("default"))) const char*

SE_MICROBENCHMARK microbenchmark_exchange(int by_push, float* out, int blocks, int size, int count, int rounds,
                                          void* stream) {
  using namespace se::cuda;
  const size_t bytes = by_push ? 2 * (sizeof(uint64_t) + size * count * sizeof(float)) : 2 * count * sizeof(float);
  return run(by_push ? exchange_by_push : exchange_by_barrier, blocks, size, bytes, stream, out, count, size, rounds);
}

SE_MICROBENCHMARK microbenchmark_stage(int by_bulk, const float* from, float* out, int blocks, int bytes, int chunks,
                                       void* stream) {
  using namespace se::cuda;
  const size_t shared = kWarps * (sizeof(float) + sizeof(uint64_t)) + bytes;
  return run(by_bulk ? stage_by_bulk : stage_by_threads, blocks, 1, shared, stream, from, out, bytes, chunks);
}
