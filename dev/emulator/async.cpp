// mbarriers and the transfers that they count: bulk copies from global memory, and pushes into the shared memory of
// another block of the cluster. Each transfer arrives at a random moment between its issue and the end of the phase
// that waits for it.
#include <algorithm>

#include "state.h"

namespace emulator {
namespace {

Mbarrier& find(const void* mbarrier, const char* otherwise = "an mbarrier that is not initialised") {
  const auto found = machine.mbarriers.find(mbarrier);
  if (found == machine.mbarriers.end()) fail(otherwise);
  return found->second;
}

// Ends the phase if nothing is missing. Returns an error message, or null.
const char* try_to_end_phase(const void* mbarrier) {
  Mbarrier& m = machine.mbarriers.at(mbarrier);
  if (m.arrivals > 0 || m.bytes > 0) return nullptr;
  if (m.bytes < 0) return "more bytes at an mbarrier than it expects";
  ++m.phase;
  m.arrivals = m.count;
  // Only this cluster's fibers are searched: fibers of a larger cluster may be left from a launch that was abandoned.
  const size_t count = machine.blocks.size() * machine.threads;
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = *machine.fibers[i];
    if (fiber.state == State::kMbarrier && fiber.mbarrier == mbarrier) wake(fiber);
  }
  return nullptr;
}

void send(void* to, const void* from, size_t bytes, const void* mbarrier) {
  const auto* data = static_cast<const unsigned char*>(from);
  machine.transfers.push_back({static_cast<unsigned char*>(to), {data, data + bytes}, mbarrier});
}

}  // namespace

void mbarrier_init(const void* mbarrier, unsigned count) {
  if (!lies_in(*machine.now->block, mbarrier, 8)) fail("an mbarrier outside shared memory");
  if (reinterpret_cast<uintptr_t>(mbarrier) % 8 != 0) fail("an mbarrier that is not aligned to 8 bytes");
  machine.mbarriers[mbarrier] = {count, count, 0, 0};
}

void mbarrier_arrive(const void* mbarrier, unsigned expected_bytes) {
  Mbarrier& m = find(mbarrier);
  if (m.arrivals == 0) fail("more arrivals at an mbarrier than its phase has");
  m.bytes += expected_bytes;
  --m.arrivals;
  if (const char* wrong = try_to_end_phase(mbarrier)) fail(wrong);
}

void mbarrier_wait(const void* mbarrier, unsigned parity) {
  while (find(mbarrier).phase % 2 == parity) {
    machine.now->mbarrier = mbarrier;
    wait(State::kMbarrier, "an mbarrier", 0);
  }
}

void copy_bulk(void* to, const void* from, size_t bytes, const void* mbarrier) {
  find(mbarrier);
  for (const auto value : {reinterpret_cast<uintptr_t>(to), reinterpret_cast<uintptr_t>(from), uintptr_t{bytes}}) {
    if (value % 16 != 0) fail("a bulk copy whose addresses and size are not multiples of 16");
  }
  if (!lies_in(*machine.now->block, to, bytes)) fail("a bulk copy to outside shared memory");
  for (size_t at = 0; at < bytes; at += 16) check_access(static_cast<const unsigned char*>(from) + at, 16);
  send(to, from, bytes, mbarrier);
}

void push(const void* mine, const void* value, size_t bytes, const void* mbarrier, unsigned rank) {
  const void* to = map_shared_rank(mine, rank);
  const void* counts = map_shared_rank(mbarrier, rank);
  find(counts, "a push before the other block's mbarrier is initialised");
  send(const_cast<void*>(to), value, bytes, counts);
}

void deliver() {
  std::swap(machine.transfers[machine.random.below(machine.transfers.size())], machine.transfers.back());
  const Transfer arrived = std::move(machine.transfers.back());
  machine.transfers.pop_back();
  std::copy(arrived.data.begin(), arrived.data.end(), arrived.to);
  machine.mbarriers.at(arrived.mbarrier).bytes -= static_cast<int64_t>(arrived.data.size());
  if (const char* wrong = try_to_end_phase(arrived.mbarrier)) machine.error = wrong;
}

void check_end(const Block& block, bool last) {
  for (const Transfer& transfer : machine.transfers) {
    if (lies_in(block, transfer.to, 0)) machine.error = "a block has ended before what is under way to it is there";
  }
  for (const auto& [mbarrier, m] : machine.mbarriers) {
    if (last && m.bytes != 0) machine.error = "more bytes at an mbarrier than it expects";
  }
}

}  // namespace emulator
