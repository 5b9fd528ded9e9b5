// Registers the CPU kernels as se_fused::forward_out and se_fused::backward_out, using the LibTorch stable ABI.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "../torch_binding.h"
#include "features.h"
#include "kernels.h"

namespace {

const se::cpu::Kernels& kernels() {
#define SE_KERNELS(isa, name)                                                                   \
  se::cpu::Kernels {                                                                            \
    name, se::cpu::isa::forward_scratch, se::cpu::isa::forward, se::cpu::isa::backward_scratch, \
        se::cpu::isa::backward, se::cpu::isa::batch_norm                                        \
  }
  static const se::cpu::Kernels chosen = [] {
    const char* variable = std::getenv("SE_FUSED_CPU");
    const std::string requested = variable ? variable : "";
#if defined(__x86_64__)
    if (requested == "x86-64-v4" || (requested.empty() && se::cpu::has_x86_64_v4())) {
      if (!se::cpu::has_x86_64_v4()) throw std::runtime_error("SE_FUSED_CPU=x86-64-v4: this CPU has no AVX-512");
      return SE_KERNELS(v4, "x86-64-v4");
    }
    if (requested == "x86-64-v3" || (requested.empty() && se::cpu::has_x86_64_v3())) {
      if (!se::cpu::has_x86_64_v3()) throw std::runtime_error("SE_FUSED_CPU=x86-64-v3: this CPU has no AVX2");
      return SE_KERNELS(v3, "x86-64-v3");
    }
#endif
    if (!requested.empty() && requested != "baseline") {
      throw std::runtime_error("SE_FUSED_CPU is " + requested + "; wanted baseline, x86-64-v3 or x86-64-v4");
    }
    return SE_KERNELS(baseline, "baseline");
  }();
#undef SE_KERNELS
  return chosen;
}

struct Loop {
  void (*body)(void* context, int64_t begin, int64_t end);
  void* context;

  static void run(int64_t begin, int64_t end, void* loop) {
    static_cast<Loop*>(loop)->body(static_cast<Loop*>(loop)->context, begin, end);
  }
};

int threads() {
  uint32_t count = 1;
  se::check(torch_get_num_threads(&count), "get_num_threads");
  return static_cast<int>(count);
}

// torch's thread pool, so that torch.set_num_threads applies here too.
se::cpu::Pool pool() {
  return {[](int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
            Loop loop{body, context};
            se::check(torch_parallel_for(0, count, grain, &Loop::run, &loop), "parallel_for");
          },
          threads()};
}

// Requests huge pages for a new map before it is written: the page faults of a 77 MB output in 4 KB pages take longer
// than the whole operation. Maps smaller than kHugeMap usually get memory that the allocator has used before, and that
// has its pages already.
constexpr size_t kHugeMap = 4 << 20, kHugePage = 2 << 20;
void request_huge_pages([[maybe_unused]] const void* map, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  if (!map || bytes < kHugeMap) return;
  const auto begin = (reinterpret_cast<uintptr_t>(map) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(map) + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

size_t map_bytes(const se::Problem& p) { return p.n * p.c * p.l * se::element_bytes(p.dtype); }

using Scratch = std::unique_ptr<void, decltype(&std::free)>;
Scratch allocate(size_t bytes) {
  Scratch scratch(std::aligned_alloc(64, bytes), &std::free);
  if (bytes > 0 && !scratch) throw std::bad_alloc();
  return scratch;
}

void run_forward(const se::BlockForward& f) {
  if (f.y != f.x) request_huge_pages(f.y, map_bytes(f));
  const Scratch scratch = allocate(kernels().forward_scratch(f));
  kernels().forward(f, pool(), scratch.get());
}

struct Cpu {
  static constexpr bool kHasBatchNorm = false;
  static void run(const se::Forward& f, const se::Tensor&) { run_forward({f, nullptr}); }
  static void run(const se::Backward& f, const se::Tensor&) {
    request_huge_pages(f.dx, map_bytes(f));
    request_huge_pages(f.dresidual, map_bytes(f));
    const Scratch scratch = allocate(kernels().backward_scratch(f));
    kernels().backward(f, pool(), scratch.get());
  }
};

const se::Registered<Cpu> registered("CPU");

}  // namespace

// For csrc/fast_path.cpp. se_fused/backends/cpu.py passes it the addresses of these functions.
#define SE_EXPORT extern "C" __attribute__((visibility("default")))
SE_EXPORT void se_fused_cpu_forward(const se::BlockForward* f) { run_forward(*f); }
SE_EXPORT void se_fused_cpu_batch_norm(const se::BatchNorm* f) {
  if (f->y != f->x) request_huge_pages(f->y, f->n * f->c * f->l * se::element_bytes(f->dtype));
  kernels().batch_norm(*f, pool());
}
