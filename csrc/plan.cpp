#include "plan.h"

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace se {
namespace {

// The thresholds are predictions: no GPU has measured them yet.
constexpr int64_t kBlocksPerMultiprocessor = 4;  // enough of them to even out the last wave
constexpr int64_t kLoadsPerThread = 4;           // what a thread of a split reduction has at least to do
constexpr int64_t kLargestSplit = 64;
constexpr int64_t kRangeBytes = 32 << 10, kSmallestRangeBytes = 4 << 10;  // of a map, for one block
constexpr int64_t kRangeChannels = 512;                                   // whose gates one block computes
constexpr int64_t kFusedWeights = 4096, kFusedHidden = 256;  // W1 that each block reads again instead of a launch
constexpr int64_t kLongestRow = int64_t{1} << 30;            // positions within a block are 32-bit numbers
constexpr int64_t kLargestGrid = (int64_t{1} << 31) - 1;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t next_power_of_two(int64_t v) {
  int64_t power = 1;
  while (power < v) power *= 2;
  return power;
}

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument("se_fused: no plan: " + why); }

struct Forced {
  std::optional<int64_t> width, lanes, splits, per_block, fused_hidden;

  explicit Forced(const std::string& text) {
    std::istringstream words(text);
    for (std::string word; words >> word;) {
      if (word == "two_pass") continue;
      const size_t equals = word.find('=');
      const std::string name = word.substr(0, equals);
      std::optional<int64_t>* slot = name == "width"          ? &width
                                     : name == "lanes"        ? &lanes
                                     : name == "splits"       ? &splits
                                     : name == "per_block"    ? &per_block
                                     : name == "fused_hidden" ? &fused_hidden
                                                              : nullptr;
      if (!slot || equals == std::string::npos) {
        refuse("'" + word + "' is neither two_pass nor width=, lanes=, splits=, per_block= or fused_hidden=");
      }
      try {
        *slot = std::stoll(word.substr(equals + 1));
      } catch (const std::logic_error&) {
        refuse("'" + word + "' has no number");
      }
    }
  }
};

// The widest access of 16, 8 (where `half_wide`) or one element's bytes that divides every span of `span` bytes. For
// float64 an element's: it is there to check the others against, and each width is a kernel to compile.
int width_for(const Call& call, int64_t span, bool half_wide, const std::optional<int64_t>& forced) {
  const int64_t element = element_bytes(call.dtype);
  auto fits = [&](int64_t width) {
    return width == element ||
           (element < 8 && (width == 16 || (width == 8 && half_wide)) && span % width == 0 && call.alignment >= width);
  };
  if (!forced) return static_cast<int>(fits(16) ? 16 : fits(8) ? 8 : element);
  if (!fits(*forced)) {
    refuse("width=" + std::to_string(*forced) + " with elements of " + std::to_string(element) + " bytes, spans of " +
           std::to_string(span) + " bytes and addresses aligned to " + std::to_string(call.alignment));
  }
  return static_cast<int>(*forced);
}

int lanes_among(const char* what, std::initializer_list<int> allowed, int64_t lanes) {
  for (const int value : allowed) {
    if (value == lanes) return value;
  }
  refuse("lanes=" + std::to_string(lanes) + " along " + what);
}

Reduction plan_reduction(const Call& call, int64_t wanted_blocks, const Forced& forced) {
  Reduction reduction{};
  int64_t blocks, most;
  if (call.channels_last) {
    const int64_t element = element_bytes(call.dtype);
    reduction.width = width_for(call, call.c * element, false, forced.width);
    const int64_t vectors = call.c * element / reduction.width;
    reduction.lanes = lanes_among("the channels", {1, 2, 4, 8, 16, 32},
                                  forced.lanes.value_or(std::min<int64_t>(kColumns, next_power_of_two(vectors))));
    reduction.chunks = ceil_div(vectors, reduction.lanes);
    blocks = call.n * reduction.chunks;
    most = call.l / (kThreads / reduction.lanes * kLoadsPerThread);
  } else {
    const int64_t row = call.l * element_bytes(call.dtype);
    reduction.width = width_for(call, row, true, forced.width);
    const int64_t vectors = row / reduction.width;
    // A group of 8 takes up to 8 accesses a thread, a warp up to 16.
    reduction.lanes = lanes_among("a row", {8, 32, kThreads},
                                  forced.lanes.value_or(vectors <= 64    ? 8
                                                        : vectors <= 512 ? 32
                                                                         : kThreads));
    reduction.chunks = 1;
    blocks = ceil_div(call.n * call.c, kThreads / reduction.lanes);
    most = vectors / (reduction.lanes * kLoadsPerThread);
  }
  const int64_t splits = std::min({ceil_div(wanted_blocks, blocks), most, kLargestSplit});
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
  if (call.channels_last) {
    elementwise.width = width_for(call, call.c * element, false, forced.width);
    const int64_t vectors = call.c * element / elementwise.width;
    elementwise.lanes = lanes_among("the channels", {1, 2, 4, 8, 16, 32},
                                    forced.lanes.value_or(std::min<int64_t>(kColumns, next_power_of_two(vectors))));
    elementwise.chunks = ceil_div(vectors, elementwise.lanes);
    elementwise.channels = std::min(call.c, elementwise.lanes * elementwise.width / element);
    const int64_t positions = std::max<int64_t>(kThreads / elementwise.lanes, bytes / (elementwise.channels * element));
    elementwise.per_block = forced.per_block.value_or(std::min(call.l, positions));
    elementwise.ranges = ceil_div(call.l, std::max<int64_t>(1, elementwise.per_block));
  } else {
    elementwise.width = width_for(call, 16, false, {});
    elementwise.chunks = 1;
    elementwise.per_block = forced.per_block.value_or(std::min(bytes / element, kRangeChannels * call.l));
    elementwise.ranges = ceil_div(call.c * call.l, std::max<int64_t>(1, elementwise.per_block));
    elementwise.channels = std::min(call.c, (elementwise.per_block - 2) / call.l + 2);
  }
  if (elementwise.per_block < 1 || elementwise.channels > 2 * kRangeChannels) {
    refuse("per_block=" + std::to_string(elementwise.per_block) + " with " + std::to_string(elementwise.channels) +
           " channels a block; wanted 1 to " + std::to_string(2 * kRangeChannels));
  }
  return elementwise;
}

int64_t reduction_blocks(const Call& call, const Reduction& reduction) {
  return call.channels_last ? call.n * reduction.chunks * reduction.splits
                            : ceil_div(call.n * call.c, kThreads / reduction.lanes) * reduction.splits;
}

void plan_forward(Plan& plan) {
  const Call& call = plan.call;
  const int64_t a = accumulator_bytes(call.dtype), map = call.n * call.c * call.l * element_bytes(call.dtype);
  auto add = [&](const char* name, int64_t blocks, int64_t shared) {
    plan.launches[plan.launch_count++] = {name, blocks, shared};
  };
  const bool hidden = call.r > 0 && !plan.fused_hidden;
  const int64_t parts = call.squeeze == Squeeze::kMeanMax ? 2 : 1;
  const int64_t reduced = kThreads * (call.channels_last ? plan.reduction.width / element_bytes(call.dtype) : 1);
  add("squeeze", reduction_blocks(call, plan.reduction), 2 * reduced * a);
  if (hidden) {
    add("hidden", ceil_div(call.r, kThreads / 32) * ceil_div(call.n, kSamples), kSamples * (kTile + kThreads / 32) * a);
  }
  add("scale", call.n * plan.elementwise.chunks * plan.elementwise.ranges,
      (kTile + plan.elementwise.channels + (plan.fused_hidden ? call.r : 0)) * a);
  plan.map_bytes_read = (2 + (call.residual ? 1 : 0)) * map;
  plan.map_bytes_written = map;
  plan.scratch_bytes =
      (parts * call.n * plan.reduction.splits * call.c + (hidden && !call.keeps ? call.n * call.r : 0)) * a;
}

void plan_backward(Plan& plan) {
  const Call& call = plan.call;
  const int64_t a = accumulator_bytes(call.dtype), map = call.n * call.c * call.l * element_bytes(call.dtype);
  auto add = [&](const char* name, int64_t blocks, int64_t shared) {
    plan.launches[plan.launch_count++] = {name, blocks, shared};
  };
  const bool maximum = call.squeeze != Squeeze::kMean, distributes = call.dx || call.dresidual;
  const int64_t parts = maximum ? 3 : 1, groups = ceil_div(call.n, kSamples);
  const int64_t reduced = kThreads * (call.channels_last ? plan.reduction.width / element_bytes(call.dtype) : 1);
  add("reduce", reduction_blocks(call, plan.reduction), 3 * reduced * a);
  if (call.r > 0) {
    add("hidden_gradient", ceil_div(call.r, kColumns) * groups, kSamples * (kTile + kThreads + kColumns) * a);
  }
  if (distributes) {
    add("distribute", call.n * plan.elementwise.chunks * plan.elementwise.ranges,
        (kTile + kThreads + 4 * plan.elementwise.channels) * a);
  }
  if (call.dw) {
    const int64_t depth = call.r > 0 ? call.r : call.c;
    add("weight_gradients",
        ceil_div(call.c, kColumns) * ceil_div(depth, kColumns) +
            ceil_div(call.r, kColumns) * ceil_div(call.c, kColumns),
        2 * kColumns * kColumns * a);
  }
  const bool distribute_reads_x = call.dx && (call.pre_act || maximum);
  plan.map_bytes_read = (2 + (call.post_act && call.residual ? 1 : 0)) * map;
  if (distributes) {
    plan.map_bytes_read +=
        (1 + (call.post_act || distribute_reads_x ? 1 : 0) + (call.post_act && call.residual ? 1 : 0)) * map;
  }
  plan.map_bytes_written = (call.dx + call.dresidual) * map;
  plan.scratch_bytes = (parts * call.n * plan.reduction.splits * call.c + call.n * call.r) * a;
}

// Of the addresses of the maps; null is aligned to all.
int alignment_of(std::initializer_list<const void*> maps) {
  uintptr_t bits = 16;
  for (const void* map : maps) bits |= reinterpret_cast<uintptr_t>(map);
  return static_cast<int>(bits & -bits);
}

Call call_of(const Problem& p, Direction direction) {
  Call call{};
  call.direction = direction;
  call.n = p.n, call.c = p.c, call.r = p.r, call.l = p.l;
  call.channels_last = p.channels_last;
  call.dtype = p.dtype;
  call.squeeze = p.options.squeeze;
  call.pre_act = p.options.pre_act != Activation::kIdentity;
  call.post_act = p.options.post_act != Activation::kIdentity;
  call.residual = p.residual && p.residual != p.x;
  return call;
}

}  // namespace

