// The Python module vgkern._C: tensors, sizes and type codes go in; of torch nothing is known but a few attributes'
// names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>

#include "bandwidth.h"
#include "batch_norm.h"
#include "dispatch.h"
#include "gradient_norm.h"
#include "memory_pool.h"
#include "parallel.h"
#include "tensors.h"

namespace py = pybind11;

namespace vgkern {
namespace {

// Where a tensor's first element is; null for None. What is asked of a tensor is asked from here, as there are up to
// fifteen in a call: from Python it takes 2 µs more.
struct Pointer {
  uintptr_t address = 0;
};

// Of a tensor of channels, which may be a slice of another: then it points at a copy, for the length of the call.
struct Channels : Pointer {};

// A residual: a tensor, or a tuple of a tensor and what there is of its batch norm, in this order; of the last seven,
// the first three are the forward's, and the others the backward's.
struct Residual : Pointer {
  bool normalised = false;
  double eps;
  Channels weight, bias;
  int dtype;
  Channels running_mean, running_var;
  int running_dtype;
  Pointer dweight, dbias;
  int gradient_dtype;
  Pointer record;
};

template <class T>
T* to(Pointer p) {
  return reinterpret_cast<T*>(p.address);
}

py::object ask(py::handle tensor, PyObject* method) {
  auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), method));
  if (!answer) throw py::error_already_set();
  return answer;
}

uintptr_t address_of(py::handle tensor) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  return PyLong_AsSize_t(ask(tensor, data_ptr).ptr());
}

// Whether each is None, or a dense CPU tensor of exactly one of the two types whose memory holds its values. A tensor
// that is sparse, or a wrapper of a transform, has no data_ptr to give; that of a lazy zero, or of no element, is 0.
bool are_ordinary(py::tuple tensors, py::handle tensor_type, py::handle parameter_type) {
  static PyObject* const is_cpu = PyUnicode_InternFromString("is_cpu");
  static PyObject* const is_nested = PyUnicode_InternFromString("is_nested");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  const auto is = [](py::handle tensor, PyObject* attribute) {
    const auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), attribute));
    if (!value) throw py::error_already_set();
    return value.ptr() == Py_True;
  };
  try {
    for (const py::handle tensor : tensors) {
      if (tensor.is_none()) continue;
      const py::handle type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
      if (type.ptr() != tensor_type.ptr() && type.ptr() != parameter_type.ptr()) return false;
      if (!is(tensor, is_cpu) || is(tensor, is_nested) || ask(tensor, is_neg).ptr() == Py_True) return false;
      if (address_of(tensor) == 0) return false;
    }
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_RuntimeError)) throw;  // NotImplementedError is one
    return false;
  }
  return true;
}

template <class Call>
Call common(bool rows, int64_t batch, int64_t channels, int64_t spatial, DataType dtype, int threads, bool training,
            double eps, int activation, std::vector<double> activation_args, Pointer x, const Residual& residual,
            Channels weight, Channels bias, DataType parameter_dtype, Channels activation_weight,
            DataType activation_weight_dtype, int64_t activation_weight_size) {
  Call call{};
  call.shape = {batch, channels, spatial, rows};
  call.dtype = dtype;
  call.threads = threads;
  call.training = training;
  call.activation = activation;
  call.activation_args = std::move(activation_args);
  call.x = to<const void>(x);
  call.residual = to<const void>(residual);
  call.norm = {{to<const void>(weight), parameter_dtype}, {to<const void>(bias), parameter_dtype}, eps, {}, {}};
  call.normalises_residual = residual.normalised;
  if (residual.normalised) {
    const DataType dtype = DataType(residual.dtype), running = DataType(residual.running_dtype);
    call.residual_norm = {{to<const void>(residual.weight), dtype},
                          {to<const void>(residual.bias), dtype},
                          residual.eps,
                          {to<const void>(residual.running_mean), running},
                          {to<const void>(residual.running_var), running}};
  }
  call.activation_weight = {to<const void>(activation_weight), activation_weight_dtype};
  call.activation_weight_size = activation_weight_size;
  return call;
}

