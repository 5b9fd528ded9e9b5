// Registers the CUDA kernels, run by machine.cpp, as cuda_on_cpu::forward_out and cuda_on_cpu::backward_out for CPU
// tensors. Every call is checked: each access lies in one of the call's buffers, and the bytes of the maps that are
// read and written are those of the plan.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <string>

#include "../../csrc/cuda/kernels.h"
#include "../../csrc/plan/cache.h"
#include "../../csrc/stable.h"
#include "machine.h"

namespace {

std::string device = "H200";
se::Plans plans([](int index) { return se::device_presets()[index]; });
std::shared_ptr<const se::Plan> last_plan;

int64_t bytes(se::DType dtype) { return se::element_bytes(dtype); }

void watch_inputs(const se::Problem& p, int64_t map) {
  const int64_t w = bytes(p.weight_dtype), depth = p.r ? p.r : p.c;
  cuda_on_cpu::watch("x", p.x, map, true);
  if (p.residual != p.x) cuda_on_cpu::watch("residual", p.residual, map, true);
  cuda_on_cpu::watch("w1", p.w1, p.r * p.c * w, false);
  cuda_on_cpu::watch("b1", p.b1, p.r * w, false);
  cuda_on_cpu::watch("w2", p.w2, p.c * depth * w, false);
  cuda_on_cpu::watch("b2", p.b2, p.c * w, false);
}

// Poisoned, so that what a kernel leaves unwritten is NaN.
void watch_output(const char* name, void* p, int64_t size, bool map = false) {
  if (p) std::memset(p, 0xff, size);
  cuda_on_cpu::watch(name, p, size, map);
}

void watch(const se::Forward& f, int64_t map) {
  const int64_t a = se::accumulator_bytes(f.dtype);
  watch_inputs(f, map);
  watch_output("z", f.z, f.n * f.c * a);
  watch_output("p1", f.p1, f.n * f.r * a);
  watch_output("p2", f.p2, f.n * f.c * a);
  if (f.y != f.x) watch_output("y", f.y, map, true);
}

void watch(const se::Backward& f, int64_t map) {
  const int64_t a = se::accumulator_bytes(f.dtype), w = bytes(f.weight_dtype), depth = f.r ? f.r : f.c;
  watch_inputs(f, map);
  cuda_on_cpu::watch("g", f.g, map, true);
  cuda_on_cpu::watch("z", f.z, f.n * f.c * a, false);
  cuda_on_cpu::watch("p1", f.p1, f.n * f.r * a, false);
  cuda_on_cpu::watch("p2", f.p2, f.n * f.c * a, false);
  watch_output("dx", f.dx, map, true);
  watch_output("dresidual", f.dresidual, map, true);
  watch_output("dw1", f.dw1, f.r * f.c * w);
  watch_output("db1", f.db1, f.r * w);
  watch_output("dw2", f.dw2, f.c * depth * w);
  watch_output("db2", f.db2, f.c * w);
}

struct OnCpu {
  template <class Direction>
  static void run(const Direction& f, const se::Tensor&) {
    const std::vector<se::Device>& known = se::device_presets();
    const auto found = std::find_if(known.begin(), known.end(), [](auto& preset) { return preset.name == device; });
    STD_TORCH_CHECK(found != known.end(), "cuda_on_cpu: no device ", device);
    last_plan = plans.plan(se::call_of(f), static_cast<int>(found - known.begin()));
    const se::Plan& plan = *last_plan;
    const std::unique_ptr<unsigned char[]> scratch(new unsigned char[plan.scratch_bytes]);
    cuda_on_cpu::forget_all();
    watch(f, f.n * f.c * f.l * bytes(f.dtype));
    watch_output("scratch", scratch.get(), plan.scratch_bytes);
    se::cuda::run(f, plan, scratch.get(), nullptr);
    const auto& counted = cuda_on_cpu::counters();
    STD_TORCH_CHECK(
        counted.map_bytes_read == plan.map_bytes_read && counted.map_bytes_written == plan.map_bytes_written,
        "cuda_on_cpu: ", counted.map_bytes_read, " bytes of maps read and ", counted.map_bytes_written,
        " written, where the plan says\n", plan.text());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_on_cpu, m) {
  const std::string inputs = "Tensor x, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, ";
  const std::string options =
      "int act, int gate, float slope, float offset, int squeeze, int pre_act, int post_act, bool channels_last, ";
  m.def(("forward_out(" + inputs + options + "Tensor(a!) y, Tensor(b!)? z, Tensor(c!)? p1, Tensor(d!)? p2) -> ()")
            .c_str());
  m.def(("backward_out(Tensor g, " + inputs + "Tensor z, Tensor p1, Tensor p2, " + options +
         "bool residual_is_x, Tensor(a!)? dx, Tensor(b!)? dw1, Tensor(c!)? db1, Tensor(d!)? dw2, Tensor(e!)? db2, "
         "Tensor(f!)? dresidual) -> ()")
            .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(cuda_on_cpu, CPU, m) {
  m.impl("forward_out", &se::Boxed<&se::forward_out<OnCpu>>::call);
  m.impl("backward_out", &se::Boxed<&se::backward_out<OnCpu>>::call);
}

// For ctypes.
#define CUDA_ON_CPU_API extern "C" __attribute__((visibility("default")))

CUDA_ON_CPU_API void cuda_on_cpu_setup(const char* device_name, const char* plan, uint64_t seed) {
  device = device_name;
  plans.force(plan);
  cuda_on_cpu::set_seed(seed);
}
CUDA_ON_CPU_API const char* cuda_on_cpu_plan() {
  static std::string text;
  text = last_plan->text();
  return text.c_str();
}
CUDA_ON_CPU_API double cuda_on_cpu_wide_share() {
  const auto& counted = cuda_on_cpu::counters();
  return static_cast<double>(counted.wide_accesses) / (counted.wide_accesses + counted.narrow_accesses);
}
CUDA_ON_CPU_API void cuda_on_cpu_wavefronts(int element, int64_t* counts) {
  const auto& reads = cuda_on_cpu::counters().shared_reads[element];
  counts[0] = reads.taken, counts[1] = reads.least;
}
CUDA_ON_CPU_API int cuda_on_cpu_slept(unsigned* blocks, unsigned* ns, int most) {
  int count = 0;
  for (const auto& [block, time] : cuda_on_cpu::counters().slept) {
    if (count < most) blocks[count] = block, ns[count] = time;
    ++count;
  }
  return count;
}
CUDA_ON_CPU_API void cuda_on_cpu_forget() { cuda_on_cpu::forget_all(); }
CUDA_ON_CPU_API void cuda_on_cpu_watch(const char* name, const void* begin, size_t bytes) {
  cuda_on_cpu::watch(name, begin, bytes, false);
}
