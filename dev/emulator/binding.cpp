// Registers the CUDA kernels, which machine.cpp runs, as operators of `emulator` for CPU tensors. Every call checks
// that each access is inside one of the call's buffers, and that it reads and writes as many bytes of the maps as the
// plan says.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <string>

#include "../../csrc/cuda/kernels.h"
#include "../../csrc/plan/cache.h"
#include "../../csrc/torch_binding.h"
#include "machine.h"

namespace {

std::string device_name = "H200";
se::Plans plans([](int index) { return se::device_presets()[index]; });
std::shared_ptr<const se::Plan> last_plan;

int device_index() {
  const std::vector<se::Device>& known = se::device_presets();
  const auto found = std::find_if(known.begin(), known.end(), [](auto& preset) { return preset.name == device_name; });
  STD_TORCH_CHECK(found != known.end(), "emulator: no device ", device_name);
  return static_cast<int>(found - known.begin());
}

int64_t bytes(se::DType dtype) { return se::element_bytes(dtype); }

void watch_inputs(const se::Problem& p, int64_t map) {
  const int64_t w = bytes(p.weight_dtype), depth = p.r ? p.r : p.c;
  emulator::watch("x", p.x, map, true);
  if (p.residual != p.x) emulator::watch("residual", p.residual, map, true);
  emulator::watch("w1", p.w1, p.r * p.c * w, false);
  emulator::watch("b1", p.b1, p.r * w, false);
  emulator::watch("w2", p.w2, p.c * depth * w, false);
  emulator::watch("b2", p.b2, p.c * w, false);
}

// Watches an output and poisons it, so that an element that no kernel writes is NaN.
void watch_output(const char* name, void* p, int64_t size, bool map = false) {
  if (p) std::memset(p, 0xff, size);
  emulator::watch(name, p, size, map);
}

void watch(const se::Forward& f, int64_t map) {
  const int64_t a = se::accumulator_bytes(f.dtype);
  watch_inputs(f, map);
  emulator::watch("scale", f.scale, f.c * a, false);
  emulator::watch("shift", f.shift, f.c * a, false);
  watch_output("z", f.z, f.n * f.c * a);
  watch_output("p1", f.p1, f.n * f.r * a);
  watch_output("p2", f.p2, f.n * f.c * a);
  if (f.y != f.x) watch_output("y", f.y, map, true);
}

void watch(const se::Backward& f, int64_t map) {
  const int64_t a = se::accumulator_bytes(f.dtype), w = bytes(f.weight_dtype), depth = f.r ? f.r : f.c;
  watch_inputs(f, map);
  emulator::watch("g", f.g, map, true);
  emulator::watch("z", f.z, f.n * f.c * a, false);
  emulator::watch("p1", f.p1, f.n * f.r * a, false);
  emulator::watch("p2", f.p2, f.n * f.c * a, false);
  watch_output("dx", f.dx, map, true);
  watch_output("dresidual", f.dresidual, map, true);
  watch_output("dw1", f.dw1, f.r * f.c * w);
  watch_output("db1", f.db1, f.r * w);
  watch_output("dw2", f.dw2, f.c * depth * w);
  watch_output("db2", f.db2, f.c * w);
}

void watch(const se::Norm& norm) {
  const int64_t size = norm.c * bytes(norm.dtype);
  emulator::watch("weight", norm.weight, size, false);
  emulator::watch("bias", norm.bias, size, false);
  emulator::watch("mean", norm.mean, size, false);
  emulator::watch("variance", norm.variance, size, false);
}

struct OnCpu {
  template <class Direction>
  static void run(const Direction& f, const se::Tensor&) {
    last_plan = plans.plan(se::call_of(f), device_index());
    const se::Plan& plan = *last_plan;
    const std::unique_ptr<unsigned char[]> scratch(new unsigned char[plan.scratch_bytes]);
    emulator::forget_all();
    watch(f, f.n * f.c * f.l * bytes(f.dtype));
    watch_output("scratch", scratch.get(), plan.scratch_bytes);
    se::cuda::run(f, plan, scratch.get(), nullptr);
    check_bytes();
  }
  static void run(const se::BatchNorm& f, const se::Norm& norm, const se::Tensor&) {
    const se::Device& device = se::device_presets()[device_index()];
    last_plan = std::make_shared<const se::Plan>(se::plan_batch_norm(se::call_of(f), device));
    const int64_t map = f.n * f.c * f.l * bytes(f.dtype);
    emulator::forget_all();
    emulator::watch("x", f.x, map, true);
    if (f.residual != f.x) emulator::watch("residual", f.residual, map, true);
    watch(norm);
    if (f.y != f.x && f.y != f.residual) watch_output("y", f.y, map, true);
    se::cuda::batch_norm(f, norm, *last_plan, nullptr);
    check_bytes();
  }
  static void run(const se::Norm& norm, void* scale, void* shift, const se::Tensor&) {
    emulator::forget_all();
    watch(norm);
    const int64_t size = norm.c * se::accumulator_bytes(norm.dtype);
    watch_output("scale", scale, size);
    watch_output("shift", shift, size);
    se::cuda::scale_shift(norm, scale, shift, se::plan_scale_shift(norm.c), nullptr);
  }

