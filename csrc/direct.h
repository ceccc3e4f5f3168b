// What every step of a layer calls in vgkern._C, past pybind11: to convert thirty arguments by it takes 0.8 µs.
#pragma once

#include <pybind11/pybind11.h>

namespace vgkern {

void add_direct_functions(pybind11::module_& module);

}  // namespace vgkern
