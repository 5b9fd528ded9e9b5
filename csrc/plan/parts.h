// What the planners use.
#pragma once

#include <optional>
#include <string>

#include "../plan.h"
#include "model.h"

namespace se::planning {

constexpr int64_t kLargestTile = (int64_t{1} << 31) - 1;  // elements of a tile, which are counted in 32 bits

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
[[noreturn]] void refuse(const std::string& why);

// Returns `value`; refuses it if it is not one of the values that are allowed for `name`.
int one_of(const char* name, std::initializer_list<int> allowed, int64_t value);

// What a user overrides in the plan (make_plan's `forced`).
struct PlanOverrides {
  std::optional<Algorithm> algorithm;
  std::optional<int64_t> vec_bytes, threads_per_row, splits, per_block, rows, fused_hidden, size, threads;

  explicit PlanOverrides(const std::string& text);
};

// The largest access that divides every span of `span` bytes: 16 bytes, 8 (if `half_wide`) or one element. float64 uses
// scalar accesses only, because it exists to check the other types, and each size is another kernel to compile.
int vec_bytes_for(const Call& call, int64_t span, bool half_wide, const std::optional<int64_t>& forced);

// A reduction in which one block reduces all positions of its channels; channels_last: of at most `channels` channels.
// The caller sets splits, channel_blocks and, in NCHW, threads_per_row.
Reduction whole_reduction(const Call& call, int64_t channels, const PlanOverrides& overrides);

// NCHW: threads per row for a block that has `rows` whole rows in shared memory. Few threads per row take the fewest
// instructions.
int threads_per_staged_row(int64_t rows, int threads, const PlanOverrides& overrides);

// Refuses a device or sizes that no kernel can run.
void check_call(const Call& call, const Device& device);
// Refuses a launch with too many blocks.
void check_grids(const Plan& plan);

constexpr int64_t kBlocksPerSm = 4;  // enough to even out the last wave; a prediction
Elementwise plan_elementwise(const Call& call, int64_t wanted_blocks, const PlanOverrides& overrides);

// Adds the launch of backward for the weights and biases.
void add_weight_gradients(Plan& plan);

inline int most_threads(const Call& call) {
  return call.direction == Direction::kForward ? kMostForwardThreads : kMostBackwardThreads;
}

// The bytes of a staged tile of one map. 16 bytes are added because an element keeps its address modulo 16.
inline int64_t staged_tile_bytes(const Call& call, int64_t elements) {
  return elements ? ceil_div(elements * element_bytes(call.dtype), 16) * 16 + 16 : 0;
}

inline bool writes_maps(const Call& call) { return call.dx || call.dresidual; }
// Given dv, whether dx or dresidual depends on x; then whether dv itself depends on x and the residual.
inline bool reads_x_again(const Call& call) {
  return call.post_act || (call.dx && (call.pre_act || call.squeeze != Squeeze::kMean));
}
inline bool reads_residual(const Call& call) { return call.post_act && call.residual; }

void plan_two_pass(Plan& plan, const Device& device, const PlanOverrides& overrides);
// Makes `plan` the plan in clusters and returns "", or returns why there is none.
std::string plan_cluster(Plan& plan, const Device& device, const PlanOverrides& overrides);

}  // namespace se::planning