 private:
  static void check_bytes() {
    const auto& counted = emulator::counters();
    STD_TORCH_CHECK(counted.map_bytes_read == last_plan->map_bytes_read &&
                        counted.map_bytes_written == last_plan->map_bytes_written,
                    "emulator: ", counted.map_bytes_read, " bytes of maps read and ", counted.map_bytes_written,
                    " written, where the plan says ", last_plan->map_bytes_read, " and ", last_plan->map_bytes_written,
                    ":\n", last_plan->text());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emulator, m) {
  const std::string inputs = "Tensor x, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, ";
  const std::string options =
      "int act, int gate, float slope, float offset, int squeeze, int pre_act, int post_act, bool channels_last, ";
  m.def(("forward_out(" + inputs + "Tensor? scale, Tensor? shift, " + options +
         "Tensor(a!) y, Tensor(b!)? z, Tensor(c!)? p1, Tensor(d!)? p2) -> ()")
            .c_str());
  m.def(("backward_out(Tensor g, " + inputs + "Tensor z, Tensor p1, Tensor p2, " + options +
         "bool residual_is_x, Tensor(a!)? dx, Tensor(b!)? dw1, Tensor(c!)? db1, Tensor(d!)? dw2, Tensor(e!)? db2, "
         "Tensor(f!)? dresidual) -> ()")
            .c_str());
  const std::string norm = "Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, float eps, ";
  m.def(("batch_norm_out(Tensor x, Tensor? residual, " + norm + "int act, bool channels_last, Tensor(a!) y) -> ()")
            .c_str());
  m.def(("scale_shift_out(" + norm + "Tensor(a!) scale, Tensor(b!) shift) -> ()").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(emulator, CPU, m) {
  m.impl("forward_out", &se::Boxed<&se::forward_out<OnCpu>>::call);
  m.impl("backward_out", &se::Boxed<&se::backward_out<OnCpu>>::call);
  m.impl("batch_norm_out", &se::Boxed<&se::batch_norm_out<OnCpu>>::call);
  m.impl("scale_shift_out", &se::Boxed<&se::scale_shift_out<OnCpu>>::call);
}

// The functions that Python calls through ctypes.
#define EMULATOR_API extern "C" __attribute__((visibility("default")))

EMULATOR_API void emulator_setup(const char* device, const char* plan, uint64_t seed) {
  device_name = device;
  plans.force(plan);
  emulator::set_seed(seed);
}
EMULATOR_API void emulator_choose_fault(int number) { emulator::fault = number; }
EMULATOR_API const char* emulator_plan() {
  static std::string text;
  text = last_plan->text();
  return text.c_str();
}
EMULATOR_API double emulator_wide_fraction() {
  const auto& counted = emulator::counters();
  return static_cast<double>(counted.wide_accesses) / (counted.wide_accesses + counted.narrow_accesses);
}
EMULATOR_API void emulator_wavefronts(int element, int64_t* counts) {
  const auto& reads = emulator::counters().shared_reads[element];
  counts[0] = reads.taken, counts[1] = reads.least;
}
EMULATOR_API int emulator_slept(unsigned* blocks, unsigned* ns, int most) {
  int count = 0;
  for (const auto& [block, time] : emulator::counters().slept) {
    if (count < most) blocks[count] = block, ns[count] = time;
    ++count;
  }
  return count;
}
EMULATOR_API void emulator_forget() { emulator::forget_all(); }
EMULATOR_API void emulator_watch(const char* name, const void* begin, size_t bytes) {
  emulator::watch(name, begin, bytes, false);
}
