// How long a plan takes, so that plans can be compared: a few constants, fitted by least squares to plans that an H200
// has timed in float16. On its record (plans_gpu.csv) the choice takes 2 % longer than the fastest plan forward and 4 %
// forward and backward, in the mean. Other GPUs enter by their bandwidth, multiprocessors and clusters; for them,
// float32 and the general form all of it is predicted.
#include <algorithm>
#include <cmath>

#include "parts.h"

namespace se::planning {
namespace {

struct Constants {
  double start_us;        // until the first block works, and after the last has ended
  double pass_us;         // two_pass: of a launch, with what waits at its begin and end
  double chain_us;        // of a block of a cluster: loads, barriers and layers that wait for one another
  double doubling_us;     // and for each doubling of the cluster
  double layer_rate;      // bytes of weights in a microsecond, for each thread of a block
  double map_rate;        // bytes of a map in a microsecond, by the instructions of a multiprocessor
  double weight_rate;     // the same of weights
  double piece_bytes;     // channels_last: what a piece of a position costs beside its own bytes
  double split_us;        // two_pass: of a part of a sum that every block adds up again
  double hidden_rate;     // two_pass: products of the hidden launch in a microsecond
  double gates_rate;      // two_pass: bytes of W1 in a microsecond, which every block reads again; 0: as good as all
  double gradients_rate;  // products of the weights' gradients in a microsecond
};
constexpr Constants kForward{4.8, 5.4, 1.0, 0.72, 51, 26e3, 134e3, 16, 0.08, 0.56e6, 0, 0};
constexpr Constants kBackward{5.0, 7.2, 11.2, 0.07, 59, 7.7e3, 454e3, 20, 0.08, 0.33e6, 9.5e6, 5.9e6};
// What a multiprocessor moves alone in a microsecond; what all move together, as a share of a copy's speed.
constexpr double kAloneBytes = 80e3, kClusterShare = 0.84, kTwoPassShare = 0.87;
constexpr int64_t kReserved = 1 << 10;  // bytes of shared memory that the system takes for a block

Prediction predict_two_pass(const Plan& plan, const Device& device, const Constants& k) {
  const Call& call = plan.call;
  const double weights = static_cast<double>(call.n * call.c) * static_cast<double>(call.r ? call.r : call.c);
  Prediction p{};
  p.launches = k.pass_us * plan.launch_count;
  p.memory = static_cast<double>(plan.map_bytes_read + plan.map_bytes_written) / (device.bytes_per_us * kTwoPassShare);
  p.waiting = k.split_us * (plan.reduction.splits - 1);
  if (!plan.fused_hidden && call.r) p.waiting += weights / k.hidden_rate;
  if (k.gates_rate > 0) p.waiting += weights * element_bytes(call.dtype) / k.gates_rate;
  if (call.dw && call.direction == Direction::kBackward) p.waiting += (call.r ? 2 : 1) * weights / k.gradients_rate;
  return p;
}

Prediction predict_cluster(const Plan& plan, const Device& device, const Constants& k) {
  const Call& call = plan.call;
  const Launch& launch = plan.launches[0];
  const int size = plan.residence.size, log = static_cast<int>(std::log2(size));
  const auto n = static_cast<double>(call.n), clusters = static_cast<double>(device.clusters[log]);
  const auto residents = static_cast<double>(std::clamp<int64_t>(
      device.shared_per_multiprocessor / (launch.shared_bytes + kReserved), 1, most_threads(call) / launch.threads));
  const auto element = static_cast<double>(element_bytes(call.dtype));
  const double slab = static_cast<double>(plan.residence.channels * call.l) * element;
  const double weights = static_cast<double>((call.r ? 2 : 1) * plan.residence.channels) *
                         static_cast<double>(call.r ? call.r : call.c) * element;
  // A block's part of what the call moves, at the speed that is left for it.
  const double moved = static_cast<double>(plan.map_bytes_read + plan.map_bytes_written) / (n * size);
  const double rate = std::min(kAloneBytes, device.bytes_per_us * kClusterShare / (std::min(n, clusters) * size));
  const double piece = static_cast<double>(plan.residence.channels) * element;
  const double transfer = moved / rate * (call.channels_last ? 1 + k.piece_bytes / piece : 1);
  const double narrow = plan.reduction.width == 16 ? 1 : plan.reduction.width == 8 ? 2 : 4;
  const double chain = k.chain_us + k.doubling_us * log + weights / (launch.threads * k.layer_rate);
  const double work = slab * narrow / k.map_rate + weights / k.weight_rate;
  const double waves = n / (clusters * residents), active = std::min(residents, std::ceil(n / clusters));
  // The last wave of a few is a whole one; of many blocks not all end together.
  const double turns = waves <= 2 ? std::ceil(waves) : waves + 0.5;
  Prediction p{};
  p.launches = k.start_us;
  p.memory = turns * active * transfer;
  p.work = turns * active * work;
  p.waiting = std::max(0.0, turns * (chain + transfer) - std::max(p.memory, p.work));
  if (call.dw && call.direction == Direction::kBackward) {
    p.waiting += (call.r ? 2 : 1) * n * static_cast<double>(call.c) * static_cast<double>(call.r ? call.r : call.c) /
                 k.gradients_rate;
  }
  return p;
}

}  // namespace

Prediction predict(const Plan& plan, const Device& device) {
  const Constants& k = plan.call.direction == Direction::kForward ? kForward : kBackward;
  return plan.algorithm == Algorithm::kCluster ? predict_cluster(plan, device, k) : predict_two_pass(plan, device, k);
}

}  // namespace se::planning
