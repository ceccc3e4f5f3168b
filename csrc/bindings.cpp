// The Python module vgkern._C: tensors, sizes and type codes go in; of torch nothing is known but the names of a few
// functions and attributes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bandwidth.h"
#include "batch_norm.h"
#include "direct.h"
#include "dispatch.h"
#include "gradient_norm.h"
#include "known_norms.h"
#include "memory_pool.h"
#include "node.h"
#include "ordinary.h"
#include "outputs.h"
#include "parallel.h"
#include "tensors.h"
#include "torch_objects.h"

namespace py = pybind11;

namespace vgkern {
namespace {

// Where a tensor's first element is.
struct Pointer {
  uintptr_t address = 0;
};

template <class T>
T* to(Pointer p) {
  return reinterpret_cast<T*>(p.address);
}

// out: float64, the norm of each array, that of all together, and the factor of clipping.
void norms(const Arrays& arrays, double p, double max_norm, int threads, Pointer out) {
  double* each = to<double>(out);
  const Norms all = gradient_norms(kernels(), arrays.list, p, max_norm, threads, each);
  each[arrays.list.size()] = all.total;
  each[arrays.list.size() + 1] = all.factor;
}

void samples(const Arrays& arrays, Pointer norms) { sample_norms(kernels(), arrays.list, to<double>(norms)); }

void add_known(KnownNorms& known, py::handle parameter, py::handle gradient, double norm, double sample) {
  known.add(parameter, gradient, view_of(gradient.ptr()).data, norm, sample);
}

void scale(const Arrays& arrays, double factor, int threads) { scale_arrays(kernels(), arrays.list, factor, threads); }

// (total, factor), the factor being that which the arrays were scaled by.
std::pair<double, double> clip_all(const Arrays& arrays, double p, double max_norm, bool only_if_finite, int threads) {
  const Norms all = clip_arrays(kernels(), arrays.list, p, max_norm, only_if_finite, threads);
  return {all.total, all.factor};
}

std::vector<bool> clip_by_unit(const Arrays& weights, const Arrays& gradients, double clip_factor, double eps, double p,
                               int threads) {
  return clip_units(kernels(), weights.list, gradients.list, clip_factor, eps, p, threads);
}

void apply_math(const std::string& name, uintptr_t in, uintptr_t out, int64_t count, int dtype) {
  const Pointer from{in}, into{out};
  if (!kernels().apply_math[dtype](name.c_str(), to<const void>(from), to<void>(into), count)) {
    throw std::invalid_argument("no mathematical function '" + name + "'");
  }
}

std::vector<std::string> activation_names() {
  const KernelTable& table = kernels();
  std::vector<std::string> names;
  for (int i = 0; i < table.num_activations; ++i) names.push_back(table.activations[i].name);
  return names;
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
  PYBIND11_TYPE_CASTER(vgkern::Pointer, const_name("Tensor"));

  bool load(handle tensor, bool) {
    value.address = tensor.attr("data_ptr")().cast<uintptr_t>();
    return true;
  }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
  using namespace vgkern;
  m.doc() = "Kernels for CPU tensors, behind vgkern.backends.cpu, which holds the order of the arguments.";
  run_serially_after_fork();

  load_torch_objects();
  add_direct_functions(m);
  add_node_functions(m);
  add_ordinary_functions(m);
  add_output_functions(m);

  m.def("gradient_norms", &norms, py::call_guard<py::gil_scoped_release>());
  m.def("sample_norms", &samples, py::call_guard<py::gil_scoped_release>());
  m.def("scale_arrays", &scale, py::call_guard<py::gil_scoped_release>());
  m.def("clip_arrays", &clip_all, py::call_guard<py::gil_scoped_release>());
  m.def("clip_units", &clip_by_unit, py::call_guard<py::gil_scoped_release>());
  py::class_<Arrays>(m, "Arrays", "What the functions on lists take: addresses, counts and types of tensors.")
      .def(py::init(&described_arrays))
      .def_readonly("dense", &Arrays::dense, "Whether each is a stretch of memory.")
      .def_readonly("unit_wise", &Arrays::unit_wise, "Whether the units of each lie one behind the other.");
  py::class_<KnownNorms>(m, "KnownNorms", "L2 norms of gradients, for as long as these stay as they are.")
      .def(py::init())
      .def("take", &KnownNorms::take, py::arg("parameters"), py::arg("gradients"), py::arg("arrays"),
           py::arg("threads"), "Measure dense gradients, and remember.")
      .def("add", &add_known, py::arg("parameter"), py::arg("gradient"), py::arg("norm"), py::arg("sample"))
      .def("unchanged", &KnownNorms::unchanged, py::arg("parameters"), py::arg("gradients"), py::arg("arrays"),
           "(norms of those that are known and seem unchanged, the other gradients)")
      .def("forget", &KnownNorms::forget)
      .def("__len__", &KnownNorms::size);
  m.def("use_tensor_types", &use_tensor_types, py::arg("tensor"), py::arg("parameter"));
  m.def("plain_gradients", &plain_gradients, py::arg("parameters"),
        "(parameters, gradients, Arrays of these) of those that have one, each gradient once; None if one is no plain "
        "CPU tensor.");
  m.def("read_tensors", &read_tensors, py::arg("tensors"), "Arrays of plain CPU tensors; None if one is not.");

  m.def(
      "dtype_names", [] { return std::vector<std::string>{"float32", "float64", "bfloat16", "float16"}; },
      "Names of the types in the order of their codes.");
  m.def("activation_names", &activation_names, "Names of the activations in the order of their codes.");
  m.def("available_isas", &available_isas, "Instruction sets that this machine runs, the best first.");
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  m.def("apply_math", &apply_math, py::arg("name"), py::arg("in_ptr"), py::arg("out_ptr"), py::arg("n"),
        py::arg("dtype"),
        "A function of csrc/simd_math.h, as tensors of a type are computed with, over an array of the type of "
        "arithmetic (float32 for half precision), in the instruction set in use; for tests.");
  m.def("set_cache_bytes", &set_cache_bytes, py::arg("bytes"),
        "Has the last level of cache taken to be of that size, which decides what is written past it; returns what it "
        "was. For tests.");
  m.def("pool_stats", &pool_stats, "The fields of vgkern.memory.MemoryStats, in order.");
  m.def("pool_set_limit", &set_memory_limit, py::arg("bytes"));
  m.def("pool_empty", &return_idle_memory);
  py::class_<Triad>(m, "Triad", "a = b + k·c over arrays of `bytes` in all; for benchmarks.")
      .def(py::init<int64_t, int>(), py::arg("bytes"), py::arg("threads"))
      .def("run", &Triad::run, py::arg("streaming"), py::call_guard<py::gil_scoped_release>(),
           "Once, with stores that bypass the caches or not.")
      .def("bandwidth", &Triad::bandwidth, py::arg("streaming"), py::call_guard<py::gil_scoped_release>(),
           "Bytes a second of the fastest of several passes.");
  m.def("use_isa", &use_isa, py::arg("name"), "Switch the whole process to an instruction set; ValueError if unknown.");
}
