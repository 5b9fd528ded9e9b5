// Predicts how long a plan takes, so that plans can be compared. Least squares fit its constants to the times of
// float16 plans on an H200 (dev/refit.py). On that record (plans_gpu.csv) the chosen plan takes on average 2 %
// longer than the fastest one forward, and 3 % forward and backward. Other GPUs differ only in bandwidth, SMs and
// clusters. Times for them, for float32 and for the general form are predictions that nobody has measured.
#include <algorithm>
#include <cmath>

#include "parts.h"

namespace se::planning {
namespace {

// clang-format off: python -m dev.refit h200
constexpr Constants kForward{
    1.18e+05, 1, 1.77, 0.422, 0.872,  // alone_bytes, cluster_efficiency, overlap, tail, two_pass_efficiency
    2.77, 4.96, 5.33, 0.211, 60.8,  // start_us, pass_us, latency_us, doubling_us, layer_rate
    2.1e+03, 1.37e+05, 1.76e+05, 14.3, 0.0789,  // staged_rate, map_rate, weight_rate, piece_bytes, split_us
    5.63e+05, 1e+09, 1e+09,  // hidden_rate, gates_rate, gradients_rate
};
constexpr Constants kBackward{
    3.26e+05, 0.835, 1.25, 0.537, 0.79,  // alone_bytes, cluster_efficiency, overlap, tail, two_pass_efficiency
    6.32, 5.72, 9.22, 0.061, 67.4,  // start_us, pass_us, latency_us, doubling_us, layer_rate
    358, 3.07e+04, 4.57e+05, 10.5, 0.0549,  // staged_rate, map_rate, weight_rate, piece_bytes, split_us
    3.08e+05, 9.46e+06, 1.16e+07,  // hidden_rate, gates_rate, gradients_rate
};
// clang-format on
constexpr int64_t kReserved = 1 << 10;  // bytes of shared memory that the system takes per block

Prediction predict_two_pass(const Plan& plan, const Device& device, const Constants& k) {
  const Call& call = plan.call;
  const double weights = static_cast<double>(call.n * call.c) * static_cast<double>(call.r ? call.r : call.c);
  Prediction p{};
  p.launches = k.pass_us * plan.launch_count;
  p.memory =
      static_cast<double>(plan.map_bytes_read + plan.map_bytes_written) / (device.bytes_per_us * k.two_pass_efficiency);
  p.waiting = k.split_us * (plan.reduction.splits - 1);
  if (!plan.fused_hidden && call.r) p.waiting += weights / k.hidden_rate;
  p.waiting += weights * element_bytes(call.dtype) / k.gates_rate;
  if (call.dw && call.direction == Direction::kBackward) p.waiting += (call.r ? 2 : 1) * weights / k.gradients_rate;
  return p;
}

// The clusters that run at once: each SM holds as many blocks as shared memory and registers allow.
struct Wave {
  double clusters, blocks_per_sm;  // clusters that run at once with one block per SM
  double all() const { return clusters * blocks_per_sm; }
};
Wave wave(const Plan& plan, const Device& device) {
  const Launch& launch = plan.launches[0];
  const auto log = static_cast<int>(std::log2(plan.cluster_config.size));
  return {static_cast<double>(device.clusters[log]),
          static_cast<double>(std::clamp<int64_t>(device.shared_per_sm / (launch.shared_bytes + kReserved), 1,
                                                  most_threads(plan.call) / launch.threads))};
}

Prediction predict_cluster(const Plan& plan, const Device& device, const Constants& k) {
  const Call& call = plan.call;
  const Launch& launch = plan.launches[0];
  const int size = plan.cluster_config.size;
  const auto n = static_cast<double>(call.n);
  const auto [clusters, blocks_per_sm] = wave(plan, device);
  const auto element = static_cast<double>(element_bytes(call.dtype));
  const double tile = static_cast<double>(plan.cluster_config.channels * call.l) * element;
  const double weights = static_cast<double>((call.r ? 2 : 1) * plan.cluster_config.channels) *
                         static_cast<double>(call.r ? call.r : call.c) * element;
  // The bytes that a block moves, and the speed at which it moves them among the others.
  const double moved = static_cast<double>(plan.map_bytes_read + plan.map_bytes_written) / (n * size);
  const double rate =
      std::min(k.alone_bytes, device.bytes_per_us * k.cluster_efficiency / (std::min(n, clusters) * size));
  const double piece = static_cast<double>(plan.cluster_config.channels) * element;
  const double pieces = call.channels_last ? 1 + k.piece_bytes / piece : 1;
  const double narrow = plan.reduction.vec_bytes == 16 ? 1 : plan.reduction.vec_bytes == 8 ? 2 : 4;
  const double waves = n / (clusters * blocks_per_sm), active = std::min(blocks_per_sm, std::ceil(n / clusters));
  const double turns = waves <= 1 ? 1 : waves + k.tail;
  // Times of one turn: the memory and the instructions for all blocks of an SM, and the latency of a single block.
  const double memory = active * moved / rate * pieces;
  const double work = active * (tile * narrow / k.map_rate + weights / k.weight_rate);
  const double latency = k.latency_us + k.doubling_us * std::log2(size) + weights / (launch.threads * k.layer_rate) +
                         tile * narrow / (launch.threads * k.staged_rate) + moved / k.alone_bytes * pieces;
  const double turn =
      std::pow(std::pow(memory, k.overlap) + std::pow(work, k.overlap) + std::pow(latency, k.overlap), 1 / k.overlap);
  Prediction p{};
  p.launches = k.start_us;
  p.memory = turns * memory;
  p.work = turns * work;
  p.waiting = turns * turn - std::max(p.memory, p.work);
  if (call.dw && call.direction == Direction::kBackward) {
    p.waiting += (call.r ? 2 : 1) * n * static_cast<double>(call.c) * static_cast<double>(call.r ? call.r : call.c) /
                 k.gradients_rate;
  }
  return p;
}

}  // namespace

const Constants& constants(Direction direction) { return direction == Direction::kForward ? kForward : kBackward; }

Prediction predict(const Plan& plan, const Device& device, const Constants& k) {
  return plan.algorithm == Algorithm::kCluster ? predict_cluster(plan, device, k) : predict_two_pass(plan, device, k);
}

void add_stagger(Plan& plan, const Device& device) {
  constexpr double kLongestSleep = 0.9e6;  // nanoseconds: __nanosleep takes up to a millisecond
  const double n = static_cast<double>(plan.call.n), first = wave(plan, device).all(), waves = n / first;
  const double moved = static_cast<double>(plan.map_bytes_read + plan.map_bytes_written) * std::min(1.0, 1 / waves);
  plan.cluster_config.first_wave = static_cast<int64_t>(first);
  if (!(device.bytes_per_us > 0)) return;  // some drivers do not report the clock
  const double spread_us = moved / device.bytes_per_us * waves / (1 + waves);
  plan.cluster_config.stagger_ns = static_cast<unsigned>(std::min(1e3 * spread_us, kLongestSleep) / std::min(n, first));
}

}  // namespace se::planning
