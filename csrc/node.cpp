#include "node.h"

#include <array>
#include <optional>
#include <string>

#include "direct.h"
#include "entry.h"
#include "ordinary.h"
#include "outputs.h"
#include "torch_objects.h"

namespace py = pybind11;

namespace vgkern {
namespace {

// What set_up gave, held for the life of the process.
struct {
  PyObject* backends;         // the module
  PyObject* activations;      // name → (code, whether its backward reads a mask, whether it reads z, whether it learns)
  PyObject* apply_in_python;  // BackwardCFunction.apply
  PyTypeObject* config;       // vgkern.functional._Config
  PyObject* apply;            // vgkern.functional._apply_direct
} given_once;

void set_up(py::module_ backends, py::dict activations, py::object apply_in_python, py::type config, py::object apply) {
  given_once = {backends.release().ptr(), activations.release().ptr(), apply_in_python.release().ptr(),
                reinterpret_cast<PyTypeObject*>(config.release().ptr()), apply.release().ptr()};
}

PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

bool is_true(PyObject* object) { return PyObject_IsTrue(object) == 1; }

// The items of a tuple that has so many.
PyObject* const* items(PyObject* tuple, Py_ssize_t count) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != count)
    throw py::type_error("expected a tuple of " + std::to_string(count));
  return reinterpret_cast<PyTupleObject*>(tuple)->ob_item;
}

// Of an activation, its row of the table.
enum { kCode, kReadsMask, kReadsZ, kLearns, kRow };
PyObject* const* row_of(PyObject* activation) {
  PyObject* const row = PyDict_GetItemWithError(given_once.activations, activation);
  if (row == nullptr) throw py::value_error("unknown activation");
  return items(row, kRow);
}

// vgkern.functional._Config.
struct Config {
  enum { kTraining, kEps, kActivation, kArgs, kMinNorm, kMaxNorm, kSaveMask, kMemoryFormat, kFields };

  explicit Config(PyObject* tuple) : fields(items(tuple, kFields)) {
    PyObject* const* row = row_of(fields[kActivation]);
    code = row[kCode];
    reads_mask = is_true(row[kReadsMask]);
    reads_z = is_true(row[kReadsZ]);
  }

  PyObject* operator[](int field) const { return fields[field]; }

  PyObject* const* fields;
  PyObject* code;
  bool reads_mask, reads_z;
};

py::object num_threads() { return owned(PyObject_CallNoArgs(torch().get_num_threads)); }

template <class... Objects>
std::array<PyObject*, sizeof...(Objects)> pack(Objects... objects) {
  return {objects...};
}

template <class... Objects>
py::object tuple_of(Objects... objects) {
  return owned(PyTuple_Pack(sizeof...(Objects), objects...));
}

void set(PyObject* object, PyObject* attribute, PyObject* value) {
  if (PyObject_SetAttr(object, attribute, value) != 0) throw py::error_already_set();
}

// (context, x, residual, weight, bias, activation_weight, probe, rest), of tensors that are checked and unwatched, rest
// being (running_mean, running_var, config, a list that gets the statistics); returns y. No context: no backward pass.
py::object node_forward(Arguments given) {
  static PyObject *const materialize_grads = name("materialize_grads"), *const to_save = name("to_save"),
                         *const config_name = name("config"), *const hooked = name("hooked");
  enum { kContext, kX, kResidual, kWeight, kBias, kActivationWeight, kProbe, kRest };
  PyObject *const context = given[kContext], *const x = given[kX], *const residual = given[kResidual];
  enum { kRunningMean, kRunningVar, kConfig, kStatistics, kOfRest };
  PyObject* const* rest = items(given[kRest], kOfRest);
  PyObject *const running_mean = rest[kRunningMean], *const running_var = rest[kRunningVar];
  const Config config(rest[kConfig]);
  const bool training = is_true(config[Config::kTraining]);
  const bool has_statistics = training || running_mean != Py_None;
  const bool has_mask = residual != Py_None && is_true(config[Config::kSaveMask]) && config.reads_mask;

  const View view = view_of(x);
  const Shape shape = shape_of(view);
  const py::object y = output_like(x, view), statistics = has_statistics ? statistics_of(shape) : py::none(),
                   mask = has_mask ? mask_of(shape) : py::none(), threads = num_threads();
  const auto all = pack(x, residual, given[kWeight], given[kBias], given[kActivationWeight], config[Config::kTraining],
                        config[Config::kEps], config.code, config[Config::kArgs], threads.ptr(), running_mean,
                        running_var, y.ptr(), statistics.ptr(), mask.ptr());
  call_forward(all.data());
  if (PyList_Append(rest[kStatistics], statistics.ptr()) != 0) throw py::error_already_set();
  if (context == Py_None) return y;

  // x for x̂, or for z; a sum under a mask, or under no activation at all, needs neither of its terms.
  const bool reads_x = has_statistics || !(has_mask || !(config.reads_mask || config.reads_z));
  // The running statistics are saved, though their values are in `statistics`, so that autograd notices when a training
  // step changes them between an eval-mode forward and its backward.
  PyObject *const frozen_mean = training ? Py_None : running_mean, *const frozen_var = training ? Py_None : running_var;
  const py::object saved =
      tuple_of(reads_x ? x : Py_None, config.reads_z ? residual : Py_None, mask.ptr(), statistics.ptr(), given[kWeight],
               given[kBias], given[kActivationWeight], frozen_mean, frozen_var);
  set(context, to_save, saved.ptr());
  set(context, materialize_grads, Py_False);
  set(context, config_name, rest[kConfig]);
  // What hooks hand back in the backward pass may be any kind of tensor.
  const py::object hooks = owned(PyObject_CallOneArg(torch().top_saved_tensors_default_hooks, Py_False));
  set(context, hooked, hooks.is_none() ? Py_False : Py_True);
  return y;
}

