// The predicted time of a plan.
#pragma once

#include "../plan.h"

namespace se::planning {

struct Constants {
  double alone_bytes;          // bytes per microsecond that one SM moves while no other does
  double cluster_efficiency;   // cluster: what all SMs together move at most, as a fraction of a copy's speed
  double overlap;              // p of the p-norm that combines a turn's parts: 1 if nothing overlaps, large if all does
  double tail;                 // turns that the last clusters of several waves add
  double two_pass_efficiency;  // two_pass: what all SMs together move, as a fraction of a copy's speed
  double start_us;             // cluster: until the first block works, and after the last has ended
  double pass_us;              // two_pass: one launch, with the latency at its begin and end
  double latency_us;           // a block of a cluster: loads, barriers and layers that wait for one another
  double doubling_us;          // added for each doubling of the cluster's size
  double layer_rate;           // bytes of weights per microsecond and thread of a block
  double staged_rate;          // bytes of a staged tile per microsecond and thread of a block
  double map_rate;             // bytes of a map per microsecond, by the instructions of one SM
  double weight_rate;          // bytes of weights per microsecond, by the instructions of one SM
  double piece_bytes;          // channels_last: the bytes that one block's channels of a position cost in addition
  double split_us;             // two_pass: one more split, whose partial results every block adds up again
  double hidden_rate;          // two_pass: products of the hidden launch per microsecond
  double gates_rate;           // two_pass: bytes of W1 per microsecond, which every block reads again
  double gradients_rate;       // products of the weight gradients per microsecond
};
const Constants& constants(Direction direction);

Prediction predict(const Plan& plan, const Device& device, const Constants& k);
inline Prediction predict(const Plan& plan, const Device& device) {
  return predict(plan, device, constants(plan.call.direction));
}

// Spreads the starts of the first wave of clusters over waves / (1 + waves) of the time in which their bytes move. That
// is most of this time if many clusters follow, and at most half if none does, because the last cluster of the wave
// ends later by the same time.
void add_stagger(Plan& plan, const Device& device);

}  // namespace se::planning
