// The scheduler: runs the fibers of one cluster at a time, and ends their barriers and shuffles.
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <sstream>
#include <stdexcept>

#include "state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

Machine machine;

namespace {

constexpr int kStay = 200;  // average steps before the scheduler switches to another block: rare, for the caches
// Stacks begin at different places in their pages, so that what the threads of a block use does not fall into the same
// sets of the cache.
constexpr int kColours = 64;
constexpr size_t kColour = 15 * 64;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

std::mutex allowed_mutex;                               // because hosts launch from many threads
std::map<std::pair<const void*, int>, size_t> allowed;  // bytes of shared memory, by kernel and device

void hop(FiberContext& from, FiberContext& to) {
  from.started = true;
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.start, &to.start);  // AddressSanitizer takes _longjmp for an exception
#else
  if (_setjmp(from.jump) != 0) return;
  if (to.started) _longjmp(to.jump, 1);
  setcontext(&to.start);
#endif
}

// AddressSanitizer must know which stack is running.
void to_scheduler([[maybe_unused]] bool for_good) {
  Fiber* self = machine.now;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, machine.scheduler_stack, machine.scheduler_stack_size);
#endif
  hop(self->context, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
}

void to_fiber(Fiber& fiber) {
  machine.now = &fiber;
  machine.position.thread = fiber.thread, machine.position.block = fiber.block->index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStack);
#endif
  hop(machine.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
  machine.now = nullptr;
}

// Runs the kernel for one thread after the other: a new context for each takes two system calls.
void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  while (true) {
    (*machine.kernel)();
    if (machine.now->waited < machine.now->arrived) fail("an end without a wait at the cluster's last barrier");
    machine.now->state = State::kDone;
    to_scheduler(false);
  }
}

void start(Fiber& fiber, int number, Index block) {
  const int thread = number % machine.threads;
  if (!fiber.stack) {
    fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber.stack == MAP_FAILED) throw std::bad_alloc();
  }
  if (fiber.state != State::kDone) {  // new, or left in the middle of a launch that failed
    fiber.context.started = false;
    getcontext(&fiber.context.start);
    fiber.context.start.uc_stack.ss_sp = fiber.stack;
    fiber.context.start.uc_stack.ss_size = kStack - number % kColours * kColour;
    fiber.context.start.uc_link = nullptr;
    makecontext(&fiber.context.start, fiber_main, 0);
  }
  fiber.state = State::kReady;
  fiber.number = number;
  fiber.arrived = fiber.waited = 0;
  fiber.copies.clear();
  fiber.block = &machine.blocks[number / machine.threads];
  fiber.thread = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
}

// Wakes the threads of a block when all of them wait at a barrier.
void end_barrier(Block& block) {
  const auto first = machine.fibers.begin() + (&block - machine.blocks.data()) * machine.threads;
  const auto end = first + machine.threads;
  for (auto fiber = first; fiber != end; ++fiber) {
    if ((*fiber)->line == (*first)->line && std::strcmp((*fiber)->file, (*first)->file) == 0) continue;
    machine.error = "divergent barrier: threads wait at lines " + std::to_string((*first)->line) + " and " +
                    std::to_string((*fiber)->line);
    return;
  }
  block.waiting = 0;
  count_reads((*first)->number, machine.threads);
  for (auto fiber = first; fiber != end; ++fiber) wake(**fiber);
}

// Wakes the lanes of a warp once all lanes in the mask have reached the same shuffle.
void try_shuffle(const Fiber& one, int count) {
  const int base = one.number / kWarp * kWarp;
  const auto takes_part = [&](int lane) { return lane < kWarp && (one.mask >> lane & 1); };
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!takes_part(lane)) continue;
    const Fiber* fiber = base + lane < count ? machine.fibers[base + lane].get() : nullptr;
    if (!fiber || fiber->state != State::kShuffle) return;
    if (fiber->mask != one.mask || fiber->line != one.line) {
      machine.error = "divergent shuffle at line " + std::to_string(one.line);
      return;
    }
  }
  uint64_t values[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (takes_part(lane)) values[lane] = machine.fibers[base + lane]->value;
  }
  if (one.mask == ~0u) count_reads(base, kWarp);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!takes_part(lane)) continue;
    Fiber& fiber = *machine.fibers[base + lane];
    if (!takes_part(fiber.partner)) {
      machine.error = "a shuffle at line " + std::to_string(one.line) + " reads a lane outside its mask";
      return;
    }
    fiber.value = values[fiber.partner];
    wake(fiber);
  }
}

