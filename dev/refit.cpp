// The planner's model with any constants, called through ctypes. A call is planned once; a fit then predicts it many
// times.
#include <cstring>
#include <exception>
#include <vector>

#include "../csrc/plan/model.h"

namespace {

struct Planned {
  se::Plan plan;
  const se::Device* device;
};
std::vector<Planned> planned;

}  // namespace

// Makes the forced plan of a call on a known device and returns its number, or -1 if there is no such plan. Backward
// computes every gradient.
extern "C" int refit_plan(const char* device, bool backward, int64_t n, int64_t c, int64_t r, int64_t l,
                          bool channels_last, int dtype, const char* forced) try {
  se::Call call{};
  call.direction = backward ? se::Direction::kBackward : se::Direction::kForward;
  call.n = n, call.c = c, call.r = r, call.l = l;
  call.channels_last = channels_last;
  call.dtype = static_cast<se::DType>(dtype);
  call.alignment = 16;
  call.dx = call.dw = true;
  for (const se::Device& known : se::device_presets()) {
    if (known.name != device) continue;
    planned.push_back({se::make_plan(call, known, forced), &known});
    return static_cast<int>(planned.size()) - 1;
  }
  return -1;
} catch (const std::exception&) {
  return -1;
}

// The predicted time in microseconds.
extern "C" double refit_predict(int plan, const se::planning::Constants* constants) {
  return se::planning::predict(planned[plan].plan, *planned[plan].device, *constants).us();
}

// Writes the present constants and returns how many doubles they are.
extern "C" int refit_constants(bool backward, se::planning::Constants* out) {
  *out = se::planning::constants(backward ? se::Direction::kBackward : se::Direction::kForward);
  return sizeof(*out) / sizeof(double);
}
