// Counts the wavefronts that a GPU would need for the vectors that kernels read from shared memory. Shared memory has
// 32 banks of 4 bytes. A GPU handles a warp in phases of as many lanes as request 128 bytes together, if all lanes take
// part.
//
// Here the lanes of a warp run one after the other, so reads are recorded until the warp converges. The k-th read of
// each lane at the same call site since the last convergence belongs to one instruction of the warp.
#include <algorithm>
#include <array>

#include "state.h"

namespace emulator {
namespace {

constexpr int kBanks = 32, kBank = 4, kAbsent = -1;

// The reads by the lanes of a warp at one call site.
struct Site {
  uintptr_t call_site;
  int bytes, element;
  std::array<int, kWarp> times;                 // reads of each lane
  std::vector<std::array<int, kWarp>> offsets;  // in shared memory, by number of the read and by lane
};
std::vector<std::vector<Site>> warps;  // sites of each warp of the cluster

// A hash of the return addresses on the fiber's stack, because a function that is not inlined has many callers.
__attribute__((no_sanitize_address)) uintptr_t call_site_of(const void* frame) {
  const auto stack = reinterpret_cast<uintptr_t>(machine.now->stack);
  uintptr_t call_site = 0;
  for (auto at = reinterpret_cast<uintptr_t>(frame); at >= stack && at < stack + kStack - 2 * sizeof(at);) {
    uintptr_t link[2];  // the caller's frame, and the return address
    std::memcpy(link, reinterpret_cast<const void*>(at), sizeof(link));
    call_site = (call_site ^ link[1]) * 0x9e3779b97f4a7c15;
    if (link[0] <= at) break;
    at = link[0];
  }
  return call_site;
}

// The wavefronts of the lanes [first, end): a bank returns one word at a time, so they are the largest number of
// different words in one bank.
int wavefronts(const Site& site, const std::array<int, kWarp>& offsets, int first, int end) {
  int words[kBanks][kWarp], counts[kBanks]{}, most = 0;
  for (int lane = first; lane < end; ++lane) {
    if (offsets[lane] == kAbsent) continue;
    for (int word = offsets[lane] / kBank; word * kBank < offsets[lane] + site.bytes; ++word) {
      int *known = words[word % kBanks], &count = counts[word % kBanks];
      if (std::find(known, known + count, word) != known + count) continue;
      known[count++] = word;
      most = std::max(most, count);
    }
  }
  return most;
}

void count(const Site& site) {
  const int lanes = std::min(kWarp, kBanks * kBank / site.bytes);
  Wavefronts& of_element = counters().shared_reads[site.element];
  for (const std::array<int, kWarp>& offsets : site.offsets) {
    for (int first = 0; first < kWarp; first += lanes) {
      const int taken = wavefronts(site, offsets, first, first + lanes);
      of_element.taken += taken;
      of_element.least += taken > 0;
    }
  }
}

}  // namespace

void check_shared_read(const void* p, size_t bytes, size_t element) {
  const Fiber& self = *machine.now;
  if (!lies_in(*self.block, p, bytes)) fail("a read of " + std::to_string(bytes) + " bytes outside shared memory");
  const auto offset = static_cast<int>(static_cast<const unsigned char*>(p) - self.block->shared.data());
  if (offset % bytes != 0) fail("a read of " + std::to_string(bytes) + " bytes that is not aligned to them");
  const uintptr_t call_site = call_site_of(__builtin_frame_address(0));
  std::vector<Site>& sites = warps[self.number / kWarp];
  auto site = std::find_if(sites.begin(), sites.end(), [&](const Site& other) { return other.call_site == call_site; });
  if (site == sites.end()) {
    site = sites.insert(site, {call_site, static_cast<int>(bytes), static_cast<int>(element), {}, {}});
  }
  const int lane = self.number % kWarp;
  const auto time = static_cast<size_t>(site->times[lane]++);
  if (time == site->offsets.size()) {
    site->offsets.emplace_back();
    site->offsets.back().fill(kAbsent);
  }
  site->offsets[time][lane] = offset;
}

void forget_reads(int fibers) { warps.assign((fibers + kWarp - 1) / kWarp, {}); }

void count_reads(int fiber, int fibers) {
  for (int warp = fiber / kWarp; warp * kWarp < fiber + fibers; ++warp) {
    for (Site& site : warps[warp]) {
      count(site);
      site.times.fill(0);
      site.offsets.clear();
    }
  }
}

}  // namespace emulator
