#include "ordinary.h"

#include <algorithm>
#include <utility>

#include "entry.h"
#include "torch_objects.h"

namespace py = pybind11;

namespace vgkern {
namespace {

// Whether nothing watches, and each of a tuple is None or ordinary.
bool are_unwatched(Arguments given) {
  if (is_watched()) return false;
  const auto tensors = py::reinterpret_borrow<py::tuple>(given[0]);
  return std::all_of(tensors.begin(), tensors.end(),
                     [](py::handle tensor) { return tensor.is_none() || ordinary(tensor.ptr()); });
}

// Of (training, tensors of a call): whether they are unwatched, and whether common.
py::object examine(Arguments given) {
  if (!PyTuple_Check(given[1]) || PyTuple_GET_SIZE(given[1]) != Place::kCount)
    throw py::type_error("expected a tuple of 7");
  PyObject* tensors[Place::kCount];
  for (int i = 0; i < Place::kCount; ++i) tensors[i] = PyTuple_GET_ITEM(given[1], i);
  View views[Place::kCount]{};
  const Look seen = look(PyObject_IsTrue(given[0]) == 1, tensors, views);
  return py::make_tuple(seen != Look::watched, seen == Look::common);
}

bool has_shape(const View& view, const int64_t* shape, int32_t rank) {
  return view.ndim == rank && std::equal(shape, shape + rank, view.shape);
}

// Whether it is plain that no check refuses what is ordinary.
bool are_common(bool training, PyObject* const* tensors, const View* views) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  const View& input = views[Place::kInput];
  const bool has_mean = views[Place::kRunningMean].data, has_var = views[Place::kRunningVar].data;
  if (code_of(input.dtype) < 0 || input.ndim < 2 || views[Place::kActivationWeight].data) return false;
  if (training && count_of(input) == input.shape[1]) return false;
  if (has_mean != has_var || !(training || has_mean)) return false;
  const View& residual = views[Place::kResidual];
  if (residual.data && !(residual.dtype == input.dtype && has_shape(residual, input.shape, input.ndim))) return false;
  const View* first = nullptr;
  for (int i : {Place::kRunningMean, Place::kRunningVar, Place::kWeight, Place::kBias}) {
    const View& view = views[i];
    if (!view.data) continue;
    if (!has_shape(view, input.shape + 1, 1)) return false;
    if (first == nullptr) first = &view;
    if (!(view.dtype == first->dtype)) return false;
  }
  const bool half = input.dtype.bits == 16;
  if (first != nullptr && !(first->dtype == input.dtype || (half && first->dtype == kFloat32Type))) return false;
  return !has_mean ||
         !(is_set(tensors[Place::kRunningMean], requires_grad) || is_set(tensors[Place::kRunningVar], requires_grad));
}

}  // namespace

std::optional<View> ordinary(PyObject* tensor) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  if (!is_plain(tensor)) return {};
  try {
    View view = view_of(tensor);
    if (view.device.device_type != kDLCPU || view.data == nullptr || ask(tensor, is_neg).ptr() == Py_True) return {};
    return view;
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_RuntimeError)) throw;  // NotImplementedError is one
    return {};
  }
}

Look look(bool training, PyObject* const* tensors, View (&views)[Place::kCount]) {
  if (is_watched()) return Look::watched;
  for (int i = 0; i < Place::kCount; ++i) {
    if (tensors[i] == Py_None) continue;
    std::optional<View> view = ordinary(tensors[i]);
    if (!view) return Look::watched;
    views[i] = std::move(*view);
  }
  return are_common(training, tensors, views) ? Look::common : Look::unwatched;
}

void add_ordinary_functions(py::module_& module) {
  static PyMethodDef functions[] = {row<are_unwatched, 1>("are_unwatched"), row<examine, 2>("examine"), {}};
  add_functions(module, functions);
}

}  // namespace vgkern
