#include <algorithm>

#include "parts.h"

namespace se::planning {
namespace {

// The thresholds are predictions: no GPU has measured others beside them.
constexpr int64_t kBlocksPerMultiprocessor = 4;  // enough of them to even out the last wave
constexpr int64_t kLoadsPerThread = 4;           // what a thread of a split reduction has at least to do
constexpr int64_t kLargestSplit = 64;
constexpr int kFewestLanes = 8;  // along the channels: 128 bytes of a position
constexpr int64_t kStagedBytes = 16 << 10, kLargestStagedBytes = 40 << 10;  // of a map, that a block copies first
constexpr int64_t kHalvedRows = 32;                                         // more of them are halved for more blocks
constexpr int64_t kRangeBytes = 64 << 10, kSmallestRangeBytes = 4 << 10;    // of a map, for one block
constexpr int64_t kRangeChannels = 512;                                     // whose gates one block computes
constexpr int64_t kFusedWeights = 4096, kFusedHidden = 256;  // W1 that each block reads again instead of a launch

// NCHW, in global memory: a group of 8 takes up to 8 accesses per thread, a warp up to 16.
int lanes_along_rows(const Call& call, const Reduction& reduction, const Forced& forced) {
  const int64_t vectors = call.l * element_bytes(call.dtype) / reduction.width;
  return one_of("lanes", {8, 32, kThreads}, forced.lanes.value_or(vectors <= 64 ? 8 : vectors <= 512 ? 32 : kThreads));
}

// Maps that a reduction reads.
int64_t maps_reduced(const Call& call) { return call.direction == Direction::kForward ? 1 : 2 + reads_residual(call); }

// Rows that a block copies to shared memory in 16 bytes, because they do not divide into such accesses themselves; 0
// where they do, or where a row is too long.
int64_t staged_rows(const Call& call, const Reduction& reduction, int64_t wanted_blocks, const Forced& forced) {
  const int64_t row = call.l * element_bytes(call.dtype), maps = maps_reduced(call);
  const bool can = call.dtype != DType::kFloat64 && call.alignment == 16 && row * maps <= kLargestStagedBytes;
  if (forced.rows == 0) return 0;
  if (forced.rows && !can) refuse("rows=" + std::to_string(*forced.rows) + " of so long or unaligned rows");
  if (forced.rows && forced.splits.value_or(1) != 1) refuse("rows=" + std::to_string(*forced.rows) + " are not split");
  if (!forced.rows && (!can || reduction.width == 16 || forced.splits || forced.width || forced.lanes)) return 0;
  int64_t rows = std::clamp<int64_t>(kStagedBytes / (row * maps), 1, call.c);
  while (rows > kHalvedRows && call.n * ceil_div(call.c, rows) < wanted_blocks) rows = ceil_div(rows, 2);
  rows = forced.rows.value_or(rows);
  if (rows < 0 || rows * row * maps > kLargestStagedBytes) {
    refuse("rows=" + std::to_string(rows) + " of " + std::to_string(row * maps) + " bytes; wanted at most " +
           std::to_string(kLargestStagedBytes) + " bytes of them");
  }
  return rows;
}

Reduction split_reduction(const Call& call, int64_t wanted_blocks, const Forced& forced) {
  Reduction reduction = whole_reduction(call, call.c, forced);
  int64_t blocks, most;
  if (call.channels_last) {
    // Few blocks rather take fewer channels than fewer positions, whose sums everyone adds up again.
    const int64_t all = call.c * element_bytes(call.dtype) / reduction.width;
    if (!forced.lanes && call.n * ceil_div(all, reduction.lanes) < wanted_blocks) {
      reduction.lanes = std::min(reduction.lanes, kFewestLanes);
    }
    reduction.chunks = ceil_div(call.c * element_bytes(call.dtype) / reduction.width, reduction.lanes);
    blocks = call.n * reduction.chunks;
    most = call.l / (kThreads / reduction.lanes * kLoadsPerThread);
  } else {
    reduction.chunks = 1;
    reduction.rows = staged_rows(call, reduction, wanted_blocks, forced);
    reduction.slab_bytes = slab_bytes(call, reduction.rows * call.l);
    reduction.lanes =
        reduction.rows ? lanes_for_rows(reduction.rows, kThreads, forced) : lanes_along_rows(call, reduction, forced);
    blocks = ceil_div(call.n * call.c, kThreads / reduction.lanes);
    most = call.l * element_bytes(call.dtype) / reduction.width / (reduction.lanes * kLoadsPerThread);
  }
  const int64_t splits = reduction.rows ? 1 : std::min({ceil_div(wanted_blocks, blocks), most, kLargestSplit});
  reduction.splits = static_cast<int>(forced.splits.value_or(std::max<int64_t>(1, splits)));
  if (reduction.splits < 1 || reduction.splits > kLargestSplit) {
    refuse("splits=" + std::to_string(reduction.splits) + "; wanted 1 to " + std::to_string(kLargestSplit));
  }
  return reduction;
}

Elementwise plan_elementwise(const Call& call, int64_t wanted_blocks, const Forced& forced) {
  const int64_t element = element_bytes(call.dtype), map_bytes = call.n * call.c * call.l * element;
  int64_t bytes = kRangeBytes;
  while (bytes > kSmallestRangeBytes && map_bytes / bytes < wanted_blocks) bytes /= 2;
  Elementwise elementwise{};
  int64_t share;
  if (call.channels_last) {
    elementwise.width = width_for(call, call.c * element, false, forced.width);
    elementwise.channels = std::min(call.c, kColumns * elementwise.width / element);
    elementwise.chunks = ceil_div(call.c, elementwise.channels);
    const int64_t positions = std::max<int64_t>(1, bytes / (elementwise.channels * element));
    elementwise.per_block = forced.per_block.value_or(std::min(call.l, positions));
    elementwise.ranges = ceil_div(call.l, std::max<int64_t>(1, elementwise.per_block));
    share = elementwise.per_block * elementwise.channels;
  } else {
    elementwise.width = width_for(call, 16, false, {});
    elementwise.chunks = 1;
    elementwise.per_block = forced.per_block.value_or(std::min(bytes / element, kRangeChannels * call.l));
    elementwise.ranges = ceil_div(call.c * call.l, std::max<int64_t>(1, elementwise.per_block));
    elementwise.channels = std::min(call.c, (elementwise.per_block - 2) / call.l + 2);
    share = elementwise.per_block;
  }
  if (share < 1 || share > kLargestShare || elementwise.channels > 2 * kRangeChannels) {
    refuse("per_block=" + std::to_string(elementwise.per_block) + " with " + std::to_string(elementwise.channels) +
           " channels per block; wanted 1 to " + std::to_string(2 * kRangeChannels) +
           " of them and 1 to 2^31 - 1 elements");
  }
  return elementwise;
}

int64_t reduction_blocks(const Call& call, const Reduction& reduction) {
  if (reduction.rows) return call.n * ceil_div(call.c, reduction.rows);
  return call.channels_last ? call.n * reduction.chunks * reduction.splits
                            : ceil_div(call.n * call.c, kThreads / reduction.lanes) * reduction.splits;
}

// Bytes of shared memory for `numbers` partial results of each thread, after the rows that are staged.
int64_t reduction_shared(const Plan& plan, int64_t numbers) {
  const Call& call = plan.call;
  const int64_t vector = call.channels_last ? plan.reduction.width / element_bytes(call.dtype) : 1;
  return maps_reduced(call) * plan.reduction.slab_bytes + kThreads * vector * numbers * accumulator_bytes(call.dtype);
}

// As csrc/cuda/excite.cuh has them for the sum over the warps of a block.
int64_t warp_sums(const Call& call) { return kThreads * 16 / element_bytes(call.dtype); }

void plan_forward(Plan& plan) {
  const Call& call = plan.call;
  const int64_t a = accumulator_bytes(call.dtype), map = call.n * call.c * call.l * element_bytes(call.dtype);
  const bool hidden = call.r > 0 && !plan.fused_hidden;
  const int64_t parts = call.squeeze == Squeeze::kMeanMax ? 2 : 1;
  plan.add("squeeze", reduction_blocks(call, plan.reduction), reduction_shared(plan, 2));
  if (hidden) {
    plan.add("hidden", ceil_div(call.r, kThreads / 32) * ceil_div(call.n, kSamples),
             kSamples * (kTile + kThreads / 32) * a);
  }
  plan.add("scale", call.n * plan.elementwise.chunks * plan.elementwise.ranges,
           (kTile + plan.elementwise.channels + (plan.fused_hidden ? padded(call.r) : 0)) * a);
  plan.map_bytes_read = (2 + call.residual) * map;
  plan.map_bytes_written = map;
  plan.scratch_bytes =
      (parts * call.n * plan.reduction.splits * call.c + (hidden && !call.keeps ? call.n * call.r : 0)) * a;
}

void plan_backward(Plan& plan) {
  const Call& call = plan.call;
  const int64_t a = accumulator_bytes(call.dtype), map = call.n * call.c * call.l * element_bytes(call.dtype);
  const int64_t parts = call.squeeze != Squeeze::kMean ? 3 : 1, groups = ceil_div(call.n, kSamples);
  plan.add("backward_reduce", reduction_blocks(call, plan.reduction), reduction_shared(plan, 3));
  if (call.r > 0) {
    plan.add("backward_hidden", ceil_div(call.r, kColumns) * groups,
             (kSamples * (kTile + kColumns) + warp_sums(call)) * a);
  }
  if (writes_maps(call)) {
    plan.add("backward_apply", call.n * plan.elementwise.chunks * plan.elementwise.ranges,
             (kTile + warp_sums(call) + 4 * plan.elementwise.channels) * a);
  }
  add_weight_gradients(plan);
  plan.map_bytes_read = (2 + reads_residual(call)) * map;
  if (writes_maps(call)) plan.map_bytes_read += (1 + reads_x_again(call) + reads_residual(call)) * map;
  plan.map_bytes_written = (call.dx + call.dresidual) * map;
  plan.scratch_bytes = (parts * call.n * plan.reduction.splits * call.c + call.n * call.r) * a;
}

}  // namespace

void plan_two_pass(Plan& plan, const Device& device, const Forced& forced) {
  const Call& call = plan.call;
  plan.algorithm = Algorithm::kTwoPass;
  const int64_t wanted = kBlocksPerMultiprocessor * device.multiprocessors;
  plan.reduction = split_reduction(call, wanted, forced);
  plan.elementwise = plan_elementwise(call, wanted, forced);
  if (call.direction == Direction::kBackward) {
    plan_backward(plan);
    plan.predicted = predict(plan, device);
    return;
  }
  const bool can_fuse = call.r > 0 && call.r <= kFusedHidden;
  if (forced.fused_hidden.value_or(0) && !can_fuse) {
    refuse("fused_hidden=1 with R = " + std::to_string(call.r) + "; wanted 1 to " + std::to_string(kFusedHidden));
  }
  plan.fused_hidden = can_fuse && forced.fused_hidden.value_or(call.c * call.r <= kFusedWeights);
  plan_forward(plan);
  plan.predicted = predict(plan, device);
}

}  // namespace se::planning
