// What a call costs the host in csrc/cuda/binding.cpp and launch(), beside torch and CUDA: heap allocations, calls of
// torch's C functions, which are stood in for here, and of CUDA's runtime (dev/emulator), whose kernels do not
// run. Prints JSON for test_host_cost.py, which compiles it; exits with 1, and says why, where the plans' cache is
// wrong.
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "../../csrc/plan/cache.h"
#include "../../csrc/torch_c.h"
#include "../../dev/emulator/machine.h"

namespace {

thread_local int heap, torch, tensors;
using Function = void (*)(StableIValue*, uint64_t, uint64_t);
std::map<std::string, Function>& registered() {
  static std::map<std::string, Function> functions;
  return functions;
}

}  // namespace

void* operator new(size_t bytes) {
  ++heap;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

struct AtenTensorOpaque {
  int64_t dim, sizes[4], strides[4];
  int32_t device, place;
};

namespace {

AtenTensorOpaque made{};  // by torch
constexpr int32_t kFloat32 = 6;

AOTITorchError done() { return ++torch, 0; }
template <class T>
AOTITorchError give(T* to, T value) {
  *to = value;
  return done();
}

}  // namespace

extern "C" {
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle*) {
  return 0;
}
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, Function function, uint64_t) {
  registered()[name] = function;
  return 0;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return 0; }
AOTITorchError aoti_torch_is_defined(AtenTensorHandle, bool* to) { return give(to, true); }
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* to) { return give(to, t->dim); }
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle t, int64_t** to) { return give(to, t->sizes); }
AOTITorchError aoti_torch_get_strides(AtenTensorHandle t, int64_t** to) { return give(to, t->strides); }
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle, int32_t* to) { return give(to, kFloat32); }
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle t, int32_t* to) { return give(to, t->device); }
// Far from every other tensor's. No kernel runs, so there is no memory.
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle t, void** to) {
  return give(to, reinterpret_cast<void*>(int64_t{t->place} << 32));
}
AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                        AtenTensorHandle* to) {
  ++tensors;
  return give(to, &made);
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle) { return done(); }
int32_t aoti_torch_dtype_float32() { return ++torch, kFloat32; }
int32_t aoti_torch_dtype_float64() { return ++torch, 7; }
int32_t aoti_torch_dtype_float16() { return ++torch, 5; }
int32_t aoti_torch_dtype_bfloat16() { return ++torch, 15; }
int32_t aoti_torch_dtype_uint8() { return ++torch, 0; }
int32_t aoti_torch_device_type_cuda() { return ++torch, 1; }
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* to) {
  emulator::runtime.device = index;
  return give(to, reinterpret_cast<DeviceGuardHandle>(&made));
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return done(); }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** to) { return give<void*>(to, nullptr); }

void se_fused_force_plan(const char* text);
}

namespace {

constexpr int kThreads = 4, kDevices = 2;
se::Device h200(int) {
  for (const se::Device& preset : se::device_presets()) {
    if (preset.name == "H200") return preset;
  }
  std::abort();
}

// squeeze_excite(x, w1, b1, w2, b2) of 14 x 14 positions; squeeze: its code, where the mean and the others have kernels
// of their own.
class Layer {
 public:
  explicit Layer(int device, StableIValue squeeze = 0)
      : squeeze_(squeeze),
        x_{4, {8, 64, 14, 14}, {64 * 196, 196, 14, 1}, device, 1},
        w1_{2, {16, 64}, {64, 1}, device, 2},
        b1_{1, {16}, {1}, device, 3},
        w2_{2, {64, 16}, {16, 1}, device, 4},
        b2_{1, {64}, {1}, device, 5} {}

  void call() { forward(arguments()); }
  std::string cost() {
    const Stack stack = arguments();
    auto& runtime = emulator::runtime;
    heap = torch = tensors = runtime.set_attribute = runtime.get_device = runtime.launch = 0;
    forward(stack);
    char text[200];
    std::snprintf(text, sizeof text,
                  R"({"heap": %d, "torch": %d, "tensors": %d, "set_attribute": %d, "get_device": %d, "launch": %d})",
                  heap, torch, tensors, runtime.set_attribute.load(), runtime.get_device.load(), runtime.launch.load());
    return text;
  }

