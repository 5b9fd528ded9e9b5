#include <string>
#include <vector>

#include "machine.h"

namespace cuda_on_cpu {
namespace {

struct Buffer {
  std::string name;
  uintptr_t begin, end;
  bool map;
};
std::vector<Buffer> buffers;
Counters counted{};

}  // namespace

const Counters& counters() { return counted; }

void watch(const char* name, const void* begin, size_t bytes, bool map) {
  const auto from = reinterpret_cast<uintptr_t>(begin);
  if (begin) buffers.push_back({name, from, from + bytes, map});
}

void forget_all() {
  buffers.clear();
  counted = {};
}

void check_access(const void* p, size_t bytes, bool write) {
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  if (begin % bytes != 0) fail("an access of " + std::to_string(bytes) + " bytes that is not aligned to them");
  for (const Buffer& buffer : buffers) {
    if (begin < buffer.begin || end > buffer.end) continue;
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

}  // namespace cuda_on_cpu
