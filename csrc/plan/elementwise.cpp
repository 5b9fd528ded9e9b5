// Plans the elementwise step, and the operators that have no other step.
#include <algorithm>

#include "parts.h"

namespace se {
namespace planning {
namespace {

// The thresholds are predictions: no GPU has timed other values.
constexpr int64_t kRangeBytes = 64 << 10, kSmallestRangeBytes = 4 << 10;  // of a map, per block of the elementwise step
constexpr int64_t kRangeChannels = 512;  // channels for which one block computes values

}  // namespace

Elementwise plan_elementwise(const Call& call, int64_t wanted_blocks, const PlanOverrides& overrides) {
  const int64_t element = element_bytes(call.dtype), map_bytes = call.n * call.c * call.l * element;
  int64_t bytes = kRangeBytes;
  while (bytes > kSmallestRangeBytes && map_bytes / bytes < wanted_blocks) bytes /= 2;
  Elementwise elementwise{};
  int64_t tile;
  if (call.channels_last) {
    elementwise.vec_bytes = vec_bytes_for(call, call.c * element, false, overrides.vec_bytes);
    elementwise.channels = std::min(call.c, kColumns * elementwise.vec_bytes / element);
    elementwise.channel_blocks = ceil_div(call.c, elementwise.channels);
    const int64_t positions = std::max<int64_t>(1, bytes / (elementwise.channels * element));
    elementwise.per_block = overrides.per_block.value_or(std::min(call.l, positions));
    elementwise.ranges = ceil_div(call.l, std::max<int64_t>(1, elementwise.per_block));
    tile = elementwise.per_block * elementwise.channels;
  } else {
    elementwise.vec_bytes = vec_bytes_for(call, 16, false, {});
    elementwise.channel_blocks = 1;
    elementwise.per_block = overrides.per_block.value_or(std::min(bytes / element, kRangeChannels * call.l));
    elementwise.ranges = ceil_div(call.c * call.l, std::max<int64_t>(1, elementwise.per_block));
    elementwise.channels = std::min(call.c, (elementwise.per_block - 2) / call.l + 2);
    tile = elementwise.per_block;
  }
  if (tile < 1 || tile > kLargestTile || elementwise.channels > 2 * kRangeChannels) {
    refuse("per_block=" + std::to_string(elementwise.per_block) + " with " + std::to_string(elementwise.channels) +
           " channels per block; wanted 1 to " + std::to_string(2 * kRangeChannels) +
           " of them and 1 to 2^31 - 1 elements");
  }
  return elementwise;
}

}  // namespace planning

Plan plan_batch_norm(const Call& call, const Device& device) {
  planning::check_call(call, device);
  Plan plan{};
  plan.call = call;
  plan.algorithm = Algorithm::kBatchNorm;
  plan.shared_per_block = device.shared_per_block;
  static const planning::PlanOverrides kNone("");
  plan.elementwise = planning::plan_elementwise(call, planning::kBlocksPerSm * device.sm_count, kNone);
  plan.add("batch_norm", call.n * plan.elementwise.channel_blocks * plan.elementwise.ranges,
           2 * padded(plan.elementwise.channels) * accumulator_bytes(call.dtype));
  const int64_t map = call.n * call.c * call.l * element_bytes(call.dtype);
  plan.map_bytes_read = (1 + call.residual) * map;
  plan.map_bytes_written = map;
  planning::check_grids(plan);
  return plan;
}

Plan plan_scale_shift(int64_t channels) {
  Plan plan{};
  plan.algorithm = Algorithm::kBatchNorm;
  plan.add("scale_shift", planning::ceil_div(channels, kThreads), 0);
  planning::check_grids(plan);
  return plan;
}

}  // namespace se