Call call_of(const Forward& f) {
  Call call = call_of(f, Direction::kForward);
  call.alignment = alignment_of({f.x, f.residual, f.y});
  call.keeps = f.p1 != nullptr;
  return call;
}

Call call_of(const Backward& f) {
  Call call = call_of(f, Direction::kBackward);
  call.alignment = alignment_of({f.g, f.x, f.residual, f.dx, f.dresidual});
  call.dx = f.dx;
  call.dresidual = f.dresidual;
  call.dw = f.dw1 || f.db1 || f.dw2 || f.db2;
  return call;
}

const std::vector<Device>& device_presets() {
  static const std::vector<Device> presets{
      {"T4", 75, 40},    {"A100", 80, 108},  {"RTX 4090", 89, 128},  {"H100", 90, 132},
      {"H200", 90, 132}, {"B200", 100, 148}, {"RTX 5090", 120, 170},
  };
  return presets;
}

Plan make_plan(const Call& call, const Device& device, const std::string& forced_text) {
  const Forced forced(forced_text);
  if (device.capability < 75) refuse(device.name + " is sm_" + std::to_string(device.capability) + "; wanted sm_75 on");
  if (call.l > kLongestRow) refuse(std::to_string(call.l) + " positions a channel; wanted at most 2^30");
  Plan plan{};
  plan.call = call;
  const int64_t wanted = kBlocksPerMultiprocessor * device.multiprocessors;
  plan.reduction = plan_reduction(call, wanted, forced);
  plan.elementwise = plan_elementwise(call, wanted, forced);
  if (call.direction == Direction::kForward) {
    const bool can_fuse = call.r > 0 && call.r <= kFusedHidden;
    if (forced.fused_hidden.value_or(0) && !can_fuse) {
      refuse("fused_hidden=1 with R = " + std::to_string(call.r) + "; wanted 1 to " + std::to_string(kFusedHidden));
    }
    plan.fused_hidden = can_fuse && forced.fused_hidden.value_or(call.c * call.r <= kFusedWeights);
    plan_forward(plan);
  } else {
    plan_backward(plan);
  }
  for (int i = 0; i < plan.launch_count; ++i) {
    if (plan.launches[i].blocks > kLargestGrid) {
      refuse(std::string(plan.launches[i].name) + " has " + std::to_string(plan.launches[i].blocks) +
             " blocks; wanted at most 2^31 - 1");
    }
  }
  return plan;
}

const Launch& Plan::launch(const std::string& name) const {
  for (int i = 0; i < launch_count; ++i) {
    if (launches[i].name == name) return launches[i];
  }
  throw std::logic_error("se_fused: the plan has no launch " + name);
}

std::string Plan::text() const {
  std::ostringstream out;
  out << "two_pass " << (call.direction == Direction::kForward ? "forward" : "backward") << ", " << launch_count
      << " launches of " << kThreads << " threads a block\n";
  for (int i = 0; i < launch_count; ++i) {
    out << "  " << launches[i].name << ": " << launches[i].blocks << " blocks, " << launches[i].shared_bytes
        << " bytes of shared memory\n";
  }
  out << "  reduction: accesses of " << reduction.width << " bytes, " << reduction.lanes << " threads along "
      << (call.channels_last ? "the channels" : "a row") << ", " << reduction.splits << " splits\n"
      << "  elementwise: accesses of " << elementwise.width << " bytes, " << elementwise.per_block
      << (call.channels_last ? " positions of " : " elements of at most ") << elementwise.channels
      << " channels a block\n"
      << "  maps: " << map_bytes_read << " bytes read, " << map_bytes_written << " written; scratch: " << scratch_bytes
      << " bytes";
  return out.str();
}

}  // namespace se
