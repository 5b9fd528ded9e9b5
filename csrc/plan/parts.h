// What the algorithms' planners share.
#pragma once

#include <optional>
#include <string>

#include "../plan.h"
#include "model.h"

namespace se::planning {

constexpr int64_t kLargestShare = (int64_t{1} << 31) - 1;  // elements of a block's share: counted in 32 bits

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
[[noreturn]] void refuse(const std::string& why);

// `value`, which must be one of those allowed for `name`.
int one_of(const char* name, std::initializer_list<int> allowed, int64_t value);

// What a user asks of the plan.
struct Forced {
  std::optional<Algorithm> algorithm;
  std::optional<int64_t> width, lanes, splits, per_block, rows, fused_hidden, size, threads;

  explicit Forced(const std::string& text);
};

// The widest access, of 16 bytes, 8 (if `half_wide`) or one element, that divides every span of `span` bytes. float64
// has accesses of one element only: it exists to check the other types, and each width is another kernel to compile.
int width_for(const Call& call, int64_t span, bool half_wide, const std::optional<int64_t>& forced);

// A reduction of which one block does the whole of its channels, at most `channels` of channels_last: splits, chunks
// and, in NCHW, lanes are left to the caller.
Reduction whole_reduction(const Call& call, int64_t channels, const Forced& forced);

// NCHW: how a block that has `rows` whole rows in shared memory divides its threads among them. Few lanes per row take
// the fewest instructions.
int lanes_for_rows(int64_t rows, int threads, const Forced& forced);

// The backward launch for the weights and biases.
void add_weight_gradients(Plan& plan);

inline int most_threads(const Call& call) {
  return call.direction == Direction::kForward ? kMostForwardThreads : kMostBackwardThreads;
}

// Of so many elements of a map in shared memory, with the remainder of 16 of the first of them.
inline int64_t slab_bytes(const Call& call, int64_t elements) {
  return elements ? ceil_div(elements * element_bytes(call.dtype), 16) * 16 + 16 : 0;
}

inline bool writes_maps(const Call& call) { return call.dx || call.dresidual; }
// Whether dx or dresidual depend on x, given dv; and dv itself on x and the residual.
inline bool reads_x_again(const Call& call) {
  return call.post_act || (call.dx && (call.pre_act || call.squeeze != Squeeze::kMean));
}
inline bool reads_residual(const Call& call) { return call.post_act && call.residual; }

void plan_two_pass(Plan& plan, const Device& device, const Forced& forced);
// Why not, or nothing where `plan` now is one.
std::string plan_cluster(Plan& plan, const Device& device, const Forced& forced);

}  // namespace se::planning
