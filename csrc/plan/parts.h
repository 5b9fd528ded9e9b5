// What the algorithms' planners share.
#pragma once

#include <optional>
#include <string>

#include "../plan.h"

namespace se::planning {

constexpr int64_t kLargestShare = (int64_t{1} << 31) - 1;  // elements of a block's share: counted in 32 bits

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
[[noreturn]] void refuse(const std::string& why);

// What a user asks of the plan.
struct Forced {
  std::optional<Algorithm> algorithm;
  std::optional<int64_t> width, lanes, splits, per_block, fused_hidden, size, by_channels, samples;

  explicit Forced(const std::string& text);
};

// The widest access of 16, 8 (where `half_wide`) or one element's bytes that divides every span of `span` bytes. For
// float64 an element's: it is there to check the others against, and each width is a kernel to compile.
int width_for(const Call& call, int64_t span, bool half_wide, const std::optional<int64_t>& forced);

// A reduction of which one block does the whole of its channels, at most `channels` of channels_last: splits and chunks
// are left to the caller.
Reduction whole_reduction(const Call& call, int64_t channels, const Forced& forced);

// The backward launch for the weights and biases.
void add_weight_gradients(Plan& plan);

inline bool writes_maps(const Call& call) { return call.dx || call.dresidual; }
// Whether dx or dresidual depend on x, given dv; and dv itself on x and the residual.
inline bool reads_x_again(const Call& call) {
  return call.post_act || (call.dx && (call.pre_act || call.squeeze != Squeeze::kMean));
}
inline bool reads_residual(const Call& call) { return call.post_act && call.residual; }

void plan_two_pass(Plan& plan, const Device& device, const Forced& forced);
// Why not, or nothing where `plan` now is one.
std::string plan_cluster(Plan& plan, const Device& device, const Forced& forced);

}  // namespace se::planning
