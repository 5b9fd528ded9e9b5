#include <algorithm>

#include "parts.h"

namespace se::planning {
namespace {

// Divides a sample into the tiles of `size` blocks. Returns false if a block would have no tile.
bool divide(Plan& plan, int size, const PlanOverrides& overrides) {
  const Call& call = plan.call;
  const int64_t element = element_bytes(call.dtype), vector = 16 / element;
  Elementwise& e = plan.elementwise;
  ClusterConfig& config = plan.cluster_config;
  e = {}, config = {};
  config.size = size;
  e.vec_bytes = vec_bytes_for(call, call.channels_last ? call.c * element : 16, false, overrides.vec_bytes);
  if (call.channels_last && e.vec_bytes != 16) return false;
  auto channels_in = [&](int64_t unit) { return ceil_div(ceil_div(call.c, unit), size) * unit; };
  auto all_have = [&](int64_t channels) { return (size - 1) * channels < call.c; };
  // Whole 16 bytes of channels per block, so that tiles are aligned for any L, unless a block would have no channel.
  config.channels = channels_in(vector);
  if (!call.channels_last && !all_have(config.channels)) config.channels = channels_in(1);
  if (!all_have(config.channels)) return false;
  e.channels = config.channels;
  e.channel_blocks = call.channels_last ? size : 1;
  e.ranges = call.channels_last ? 1 : size;
  e.per_block = call.channels_last ? call.l : config.channels * call.l;
  plan.reduction = whole_reduction(call, e.channels, overrides);
  plan.reduction.splits = 1;
  config.staged_bytes = staged_tile_bytes(call, config.channels * call.l);
  return true;
}

// The bytes of shared memory of a block: its staged tiles, and the numbers after them (ClusterLayout).
int64_t shared_bytes(Plan& plan, int threads) {
  const Call& call = plan.call;
  ClusterConfig& config = plan.cluster_config;
  const bool forward = call.direction == Direction::kForward;
  const int64_t vector = 16 / element_bytes(call.dtype), warps = threads / 32, part = forward ? 2 : 3;
  const int64_t depth = call.r ? call.r : call.c;
  int64_t work = warps * part * (call.channels_last ? vector * plan.reduction.threads_per_row : 1), kinds = 1, maps = 1;
  if (!forward) {
    work = std::max(work, warps * 32 * vector);
    kinds = call.squeeze == Squeeze::kMean ? 2 : 4;
    config.stages_x = reads_x_again(call);
    config.stages_residual = reads_residual(call);
    maps += config.stages_x + config.stages_residual;
  }
  config.work = padded(work);
  const int64_t numbers = ClusterLayout(config.work, config.channels, call.r, depth).gates + kinds * config.channels;
  return maps * config.staged_bytes + numbers * accumulator_bytes(call.dtype);
}

// Why there is no plan, for the size that was forced, or for the largest size that the device has and that divides the
// sample.
std::string why_not(Plan& plan, const Device& device, const PlanOverrides& overrides) {
  for (int log = 4; log >= 0; --log) {
    const int size = 1 << log;
    const bool possible = device.clusters[log] > 0 && divide(plan, size, overrides);
    if (overrides.size ? *overrides.size != size : size > 1 && !possible) continue;
    const std::string blocks = std::to_string(size) + (size == 1 ? " block" : " blocks");
    if (device.clusters[log] == 0) return device.name + " has no clusters of " + blocks;
    if (!possible) {
      return "the channels of a sample do not divide among " + blocks +
             (plan.call.channels_last ? " in whole 16 bytes" : "");
    }
    return (size == 1 ? "" : "each of ") + blocks + " would need " + std::to_string(shared_bytes(plan, kThreads)) +
           " bytes of shared memory; " + device.name + " has " + std::to_string(device.shared_per_block);
  }
  return "size=" + std::to_string(*overrides.size) + "; wanted 1, 2, 4, 8 or 16";
}

void add_launches(Plan& plan, int threads) {
  const Call& call = plan.call;
  const int size = plan.cluster_config.size;
  plan.launch_count = 0;
  plan.add(call.direction == Direction::kForward ? "forward_cluster" : "backward_cluster", call.n * size,
           shared_bytes(plan, threads), size, threads);
  if (call.direction == Direction::kBackward) add_weight_gradients(plan);
}

}  // namespace

std::string plan_cluster(Plan& plan, const Device& device, const PlanOverrides& overrides) {
  const Call& call = plan.call;
  if (call.dtype == DType::kFloat64) return "its kernels are not compiled for float64";
  if (device.clusters[0] == 0) {
    return device.name + " has no clusters: they need sm_90, or sm_80 for one block, and kernels compiled for it";
  }
  const bool forward = call.direction == Direction::kForward;
  if (!forward && !writes_maps(call)) return "the call needs no gradient of a map";
  if (overrides.threads) one_of("threads", {256, 512}, *overrides.threads);
  if (!overrides.algorithm && overrides.threads_per_row.value_or(1) > kColumns)
    return "only two_pass has so many threads per row";
  const int64_t map = call.n * call.c * call.l * element_bytes(call.dtype);
  plan.algorithm = Algorithm::kCluster;
  if (forward) {
    plan.map_bytes_read = (1 + call.residual) * map;
    plan.map_bytes_written = map;
  } else {
    plan.map_bytes_read = (2 + reads_residual(call)) * map;
    plan.map_bytes_written = (call.dx + call.dresidual) * map;
    if (call.dw) plan.scratch_bytes = call.n * (call.c + call.r) * accumulator_bytes(call.dtype);
  }

  Plan best{};
  for (int log = 0; log < 5; ++log) {
    const int size = 1 << log;
    if (overrides.size && *overrides.size != size) continue;
    if (device.clusters[log] == 0 || !divide(plan, size, overrides)) continue;
    for (const int threads : {256, 512}) {
      if (overrides.threads && *overrides.threads != threads) continue;
      add_launches(plan, threads);
      if (!call.channels_last) {
        plan.reduction.threads_per_row = threads_per_staged_row(plan.cluster_config.channels, threads, overrides);
        // Threads side by side read x from global memory: with one thread per row, most of every 32-byte sector would
        // be unused.
        const bool reads_x = call.direction == Direction::kBackward && !plan.cluster_config.stages_x;
        const int fewest = std::max(2, plan.reduction.vec_bytes / 2);
        if (reads_x && !overrides.threads_per_row)
          plan.reduction.threads_per_row = std::max(plan.reduction.threads_per_row, fewest);
      }
      if (plan.launches[0].shared_bytes > device.shared_per_block) continue;
      plan.predicted = predict(plan, device);
      if (!best.launch_count || plan.predicted.us() < best.predicted.us()) best = plan;
    }
  }
  if (!best.launch_count) return why_not(plan, device, overrides);
  plan = best;
  add_stagger(plan, device);
  return "";
}

}  // namespace se::planning
