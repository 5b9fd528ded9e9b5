// Vectors that kernels read from shared memory, and the wavefronts that a GPU would need for them: it has 32 banks of 4
// bytes, and a warp is served in phases of as many lanes as ask for 128 bytes, where all of them take part.
//
// The lanes of a warp run one after the other here, so a read is noted until the warp has come together: what the lanes
// read at the k-th time since then that they came to one place in the code is one instruction of the warp.
#include <algorithm>
#include <array>

#include "state.h"

namespace emulator {
namespace {

constexpr int kBanks = 32, kBank = 4, kAbsent = -1;

// The reads at one place in the code by the lanes of a warp.
struct Site {
  uintptr_t place;
  int bytes, element;
  std::array<int, kWarp> times;                 // of each lane
  std::vector<std::array<int, kWarp>> offsets;  // in shared memory, by time and lane
};
std::vector<std::vector<Site>> warps;  // of the cluster

// A hash of the return addresses on the fiber's stack: a function that is not inlined is many places.
__attribute__((no_sanitize_address)) uintptr_t place_of(const void* frame) {
  const auto stack = reinterpret_cast<uintptr_t>(machine.now->stack);
  uintptr_t place = 0;
  for (auto at = reinterpret_cast<uintptr_t>(frame); at >= stack && at < stack + kStack - 2 * sizeof(at);) {
    uintptr_t link[2];  // the caller's frame, and where it goes on
    std::memcpy(link, reinterpret_cast<const void*>(at), sizeof(link));
    place = (place ^ link[1]) * 0x9e3779b97f4a7c15;
    if (link[0] <= at) break;
    at = link[0];
  }
  return place;
}

// Those of lanes [first, end): the most different words in a bank, which answers with one at a time.
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
  const uintptr_t place = place_of(__builtin_frame_address(0));
  std::vector<Site>& sites = warps[self.number / kWarp];
  auto site = std::find_if(sites.begin(), sites.end(), [&](const Site& other) { return other.place == place; });
  if (site == sites.end()) {
    site = sites.insert(site, {place, static_cast<int>(bytes), static_cast<int>(element), {}, {}});
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
