// The kernels' calls, with Python's objects for arguments.
#pragma once

#include <pybind11/pybind11.h>

#include "entry.h"
#include "tensors.h"

namespace vgkern {

// The arguments with which every call begins: x, residual, weight, bias, activation_weight, training, eps, the
// activation's code, its arguments, the number of threads.
constexpr int kGiven = 10;

// … running_mean, running_var, y, statistics, mask
void call_forward(Arguments given);

// … dy, mask, statistics, min_norm, max_norm, dx, dresidual, dweight, dbias, dactivation_weight, record
void call_backward(Arguments given);

// (running_mean, running_var, counter or None, statistics, momentum): running ← (1 − momentum)·running + momentum·batch
// for the mean and the unbiased variance, (C,), from statistics of (3, C): in float64 and rounded once, from whichever
// end is the nearer, as torch.lerp. Counts the batch, where there is a counter. False, and nothing is done, if a
// running statistic is not contiguous, or the counter not of int64 on the CPU.
bool update_running_statistics(Arguments given);
bool takes_running_statistics(const View& mean, const View& var, PyObject* counter);

void add_direct_functions(pybind11::module_& module);

}  // namespace vgkern
