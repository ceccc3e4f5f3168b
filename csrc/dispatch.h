// The choice of an instruction set at run time.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace vgkern {

// Instruction sets that this machine runs, the best first; "baseline" is always the last.
std::vector<std::string> available_isas();

// The table in use: the best one, until use_isa chose another. use_isa throws std::invalid_argument for one that is
// unknown or that this machine does not run.
const KernelTable& kernels();
void use_isa(const std::string& name);

}  // namespace vgkern