// Whether the C++ backend is the one that vgkern.backends.of gives.
bool is_backend_of_cpu() {
  static PyObject* const forced_name = name("_forced");
  const py::object forced = attribute(given_once.backends, forced_name);
  return forced.is_none() || PyUnicode_CompareWithASCIIString(forced.ptr(), "cpu") == 0;
}

// (node, dy): the gradients of the forward's inputs. Asked anew whether the pass is watched, as the forward pass may
// not have been; what is not for a kernel alone goes to the node's own `backward`.
py::object node_backward(Arguments given) {
  static PyObject *const saved_tensors = name("saved_tensors"), *const needs_input_grad = name("needs_input_grad"),
                         *const config_name = name("config"), *const hooked = name("hooked");
  PyObject *const node = given[0], *dy = given[1];
  const std::optional<View> ordinary_dy = dy == Py_None ? std::nullopt : ordinary(dy);
  if (!ordinary_dy || is_true(attribute(node, hooked).ptr()) || says_yes(torch().is_grad_enabled) || is_watched() ||
      !is_backend_of_cpu())
    return owned(PyObject_Vectorcall(given_once.apply_in_python, given, 2, nullptr));

  const py::object saved = attribute(node, saved_tensors), config_tuple = attribute(node, config_name),
                   needs = attribute(node, needs_input_grad);
  PyObject* const* kept = items(saved.ptr(), 9);  // in the order of node_forward
  PyObject *x = kept[0], *const residual = kept[1], *const mask = kept[2], *const statistics = kept[3],
           *const weight = kept[4], *const bias = kept[5], *const activation_weight = kept[6];
  const Config config(config_tuple.ptr());
  PyObject* const format = config[Config::kMemoryFormat];
  const bool in_format =
      format == torch().contiguous_format ? is_contiguous(*ordinary_dy) : is_channels_last(*ordinary_dy);
  py::object dense_dy;
  if (!in_format) {
    dense_dy = py::handle(dy).attr("contiguous")(py::arg("memory_format") = py::handle(format));
    dy = dense_dy.ptr();
  }
  if (x == Py_None) x = dy;  // for its shape, dtype and format

  enum { kX, kResidual, kWeight, kBias, kActivationWeight, kProbe, kInputs };
  PyObject* const* wanted = items(needs.ptr(), kInputs + 1);
  const auto need = [&](int input) { return is_true(wanted[input]); };
  // One tensor serves both: without normalisation, and so without bounds, dz is dx; without an activation it is dy.
  const bool shared = statistics == Py_None;
  const bool passed_on = !shared && integer(config.code) == kIdentity;
  const auto like = [](bool wanted, PyObject* tensor) { return wanted ? empty_like(tensor) : py::none(); };
  const View view = view_of(x);
  const auto output = [&](bool wanted) { return wanted ? output_like(x, view) : py::none(); };
  const py::object dx = output(need(kX) || (shared && need(kResidual))),
                   dresidual = output(need(kResidual) && !shared && !passed_on), dweight = like(need(kWeight), weight),
                   dbias = like(need(kBias), bias),
                   dactivation_weight = like(need(kActivationWeight), activation_weight),
                   record = need(kProbe) ? new_record() : py::none(), threads = num_threads();
  const auto all = pack(x, residual, weight, bias, activation_weight, config[Config::kTraining], config[Config::kEps],
                        config.code, config[Config::kArgs], threads.ptr(), dy, mask, statistics,
                        config[Config::kMinNorm], config[Config::kMaxNorm], dx.ptr(), dresidual.ptr(), dweight.ptr(),
                        dbias.ptr(), dactivation_weight.ptr(), record.ptr());
  call_backward(all.data());

  PyObject* const residual_gradient = !need(kResidual) ? Py_None : shared ? dx.ptr() : passed_on ? dy : dresidual.ptr();
  return tuple_of(dx.ptr(), residual_gradient, dweight.ptr(), dbias.ptr(), dactivation_weight.ptr(), record.ptr(),
                  Py_None);
}

