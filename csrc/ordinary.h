// Whether a call of an operator can go past PyTorch's dispatcher: seen by nobody, on tensors that a kernel can read.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "tensors.h"

namespace vgkern {

// What describes a dense CPU tensor of exactly one of the two types whose memory holds its values, or nothing. One that
// is sparse, or a wrapper of a transform, has no memory to show; that of a lazy zero, or of no element, is null.
std::optional<View> ordinary(PyObject* tensor);

// The places of a call's tensors.
struct Place {
  enum { kInput, kResidual, kRunningMean, kRunningVar, kWeight, kBias, kActivationWeight, kCount };
};

// `unwatched`: nothing watches, and all that are not None are ordinary. `common`: so it is, and plain that no check
// refuses them, for an input (N, C, *) with a residual of its type, parameters and statistics all of that or of float32
// beside half precision, more than one value a channel, statistics given or not needed, and no activation_weight.
enum class Look { watched, unwatched, common };

// At a call's tensors, of which `views` become the descriptions; those of None stay empty.
Look look(bool training, PyObject* const* tensors, View (&views)[Place::kCount]);

void add_ordinary_functions(pybind11::module_& module);

}  // namespace vgkern