void forward(bool rows, int64_t batch, int64_t channels, int64_t spatial, int dtype, int threads, bool training,
             double eps, int activation, std::vector<double> activation_args, Pointer x, const Residual& residual,
             Channels weight, Channels bias, int parameter_dtype, Channels activation_weight,
             int activation_weight_dtype, int64_t activation_weight_size, Channels running_mean, Channels running_var,
             int running_dtype, Pointer y, Pointer statistics, Pointer saved_mask) {
  auto call = common<Forward>(rows, batch, channels, spatial, DataType(dtype), threads, training, eps, activation,
                              std::move(activation_args), x, residual, weight, bias, DataType(parameter_dtype),
                              activation_weight, DataType(activation_weight_dtype), activation_weight_size);
  call.norm.running_mean = {to<const void>(running_mean), DataType(running_dtype)};
  call.norm.running_var = {to<const void>(running_var), DataType(running_dtype)};
  call.y = to<void>(y);
  call.statistics = to<double>(statistics);
  call.saved_mask = to<uint8_t>(saved_mask);
  batch_norm_act_forward(kernels(), call);
}

void backward(bool rows, int64_t batch, int64_t channels, int64_t spatial, int dtype, int threads, bool training,
              double eps, int activation, std::vector<double> activation_args, Pointer x, const Residual& residual,
              Channels weight, Channels bias, int parameter_dtype, Channels activation_weight,
              int activation_weight_dtype, int64_t activation_weight_size, Pointer dy, Pointer mask,
              Channels statistics, double min_norm, double max_norm, Pointer dx, Pointer dresidual, Pointer dweight,
              Pointer dbias, Pointer dactivation_weight, int gradient_dtype, Pointer record) {
  auto call = common<Backward>(rows, batch, channels, spatial, DataType(dtype), threads, training, eps, activation,
                               std::move(activation_args), x, residual, weight, bias, DataType(parameter_dtype),
                               activation_weight, DataType(activation_weight_dtype), activation_weight_size);
  call.dy = to<const void>(dy);
  call.mask = to<const uint8_t>(mask);
  call.statistics = to<const double>(statistics);
  call.min_norm = min_norm;
  call.max_norm = max_norm;
  call.dx = to<void>(dx);
  call.dresidual = to<void>(dresidual);
  call.dweight = to<void>(dweight);
  call.dbias = to<void>(dbias);
  call.dactivation_weight = to<void>(dactivation_weight);
  call.gradient_dtype = DataType(gradient_dtype);
  call.record = to<double>(record);
  if (residual.normalised) {
    call.dresidual_weight = to<void>(residual.dweight);
    call.dresidual_bias = to<void>(residual.dbias);
    call.residual_gradient_dtype = DataType(residual.gradient_dtype);
    call.residual_record = to<double>(residual.record);
  }
  batch_norm_act_backward(kernels(), call);
}

void input_gradient(bool rows, int64_t batch, int64_t channels, int64_t spatial, int dtype, int threads, bool training,
                    double eps, int activation, std::vector<double> activation_args, Pointer x,
                    const Residual& residual, Channels weight, Channels bias, int parameter_dtype,
                    Channels activation_weight, int activation_weight_dtype, int64_t activation_weight_size, Pointer dy,
                    Pointer mask, Channels statistics, Pointer mean_gradients, Pointer dx_factor, Pointer dx,
                    Pointer dx_squares) {
  auto call = common<Backward>(rows, batch, channels, spatial, DataType(dtype), threads, training, eps, activation,
                               std::move(activation_args), x, residual, weight, bias, DataType(parameter_dtype),
                               activation_weight, DataType(activation_weight_dtype), activation_weight_size);
  call.dy = to<const void>(dy);
  call.mask = to<const uint8_t>(mask);
  call.statistics = to<const double>(statistics);
  call.max_norm = std::numeric_limits<double>::infinity();
  call.mean_gradients = to<const double>(mean_gradients);
  call.dx_factor = to<const double>(dx_factor);
  call.dx = to<void>(dx);
  call.dx_squares = to<double>(dx_squares);
  batch_norm_act_backward(kernels(), call);
}

// out: float64, the norm of each array, that of all together, and the factor of clipping.
void norms(const Arrays& arrays, double p, double max_norm, int threads, Pointer out) {
  double* each = to<double>(out);
  const Norms all = gradient_norms(kernels(), arrays.list, p, max_norm, threads, each);
  each[arrays.list.size()] = all.total;
  each[arrays.list.size() + 1] = all.factor;
}

void samples(const Arrays& arrays, Pointer norms) { sample_norms(kernels(), arrays.list, to<double>(norms)); }

void scale(const Arrays& arrays, double factor, int threads) { scale_arrays(kernels(), arrays.list, factor, threads); }

