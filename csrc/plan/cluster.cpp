#include <algorithm>

#include "parts.h"

namespace se::planning {
namespace {

// A model of the time, predicted, and refuted by an H200 (docs/design.md): it has to be fitted anew. What a
// multiprocessor moves alone, and its part of what all move together (H200: 4.3 TB/s over 132); and what a block spends
// on its exchange and layers, when its multiprocessor moves nothing unless it has a second block.
constexpr double kAloneBytesPerUs = 100e3, kTogetherBytesPerUs = 33e3, kExchangeUs = 2.5;
constexpr int64_t kReserved = 1 << 10;  // bytes of shared memory that the system takes for a block
// Of a position's channels, for one block: an H100 stores pieces of 256 bytes at 99 % of the speed of 512, of 32 bytes
// at 32 % (QuACK's notes on coalescing).
constexpr int64_t kPieceBytes = 256;

// The share of each of `size` blocks: false where one would have none, or none such as was asked for.
bool divide(Plan& plan, int size, const Forced& forced) {
  const Call& call = plan.call;
  const int64_t element = element_bytes(call.dtype), vector = 16 / element;
  Elementwise& e = plan.elementwise;
  Residence& residence = plan.residence;
  e = {}, residence = {};
  e.chunks = 1, e.ranges = size;
  residence.size = size;
  // One, unless asked: four lose at 14 of the 16 calls that an H200 has timed (plans_gpu.csv).
  residence.samples = call.direction == Direction::kForward ? static_cast<int>(forced.samples.value_or(1)) : 1;
  residence.wide = call.alignment == 16;
  auto channels_in = [&](int64_t unit) { return ceil_div(ceil_div(call.c, unit), size) * unit; };
  auto all_have = [&](int64_t channels) { return (size - 1) * channels < call.c; };
  e.width =
      call.channels_last ? width_for(call, call.c * element, false, forced.width) : width_for(call, 16, false, {});
  // In whole 16 bytes, for any L, where that leaves channels to every block.
  residence.channels = channels_in(vector);
  if (call.channels_last) {
    const bool long_piece = residence.channels * element >= kPieceBytes;
    residence.by_channels = e.width == 16 && all_have(residence.channels) &&
                            forced.by_channels.value_or(long_piece || residence.samples > 1);
  }
  // NCHW is split by channels anyway.
  const bool by_channels = !call.channels_last || residence.by_channels;
  if (forced.by_channels.value_or(by_channels) != by_channels) return false;
  if (!by_channels || !all_have(residence.channels)) residence.channels = channels_in(1);
  if (!all_have(residence.channels) || (!by_channels && (call.l < size || residence.samples > 1))) return false;
  e.channels = by_channels ? residence.channels : call.c;
  e.per_block = !by_channels ? ceil_div(call.l, size) : call.channels_last ? call.l : residence.channels * call.l;
  plan.reduction = whole_reduction(call, e.channels, forced);
  plan.reduction.splits = 1;
  const int64_t share = call.channels_last ? e.per_block * e.channels : e.per_block;
  residence.slab_bytes = ceil_div(share * element, 16) * 16 + 16;  // and the remainder of 16 of the first element
  return true;
}

// What forward_cluster.cu and backward_cluster.cu lay out.
int64_t shared_bytes(Plan& plan) {
  const Call& call = plan.call;
  const Elementwise& e = plan.elementwise;
  Residence& residence = plan.residence;
  const bool forward = call.direction == Direction::kForward;
  const int64_t part = forward ? 2 : 3, own = residence.channels, depth = call.r ? call.r : call.c;
  const int64_t samples = residence.samples;
  residence.work = kThreads * (call.channels_last ? e.width / element_bytes(call.dtype) : 1) * part;
  int64_t numbers = residence.work + samples * (part * e.channels + own + call.r + depth);
  int64_t slabs = samples;
  if (forward) {
    numbers += samples * own;
  } else {
    const int64_t kinds = call.squeeze == Squeeze::kMean ? 2 : 4;
    const bool collects = call.channels_last && !residence.by_channels;
    numbers += kinds * (own + (collects ? call.c : 0));
    residence.keeps_x = reads_x_again(call);
    residence.keeps_residual = reads_residual(call);
    slabs += residence.keeps_x + residence.keeps_residual;
  }
  return slabs * residence.slab_bytes + numbers * accumulator_bytes(call.dtype);
}

double predicted_us(const Plan& plan, const Device& device, int64_t shared, int clusters) {
  const Call& call = plan.call;
  const int size = plan.residence.size;
  const int64_t residents =
      std::clamp<int64_t>(device.shared_per_multiprocessor / (shared + kReserved), 1,
                          call.direction == Direction::kForward ? kForwardResidents : kBackwardResidents);
  const int64_t wanted = ceil_div(call.n, plan.residence.samples), at_once = clusters * residents;
  const int64_t waves = ceil_div(wanted, at_once);
  const auto bytes = static_cast<double>(plan.map_bytes_read + plan.map_bytes_written);
  const auto busy = static_cast<double>(std::min<int64_t>(device.multiprocessors, std::min(wanted, at_once) * size));
  const double weights = static_cast<double>(2 * call.c * (call.r ? call.r : call.c) * element_bytes(call.dtype));
  return waves * (kExchangeUs / std::min<int64_t>(residents, 2) + weights / size * residents / kAloneBytesPerUs) +
         bytes / std::min(kTogetherBytesPerUs * device.multiprocessors, kAloneBytesPerUs * busy);
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
      const char* how = plan.residence.samples > 1 ? " by channels, which several samples need"
                        : !forced.by_channels      ? ""
                        : *forced.by_channels      ? " by channels"
                                                   : " by positions";
      return "a sample does not divide among " + blocks + how;
    }
    return "each of " + blocks + " would need " + std::to_string(shared_bytes(plan)) + " bytes of shared memory; " +
           device.name + " has " + std::to_string(device.shared_per_block);
  }
  return "size=" + std::to_string(*forced.size) + "; wanted 1, 2, 4, 8 or 16";
}

}  // namespace

