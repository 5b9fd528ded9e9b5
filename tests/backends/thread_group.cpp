// Runs csrc/cpu/thread_group.h with pools of real threads. In every phase each thread writes its chunks, and the next
// phase reads what other threads wrote. test_thread_group.py compiles this with ThreadSanitizer and without; it exits
// with 1, and says why, where a result is wrong.
#include "csrc/cpu/thread_group.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

using Body = void (*)(void* context, int64_t begin, int64_t end);
using Run = decltype(se::cpu::Pool::run);

// body(begin, end) for ranges of `step`, each on its own thread; start(i) runs on the i-th thread before that.
template <class Start>
void spawn(int64_t count, int64_t step, Body body, void* context, Start start) {
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += step) {
    threads.emplace_back([=] {
      start(begin / step);
      body(context, begin, begin + step < count ? begin + step : count);
    });
  }
  for (auto& thread : threads) thread.join();
}

// No thread begins before all have started.
void at_once(int64_t count, int64_t, Body body, void* context) {
  std::atomic<int64_t> started{0};
  spawn(count, 1, body, context, [&started, count](int64_t) {
    for (++started; started.load() < count;) std::this_thread::yield();
  });
}

// A thread begins when the others may be in a later phase.
void staggered(int64_t count, int64_t, Body body, void* context) {
  spawn(count, 1, body, context, [](int64_t i) { std::this_thread::sleep_for(std::chrono::microseconds(40 * i)); });
}

// A thread begins when the one before it has ended; the last worker comes first.
void in_turn(int64_t count, int64_t, Body body, void* context) {
  for (int64_t i = count; i-- > 0;) std::thread([=] { body(context, i, i + 1); }).join();
}

// A range of two workers is one call, which runs only the first of them.
void every_other(int64_t count, int64_t, Body body, void* context) {
  spawn(count, 2, body, context, [](int64_t) {});
}

// What a pool does inside a parallel region of its own: one call for the whole range.
void first_only(int64_t count, int64_t, Body body, void* context) { body(context, 0, count); }

struct {
  const char* name;
  Run run;
} const kPools[] = {{"at once", at_once},
                    {"staggered", staggered},
                    {"in turn", in_turn},
                    {"every other", every_other},
                    {"first only", first_only}};

constexpr int kPhases = 6, kRounds = 8;

uint64_t combine(uint64_t own, uint64_t others, int phase) { return 3 * own + others + phase; }

// The element that a phase reads beside its own: half the array away, hence most often in another thread's chunk.
int64_t partner(int64_t i, int64_t count) { return (i + count / 2) % count; }

// One region over arrays of `count` elements. The phases swap the arrays, so a phase also overwrites what other threads
// read in the phase before. Their units differ, so the chunks do too.
void check(const char* name, Run run, int threads, int64_t count) {
  auto fail = [&](const char* what, int64_t at, uint64_t got, uint64_t expected) {
    std::fprintf(stderr, "pool '%s', %d threads, %lld elements: %s %lld is %llu, not %llu\n", name, threads,
                 static_cast<long long>(count), what, static_cast<long long>(at), static_cast<unsigned long long>(got),
                 static_cast<unsigned long long>(expected));
    std::exit(1);
  };
  std::vector<uint64_t> maps[2], expected(count), visits(count), sizes(threads);
  for (int64_t i = 0; i < count; ++i) expected[i] = i;
  maps[0] = expected, maps[1].resize(count);

  se::cpu::parallel_region({run, threads}, se::cpu::kGrain * threads, [&](se::cpu::ThreadGroup& group) {
    for (int phase = 0; phase < kPhases; ++phase) {
      const auto& from = maps[phase % 2];
      auto& to = maps[(phase + 1) % 2];
      group.parallel_for(count, phase % 3 == 1 ? 16 : 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          to[i] = combine(from[i], from[partner(i, count)], phase);
          ++visits[i];
        }
      });
    }
    group.parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sizes[i] = group.size();
    });
  });

  for (int phase = 0; phase < kPhases; ++phase) {
    const std::vector<uint64_t> from = expected;
    for (int64_t i = 0; i < count; ++i) expected[i] = combine(from[i], from[partner(i, count)], phase);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (visits[i] != kPhases) fail("number of visits of element", i, visits[i], kPhases);
    if (maps[kPhases % 2][i] != expected[i]) fail("element", i, maps[kPhases % 2][i], expected[i]);
  }
  for (int i = 0; i < threads; ++i) {
    if (sizes[i] != static_cast<uint64_t>(threads)) fail("size of the group in chunk", i, sizes[i], threads);
  }
}

}  // namespace

int main() {
  for (const auto& pool : kPools) {
    for (int threads : {1, 2, 3, 8}) {
      // none, fewer than threads, fewer than chunks, and more than chunks, also with a part of a unit at the end
      for (int64_t count : {0, 1, 5, 100, 2048, 4099}) {
        for (int round = 0; round < kRounds; ++round) check(pool.name, pool.run, threads, count);
      }
    }
  }
}
