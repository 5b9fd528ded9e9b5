// A CUDA device on one CPU thread, on which the replaced headers are built.
//
// Each CUDA thread is a fiber. The blocks of one cluster run at a time; a seed determines the order of clusters and
// threads. A fiber runs until a barrier or a shuffle. Shared memory is poisoned at first and again when its block ends.
// Every access to global memory is checked: it must be inside one watched buffer and aligned to its size, and data that
// is read by the read-only path must not be written in the same launch. Vector reads from shared memory are also
// checked, and the wavefronts that they would take are counted. An asynchronous copy arrives only when its thread waits
// for it; a transfer that an mbarrier counts arrives at some moment before the end of its phase. The first error is
// kept, the launch is abandoned, and std::runtime_error is raised.
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

// The indices of the running thread.
struct Position {
  Index thread, block;
  Index threads, blocks;  // threads of a block; blocks of the grid
};
const Position& position();
unsigned char* shared_memory();

// Called by a thread: ends the launch; the thread never runs again.
[[noreturn]] void fail(const std::string& what);

void sync_threads(const char* file, int line);
// relaxed: the thread's earlier writes are not made visible.
void cluster_arrive(bool relaxed);
void cluster_wait();
// The address that corresponds to p, an address in this block's shared memory, in the cluster's block `rank`.
const void* map_shared_rank(const void* p, unsigned rank);
// The same, for a read.
const void* read_shared_rank(const void* p, unsigned rank);
void copy_async(void* to, const void* from, size_t bytes);
void await_copies();
// An mbarrier is 8 bytes of shared memory; its state is kept elsewhere. push() writes to the address that corresponds
// to `mine` in the cluster's block `rank`, and counts at the corresponding mbarrier of that block.
void mbarrier_init(const void* mbarrier, unsigned count);
void mbarrier_arrive(const void* mbarrier, unsigned expected_bytes);
void mbarrier_wait(const void* mbarrier, unsigned parity);
void copy_bulk(void* to, const void* from, size_t bytes, const void* mbarrier);
void push(const void* mine, const void* value, size_t bytes, const void* mbarrier, unsigned rank);
// Returns the value that the thread in lane (own lane ^ offset) passed to the same shuffle.
uint64_t shuffle_xor(unsigned mask, uint64_t value, int offset, const char* file, int line);

// Adds a buffer that kernels may access; `map`: whether its bytes are counted.
void watch(const char* name, const void* begin, size_t bytes, bool map);
void forget_all();
struct Wavefronts {
  int64_t taken, least;
};
struct Counters {
  int64_t map_bytes_read, map_bytes_written;
  int64_t wide_accesses, narrow_accesses;         // accesses to maps: 16-byte ones, and smaller ones
  Wavefronts shared_reads[9];                     // vector reads from shared memory, by the bytes of an element
  std::set<std::pair<unsigned, unsigned>> slept;  // block and nanoseconds
};
Counters& counters();
// kReadOnly: the read-only path may return the data from before the launch, so the launch must not write that data.
enum class Use { kRead, kReadOnly, kWrite };
void check_access(const void* p, size_t bytes, Use use = Use::kRead);
void begin_launch();
bool in_shared_memory(const void* p, size_t bytes);  // of this block's shared memory
void check_shared_read(const void* p, size_t bytes, size_t element);

// Counts the runtime calls of the launching code. If only_counts is set, no kernel runs.
struct Runtime {
  std::atomic<int> set_attribute, get_device, launch;
  bool only_counts;
  static inline thread_local int device;  // the current one
};
inline Runtime runtime{};

inline int fault = -1;  // the number of the planted fault that the kernels have, in a library with faults

// The dynamic shared memory that every launch may have, and the larger limit that a kernel may set on the current
// device.
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
// Reads a vector whose elements have `element` bytes.
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
