// Functions for Python past pybind11, by CPython's own calling convention: what every step of a layer calls, for to
// convert thirty arguments by pybind11 takes 0.8 µs.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <string>
#include <type_traits>

namespace vgkern {

using Arguments = PyObject* const*;

inline pybind11::object owned(PyObject* result) {
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

inline double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

inline int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

inline pybind11::object ask(PyObject* object, PyObject* method) {
  return owned(PyObject_CallMethodNoArgs(object, method));
}

inline pybind11::object attribute(PyObject* object, PyObject* name) { return owned(PyObject_GetAttr(object, name)); }

inline bool is_set(PyObject* object, PyObject* name) { return attribute(object, name).ptr() == Py_True; }

inline PyObject* returned(bool value) { return PyBool_FromLong(value); }
inline PyObject* returned(pybind11::object value) { return value.release().ptr(); }

template <auto function, int arity>
PyObject* entry(PyObject*, Arguments given, Py_ssize_t count) {
  namespace py = pybind11;
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

// A row of a module's table of functions.
template <auto function, int arity>
constexpr PyMethodDef row(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&entry<function, arity>)), METH_FASTCALL,
          nullptr};
}

inline void add_functions(pybind11::module_& module, PyMethodDef* functions) {
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw pybind11::error_already_set();
}

}  // namespace vgkern
