#include "direct.h"

#include <algorithm>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "batch_norm.h"
#include "dispatch.h"
#include "memory_pool.h"
#include "tensors.h"

namespace py = pybind11;

namespace vgkern {
namespace {

using Arguments = PyObject* const*;

double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

py::object ask(PyObject* tensor, PyObject* method) {
  auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, method));
  if (!answer) throw py::error_already_set();
  return answer;
}

bool has(PyObject* tensor, PyObject* attribute) {
  const auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, attribute));
  if (!value) throw py::error_already_set();
  return value.ptr() == Py_True;
}

// ---- Tensors as they are given: None is a null pointer -------------------------------------------------------------

View view_or_none(PyObject* tensor) { return tensor == Py_None ? View{} : view_of(tensor); }

template <class T>
T* memory_of(PyObject* tensor) {
  return static_cast<T*>(view_or_none(tensor).data);
}

// A tensor of channels. One that is a slice of another is copied, for the length of the call.
struct Channels {
  explicit Channels(PyObject* tensor) {
    static PyObject* const contiguous = PyUnicode_InternFromString("contiguous");
    if (tensor == Py_None) return;
    View view = view_of(tensor);
    if (!is_contiguous(view)) {
      copy = ask(tensor, contiguous);
      view = view_of(copy.ptr());
    }
    array = {view.data, DataType(code_of(view.dtype))};
    size = count_of(view);
  }

  ChannelArray array{};
  int64_t size = 1;
  py::object copy;
};

// A residual: a tensor, or a tuple of it and what there is of a batch norm of its own: eps, weight, bias, running_mean,
// running_var, and of a backward dweight, dbias, record.
struct Residual {
  explicit Residual(PyObject* given)
      : parts(PyTuple_Check(given) ? py::reinterpret_borrow<py::tuple>(given) : py::make_tuple(py::handle(given))),
        normalised(parts.size() > 1),
        data(memory_of<const void>(part(0))),
        weight(part(2)),
        bias(part(3)),
        running_mean(part(4)),
        running_var(part(5)) {}

  PyObject* part(size_t i) const { return i < parts.size() ? PyTuple_GET_ITEM(parts.ptr(), i) : Py_None; }
  BatchNorm norm() const { return {weight.array, bias.array, number(part(1)), running_mean.array, running_var.array}; }

  py::tuple parts;
  bool normalised;
  const void* data;
  Channels weight, bias, running_mean, running_var;
};

// As vgkern.ops.layout.
Shape shape_of(const View& x) {
  Shape shape{1, 1, count_of(x), false};
  if (x.ndim >= 2) {
    shape = {x.shape[0], x.shape[1], shape.spatial / (x.shape[0] * x.shape[1]), false};
    shape.rows = shape.spatial == 1 || !is_contiguous(x);
  }
  return shape;
}

// The arguments with which every call begins: x, residual, weight, bias, activation_weight, training, eps, the
// activation's code, its arguments, the number of threads.
constexpr int kGiven = 10;

struct Given {
  explicit Given(Arguments given)
      : x(view_of(given[0])),
        residual(given[1]),
        weight(given[2]),
        bias(given[3]),
        activation_weight(given[4]),
        training(PyObject_IsTrue(given[5]) == 1),
        eps(number(given[6])),
        activation(static_cast<int>(integer(given[7]))),
        threads(static_cast<int>(integer(given[9]))) {
    for (const py::handle argument : py::reinterpret_borrow<py::sequence>(given[8]))
      activation_args.push_back(number(argument.ptr()));
  }

  template <class Call>
  Call call() const {
    Call call{};
    call.shape = shape_of(x);
    call.dtype = DataType(code_of(x.dtype));
    call.threads = threads;
    call.training = training;
    call.activation = activation;
    call.activation_args = activation_args;
    call.x = x.data;
    call.residual = residual.data;
    call.norm = {weight.array, bias.array, eps, {}, {}};
    call.normalises_residual = residual.normalised;
    if (residual.normalised) call.residual_norm = residual.norm();
    call.activation_weight = activation_weight.array;
    call.activation_weight_size = activation_weight.size;
    return call;
  }

  View x;
  Residual residual;
  Channels weight, bias, activation_weight;
  bool training;
  double eps;
  int activation;
  std::vector<double> activation_args;
  int threads;
};

// ---- The functions -------------------------------------------------------------------------------------------------