// The format in which a kernel takes a tensor as it is, or null.
PyObject* format_of(const View& view) {
  if (is_contiguous(view)) return torch().contiguous_format;
  if (!is_channels_last(view)) return nullptr;
  return view.ndim == 4 ? torch().channels_last : torch().channels_last_3d;
}

// (input, residual, weight, bias, activation_weight, probe, running_mean, running_var, counter, training, momentum,
// eps, activation, its arguments, (min_norm, max_norm), whether the running statistics are to follow): all of
// vgkern.functional.step, from its checks to the running statistics, for tensors that are common and in the kernels'
// formats; y. None, and nothing has happened, for all else.
py::object node_step(Arguments given) {
  static PyObject* const requires_grad = name("requires_grad");
  enum { kInput, kResidual, kWeight, kBias, kActivationWeight, kProbe, kRunningMean, kRunningVar, kCounter };
  enum { kTraining = kCounter + 1, kMomentum, kEps, kActivation, kArgs, kBounds, kFollow };
  PyObject *const momentum = given[kMomentum], *const eps = given[kEps], *const *bounds = items(given[kBounds], 2);
  PyObject *const running_mean = given[kRunningMean], *const running_var = given[kRunningVar];
  const bool training = is_true(given[kTraining]);
  const bool follow = is_true(given[kFollow]) && running_mean != Py_None;
  if (!PyFloat_CheckExact(momentum) || !PyFloat_CheckExact(eps) || !(PyFloat_AS_DOUBLE(eps) > 0)) return py::none();
  if (is_true(row_of(given[kActivation])[kLearns]) || !is_backend_of_cpu()) return py::none();
  const auto tensors = pack(given[kInput], given[kResidual], running_mean, running_var, given[kWeight], given[kBias],
                            given[kActivationWeight]);
  View views[Place::kCount]{};
  if (look(training, tensors.data(), views) != Look::common) return py::none();
  PyObject* const format = format_of(views[Place::kInput]);
  if (format == nullptr) return py::none();
  if (views[Place::kResidual].data != nullptr && format_of(views[Place::kResidual]) != format) return py::none();
  if (follow && !takes_running_statistics(views[Place::kRunningMean], views[Place::kRunningVar], given[kCounter]))
    return py::none();
  if (is_true(given[kFollow]) && !follow && given[kCounter] != Py_None) return py::none();

  bool records = false;
  if (says_yes(torch().is_grad_enabled)) {
    for (int i : {kInput, kResidual, kWeight, kBias})
      records = records || (given[i] != Py_None && is_set(given[i], requires_grad));
  }
  const py::object plain = tuple_of(given[kTraining], eps, given[kActivation], given[kArgs], bounds[0], bounds[1],
                                    records ? Py_True : Py_False, format),
                   arguments = tuple_of(plain.ptr()),
                   config = owned(PyTuple_Type.tp_new(given_once.config, arguments.ptr(), nullptr)),
                   statistics = owned(PyList_New(0)),
                   rest = tuple_of(running_mean, running_var, config.ptr(), statistics.ptr());
  const auto call = pack(Py_None, given[kInput], given[kResidual], given[kWeight], given[kBias],
                         given[kActivationWeight], given[kProbe], rest.ptr());
  py::object y = records ? owned(PyObject_Vectorcall(given_once.apply, call.data() + 1, call.size() - 1, nullptr))
                         : node_forward(call.data());
  // State changes last: whatever throws above leaves it as it was.
  if (follow) {
    update_running_statistics(
        pack(running_mean, running_var, given[kCounter], PyList_GET_ITEM(statistics.ptr(), 0), momentum).data());
    // What an operation of PyTorch does by itself: autograd must notice where it saved the values of before.
    const py::object state = given[kCounter] == Py_None ? tuple_of(running_mean, running_var)
                                                        : tuple_of(running_mean, running_var, given[kCounter]);
    owned(PyObject_CallOneArg(torch().increment_version, state.ptr()));
  }
  return y;
}

}  // namespace

void add_node_functions(py::module_& module) {
  static PyMethodDef functions[] = {row<node_forward, 8>("node_forward"), row<node_step, 16>("node_step"), {}};
  add_functions(module, functions);
  // As a method: a function of C does not become one by standing in a class.
  static PyMethodDef method = row<node_backward, 2>("apply");
  const py::object function = owned(PyCFunction_New(&method, nullptr));
  module.attr("node_backward") = owned(PyInstanceMethod_New(function.ptr()));
  module.def(
      "set_up_node", &set_up, py::arg("backends"), py::arg("activations"), py::arg("apply_in_python"),
      py::arg("config"), py::arg("apply"),
      "Before the first node: the module vgkern.backends; name → (code, whether its backward reads a mask, "
      "whether it reads z, whether it learns); what node_backward falls back on; vgkern.functional's _Config and "
      "_apply_direct.");
}

}  // namespace vgkern
