#include <algorithm>

#include "parts.h"

namespace se::planning {
namespace {

// The thresholds are predictions: no GPU has timed other values.
constexpr int64_t kLoadsPerThread = 4;  // the fewest loads per thread of a split reduction
constexpr int64_t kLargestSplit = 64;
constexpr int kFewestThreadsPerRow = 8;                                     // channels_last: 128 bytes of a position
constexpr int64_t kStagedBytes = 16 << 10, kLargestStagedBytes = 40 << 10;  // of the maps, staged per block
constexpr int64_t kHalvedRows = 32;  // more staged rows than this are halved until there are enough blocks
// Up to these sizes each block reads W1 itself, which saves a launch.
constexpr int64_t kFusedWeights = 4096, kFusedHidden = 256;

// NCHW rows in global memory: 8 threads make up to 8 accesses each, a warp up to 16.
int threads_per_global_row(const Call& call, const Reduction& reduction, const PlanOverrides& overrides) {
  const int64_t vectors = call.l * element_bytes(call.dtype) / reduction.vec_bytes;
  return one_of("threads_per_row", {8, 32, kThreads},
                overrides.threads_per_row.value_or(vectors <= 64    ? 8
                                                   : vectors <= 512 ? 32
                                                                    : kThreads));
}

// The number of maps that a reduction reads.
int64_t maps_reduced(const Call& call) { return call.direction == Direction::kForward ? 1 : 2 + reads_residual(call); }

// The rows that a block stages in shared memory by 16-byte copies because 16-byte accesses do not divide a row; 0 if
// they do, or if a row is too long.
int64_t staged_rows(const Call& call, const Reduction& reduction, int64_t wanted_blocks,
                    const PlanOverrides& overrides) {
  const int64_t row = call.l * element_bytes(call.dtype), maps = maps_reduced(call);
  const bool can = call.dtype != DType::kFloat64 && call.alignment == 16 && row * maps <= kLargestStagedBytes;
  if (overrides.rows == 0) return 0;
  if (overrides.rows && !can) refuse("rows=" + std::to_string(*overrides.rows) + " of so long or unaligned rows");
  if (overrides.rows && overrides.splits.value_or(1) != 1)
    refuse("rows=" + std::to_string(*overrides.rows) + " are not split");
  if (!overrides.rows &&
      (!can || reduction.vec_bytes == 16 || overrides.splits || overrides.vec_bytes || overrides.threads_per_row))
    return 0;
  int64_t rows = std::clamp<int64_t>(kStagedBytes / (row * maps), 1, call.c);
  while (rows > kHalvedRows && call.n * ceil_div(call.c, rows) < wanted_blocks) rows = ceil_div(rows, 2);
  rows = overrides.rows.value_or(rows);
  if (rows < 0 || rows * row * maps > kLargestStagedBytes) {
    refuse("rows=" + std::to_string(rows) + " of " + std::to_string(row * maps) + " bytes; wanted at most " +
           std::to_string(kLargestStagedBytes) + " bytes of them");
  }
  return rows;
}

Reduction split_reduction(const Call& call, int64_t wanted_blocks, const PlanOverrides& overrides) {
  Reduction reduction = whole_reduction(call, call.c, overrides);
  int64_t blocks, most;
  if (call.channels_last) {
    // If blocks are few, they take fewer channels rather than fewer positions: the sums of positions must be added up
    // again by every block that needs them.
    const int64_t all = call.c * element_bytes(call.dtype) / reduction.vec_bytes;
    if (!overrides.threads_per_row && call.n * ceil_div(all, reduction.threads_per_row) < wanted_blocks) {
      reduction.threads_per_row = std::min(reduction.threads_per_row, kFewestThreadsPerRow);
    }
    reduction.channel_blocks =
        ceil_div(call.c * element_bytes(call.dtype) / reduction.vec_bytes, reduction.threads_per_row);
    blocks = call.n * reduction.channel_blocks;
    most = call.l / (kThreads / reduction.threads_per_row * kLoadsPerThread);
  } else {
    reduction.channel_blocks = 1;
    reduction.rows = staged_rows(call, reduction, wanted_blocks, overrides);
    reduction.staged_bytes = staged_tile_bytes(call, reduction.rows * call.l);
    reduction.threads_per_row = reduction.rows ? threads_per_staged_row(reduction.rows, kThreads, overrides)
                                               : threads_per_global_row(call, reduction, overrides);
    blocks = ceil_div(call.n * call.c, kThreads / reduction.threads_per_row);
    most = call.l * element_bytes(call.dtype) / reduction.vec_bytes / (reduction.threads_per_row * kLoadsPerThread);
  }
  const int64_t splits = reduction.rows ? 1 : std::min({ceil_div(wanted_blocks, blocks), most, kLargestSplit});
  reduction.splits = static_cast<int>(overrides.splits.value_or(std::max<int64_t>(1, splits)));
  if (reduction.splits < 1 || reduction.splits > kLargestSplit) {
    refuse("splits=" + std::to_string(reduction.splits) + "; wanted 1 to " + std::to_string(kLargestSplit));
  }
  return reduction;
}

int64_t reduction_blocks(const Call& call, const Reduction& reduction) {
  if (reduction.rows) return call.n * ceil_div(call.c, reduction.rows);
  return call.channels_last ? call.n * reduction.channel_blocks * reduction.splits
                            : ceil_div(call.n * call.c, kThreads / reduction.threads_per_row) * reduction.splits;
}

// Bytes of shared memory for the staged rows and `numbers` partial results per thread.
int64_t reduction_shared(const Plan& plan, int64_t numbers) {
  const Call& call = plan.call;
  const int64_t vector = call.channels_last ? plan.reduction.vec_bytes / element_bytes(call.dtype) : 1;
  return maps_reduced(call) * plan.reduction.staged_bytes + kThreads * vector * numbers * accumulator_bytes(call.dtype);
}

// kWarpSums of csrc/cuda/gemv.cuh for all warps of a block.
int64_t warp_sums(const Call& call) { return kThreads * 16 / element_bytes(call.dtype); }

void plan_forward(Plan& plan) {
  const Call& call = plan.call;
  const int64_t a = accumulator_bytes(call.dtype), map = call.n * call.c * call.l * element_bytes(call.dtype);
  const bool hidden = call.r > 0 && !plan.fused_hidden;
  const int64_t parts = call.squeeze == Squeeze::kMeanMax ? 2 : 1;
  plan.add("squeeze", reduction_blocks(call, plan.reduction), reduction_shared(plan, 2));
  if (hidden) {
    plan.add("hidden", ceil_div(call.r, kThreads / 32) * ceil_div(call.n, kSamples),
             kSamples * (kGemvChunk + kThreads / 32) * a);
  }
  plan.add("scale", call.n * plan.elementwise.channel_blocks * plan.elementwise.ranges,
           (kGemvChunk + plan.elementwise.channels + (plan.fused_hidden ? padded(call.r) : 0)) * a);
  plan.map_bytes_read = (2 + call.residual) * map;
  plan.map_bytes_written = map;
  plan.scratch_bytes =
      (parts * call.n * plan.reduction.splits * call.c + (hidden && !call.saves_p1 ? call.n * call.r : 0)) * a;
}

void plan_backward(Plan& plan) {
  const Call& call = plan.call;
  const int64_t a = accumulator_bytes(call.dtype), map = call.n * call.c * call.l * element_bytes(call.dtype);
  const int64_t parts = call.squeeze != Squeeze::kMean ? 3 : 1, groups = ceil_div(call.n, kSamples);
  plan.add("backward_reduce", reduction_blocks(call, plan.reduction), reduction_shared(plan, 3));
  if (call.r > 0) {
    plan.add("backward_hidden", ceil_div(call.r, kColumns) * groups,
             (kSamples * (kGemvChunk + kColumns) + warp_sums(call)) * a);
  }
  if (writes_maps(call)) {
    plan.add("backward_apply", call.n * plan.elementwise.channel_blocks * plan.elementwise.ranges,
             (kGemvChunk + warp_sums(call) + 4 * plan.elementwise.channels) * a);
  }
  add_weight_gradients(plan);
  plan.map_bytes_read = (2 + reads_residual(call)) * map;
  if (writes_maps(call)) plan.map_bytes_read += (1 + reads_x_again(call) + reads_residual(call)) * map;
  plan.map_bytes_written = (call.dx + call.dresidual) * map;
  plan.scratch_bytes = (parts * call.n * plan.reduction.splits * call.c + call.n * call.r) * a;
}

}  // namespace

void plan_two_pass(Plan& plan, const Device& device, const PlanOverrides& overrides) {
  const Call& call = plan.call;
  plan.algorithm = Algorithm::kTwoPass;
  const int64_t wanted = kBlocksPerSm * device.sm_count;
  plan.reduction = split_reduction(call, wanted, overrides);
  plan.elementwise = plan_elementwise(call, wanted, overrides);
  if (call.direction == Direction::kBackward) {
    plan_backward(plan);
    plan.predicted = predict(plan, device);
    return;
  }
  const bool can_fuse = call.r > 0 && call.r <= kFusedHidden;
  if (overrides.fused_hidden.value_or(0) && !can_fuse) {
    refuse("fused_hidden=1 with R = " + std::to_string(call.r) + "; wanted 1 to " + std::to_string(kFusedHidden));
  }
  plan.fused_hidden = can_fuse && overrides.fused_hidden.value_or(call.c * call.r <= kFusedWeights);
  plan_forward(plan);
  plan.predicted = predict(plan, device);
}

}  // namespace se::planning