// … running_mean, running_var, y, statistics, mask
void forward(Arguments given) {
  const Given common(given);
  const Channels running_mean(given[kGiven]), running_var(given[kGiven + 1]);
  auto call = common.call<Forward>();
  call.norm.running_mean = running_mean.array;
  call.norm.running_var = running_var.array;
  call.y = memory_of<void>(given[kGiven + 2]);
  call.statistics = memory_of<double>(given[kGiven + 3]);
  call.saved_mask = memory_of<uint8_t>(given[kGiven + 4]);
  const py::gil_scoped_release release;
  batch_norm_act_forward(kernels(), call);
}

// … dy, mask, statistics, min_norm, max_norm, dx, dresidual, dweight, dbias, dactivation_weight, record
void backward(Arguments given) {
  const Given common(given);
  const Channels statistics(given[kGiven + 2]);
  const View dweight = view_or_none(given[kGiven + 7]), dbias = view_or_none(given[kGiven + 8]);
  auto call = common.call<Backward>();
  call.dy = memory_of<const void>(given[kGiven]);
  call.mask = memory_of<const uint8_t>(given[kGiven + 1]);
  call.statistics = static_cast<const double*>(statistics.array.data);
  call.min_norm = number(given[kGiven + 3]);
  call.max_norm = number(given[kGiven + 4]);
  call.dx = memory_of<void>(given[kGiven + 5]);
  call.dresidual = memory_of<void>(given[kGiven + 6]);
  call.dweight = dweight.data;
  call.dbias = dbias.data;
  call.dactivation_weight = memory_of<void>(given[kGiven + 9]);
  call.gradient_dtype = DataType(code_of((dweight.data ? dweight : dbias).dtype));
  call.record = memory_of<double>(given[kGiven + 10]);
  const View dresidual_weight = view_or_none(common.residual.part(6)),
             dresidual_bias = view_or_none(common.residual.part(7));
  call.dresidual_weight = dresidual_weight.data;
  call.dresidual_bias = dresidual_bias.data;
  call.residual_gradient_dtype = DataType(code_of((dresidual_weight.data ? dresidual_weight : dresidual_bias).dtype));
  call.residual_record = memory_of<double>(common.residual.part(8));
  const py::gil_scoped_release release;
  batch_norm_act_backward(kernels(), call);
}

// … dy, mask, statistics, mean_gradients, dx_factor, dx, dx_squares
void input_gradient(Arguments given) {
  const Given common(given);
  const Channels statistics(given[kGiven + 2]);
  auto call = common.call<Backward>();
  call.dy = memory_of<const void>(given[kGiven]);
  call.mask = memory_of<const uint8_t>(given[kGiven + 1]);
  call.statistics = static_cast<const double*>(statistics.array.data);
  call.max_norm = std::numeric_limits<double>::infinity();
  call.mean_gradients = memory_of<const double>(given[kGiven + 3]);
  call.dx_factor = memory_of<const double>(given[kGiven + 4]);
  call.dx = memory_of<void>(given[kGiven + 5]);
  call.dx_squares = memory_of<double>(given[kGiven + 6]);
  const py::gil_scoped_release release;
  batch_norm_act_backward(kernels(), call);
}

// The tensors of vgkern.ops that a call makes, uninitialised: the mask of x, its statistics, an output like x; whether
// torch is to make them.
py::object new_mask(Arguments given) {
  const Shape x = shape_of(view_of(given[0]));
  const int64_t inner = x.rows ? x.channels : x.spatial;
  return new_tensor(x.batch * x.channels * x.spatial / inner, (inner + 7) / 8, kUInt8Type, given[1] == Py_True);
}

py::object new_statistics(Arguments given) {
  return new_tensor(3, shape_of(view_of(given[0])).channels, kFloat64Type, given[1] == Py_True);
}

// Whoever turns the pool off wants PyTorch's own tensors.
py::object new_output(Arguments given) {
  return new_like(given[0], given[1] == Py_True || memory_statistics().limit == 0);
}

// running ← (1 − momentum)·running + momentum·batch for the mean and the unbiased variance, (C,), from statistics of
// (3, C): in float64 and rounded once, from whichever end is the nearer, as torch.lerp. Counts the batch, where there
// is a counter. False, and nothing is done, if a tensor is not contiguous, or the counter not of int64 on the CPU.
bool update_running_statistics(Arguments given) {
  const View running_mean = view_of(given[0]), running_var = view_of(given[1]), statistics = view_of(given[3]);
  if (!is_contiguous(running_mean) || !is_contiguous(running_var)) return false;
  const double momentum = number(given[4]);
  if (given[2] != Py_None) {
    const View counter = view_of(given[2]);
    if (counter.device.device_type != kDLCPU || !(counter.dtype == kInt64Type)) return false;
    ++*static_cast<int64_t*>(counter.data);
  }
  const KernelTable& table = kernels();
  const int64_t channels = count_of(running_mean);
  std::vector<double> values(channels);
  const auto update = [&](const View& running, const double* batch) {
    const int dtype = code_of(running.dtype);
    table.to_double[dtype](running.data, values.data(), channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double difference = batch[c] - values[c];
      values[c] = momentum < 0.5 ? values[c] + momentum * difference : batch[c] - (1.0 - momentum) * difference;
    }
    table.from_double[dtype](values.data(), running.data, channels);
  };
  const auto* batch_mean = static_cast<const double*>(statistics.data);
  update(running_mean, batch_mean);
  update(running_var, batch_mean + 2 * channels);
  return true;
}

