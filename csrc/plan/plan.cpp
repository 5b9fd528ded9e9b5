#include "../plan.h"

#include <algorithm>
#include <iterator>
#include <sstream>
#include <stdexcept>

#include "parts.h"

namespace se {
namespace planning {
namespace {

constexpr int64_t kLongestRow = int64_t{1} << 30;  // a block counts its positions in 32 bits
constexpr int64_t kLargestGrid = (int64_t{1} << 31) - 1;

int64_t next_power_of_two(int64_t v) {
  int64_t power = 1;
  while (power < v) power *= 2;
  return power;
}

// The alignment that the addresses of all maps have; null has every alignment.
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

namespace {

// A word of a forced plan: where its number is stored, if it has one, and the only algorithm that has it, if one does.
struct Word {
  const char* name;
  std::optional<int64_t> PlanOverrides::* member;
  std::optional<Algorithm> algorithm;
};
constexpr Word kWords[]{
    {"two_pass", nullptr, Algorithm::kTwoPass},
    {"cluster", nullptr, Algorithm::kCluster},
    {"vec_bytes", &PlanOverrides::vec_bytes, {}},
    {"threads_per_row", &PlanOverrides::threads_per_row, {}},
    {"splits", &PlanOverrides::splits, Algorithm::kTwoPass},
    {"per_block", &PlanOverrides::per_block, Algorithm::kTwoPass},
    {"rows", &PlanOverrides::rows, Algorithm::kTwoPass},
    {"fused_hidden", &PlanOverrides::fused_hidden, Algorithm::kTwoPass},
    {"size", &PlanOverrides::size, Algorithm::kCluster},
    {"threads", &PlanOverrides::threads, Algorithm::kCluster},
};

[[noreturn]] void refuse_word(const std::string& word) {
  std::string known;
  for (const Word& each : kWords) {
    if (!known.empty()) known += &each == std::end(kWords) - 1 ? " and " : ", ";
    known += std::string(each.name) + (each.member ? "=" : "");
  }
  refuse("'" + word + "' is none of " + known);
}

}  // namespace

PlanOverrides::PlanOverrides(const std::string& text) {
  if (text.empty()) return;  // constructing the stream alone takes longer than a plan
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const auto* known =
        std::find_if(std::begin(kWords), std::end(kWords), [&](auto& each) { return each.name == name; });
    if (known == std::end(kWords) || (known->member != nullptr) != (equals != std::string::npos)) refuse_word(word);
    if (known->algorithm) {
      if (algorithm.value_or(*known->algorithm) != *known->algorithm) {
        refuse("'" + text + "' asks for both two_pass and cluster");
      }
      algorithm = known->algorithm;
    }
    if (!known->member) continue;
    try {
      this->*known->member = std::stoll(word.substr(equals + 1));
    } catch (const std::logic_error&) {
      refuse("'" + word + "' has no number");
    }
  }
}

int vec_bytes_for(const Call& call, int64_t span, bool half_wide, const std::optional<int64_t>& forced) {
  const int64_t element = element_bytes(call.dtype);
  auto fits = [&](int64_t vec_bytes) {
    return vec_bytes == element || (element < 8 && (vec_bytes == 16 || (vec_bytes == 8 && half_wide)) &&
                                    span % vec_bytes == 0 && call.alignment >= vec_bytes);
  };
  if (!forced) return static_cast<int>(fits(16) ? 16 : fits(8) ? 8 : element);
  if (!fits(*forced)) {
    refuse("vec_bytes=" + std::to_string(*forced) + " with elements of " + std::to_string(element) +
           " bytes, spans of " + std::to_string(span) + " bytes and addresses aligned to " +
           std::to_string(call.alignment));
  }
  return static_cast<int>(*forced);
}

int threads_per_staged_row(int64_t rows, int threads, const PlanOverrides& overrides) {
  int threads_per_row = 1;
  while (threads_per_row < kColumns && 2 * threads_per_row * rows <= threads) threads_per_row *= 2;
  return one_of("threads_per_row", {1, 2, 4, 8, 16, 32}, overrides.threads_per_row.value_or(threads_per_row));
}

Reduction whole_reduction(const Call& call, int64_t channels, const PlanOverrides& overrides) {
  Reduction reduction{};
  const int64_t row = (call.channels_last ? call.c : call.l) * element_bytes(call.dtype);
  reduction.vec_bytes = vec_bytes_for(call, row, !call.channels_last, overrides.vec_bytes);
  if (call.channels_last) {
    const int64_t vectors = channels * element_bytes(call.dtype) / reduction.vec_bytes;
    const int64_t threads_per_row = std::min<int64_t>(kColumns, next_power_of_two(vectors));
    reduction.threads_per_row =
        one_of("threads_per_row", {1, 2, 4, 8, 16, 32}, overrides.threads_per_row.value_or(threads_per_row));
  }
  return reduction;
}

void check_call(const Call& call, const Device& device) {
  if (device.capability < 75) refuse(device.name + " is sm_" + std::to_string(device.capability) + "; wanted sm_75 on");
  for (const auto& [what, size] : {std::pair{"positions", call.l}, {"channels", call.c}, {"hidden units", call.r}}) {
    if (size > kLongestRow) refuse(std::to_string(size) + " " + what + "; wanted at most 2^30");
  }
}

void check_grids(const Plan& plan) {
  for (int i = 0; i < plan.launch_count; ++i) {
    if (plan.launches[i].blocks > kLargestGrid) {
      refuse(std::string(plan.launches[i].name) + " has " + std::to_string(plan.launches[i].blocks) +
             " blocks; wanted at most 2^31 - 1");
    }
  }
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
  call.pre_act = call.pre_act || f.scale;
  call.alignment = planning::alignment_of({f.x, f.residual, f.y});
  call.saves_p1 = f.p1 != nullptr;
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

Call call_of(const BatchNorm& f) {
  Call call{};
  call.n = f.n, call.c = f.c, call.l = f.l;
  call.channels_last = f.channels_last;
  call.dtype = f.dtype;
  call.post_act = f.act != Activation::kIdentity;
  call.residual = f.residual != nullptr;
  call.alignment = planning::alignment_of({f.x, f.residual, f.y});
  return call;
}

const std::vector<Device>& device_presets() {
  constexpr int64_t kKiB = 1 << 10, kMiB = 1 << 20;
  // The H200's clusters and copy speed are measured (benchmarks/results/h200); the RTX 5090's clusters are QuACK's. The
  // others are predicted: clusters in proportion to the SMs, copies at 85 to 92 % of the memory's peak.
  static const std::vector<Device> presets{
      {"T4", 75, 40, 64 * kKiB, 64 * kKiB, {}, 0.26e6, 4 * kMiB},
      {"A100", 80, 108, 163 * kKiB, 164 * kKiB, {108}, 1.75e6, 40 * kMiB},
      {"RTX 4090", 89, 128, 99 * kKiB, 100 * kKiB, {128}, 0.92e6, 72 * kMiB},
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

Plan make_plan(const Call& call, const Device& device, const std::string& forced) {
  using planning::refuse;
  const planning::PlanOverrides overrides(forced);
  planning::check_call(call, device);
  Plan plan{};
  plan.call = call;
  const std::string why = overrides.algorithm == Algorithm::kTwoPass ? "two_pass is forced"
                                                                     : planning::plan_cluster(plan, device, overrides);
  if (!why.empty() && overrides.algorithm == Algorithm::kCluster) refuse("cluster: " + why);
  if (overrides.algorithm == Algorithm::kCluster) {
    plan.other = "not two_pass: cluster is forced";
  } else {
    Plan two_pass{};
    two_pass.call = call;
    planning::plan_two_pass(two_pass, device, overrides);
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
  planning::check_grids(plan);
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
  const bool forward = call.direction == Direction::kForward;
  std::ostringstream out;
  switch (algorithm) {
    case Algorithm::kTwoPass: out << (forward ? "two_pass forward" : "two_pass backward"); break;
    case Algorithm::kCluster: out << (forward ? "cluster forward" : "cluster backward"); break;
    case Algorithm::kBatchNorm: out << "batch norm"; break;
  }
  out << ", " << launch_count << (launch_count == 1 ? " launch" : " launches") << '\n';
  for (int i = 0; i < launch_count; ++i) {
    const Launch& launch = launches[i];
    out << "  " << launch.name << ": " << launch.blocks << " blocks of " << launch.threads << " threads";
    if (launch.cluster > 0) out << " in clusters of " << launch.cluster;
    out << ", " << launch.shared_bytes << " bytes of shared memory";
    if (launch.cluster > 0 && call.n > 1) {
      out << ", the first " << std::min(call.n, cluster_config.first_wave) << " clusters " << cluster_config.stagger_ns
          << " ns apart";
    }
    out << '\n';
  }
  if (algorithm != Algorithm::kBatchNorm) {
    out << "  reduction: " << reduction.vec_bytes << "-byte accesses, " << reduction.threads_per_row << " threads per "
        << (call.channels_last ? "row of channels" : "row") << ", " << reduction.splits << " splits";
    if (reduction.rows > 0) out << ", " << reduction.rows << " rows at a time through shared memory";
    out << '\n';
  }
  out << "  elementwise: " << elementwise.vec_bytes << "-byte accesses, " << elementwise.per_block
      << (call.channels_last ? " positions of " : " elements of at most ") << elementwise.channels
      << " channels per block\n"
      << "  maps: " << map_bytes_read << " bytes read, " << map_bytes_written << " written; scratch: " << scratch_bytes
      << " bytes";
  if (algorithm != Algorithm::kBatchNorm) out << "\n  predicted: " << text_of(predicted) << "\n  " << other;
  return out.str();
}

}  // namespace se
