#include "../plan.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "parts.h"

namespace se {
namespace planning {
namespace {

constexpr int64_t kLongestRow = int64_t{1} << 30;  // positions within a block are 32-bit numbers
constexpr int64_t kLargestGrid = (int64_t{1} << 31) - 1;

int64_t next_power_of_two(int64_t v) {
  int64_t power = 1;
  while (power < v) power *= 2;
  return power;
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

int one_of(const char* name, std::initializer_list<int> allowed, int64_t value) {
  std::string list;
  for (const int each : allowed) {
    if (each == value) return each;
    list += (list.empty() ? "" : ", ") + std::to_string(each);
  }
  refuse(std::string(name) + "=" + std::to_string(value) + "; wanted one of " + list);
}

void refuse(const std::string& why) { throw std::invalid_argument("se_fused: no plan: " + why); }

Forced::Forced(const std::string& text) {
  if (text.empty()) return;  // the stream alone takes longer than a plan
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    std::optional<Algorithm> of;
    if (name == "two_pass" || name == "splits" || name == "per_block" || name == "rows" || name == "fused_hidden") {
      of = Algorithm::kTwoPass;
    } else if (name == "cluster" || name == "size" || name == "threads") {
      of = Algorithm::kCluster;
    }
    if (of && algorithm.value_or(*of) != *of) refuse("'" + text + "' asks for both two_pass and cluster");
    if (of) algorithm = of;
    if (word == "two_pass" || word == "cluster") continue;
    std::optional<int64_t>* slot = name == "width"          ? &width
                                   : name == "lanes"        ? &lanes
                                   : name == "splits"       ? &splits
                                   : name == "per_block"    ? &per_block
                                   : name == "fused_hidden" ? &fused_hidden
                                   : name == "rows"         ? &rows
                                   : name == "size"         ? &size
                                   : name == "threads"      ? &threads
                                                            : nullptr;
    if (!slot || equals == std::string::npos) {
      refuse("'" + word +
             "' is none of two_pass, cluster, width=, lanes=, splits=, per_block=, rows=, fused_hidden=, size= and "
             "threads=");
    }
    try {
      *slot = std::stoll(word.substr(equals + 1));
    } catch (const std::logic_error&) {
      refuse("'" + word + "' has no number");
    }
  }
}

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

int lanes_for_rows(int64_t rows, int threads, const Forced& forced) {
  int lanes = 1;
  while (lanes < kColumns && 2 * lanes * rows <= threads) lanes *= 2;
  return one_of("lanes", {1, 2, 4, 8, 16, 32}, forced.lanes.value_or(lanes));
}

Reduction whole_reduction(const Call& call, int64_t channels, const Forced& forced) {
  Reduction reduction{};
  const int64_t row = (call.channels_last ? call.c : call.l) * element_bytes(call.dtype);
  reduction.width = width_for(call, row, !call.channels_last, forced.width);
  if (call.channels_last) {
    const int64_t vectors = channels * element_bytes(call.dtype) / reduction.width;
    const int64_t lanes = std::min<int64_t>(kColumns, next_power_of_two(vectors));
    reduction.lanes = one_of("lanes", {1, 2, 4, 8, 16, 32}, forced.lanes.value_or(lanes));
  }
  return reduction;
}

void add_weight_gradients(Plan& plan) {
  const Call& call = plan.call;
  if (!call.dw) return;
  const int64_t depth = call.r > 0 ? call.r : call.c;
  plan.add(
      "weight_gradients",
      ceil_div(call.c, kColumns) * ceil_div(depth, kColumns) + ceil_div(call.r, kColumns) * ceil_div(call.c, kColumns),
      2 * kColumns * kColumns * accumulator_bytes(call.dtype));
}

}  // namespace planning

Call call_of(const Forward& f) {
  Call call = planning::call_of(f, Direction::kForward);
  call.alignment = planning::alignment_of({f.x, f.residual, f.y});
  call.keeps = f.p1 != nullptr;
  return call;
}

Call call_of(const Backward& f) {
  Call call = planning::call_of(f, Direction::kBackward);
  call.alignment = planning::alignment_of({f.g, f.x, f.residual, f.dx, f.dresidual});
  call.dx = f.dx;
  call.dresidual = f.dresidual;
  call.dw = f.dw1 || f.db1 || f.dw2 || f.db2;
  return call;
}

const std::vector<Device>& device_presets() {
  constexpr int64_t kKiB = 1 << 10, kMiB = 1 << 20;
  // Clusters and copies of the H200 are measured (benchmarks/results/h200); clusters of the RTX 5090 are QuACK's. The
  // others are predicted: clusters in proportion, copies as 85 to 92 % of the memory's peak.
  static const std::vector<Device> presets{
      {"T4", 75, 40, 64 * kKiB, 64 * kKiB, {}, 0.26e6, 4 * kMiB},
      {"A100", 80, 108, 163 * kKiB, 164 * kKiB, {}, 1.75e6, 40 * kMiB},
      {"RTX 4090", 89, 128, 99 * kKiB, 100 * kKiB, {}, 0.92e6, 72 * kMiB},
      {"H100", 90, 132, 227 * kKiB, 228 * kKiB, {132, 66, 30, 15, 7}, 3.0e6, 50 * kMiB},
      {"H200", 90, 132, 227 * kKiB, 228 * kKiB, {132, 66, 30, 15, 7}, 4.25e6, 50 * kMiB},
      {"B200", 100, 148, 227 * kKiB, 228 * kKiB, {148, 74, 36, 16, 8}, 6.8e6, 126 * kMiB},
      {"RTX 5090", 120, 170, 99 * kKiB, 100 * kKiB, {170, 85, 41, 19, 0}, 1.55e6, 96 * kMiB},
  };
  return presets;
}

namespace {

std::string text_of(const Prediction& predicted) {
  std::ostringstream out;
  out.precision(3);
  out << predicted.us() << " us: " << predicted.launches << " starting launches, " << predicted.memory
      << " moving bytes or " << predicted.work << " of instructions, " << predicted.waiting << " waiting";
  return out.str();
}

}  // namespace

Plan make_plan(const Call& call, const Device& device, const std::string& forced_text) {
  using planning::refuse;
  const planning::Forced forced(forced_text);
  if (device.capability < 75) refuse(device.name + " is sm_" + std::to_string(device.capability) + "; wanted sm_75 on");
  for (const auto& [what, size] : {std::pair{"positions", call.l}, {"channels", call.c}, {"hidden units", call.r}}) {
    if (size > planning::kLongestRow) refuse(std::to_string(size) + " " + what + "; wanted at most 2^30");
  }
  Plan plan{};
  plan.call = call;
  const std::string why =
      forced.algorithm == Algorithm::kTwoPass ? "two_pass was asked for" : planning::plan_cluster(plan, device, forced);
  if (!why.empty() && forced.algorithm == Algorithm::kCluster) refuse("cluster: " + why);
  if (forced.algorithm == Algorithm::kCluster) {
    plan.other = "not two_pass: cluster was asked for";
  } else {
    Plan two_pass{};
    two_pass.call = call;
    planning::plan_two_pass(two_pass, device, forced);
    if (!why.empty()) {
      plan = two_pass;
      plan.other = "not cluster: " + why;
    } else {
      if (two_pass.predicted.us() < plan.predicted.us()) std::swap(plan, two_pass);
      plan.other = std::string(two_pass.algorithm == Algorithm::kCluster ? "not cluster" : "not two_pass") +
                   ": predicted " + text_of(two_pass.predicted);
    }
  }
  plan.shared_per_block = device.shared_per_block;
  for (int i = 0; i < plan.launch_count; ++i) {
    if (plan.launches[i].blocks > planning::kLargestGrid) {
      refuse(std::string(plan.launches[i].name) + " has " + std::to_string(plan.launches[i].blocks) +
             " blocks; wanted at most 2^31 - 1");
    }
  }
  return plan;
}

void Plan::add(const char* name, int64_t blocks, int64_t shared_bytes, int cluster, int threads) {
  launches[launch_count++] = {name, blocks, shared_bytes, cluster, threads};
}

const Launch& Plan::launch(std::string_view name) const {
  for (int i = 0; i < launch_count; ++i) {
    if (launches[i].name == name) return launches[i];
  }
  throw std::logic_error("se_fused: the plan has no launch " + std::string(name));
}

std::string Plan::text() const {
  const bool cluster = algorithm == Algorithm::kCluster;
  std::ostringstream out;
  out << (cluster ? "cluster " : "two_pass ") << (call.direction == Direction::kForward ? "forward" : "backward")
      << ", " << launch_count << (launch_count == 1 ? " launch" : " launches") << '\n';
  for (int i = 0; i < launch_count; ++i) {
    const Launch& launch = launches[i];
    out << "  " << launch.name << ": " << launch.blocks << " blocks of " << launch.threads << " threads";
    if (launch.cluster > 0) out << " in clusters of " << launch.cluster;
    out << ", " << launch.shared_bytes << " bytes of shared memory";
    if (launch.cluster > 0 && call.n > 1) {
      out << ", the first " << std::min(call.n, residence.first_wave) << " clusters " << residence.stagger_ns
          << " ns apart";
    }
    out << '\n';
  }
  out << "  reduction: accesses of " << reduction.width << " bytes, " << reduction.lanes << " threads along "
      << (call.channels_last ? "the channels" : "a row") << ", " << reduction.splits << " splits";
  if (reduction.rows > 0) out << ", " << reduction.rows << " rows at a time through shared memory";
  out << "\n  elementwise: accesses of " << elementwise.width << " bytes, " << elementwise.per_block
      << (call.channels_last ? " positions of " : " elements of at most ") << elementwise.channels
      << " channels per block\n"
      << "  maps: " << map_bytes_read << " bytes read, " << map_bytes_written << " written; scratch: " << scratch_bytes
      << " bytes\n  predicted: " << text_of(predicted) << "\n  " << other;
  return out.str();
}

}  // namespace se