// What describes a dense CPU tensor of exactly one of the two types whose memory holds its values, or nothing. One that
// is sparse, or a wrapper of a transform, has no memory to show; that of a lazy zero, or of no element, is null.
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

// Whether each of a tuple is None or ordinary.
bool are_ordinary(Arguments given) {
  const auto tensors = py::reinterpret_borrow<py::tuple>(given[0]);
  return std::all_of(tensors.begin(), tensors.end(),
                     [](py::handle tensor) { return tensor.is_none() || ordinary(tensor.ptr()); });
}

// Of (training, (input, residual, running_mean, running_var, weight, bias, activation_weight)): whether all that are
// not None are ordinary; and whether then it is plain that no check refuses them. So it is for an input (N, C, *) with
// all else of its type, more than one value a channel, statistics given or not needed, and no activation_weight.
py::object examine(Arguments given) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  enum { kInput, kResidual, kRunningMean, kRunningVar, kWeight, kBias, kActivationWeight, kTensors };
  const bool training = PyObject_IsTrue(given[0]) == 1;
  if (!PyTuple_Check(given[1]) || PyTuple_GET_SIZE(given[1]) != kTensors) throw py::type_error("expected a tuple of 7");
  const auto tensor = [&](int i) { return PyTuple_GET_ITEM(given[1], i); };
  View views[kTensors]{};
  for (int i = 0; i < kTensors; ++i) {
    if (tensor(i) == Py_None) continue;
    std::optional<View> view = ordinary(tensor(i));
    if (!view) return py::make_tuple(false, false);
    views[i] = std::move(*view);
  }
  const View& input = views[kInput];
  const auto common = [&] {
    const bool has_mean = views[kRunningMean].data, has_var = views[kRunningVar].data;
    if (code_of(input.dtype) < 0 || input.ndim < 2 || views[kActivationWeight].data) return false;
    if (training && count_of(input) == input.shape[1]) return false;
    if (has_mean != has_var || !(training || has_mean)) return false;
    for (int i = kResidual; i <= kBias; ++i) {
      const View& view = views[i];
      if (!view.data) continue;
      const int64_t* expected = i == kResidual ? input.shape : input.shape + 1;
      if (!(view.dtype == input.dtype) || view.ndim != (i == kResidual ? input.ndim : 1)) return false;
      if (!std::equal(view.shape, view.shape + view.ndim, expected)) return false;
    }
    return !(has_mean && (has(tensor(kRunningMean), requires_grad) || has(tensor(kRunningVar), requires_grad)));
  };
  return py::make_tuple(true, common());
}

// ---- As Python's functions -----------------------------------------------------------------------------------------

PyObject* returned(bool value) { return PyBool_FromLong(value); }
PyObject* returned(py::object value) { return value.release().ptr(); }

template <auto function, int arity>
PyObject* entry(PyObject*, Arguments given, Py_ssize_t count) {
  try {
    if (count != arity) throw py::type_error("expected " + std::to_string(arity) + " arguments");
    if constexpr (std::is_void_v<decltype(function(given))>) {
      function(given);
      return Py_NewRef(Py_None);
    } else {
      return returned(function(given));
    }
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  return nullptr;
}

template <auto function, int arity>
constexpr PyMethodDef row(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&entry<function, arity>)), METH_FASTCALL,
          nullptr};
}

}  // namespace

void add_direct_functions(py::module_& module) {
  static PyMethodDef functions[] = {
      row<forward, kGiven + 5>("batch_norm_act_forward"),
      row<backward, kGiven + 11>("batch_norm_act_backward"),
      row<input_gradient, kGiven + 7>("batch_norm_act_input_gradient"),
      row<new_mask, 2>("new_mask"),
      row<new_statistics, 2>("new_statistics"),
      row<new_output, 2>("new_output"),
      row<update_running_statistics, 5>("update_running_statistics"),
      row<are_ordinary, 1>("are_ordinary"),
      row<examine, 2>("examine"),
      {},
  };
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace vgkern
