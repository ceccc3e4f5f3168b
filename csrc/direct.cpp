#include "direct.h"

#include <limits>
#include <vector>

#include "batch_norm.h"
#include "dispatch.h"
#include "outputs.h"
#include "tensors.h"

namespace py = pybind11;

namespace vgkern {
namespace {

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

}  // namespace

void call_forward(Arguments given) {
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

void call_backward(Arguments given) {
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

bool takes_running_statistics(const View& mean, const View& var, PyObject* counter) {
  if (!is_contiguous(mean) || !is_contiguous(var)) return false;
  if (counter == Py_None) return true;
  const View view = view_of(counter);
  return view.device.device_type == kDLCPU && view.dtype == kInt64Type;
}

bool update_running_statistics(Arguments given) {
  const View running_mean = view_of(given[0]), running_var = view_of(given[1]), statistics = view_of(given[3]);
  if (!takes_running_statistics(running_mean, running_var, given[2])) return false;
  const double momentum = number(given[4]);
  if (given[2] != Py_None) ++*static_cast<int64_t*>(view_of(given[2]).data);
  const KernelTable& table = kernels();
  const int64_t channels = count_of(running_mean);
  const auto update = [&](const View& running, const double* batch) {
    table.update_running[code_of(running.dtype)](running.data, batch, momentum, channels);
  };
  const auto* batch_mean = static_cast<const double*>(statistics.data);
  update(running_mean, batch_mean);
  update(running_var, batch_mean + 2 * channels);
  return true;
}

void add_direct_functions(py::module_& module) {
  static PyMethodDef functions[] = {
      row<call_forward, kGiven + 5>("batch_norm_act_forward"),
      row<call_backward, kGiven + 11>("batch_norm_act_backward"),
      row<input_gradient, kGiven + 7>("batch_norm_act_input_gradient"),
      row<update_running_statistics, 5>("update_running_statistics"),
      {},
  };
  add_functions(module, functions);
}

}  // namespace vgkern
