// A cache of plans, because finding a plan takes a fraction of the time of making it.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "../plan.h"

namespace se {

// Any number of threads may use it.
class Plans {
 public:
  // The most calls per device and forced plan, and the most forced plans per device. A model has tens of layers, so a
  // process has some hundred different calls. Inputs whose sizes never recur would fill a cache of any size; after the
  // cache is emptied, a call costs only the time to make its plan.
  static constexpr size_t kMost = 1024, kMostForced = 64;

  // limits(index) returns the limits of a device; it is called once for each device, unless it raises.
  explicit Plans(std::function<Device(int index)> limits) : limits_(std::move(limits)) {}

  const Device& device(int index) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return known(index).device;
  }

  // The result of make_plan. It is shared, because another thread may empty the cache while it is used.
  std::shared_ptr<const Plan> plan(const Call& call, int index) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& [device, plans] = known(index);
    const auto same_forced = plans.find(forced());
    if (same_forced != plans.end()) {
      const auto found = same_forced->second.find(call);
      if (found != same_forced->second.end()) return found->second;
    }
    auto made = std::make_shared<const Plan>(make_plan(call, device, forced()));
    if (plans.size() == kMostForced && same_forced == plans.end()) plans.clear();
    auto& kept = plans[forced()];
    if (kept.size() == kMost) kept.clear();
    return kept.emplace(call, std::move(made)).first->second;
  }

  // Forces a plan for the calls of this thread that follow; "" forces none.
  static void force(std::string text) { forced() = std::move(text); }

 private:
  struct Hash {
    size_t operator()(const Call& call) const {
      return std::apply(
          [](auto... member) {
            size_t hash = 0;
            ((hash = hash * 0x9e3779b97f4a7c15 + static_cast<size_t>(member)), ...);
            return hash;
          },
          members(call));
    }
  };
  struct Known {
    Device device;
    std::map<std::string, std::unordered_map<Call, std::shared_ptr<const Plan>, Hash>> plans;  // for each forced plan
  };

  static std::string& forced() {
    thread_local std::string text;
    return text;
  }

  Known& known(int index) {
    const auto found = known_.find(index);
    return found != known_.end() ? found->second : known_.emplace(index, Known{limits_(index), {}}).first->second;
  }

  std::function<Device(int index)> limits_;
  std::mutex mutex_;  // guards the members below
  std::unordered_map<int, Known> known_;
};

}  // namespace se
