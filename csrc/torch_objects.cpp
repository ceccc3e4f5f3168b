#include "torch_objects.h"

#include "entry.h"

namespace py = pybind11;

namespace vgkern {
namespace {

TorchObjects objects;

PyObject* held(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

TorchObjects::Flag flag(const char* module, const char* name, py::object idle) {
  (void)py::module_::import(module).attr(name);  // missed at once, and not in a step
  return {py::module_::import(module).release().ptr(), PyUnicode_InternFromString(name), idle.release().ptr()};
}

bool differs(PyObject* answer, PyObject* idle) {
  const int same = PyObject_RichCompareBool(answer, idle, Py_EQ);
  if (same < 0) throw py::error_already_set();
  return same == 0;
}

}  // namespace

const TorchObjects& torch() { return objects; }

void load_torch_objects() {
  objects = {
      py::module_::import("torch").release().ptr(),
      held("torch", "get_num_threads"),
      held("torch", "is_grad_enabled"),
      held("torch", "are_deterministic_algorithms_enabled"),
      held("torch._C._autograd", "_top_saved_tensors_default_hooks"),
      held("torch.utils.dlpack", "from_dlpack"),
      held("torch._C", "_increment_version"),
      held("torch", "contiguous_format"),
      held("torch", "channels_last"),
      held("torch", "channels_last_3d"),
      py::module_::import("torch.utils.deterministic").release().ptr(),
      {
          {held("torch._C", "_len_torch_dispatch_stack"), py::int_(0).release().ptr()},
          {held("torch._C", "_len_torch_function_stack"), py::int_(0).release().ptr()},
          {held("torch._C", "_are_functorch_transforms_active"), py::bool_(false).release().ptr()},
          {held("torch._C", "_get_tracing_state"), py::none().release().ptr()},
          {held("torch.fx._symbolic_trace", "is_fx_symbolic_tracing"), py::bool_(false).release().ptr()},
      },
      {
          flag("torch.autograd.forward_ad", "_current_level", py::int_(-1)),
          flag("torch.autograd.profiler", "_is_profiler_enabled", py::bool_(false)),
      },
  };
}

py::object empty_like(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("empty_like");
  return owned(PyObject_CallMethodOneArg(objects.module, name, tensor));  // looked up, as a test may replace it
}

bool says_yes(PyObject* function) { return owned(PyObject_CallNoArgs(function)).ptr() == Py_True; }

bool is_watched() {
  for (const auto& [ask, idle] : objects.watchers) {
    if (differs(owned(PyObject_CallNoArgs(ask)).ptr(), idle)) return true;
  }
  for (const auto& [module, name, idle] : objects.watching) {
    if (differs(attribute(module, name).ptr(), idle)) return true;
  }
  return false;
}

}  // namespace vgkern
