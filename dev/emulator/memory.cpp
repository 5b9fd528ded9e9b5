// Checks every access to global memory against the watched buffers, and counts the bytes of maps.
#include <string>
#include <vector>

#include "machine.h"

namespace emulator {
namespace {

struct Buffer {
  std::string name;
  uintptr_t begin, end;
  bool map;
  std::vector<uint64_t> written, read_only;  // by this launch: one bit per byte, so one number per 64 bytes
};
constexpr size_t kBits = 64;
std::vector<Buffer> buffers;
Counters counted{};

}  // namespace

Counters& counters() { return counted; }

void watch(const char* name, const void* begin, size_t bytes, bool map) {
  const auto from = reinterpret_cast<uintptr_t>(begin);
  if (begin) buffers.push_back({name, from, from + bytes, map, {}, {}});
}

void forget_all() {
  buffers.clear();
  counted = {};
}

void begin_launch() {
  for (Buffer& buffer : buffers) {
    buffer.written.assign(buffer.end / kBits - buffer.begin / kBits + 1, 0);
    buffer.read_only = buffer.written;
  }
}

void check_access(const void* p, size_t bytes, Use use) {
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  if (begin % bytes != 0) fail("an access of " + std::to_string(bytes) + " bytes that is not aligned to them");
  const bool write = use == Use::kWrite;
  for (Buffer& buffer : buffers) {
    if (begin < buffer.begin || end > buffer.end) continue;
    // An access never crosses two numbers, because it is aligned to its size.
    const size_t word = begin / kBits - buffer.begin / kBits;
    const uint64_t bits = ((uint64_t{1} << bytes) - 1) << begin % kBits;
    if (write) buffer.written[word] |= bits;
    if (use == Use::kReadOnly) buffer.read_only[word] |= bits;
    if (buffer.written[word] & buffer.read_only[word] & bits) {
      fail("the launch writes what it reads by the read-only path, in " + buffer.name);
    }
    if (buffer.map) {
      (write ? counted.map_bytes_written : counted.map_bytes_read) += bytes;
      ++(bytes == 16 ? counted.wide_accesses : counted.narrow_accesses);
    }
    return;
  }
  std::string near = "no buffer";
  uintptr_t nearest = 4096;
  for (const Buffer& buffer : buffers) {
    const uintptr_t distance = begin >= buffer.end ? begin - buffer.end : end <= buffer.begin ? buffer.begin - end : 0;
    if (distance < nearest) nearest = distance, near = "near " + buffer.name;
  }
  fail(std::string(write ? "a write" : "a read") + " of " + std::to_string(bytes) + " bytes out of bounds, " + near);
}

}  // namespace emulator
