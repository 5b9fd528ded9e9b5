#include <algorithm>

#include "parts.h"

namespace se::planning {
namespace {

// The share of each of `size` blocks: false where one would have none.
bool divide(Plan& plan, int size, const Forced& forced) {
  const Call& call = plan.call;
  const int64_t element = element_bytes(call.dtype), vector = 16 / element;
  Elementwise& e = plan.elementwise;
  Residence& residence = plan.residence;
  e = {}, residence = {};
  residence.size = size;
  e.width = width_for(call, call.channels_last ? call.c * element : 16, false, forced.width);
  if (call.channels_last && e.width != 16) return false;
  auto channels_in = [&](int64_t unit) { return ceil_div(ceil_div(call.c, unit), size) * unit; };
  auto all_have = [&](int64_t channels) { return (size - 1) * channels < call.c; };
  // In whole 16 bytes, for any L, where that leaves channels to every block.
  residence.channels = channels_in(vector);
  if (!call.channels_last && !all_have(residence.channels)) residence.channels = channels_in(1);
  if (!all_have(residence.channels)) return false;
  e.channels = residence.channels;
  e.chunks = call.channels_last ? size : 1;
  e.ranges = call.channels_last ? 1 : size;
  e.per_block = call.channels_last ? call.l : residence.channels * call.l;
  plan.reduction = whole_reduction(call, e.channels, forced);
  plan.reduction.splits = 1;
  residence.slab_bytes = slab_bytes(call, residence.channels * call.l);
  return true;
}

// The bytes of shared memory of a block: its slabs, and the numbers after them (ClusterLayout).
int64_t shared_bytes(Plan& plan, int threads) {
  const Call& call = plan.call;
  Residence& residence = plan.residence;
  const bool forward = call.direction == Direction::kForward;
  const int64_t vector = 16 / element_bytes(call.dtype), warps = threads / 32, part = forward ? 2 : 3;
  const int64_t depth = call.r ? call.r : call.c;
  int64_t work = warps * part * (call.channels_last ? vector * plan.reduction.lanes : 1), kinds = 1, slabs = 1;
  if (!forward) {
    work = std::max(work, warps * 32 * vector);
    kinds = call.squeeze == Squeeze::kMean ? 2 : 4;
    residence.keeps_x = reads_x_again(call);
    residence.keeps_residual = reads_residual(call);
    slabs += residence.keeps_x + residence.keeps_residual;
  }
  residence.work = padded(work);
  const int64_t numbers =
      ClusterLayout(residence.work, residence.channels, call.r, depth).gates + kinds * residence.channels;
  return slabs * residence.slab_bytes + numbers * accumulator_bytes(call.dtype);
}

// Of the size that was asked for, or the largest that the device has and the sample divides among.
std::string why_not(Plan& plan, const Device& device, const Forced& forced) {
  for (int log = 4; log >= 0; --log) {
    const int size = 1 << log;
    const bool possible = device.clusters[log] > 0 && divide(plan, size, forced);
    if (forced.size ? *forced.size != size : size > 1 && !possible) continue;
    const std::string blocks = std::to_string(size) + (size == 1 ? " block" : " blocks");
    if (device.clusters[log] == 0) return device.name + " has no clusters of " + blocks;
    if (!possible) {
      return "the channels of a sample do not divide among " + blocks +
             (plan.call.channels_last ? " in whole 16 bytes" : "");
    }
    return "each of " + blocks + " would need " + std::to_string(shared_bytes(plan, kThreads)) +
           " bytes of shared memory; " + device.name + " has " + std::to_string(device.shared_per_block);
  }
  return "size=" + std::to_string(*forced.size) + "; wanted 1, 2, 4, 8 or 16";
}

void add_launches(Plan& plan, int threads) {
  const Call& call = plan.call;
  const int size = plan.residence.size;
  plan.launch_count = 0;
  plan.add(call.direction == Direction::kForward ? "forward_cluster" : "backward_cluster", call.n * size, shared_bytes(plan, threads),
           size, threads);
  if (call.direction == Direction::kBackward) add_weight_gradients(plan);
}

}  // namespace

std::string plan_cluster(Plan& plan, const Device& device, const Forced& forced) {
  const Call& call = plan.call;
  if (call.dtype == DType::kFloat64) return "its kernels are not compiled for float64";
  if (device.clusters[0] == 0) return device.name + " has no clusters: they need sm_90 and kernels compiled for it";
  const bool forward = call.direction == Direction::kForward;
  if (!forward && !writes_maps(call)) return "no gradient of a map is wanted";
  if (forced.threads) one_of("threads", {256, 512}, *forced.threads);
  if (!forced.algorithm && forced.lanes.value_or(1) > kColumns) return "so many lanes are two_pass's";
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
    if (forced.size && *forced.size != size) continue;
    if (device.clusters[log] == 0 || !divide(plan, size, forced)) continue;
    for (const int threads : {256, 512}) {
      if (forced.threads && *forced.threads != threads) continue;
      add_launches(plan, threads);
      if (!call.channels_last) {
        plan.reduction.lanes = lanes_for_rows(plan.residence.channels, threads, forced);
        // From global memory, x is read by threads side by side: with one for each row, most of every sector of 32
        // bytes is not used.
        const bool reads_x = call.direction == Direction::kBackward && !plan.residence.keeps_x;
        const int fewest = std::max(2, plan.reduction.width / 2);
        if (reads_x && !forced.lanes) plan.reduction.lanes = std::max(plan.reduction.lanes, fewest);
      }
      if (plan.launches[0].shared_bytes > device.shared_per_block) continue;
      plan.predicted = predict(plan, device);
      if (!best.launch_count || plan.predicted.us() < best.predicted.us()) best = plan;
    }
  }
  if (!best.launch_count) return why_not(plan, device, forced);
  plan = best;
  add_stagger(plan, device);
  return "";
}

}  // namespace se::planning
