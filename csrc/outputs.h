// The tensors that a call makes, uninitialised: in memory of the pool where they are large, and on the C library's heap
// where they are small, which takes half of torch.empty's time. Their storage cannot be resized.
//
// Where torch is to fill what is empty (deterministic algorithms), large outputs are filled, and torch makes small
// ones, statistics, masks and records, as it does where it has no table of functions. All throw py::error_already_set
// or std::bad_alloc.
#pragma once

#include <pybind11/pybind11.h>

#include "batch_norm.h"
#include "tensors.h"

namespace vgkern {

// As vgkern.ops.layout.
Shape shape_of(const View& x);

// Like x, which is dense. Whoever turns the pool off wants PyTorch's own tensors, and gets them.
pybind11::object output_like(PyObject* x, const View& view);

pybind11::object statistics_of(const Shape& x);
pybind11::object mask_of(const Shape& x);
pybind11::object new_record();

void add_output_functions(pybind11::module_& module);

}  // namespace vgkern
