// The state of the device: threads as fibers, the blocks of a cluster, and transfers to them. machine.cpp, the
// scheduler, and async.cpp use it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;  // of address space; a page is allocated when it is first touched

enum class State { kReady, kBarrier, kCluster, kShuffle, kMbarrier, kDone };

// The point at which a fiber was suspended. swapcontext makes a system call for the signal mask each time, which took a
// third of all time. So it only starts a fiber, and _setjmp and _longjmp resume it.
struct FiberContext {
  ucontext_t start;
  jmp_buf jump;
  bool started = false;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Block {
  Index index;
  std::vector<unsigned char> shared;
  int waiting, done;       // numbers of threads at the barrier; of threads that have ended
  std::vector<int> ready;  // threads that can run
};

struct Fiber {
  FiberContext context;
  void* stack = nullptr;
  State state = State::kReady;
  Block* block;
  Index thread;
  int number;                // in the cluster
  int arrived, waited;       // numbers of cluster barriers at which it has arrived; for which it has waited
  std::vector<Copy> copies;  // not yet waited for
  const char* file;          // where it waits
  int line;
  unsigned mask;  // of a shuffle, with its value and partner
  uint64_t value;
  int partner;
  const void* mbarrier;  // at which it waits
};

struct Mbarrier {
  unsigned count;           // arrivals of a phase
  int64_t arrivals, bytes;  // missing in the present phase; bytes may arrive before they are expected
  unsigned phase;
};

// Bytes in transit to shared memory, and the mbarrier that counts their arrival.
struct Transfer {
  unsigned char* to;
  std::vector<unsigned char> data;
  const void* mbarrier;
};

// SplitMix64 (Steele, Lea and Flood, 2014). std::mt19937_64 and its divisions took a tenth of all time.
struct Random {
  using result_type = uint64_t;
  uint64_t state = 0;

  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }
  uint64_t operator()() {
    uint64_t v = state += 0x9e3779b97f4a7c15;
    v = (v ^ v >> 30) * 0xbf58476d1ce4e5b9;
    v = (v ^ v >> 27) * 0x94d049bb133111eb;
    return v ^ v >> 31;
  }
  // A number below n, which is below 2^32.
  size_t below(size_t n) { return ((*this)() >> 32) * n >> 32; }
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  FiberContext scheduler;
  void* scheduler_fake_stack;
  const void* scheduler_stack;
  size_t scheduler_stack_size;
  Fiber* now = nullptr;
  Position position;
  std::vector<Block> blocks;  // of the cluster
  int threads;                // of a block
  int arrived, phase;         // threads that have arrived at the cluster's present barrier; barriers that have ended
  std::vector<bool> relaxed;  // for each of these barriers and the present one: whether an arrival was relaxed
  const std::function<void()>* kernel;
  std::map<const void*, Mbarrier> mbarriers;  // by their address in shared memory
  std::vector<Transfer> transfers;
  std::string error;
  Random random;
};
extern Machine machine;

// Called by a thread, which continues when another thread wakes it.
void wait(State state, const char* file, int line);
void wake(Fiber& fiber);
bool lies_in(const Block& block, const void* p, size_t bytes);

// Lets one transfer arrive, which the seed chooses.
void deliver();
// Checks the state after the last thread of `block`; `last`: also the cluster's state after its last block.
void check_end(const Block& block, bool last);

// Vector reads from shared memory (shared.cpp). forget_reads: a cluster of so many threads starts. count_reads: the
// threads [fiber, fiber + fibers), which are whole warps, have converged.
void forget_reads(int fibers);
void count_reads(int fiber, int fibers);

}  // namespace emulator
