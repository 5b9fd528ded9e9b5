// The threads of one call: a single parallel region of several phases. The end of a phase costs 0.03 us between two
// threads, where a region of its own costs 0.7, and a thread keeps its share of a map from phase to phase, in its
// cache.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

#include "kernels.h"

namespace se::cpu {
namespace {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Each on a cache line of its own, because several threads write them.
struct alignas(64) Counter {
  std::atomic<uint64_t> value{0};
};

// One of the `workers` that go through the same phases. Each begins with its own share of a phase and then takes over
// what the others have not begun, so that none waits for a thread that has not started: whether the pool runs the
// workers at once, in turn, or only some of them, the work gets done.
class Worker {
 public:
  Worker() = default;  // alone
  Worker(Counter* counters, int workers, int index)
      : done_(&counters[0].value), shares_(counters + 1), workers_(workers), index_(index) {}

  int count() const { return workers_; }

  // body(begin, end) for chunks of [0, count), cut at multiples of `unit`. On return all of it is done.
  template <class Body>
  void share(int64_t count, int64_t unit, Body&& body) {
    if (workers_ == 1) {
      if (count > 0) body(int64_t{0}, count);
      return;
    }
    const int64_t units = divide_up(count, unit);
    const int64_t chunks = units < kChunks * workers_ ? units : kChunks * workers_;
    ++phase_;
    target_ += chunks;
    int64_t finished = 0;
    auto start = [&](int64_t chunk) { return units * chunk / chunks * unit; };
    for (int i = 0; i < workers_; ++i) {
      const int64_t owner = (index_ + i) % workers_;
      const int64_t first = chunks * owner / workers_, last = chunks * (owner + 1) / workers_;
      for (int64_t k; (k = first + claim(shares_[owner].value)) < last; ++finished) {
        body(start(k), k + 1 == chunks ? count : start(k + 1));
      }
    }
    if (finished > 0) done_->fetch_add(finished, std::memory_order_acq_rel);
    for (int spins = 0; done_->load(std::memory_order_acquire) < target_; ++spins) relax(spins);
  }

 private:
  // Chunks of a worker's share of a phase: what a thread that comes late leaves to the others.
  static constexpr int64_t kChunks = 4;

  // The next number in `counter`, which holds the phase above and the numbers given out in it below.
  int64_t claim(std::atomic<uint64_t>& counter) const {
    const uint64_t none = phase_ << 32;
    uint64_t seen = counter.load(std::memory_order_relaxed), next;
    do {
      if (seen >> 32 > phase_) return INT64_MAX >> 1;  // the others are further on
      next = seen < none ? none : seen;
    } while (!counter.compare_exchange_weak(seen, next + 1, std::memory_order_relaxed));
    return static_cast<int64_t>(next - none);
  }

  // Busy for about the time that a thread takes to be woken, then gives the core to whoever needs it.
  static void relax(int spins) {
    if (spins >= 4096) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::atomic<uint64_t>* done_ = nullptr;
  Counter* shares_ = nullptr;
  int workers_ = 1, index_ = 0;
  uint64_t phase_ = 0, target_ = 0;
};

// Work that is worth one more thread, in elements: 56448, of 1x72x28x28, take 7.4 us by two threads and 8.0 by one.
constexpr int64_t kGrain = 24576;

// body(worker), run by as many workers as the work, in elements, is worth.
constexpr int kMaxWorkers = 64;
template <class Body>
void with_team(const Pool& pool, int64_t work, Body&& body) {
  int64_t workers = pool.threads < kMaxWorkers ? pool.threads : kMaxWorkers;
  if (work / kGrain < workers) workers = work / kGrain;
  if (workers <= 1) {
    Worker alone;
    return body(alone);
  }
  alignas(64) unsigned char memory[(kMaxWorkers + 1) * sizeof(Counter)];
  auto* counters = reinterpret_cast<Counter*>(memory);
  for (int64_t i = 0; i <= workers; ++i) new (counters + i) Counter;
  auto run = [&](int64_t index) {
    Worker worker(counters, static_cast<int>(workers), static_cast<int>(index));
    body(worker);
  };
  using Run = decltype(run);
  pool.run(workers, 1, [](void* context, int64_t begin, int64_t) { (*static_cast<Run*>(context))(begin); }, &run);
}

}  // namespace
}  // namespace se::cpu
