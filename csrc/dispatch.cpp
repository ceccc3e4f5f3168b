#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace vgkern {
namespace {

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  const KernelTable& (*table)();
};

// The best first. What a file of isa/ is compiled with (setup.py) must be asked for here.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
     },
     avx512_kernels},
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     avx2_kernels},
#endif
    {"baseline", [] { return true; }, baseline_kernels},
};

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const auto& isa : kInstructionSets) {
    if (isa.runs_here()) names.push_back(isa.name);
  }
  return names;
}

void use_isa(const std::string& name) {
  std::string known;
  for (const auto& isa : kInstructionSets) {
    if (name == isa.name) {
      if (!isa.runs_here()) throw std::invalid_argument("this machine does not run the instruction set " + name);
      chosen = &isa.table();
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'; known here: " + known);
}

const KernelTable& kernels() {
  if (chosen == nullptr) use_isa(available_isas().front());
  return *chosen;
}

}  // namespace vgkern