std::vector<bool> clip(const Arrays& weights, const Arrays& gradients, double clip_factor, double eps, double p,
                       int threads) {
  return clip_units(kernels(), weights.list, gradients.list, clip_factor, eps, p, threads);
}

// running ← (1 − momentum)·running + momentum·batch for the mean and the unbiased variance, both (C,) of the given
// type, from statistics of (3, C): in float64 and rounded once, from whichever end is the nearer, as torch.lerp. Counts
// the batch, where there is a counter (int64).
void update_running_statistics(Pointer statistics, int64_t channels, double momentum, int dtype, Pointer running_mean,
                               Pointer running_var, Pointer num_batches_tracked) {
  const KernelTable& table = kernels();
  const double* batch_mean = to<const double>(statistics);
  std::vector<double> values(channels);
  const auto update = [&](Pointer running, const double* batch) {
    table.to_double[dtype](to<const void>(running), values.data(), channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double difference = batch[c] - values[c];
      values[c] = momentum < 0.5 ? values[c] + momentum * difference : batch[c] - (1.0 - momentum) * difference;
    }
    table.from_double[dtype](values.data(), to<void>(running), channels);
  };
  update(running_mean, batch_mean);
  update(running_var, batch_mean + 2 * channels);
  if (num_batches_tracked.address) ++*to<int64_t>(num_batches_tracked);
}

void apply_math(const std::string& name, uintptr_t in, uintptr_t out, int64_t count, const std::string& kind) {
  const KernelTable& table = kernels();
  const Pointer from{in}, to_{out};
  const auto in_float = kind == "coarse" ? table.apply_math_coarse : table.apply_math_float;
  const bool known = kind == "float64"
                         ? table.apply_math_double(name.c_str(), to<const double>(from), to<double>(to_), count)
                         : in_float(name.c_str(), to<const float>(from), to<float>(to_), count);
  if (!known) throw std::invalid_argument("no mathematical function '" + name + "'");
}

std::vector<std::string> activation_names() {
  const KernelTable& table = kernels();
  std::vector<std::string> names;
  for (int i = 0; i < table.num_activations; ++i) names.push_back(table.activations[i].name);
  return names;
}

// A DLPack capsule, or None where the pool has no memory. Whoever takes the tensor over renames the capsule.
py::object pool_tensor(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                       std::pair<uint8_t, uint8_t> code_and_bits) {
  constexpr auto kName = "dltensor";
  DLManagedTensor* tensor = make_tensor(shape, strides, {code_and_bits.first, code_and_bits.second, 1});
  if (tensor == nullptr) return py::none();
  return py::capsule(tensor, kName, [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, kName)) return;
    auto* unused = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kName));
    unused->deleter(unused);
  });
}

py::tuple pool_stats() {
  const MemoryStatistics s = memory_statistics();
  return py::make_tuple(s.in_use, s.idle, s.peak, s.limit, s.hits, s.misses);
}

}  // namespace
}  // namespace vgkern

namespace pybind11::detail {

template <>
struct type_caster<vgkern::Pointer> {
  PYBIND11_TYPE_CASTER(vgkern::Pointer, const_name("Tensor | None"));

  bool load(handle tensor, bool) {
    if (!tensor.is_none()) value.address = vgkern::address_of(tensor);
    return true;
  }
};

template <>
struct type_caster<vgkern::Channels> {
  PYBIND11_TYPE_CASTER(vgkern::Channels, const_name("Tensor | None"));

  bool load(handle tensor, bool) {
    static PyObject* const is_contiguous = PyUnicode_InternFromString("is_contiguous");
    static PyObject* const contiguous = PyUnicode_InternFromString("contiguous");
    if (tensor.is_none()) return true;
    if (vgkern::ask(tensor, is_contiguous).ptr() != Py_True) {
      copy_ = vgkern::ask(tensor, contiguous);
      tensor = copy_;
    }
    value.address = vgkern::address_of(tensor);
    return true;
  }

 private:
  object copy_;
};

template <>
struct type_caster<vgkern::Residual> {
  PYBIND11_TYPE_CASTER(vgkern::Residual, const_name("Tensor | tuple | None"));