 private:
  using Stack = std::array<StableIValue, 20>;

  static StableIValue handle(AtenTensorOpaque& tensor) { return reinterpret_cast<StableIValue>(&tensor); }
  static StableIValue optional(AtenTensorOpaque& tensor) {
    return reinterpret_cast<StableIValue>(new StableIValue(handle(tensor)));
  }
  Stack arguments() {
    constexpr StableIValue kRelu = 1, kSigmoid = 9;
    // In the order of the schema (se_fused/ops.py). What is not set is 0: no tensor, or the option's default.
    Stack stack{handle(x_), optional(w1_), optional(b1_), handle(w2_), optional(b2_)};
    stack[8] = kRelu, stack[9] = kSigmoid, stack[12] = squeeze_, stack[16] = handle(x_);
    return stack;
  }
  static void forward(Stack stack) {
    static const Function function = registered().at("forward_out");
    function(stack.data(), stack.size(), 0);
  }

  StableIValue squeeze_;
  AtenTensorOpaque x_, w1_, b1_, w2_, b2_;
};

template <class Body>
void in_threads(Body body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::exit(1);
}

se::Call call_of(int64_t n) {
  se::Call call{};
  call.n = n, call.c = 64, call.r = 16, call.l = 196, call.alignment = 16;
  return call;
}

void check_cache() {
  std::atomic<int> asked{0};
  se::Plans plans([&](int index) { return ++asked, h200(index); });
  const auto first = plans.plan(call_of(1), 0);
  require(plans.plan(call_of(1), 0) == first, "a call that comes again has the same plan");
  require(plans.plan(call_of(1), 1) != first, "another device has plans of its own");
  require(plans.plan(call_of(2), 0)->call == call_of(2), "another call has another plan");
  plans.force("two_pass");
  require(plans.plan(call_of(1), 0)->algorithm == se::Algorithm::kTwoPass, "a forced plan holds at once");
  std::thread([&] { require(plans.plan(call_of(1), 0) == first, "and for this thread only"); }).join();
  plans.force("");
  const auto kept = plans.plan(call_of(1), 0);
  for (int64_t n = 2; n <= static_cast<int64_t>(se::Plans::kMost); ++n) plans.plan(call_of(n), 0);
  require(plans.plan(call_of(1), 0) == kept, "the cache holds as many calls as it says");
  plans.plan(call_of(1 << 20), 0);
  require(plans.plan(call_of(1), 0) != kept, "one more call empties it");
  require(kept->call == call_of(1), "a plan lives as long as it is used");
  in_threads([&](int thread) {
    for (int64_t n = 1; n < 3000; ++n) {
      const int index = static_cast<int>(n % kDevices);
      require(plans.plan(call_of(n * (1 + thread % 2)), index)->call == call_of(n * (1 + thread % 2)), "each its own");
    }
  });
  require(asked == kDevices, "a device is asked once for its limits");
}

}  // namespace

se::Device se::cuda::device_limits(int index) { return h200(index); }

int main() {
  check_cache();
  emulator::runtime.only_counts = true;
  Layer layer(0), elsewhere(1);
  std::printf("{");
  for (const auto& [plan, forced] : {std::pair{"cluster", ""}, {"two_pass", "two_pass"}}) {
    se_fused_force_plan(forced);
    const std::string first = layer.cost(), again = layer.cost(), other = elsewhere.cost();
    std::printf(R"("%s": {"first": %s, "again": %s, "on another device": %s}, )", plan, first.c_str(), again.c_str(),
                other.c_str());
  }
  // Of a kernel that no call above has launched.
  const StableIValue max = 1;
  emulator::runtime.set_attribute = 0;
  in_threads([&](int thread) {
    se_fused_force_plan("cluster");
    for (int i = 0; i < 1000; ++i) Layer((thread + i) % kDevices, max).call();
  });
  std::printf(R"("set_attribute in threads": %d})", emulator::runtime.set_attribute.load());
}
