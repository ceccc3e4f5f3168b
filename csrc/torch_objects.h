// What the extension asks of torch, which it is not linked with: Python's objects, held for the life of the process.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace vgkern {

struct TorchObjects {
  PyObject* module;  // torch
  PyObject *get_num_threads, *is_grad_enabled, *are_deterministic_algorithms_enabled, *top_saved_tensors_default_hooks;
  PyObject *from_dlpack, *increment_version;
  PyObject *contiguous_format, *channels_last, *channels_last_3d;
  PyObject* deterministic;  // the module torch.utils.deterministic

  // Functions and attributes of modules that say whether something watches operators, and their answer if nothing does.
  struct Function {
    PyObject *ask, *idle;
  };
  struct Flag {
    PyObject *module, *name, *idle;
  };
  std::vector<Function> watchers;
  std::vector<Flag> watching;
};

// Fetched by load_torch_objects, which the module calls when it is imported, and not at first use: an import may let
// another thread go on, which would wait for it in C++ with the interpreter's lock in its hand.
const TorchObjects& torch();
void load_torch_objects();

// torch.empty_like(tensor).
pybind11::object empty_like(PyObject* tensor);

// The answer of a function that says yes or no.
bool says_yes(PyObject* function);

// Whether anything has to see the operators: a TorchDispatchMode or TorchFunctionMode (FakeTensorMode, a FLOP counter,
// torch.device as a context), make_fx, torch.jit.trace, a transform of torch.func, forward-mode AD, the profiler.
// torch.compile is not asked: what it traces does not come here.
bool is_watched();

}  // namespace vgkern