  bool load(handle residual, bool) {
    const bool normalised = PyTuple_Check(residual.ptr());
    const handle tensor = normalised ? handle(PyTuple_GET_ITEM(residual.ptr(), 0)) : residual;
    if (!tensor.is_none()) value.address = vgkern::address_of(tensor);
    if (!normalised) return true;
    const auto given = reinterpret_borrow<tuple>(residual);
    value.normalised = true;
    value.eps = given[1].cast<double>();
    value.dtype = given[4].cast<int>();
    value.running_dtype = given[7].cast<int>();
    value.gradient_dtype = given[10].cast<int>();
    vgkern::Channels* const channels[] = {&value.weight, &value.bias, &value.running_mean, &value.running_var};
    const int places[] = {2, 3, 5, 6};
    for (int i = 0; i < 4; ++i) {
      casters_[i].load(given[places[i]], false);
      *channels[i] = cast_op<vgkern::Channels&>(casters_[i]);
    }
    vgkern::Pointer* const pointers[] = {&value.dweight, &value.dbias, &value.record};
    const int after[] = {8, 9, 11};
    for (int i = 0; i < 3; ++i) {
      const object gradient = given[after[i]];
      if (!gradient.is_none()) pointers[i]->address = vgkern::address_of(gradient);
    }
    return true;
  }

 private:
  make_caster<vgkern::Channels> casters_[4];  // they hold copies
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
  using namespace vgkern;
  m.doc() = "Kernels for CPU tensors, behind vgkern.backends.cpu, which holds the order of the arguments.";
  run_serially_after_fork();

  m.def("batch_norm_act_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("batch_norm_act_backward", &backward, py::call_guard<py::gil_scoped_release>());
  m.def("batch_norm_act_input_gradient", &input_gradient, py::call_guard<py::gil_scoped_release>());

  m.def("gradient_norms", &norms, py::call_guard<py::gil_scoped_release>());
  m.def("sample_norms", &samples, py::call_guard<py::gil_scoped_release>());
  m.def("scale_arrays", &scale, py::call_guard<py::gil_scoped_release>());
  m.def("clip_units", &clip, py::call_guard<py::gil_scoped_release>());
  py::class_<Arrays>(m, "Arrays", "What the functions on lists take: addresses, counts and types of tensors.")
      .def(py::init(&described_arrays))
      .def_readonly("dense", &Arrays::dense, "Whether each is a stretch of memory.")
      .def_readonly("unit_wise", &Arrays::unit_wise, "Whether the units of each lie one behind the other.");
  m.def("use_tensor_types", &use_tensor_types, py::arg("tensor"), py::arg("parameter"));
  m.def("plain_gradients", &plain_gradients, py::arg("parameters"),
        "(parameters, gradients) of those that have one, each gradient once; None if one is no plain CPU tensor.");
  m.def("read_tensors", &read_tensors, py::arg("tensors"), "Arrays of plain CPU tensors; None if one is not.");
  m.def("update_running_statistics", &update_running_statistics);
  m.def("are_ordinary", &are_ordinary);

  m.def(
      "dtype_names", [] { return std::vector<std::string>{"float32", "float64", "bfloat16", "float16"}; },
      "Names of the types in the order of their codes.");
  m.def("activation_names", &activation_names, "Names of the activations in the order of their codes.");
  m.def("available_isas", &available_isas, "Instruction sets that this machine runs, the best first.");
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  m.def("apply_math", &apply_math, py::arg("name"), py::arg("in_ptr"), py::arg("out_ptr"), py::arg("n"),
        py::arg("kind"),
        "A function of csrc/simd_math.h over an array, in the instruction set in use; for tests. The kind is float32, "
        "coarse (float32 as half-precision tensors are computed with) or float64.");
  m.def("pool_tensor", &pool_tensor, py::arg("shape"), py::arg("strides"), py::arg("code_and_bits"),
        "DLPack capsule of an uninitialised dense tensor in memory of the pool; None where there is none.");
  m.def("pool_stats", &pool_stats, "The fields of vgkern.memory.MemoryStats, in order.");
  m.def("pool_set_limit", &set_memory_limit, py::arg("bytes"));
  m.def("pool_empty", &return_idle_memory);
  m.def(
      "measure_bandwidth", &measure_bandwidth, py::arg("bytes"), py::arg("threads"), py::arg("streaming"),
      py::call_guard<py::gil_scoped_release>(),
      "Bytes a second of a = b + k·c over `bytes` in all, with stores that bypass the caches or not; for benchmarks.");
  m.def("use_isa", &use_isa, py::arg("name"), "Switch the whole process to an instruction set; ValueError if unknown.");
}
