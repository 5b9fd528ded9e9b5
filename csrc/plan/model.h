// What a plan is predicted to take.
#pragma once

#include "../plan.h"

namespace se::planning {

struct Constants {
  double alone_bytes;     // that a multiprocessor moves alone in a microsecond
  double cluster_share;   // cluster: of a copy's speed, what all multiprocessors move together at most
  double overlap;         // p of the p-norm that a turn takes: 1 if nothing overlaps, large if all does
  double tail;            // turns that the last clusters of several waves take beside all others
  double two_pass_share;  // two_pass: the same
  double start_us;        // until the first block works, and after the last has ended
  double pass_us;         // two_pass: of a launch, with what waits at its begin and end
  double chain_us;        // of a block of a cluster: loads, barriers and layers that wait for one another
  double doubling_us;     // and for each doubling of the cluster
  double layer_rate;      // bytes of weights in a microsecond, for each thread of a block
  double slab_rate;       // bytes of a map in shared memory in a microsecond, for each thread of a block
  double map_rate;        // bytes of a map in a microsecond, by the instructions of a multiprocessor
  double weight_rate;     // the same of weights
  double piece_bytes;     // channels_last: what a piece of a position costs beside its own bytes
  double split_us;        // two_pass: of a part of a sum that every block adds up again
  double hidden_rate;     // two_pass: products of the hidden launch in a microsecond
  double gates_rate;      // two_pass: bytes of W1 in a microsecond, which every block reads again
  double gradients_rate;  // products of the weights' gradients in a microsecond
};
const Constants& constants(Direction direction);

Prediction predict(const Plan& plan, const Device& device, const Constants& k);
inline Prediction predict(const Plan& plan, const Device& device) {
  return predict(plan, device, constants(plan.call.direction));
}

// The first clusters begin spread over a part of the time in which their bytes move: waves / (1 + waves) of it. That is
// most of it where many clusters follow, and at most half where none does, since the last of them ends later by as
// much.
void add_stagger(Plan& plan, const Device& device);

}  // namespace se::planning