std::string stuck(int count) {
  std::ostringstream out;
  out << "deadlock:";
  for (int i = 0; i < count; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    if (i > 0 && i % kWarp != 0 && fiber.state == machine.fibers[i - 1]->state) continue;
    out << " thread " << i << (fiber.state == State::kDone ? " has ended" : " waits");
    if (fiber.state == State::kCluster) {
      out << " for the cluster";
    } else if (fiber.state == State::kMbarrier) {
      out << " at an mbarrier";
    } else if (fiber.state != State::kDone) {
      out << " at line " << fiber.line;
    }
    out << ";";
  }
  return out.str();
}

void run_cluster(Index block, int count) {
  machine.arrived = machine.phase = 0;
  machine.relaxed.assign(1, false);
  forget_reads(count);
  machine.mbarriers.clear();
  machine.transfers.clear();
  for (int i = 0; i < count; ++i) {
    start(*machine.fibers[i], i, block);
    wake(*machine.fibers[i]);
  }
  int done = 0;
  // The average number of steps before a transfer arrives, or before all transfers arrive.
  const unsigned pace = 1u << machine.random.below(9);
  const bool all = machine.random.below(2) == 0;
  std::vector<int>* ready = &machine.blocks[0].ready;
  while (done < count && machine.error.empty()) {
    if (!machine.transfers.empty() && machine.random.below(pace) == 0) {
      deliver();
      while (all && !machine.transfers.empty() && machine.error.empty()) deliver();
    }
    if (!machine.error.empty()) break;
    if (ready->empty() || machine.random.below(kStay) == 0) {
      std::vector<std::vector<int>*> candidates;
      for (Block& other : machine.blocks) {
        if (!other.ready.empty()) candidates.push_back(&other.ready);
      }
      if (candidates.empty() && !machine.transfers.empty()) {
        deliver();
        continue;
      }
      if (candidates.empty()) {
        machine.error = stuck(count);
        break;
      }
      ready = candidates[machine.random.below(candidates.size())];
    }
    std::swap((*ready)[machine.random.below(ready->size())], ready->back());
    Fiber& fiber = *machine.fibers[ready->back()];
    ready->pop_back();
    to_fiber(fiber);
    if (!machine.error.empty()) break;
    if (fiber.state == State::kShuffle) try_shuffle(fiber, count);
    if (fiber.state == State::kBarrier && ++fiber.block->waiting == machine.threads) end_barrier(*fiber.block);
    if (fiber.state == State::kDone) {
      ++done;
      if (++fiber.block->done < machine.threads) continue;
      check_end(*fiber.block, done == count);
      count_reads(fiber.number / machine.threads * machine.threads, machine.threads);
      std::fill(fiber.block->shared.begin(), fiber.block->shared.end(), kPoison);
    }
  }
}

}  // namespace

void wait(State state, const char* file, int line) {
  machine.now->state = state;
  machine.now->file = file;
  machine.now->line = line;
  to_scheduler(false);
}

void wake(Fiber& fiber) {
  fiber.state = State::kReady;
  fiber.block->ready.push_back(fiber.number);
}

void fail(const std::string& what) {
  std::ostringstream out;
  const Position& at = machine.position;
  out << what << " (block " << at.block.x << ", thread " << at.thread.x << ")";
  machine.error = out.str();
  to_scheduler(true);
  std::abort();
}

const Position& position() { return machine.position; }
unsigned char* shared_memory() { return machine.now->block->shared.data(); }

void allow_shared(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  allowed[{kernel, runtime.device}] = bytes;
}
size_t allowed_shared(const void* kernel) {
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  return allowed[{kernel, runtime.device}];
}

void set_seed(uint64_t seed) { machine.random.state = seed; }

bool lies_in(const Block& block, const void* p, size_t bytes) {
  const auto offset = static_cast<const unsigned char*>(p) - block.shared.data();
  return offset >= 0 && offset + static_cast<std::ptrdiff_t>(bytes) <= static_cast<std::ptrdiff_t>(block.shared.size());
}

