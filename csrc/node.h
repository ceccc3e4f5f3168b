// The autograd node of batch_norm_act on plain CPU tensors: what vgkern.functional._BatchNormActDirect does, in one
// call each way. Behind a kernel that has run a step's tensors through the caches, each line of Python's and torch's
// memory is read anew: a call through five of Python's functions takes 40 µs there and not 5.
#pragma once

#include <pybind11/pybind11.h>

namespace vgkern {

void add_node_functions(pybind11::module_& module);

}  // namespace vgkern
