// The device's state: threads as fibers, the blocks of a cluster, what is under way to them. Shared by machine.cpp,
// which schedules, and async.cpp.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "machine.h"

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;  // of address space; pages come as they are touched

enum class State { kReady, kBarrier, kCluster, kShuffle, kMbarrier, kDone };

// Where a stack was left. swapcontext changes the signal mask by a system call each time, which took a third of all
// time; so it only starts a fiber, and _setjmp and _longjmp go on.
struct Place {
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
  int waiting, done;       // threads
  std::vector<int> ready;  // and those that can run
};

struct Fiber {
  Place place;
  void* stack = nullptr;
  State state;
  Block* block;
  Index thread;
  int number;                // in the cluster
  int arrived, waited;       // at so many of the cluster's barriers
  std::vector<Copy> copies;  // under way
  const char* file;          // where it waits
  int line;
  unsigned mask;  // of a shuffle, with its value and partner
  uint64_t value;
  int partner;
  const void* mbarrier;  // that it waits at
};

struct Mbarrier {
  unsigned count;           // arrivals of a phase
  int64_t arrivals, bytes;  // that the present phase waits for; bytes may come before they are expected
  unsigned phase;
};

// Bytes on their way to shared memory, and the mbarrier that counts them when they are there.
struct Transfer {
  unsigned char* to;
  std::vector<unsigned char> data;
  const void* mbarrier;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Place scheduler;
  void* scheduler_fake_stack;
  const void* scheduler_stack;
  size_t scheduler_stack_size;
  Fiber* now = nullptr;
  Position position;
  std::vector<Block> blocks;  // of the cluster
  int threads;                // of a block
  int arrived, phase;         // threads at the cluster's present barrier; barriers that are over
  std::vector<bool> relaxed;  // whether an arrival at each of those, or at the present one, was
  const std::function<void()>* kernel;
  std::map<const void*, Mbarrier> mbarriers;  // by their place in shared memory
  std::vector<Transfer> transfers;
  std::string error;
  std::mt19937_64 random;
};
extern Machine machine;

// Called inside a thread, which goes on when it has been woken.
void wait(State state, const char* file, int line);
void wake(Fiber& fiber);
bool lies_in(const Block& block, const void* p, size_t bytes);

// One of the transfers, drawn by the seed, arrives.
void deliver();
// After the last thread of `block`; of the cluster's last block, also for the cluster.
void check_end(const Block& block, bool last);

// Of shared memory by vectors (shared.cpp): at the start of a cluster of so many threads, and where threads
// [fiber, fiber + fibers), whole warps, have come together.
void forget_reads(int fibers);
void count_reads(int fiber, int fibers);

}  // namespace emulator
