// A CUDA device on one CPU thread: what the stand-in headers are made of.
//
// One fiber per CUDA thread, the blocks of one cluster at a time, clusters and threads in an order drawn from a seed. A
// fiber runs until a barrier or a shuffle. Shared memory starts poisoned, and is poisoned again when its block ends.
// Every access to global memory is checked: it must lie inside one watched buffer and be aligned to its size, and what
// is read by the read-only path must not be written in the same launch. Vectors that are read from shared memory are
// checked as well, and the wavefronts counted that they would take. An asynchronous copy arrives when its thread waits
// for it, no sooner; what an mbarrier counts, at some moment before its phase ends. An error is kept, the launch
// abandoned, and std::runtime_error raised.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <utility>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

// The indices of the thread that runs now.
struct Position {
  Index thread, block;
  Index threads, blocks;  // in a block; in the grid
};
const Position& position();
unsigned char* shared_memory();

// Ends the launch from inside a thread, which never runs again.
[[noreturn]] void fail(const std::string& what);

void sync_threads(const char* file, int line);
// relaxed: what the thread wrote before is not published.
void cluster_arrive(bool relaxed);
void cluster_wait();
// The address in the shared memory of the cluster's block `rank` that p, which lies in this block's, has there.
const void* map_shared_rank(const void* p, unsigned rank);
// The same, to be read.
const void* read_shared_rank(const void* p, unsigned rank);
void copy_async(void* to, const void* from, size_t bytes);
void await_copies();
// An mbarrier is 8 bytes of shared memory; its state is kept elsewhere. Pushed bytes go to where `mine` lies in the
// shared memory of the cluster's block `rank`, and count at its mbarrier in the same place as this block's.
void mbarrier_init(const void* mbarrier, unsigned count);
void mbarrier_arrive(const void* mbarrier, unsigned expected_bytes);
void mbarrier_wait(const void* mbarrier, unsigned parity);
void copy_bulk(void* to, const void* from, size_t bytes, const void* mbarrier);
void push(const void* mine, const void* value, size_t bytes, const void* mbarrier, unsigned rank);
// The value that the thread in lane (own lane ^ offset) passed to the same shuffle.
uint64_t shuffle_xor(unsigned mask, uint64_t value, int offset, const char* file, int line);

// Buffers that kernels may touch; `map`: its bytes are counted.
void watch(const char* name, const void* begin, size_t bytes, bool map);
void forget_all();
struct Wavefronts {
  int64_t taken, least;
};
struct Counters {
  int64_t map_bytes_read, map_bytes_written;
  int64_t wide_accesses, narrow_accesses;         // of maps: of 16 bytes, and of less
  Wavefronts shared_reads[9];                     // of shared memory by vectors: by the bytes of an element
  std::set<std::pair<unsigned, unsigned>> slept;  // block and nanoseconds
};
Counters& counters();
// kReadOnly: by the path that may give what was there before the launch, and so of nothing that the launch writes.
enum class Use { kRead, kReadOnly, kWrite };
void check_access(const void* p, size_t bytes, Use use = Use::kRead);
void begin_launch();
bool in_shared_memory(const void* p, size_t bytes);  // of this block
void check_shared_read(const void* p, size_t bytes, size_t element);

// The runtime's calls by the code that launches, which can be counted alone, without a kernel that runs.
struct Runtime {
  std::atomic<int> set_attribute, get_device, launch;
  bool only_counts;
  static inline thread_local int device;  // the current one
};
inline Runtime runtime{};

// Dynamic shared memory of a launch: so much without leave, and what a kernel has leave for on the current device.
constexpr size_t kShared = 48 << 10;
void allow_shared(const void* kernel, size_t bytes);
size_t allowed_shared(const void* kernel);

void set_seed(uint64_t seed);
void run(Index grid, Index block, unsigned cluster, size_t shared_bytes, const std::function<void()>& kernel);

template <class T>
T read(const T* p) {
  check_access(p, sizeof(T));
  return *p;
}
template <class T>
T read_only(const T* p) {
  check_access(p, sizeof(T), Use::kReadOnly);
  return *p;
}
// A vector whose elements have so many bytes.
template <class T>
T read_shared(const T* p, size_t element) {
  check_shared_read(p, sizeof(T), element);
  return *p;
}
template <class T>
void write(T* p, const T& v) {
  check_access(p, sizeof(T), Use::kWrite);
  *p = v;
}
template <class T>
T atomic_add(T* p, T v) {
  if (!in_shared_memory(p, sizeof(T))) check_access(p, sizeof(T), Use::kWrite);
  const T before = *p;
  *p += v;
  return before;
}
template <class T>
T shuffle_xor(unsigned mask, T v, int offset, const char* file, int line) {
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  bits = shuffle_xor(mask, bits, offset, file, line);
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}

}  // namespace emulator