bool in_shared_memory(const void* p, size_t bytes) { return lies_in(*machine.now->block, p, bytes); }

void sync_threads(const char* file, int line) { wait(State::kBarrier, file, line); }

void cluster_arrive(bool relaxed) {
  Fiber& self = *machine.now;
  if (self.arrived > self.waited) fail("a second arrival at a barrier of the cluster without a wait between");
  ++self.arrived;
  if (relaxed) machine.relaxed.back() = true;
  const int count = static_cast<int>(machine.blocks.size()) * machine.threads;
  if (++machine.arrived < count) return;
  machine.arrived = 0;
  ++machine.phase;
  machine.relaxed.push_back(false);
  for (int i = 0; i < count; ++i) {
    if (machine.fibers[i]->state == State::kCluster) wake(*machine.fibers[i]);
  }
}

void cluster_wait() {
  Fiber& self = *machine.now;
  if (self.waited == self.arrived) fail("a wait at a barrier of the cluster without an arrival");
  ++self.waited;
  if (self.arrived > machine.phase) wait(State::kCluster, "the cluster", 0);
}

const void* map_shared_rank(const void* p, unsigned rank) {
  const Block& own = *machine.now->block;
  if (!lies_in(own, p, 0)) fail("an address outside shared memory");
  if (rank >= machine.blocks.size()) fail("no block " + std::to_string(rank) + " in the cluster");
  if (machine.phase == 0) fail("another block's shared memory before it is known to have started");
  if (machine.blocks[rank].done == machine.threads) fail("the shared memory of a block that has ended");
  return machine.blocks[rank].shared.data() + (static_cast<const unsigned char*>(p) - own.shared.data());
}

const void* read_shared_rank(const void* p, unsigned rank) {
  const int waited = machine.now->waited;
  if (waited > 0 && machine.relaxed[waited - 1]) {
    fail("another block's shared memory after a barrier of the cluster that publishes nothing");
  }
  return map_shared_rank(p, rank);
}

void copy_async(void* to, const void* from, size_t bytes) {
  check_access(from, bytes);
  if (!lies_in(*machine.now->block, to, bytes)) fail("a copy to outside shared memory");
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) fail("a copy to an address that is not aligned to its size");
  machine.now->copies.push_back({to, from, bytes});
}

void await_copies() {
  for (const Copy& copy : machine.now->copies) std::memcpy(copy.to, copy.from, copy.bytes);
  machine.now->copies.clear();
}

uint64_t shuffle_xor(unsigned mask, uint64_t value, int offset, const char* file, int line) {
  const int lane = machine.now->number % kWarp;
  if (!(mask >> lane & 1)) fail("a shuffle at line " + std::to_string(line) + " whose mask leaves out its own lane");
  machine.now->mask = mask;
  machine.now->value = value;
  machine.now->partner = lane ^ offset;
  wait(State::kShuffle, file, line);
  return machine.now->value;
}

void run(Index grid, Index block, unsigned cluster, size_t shared_bytes, const std::function<void()>& kernel) {
  machine.threads = static_cast<int>(block.x * block.y * block.z);
  machine.position.threads = block, machine.position.blocks = grid;
  const int count = machine.threads * static_cast<int>(cluster);
  while (machine.fibers.size() < static_cast<size_t>(count)) machine.fibers.push_back(std::make_unique<Fiber>());
  machine.kernel = &kernel;
  begin_launch();
  machine.error.clear();
  if (grid.x % cluster != 0) throw std::runtime_error("emulator: the grid is no multiple of the cluster");
  std::vector<unsigned> order(grid.x / cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i * cluster;
  std::shuffle(order.begin(), order.end(), machine.random);
  for (const unsigned first : order) {
    machine.blocks.clear();
    for (unsigned i = 0; i < cluster; ++i) {
      // A new buffer of exactly this size, so that AddressSanitizer detects accesses outside it.
      machine.blocks.push_back({{first + i, 0, 0}, std::vector<unsigned char>(shared_bytes, kPoison), 0, 0, {}});
    }
    run_cluster(block, count);
    if (!machine.error.empty()) throw std::runtime_error("emulator: " + machine.error);
  }
}

}  // namespace emulator