std::string plan_cluster(Plan& plan, const Device& device, const Forced& forced) {
  const Call& call = plan.call;
  if (const int64_t by = forced.by_channels.value_or(0); by != 0 && by != 1) {
    return "by_channels=" + std::to_string(by) + "; wanted 0 or 1";
  }
  if (const int64_t samples = forced.samples.value_or(1); samples != 1 && samples != kSamples) {
    return "samples=" + std::to_string(samples) + "; wanted 1 or " + std::to_string(kSamples);
  }
  if (call.dtype == DType::kFloat64) return "its kernels are not compiled for float64";
  if (device.clusters[0] == 0) return device.name + " has no clusters: they need sm_90 and kernels compiled for it";
  if (call.direction == Direction::kBackward && !writes_maps(call)) return "no gradient of a map is wanted";
  const int64_t map = call.n * call.c * call.l * element_bytes(call.dtype);
  plan.algorithm = Algorithm::kCluster;
  if (call.direction == Direction::kForward) {
    plan.map_bytes_read = (1 + call.residual) * map;
    plan.map_bytes_written = map;
  } else {
    plan.map_bytes_read = (2 + reads_residual(call)) * map;
    plan.map_bytes_written = (call.dx + call.dresidual) * map;
    if (call.dw) plan.scratch_bytes = call.n * (call.c + call.r) * accumulator_bytes(call.dtype);
  }

  double least = 0;
  int64_t chosen_shared = 0;
  int chosen = 0;
  for (int log = 0; log < 5; ++log) {
    const int size = 1 << log;
    if (forced.size && *forced.size != size) continue;
    if (device.clusters[log] == 0 || !divide(plan, size, forced)) continue;
    const int64_t shared = shared_bytes(plan);
    if (shared > device.shared_per_block) continue;
    const double us = predicted_us(plan, device, shared, device.clusters[log]);
    if (!chosen || us < least) least = us, chosen = size, chosen_shared = shared;
  }
  if (!chosen) return why_not(plan, device, forced);
  divide(plan, chosen, forced);
  shared_bytes(plan);
  plan.add(call.direction == Direction::kForward ? "forward" : "backward",
           ceil_div(call.n, plan.residence.samples) * chosen, chosen_shared, chosen);
  if (call.direction == Direction::kBackward) add_weight_gradients(plan);
  return "";
}

}  // namespace se::planning
