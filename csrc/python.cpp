// se_fused._C: facts about this build and this CPU. No torch header, so importing it needs no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/features.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", __VERSION__},
      {"target_torch", SE_FUSED_TARGET_TORCH},
      {"instruction_sets", SE_FUSED_INSTRUCTION_SETS},
  };
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> features{"baseline"};
  if (se::cpu::has_x86_64_v3()) features.emplace_back("x86-64-v3");
  if (se::cpu::has_x86_64_v4()) features.emplace_back("x86-64-v4");
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the compiled part of se_fused and about this CPU.";
  m.def("build_info", &build_info, "Compiler, target torch version and instruction sets of this build.");
  m.def("cpu_features", &cpu_features, "The instruction sets that this CPU runs, of those that are compiled.");
}
