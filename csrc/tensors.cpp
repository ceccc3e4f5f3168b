#include "tensors.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>

#include "dlpack.h"
#include "entry.h"
#include "torch_objects.h"

namespace py = pybind11;

namespace vgkern {
namespace {

// References that are held for the life of the process, as the types are.
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
PyObject* grad = nullptr;  // the descriptor Tensor.grad: asking it saves the look-up by name, a third of the time
int (*describe)(void*, DLTensor*) = nullptr;
int (*make_object)(DLManagedTensorVersioned*, void**) = nullptr;

// Whether the axes are a stretch of memory in some order; they are sorted.
bool is_dense(std::vector<std::pair<int64_t, int64_t>>& strides_and_sizes) {
  std::sort(strides_and_sizes.begin(), strides_and_sizes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : strides_and_sizes) {
    if (size == 1) continue;
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

void add(Arrays& arrays, void* data, int dtype, int64_t rank, const int64_t* shape, const int64_t* strides) {
  int64_t count = 1;
  bool contiguous = true;
  for (int64_t i = rank; i-- > 0;) {
    contiguous = contiguous && (shape[i] == 1 || strides[i] == count);
    count *= shape[i];
  }
  const int64_t units = rank >= 2 ? shape[0] : 1;
  arrays.list.push_back({data, count, DataType(dtype), units});
  if (contiguous || count == 0) return;
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t i = 0; i < rank; ++i) axes.emplace_back(strides[i], shape[i]);
  arrays.dense = arrays.dense && is_dense(axes);
  arrays.unit_wise = arrays.unit_wise && arrays.dense && (units == 1 || strides[0] == count / units);
}

// Addresses of up to `most` objects, in one stretch of memory: std::unordered_set allocates for each, which takes as
// long as all else that is done to a gradient.
class Addresses {
 public:
  explicit Addresses(size_t most) {
    size_t size = 16;  // a power of two, so that & finds the slot; half of the slots stay free
    while (size < 2 * most) size *= 2;
    slots_.assign(size, nullptr);
  }

  // False if it was there.
  bool insert(const void* object) {
    const size_t last = slots_.size() - 1;
    size_t i = reinterpret_cast<uintptr_t>(object) * uint64_t{0x9e3779b97f4a7c15} >> 32;  // 2⁶⁴ / golden ratio
    while (slots_[i & last] != nullptr && slots_[i & last] != object) ++i;
    return std::exchange(slots_[i & last], object) == nullptr;
  }

 private:
  std::vector<const void*> slots_;
};

// Whether the tensor, of one of the two types, was added.
bool read(PyObject* tensor, Arrays& arrays) {
  DLTensor view;
  if (describe(tensor, &view) != 0) {  // sparse, say
    PyErr_Clear();
    return false;
  }
  const int dtype = code_of(view.dtype);
  if (dtype < 0 || view.device.device_type != kDLCPU) return false;
  char* data = static_cast<char*>(view.data);
  if (data != nullptr) data += view.byte_offset;
  add(arrays, data, dtype, view.ndim, view.shape, view.strides);
  return data != nullptr || arrays.list.back().count == 0;
}

// For torch without the table of functions.
View view_by_attributes(py::handle tensor) {
  View view{};
  const py::object dtype = tensor.attr("dtype");
  const std::pair<const char*, DLDataType> types[] = {
      {"float32", {2, 32, 1}}, {"float64", {2, 64, 1}}, {"bfloat16", {4, 16, 1}},
      {"float16", {2, 16, 1}}, {"int64", kInt64Type},
  };
  const auto torch = py::module_::import("torch");
  for (const auto& [name, type] : types) {
    if (dtype.is(torch.attr(name))) view.dtype = type;
  }
  view.device = {tensor.attr("is_cpu").cast<bool>() ? kDLCPU : DLDeviceType{}, 0};
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  for (const char* name : {"size", "stride"}) {
    for (const py::handle size : tensor.attr(name)()) view.sizes.push_back(size.cast<int64_t>());
  }
  view.ndim = static_cast<int32_t>(view.sizes.size() / 2);
  view.shape = view.sizes.data();
  view.strides = view.shape + view.ndim;
  return view;
}

}  // namespace

bool is_plain(PyObject* object) { return Py_TYPE(object) == tensor_type || Py_TYPE(object) == parameter_type; }

int code_of(DLDataType dtype) {
  constexpr uint8_t kFloat = 2, kBFloat = 4;
  if (dtype.lanes != 1) return -1;
  if (dtype.code == kFloat)
    return dtype.bits == 32 ? kFloat32 : dtype.bits == 64 ? kFloat64 : dtype.bits == 16 ? kFloat16 : -1;
  return dtype.code == kBFloat && dtype.bits == 16 ? kBFloat16 : -1;
}

View view_of(PyObject* tensor) {
  if (describe == nullptr) return view_by_attributes(tensor);
  View view{};
  if (describe(tensor, &view) != 0) throw py::error_already_set();
  if (view.data != nullptr) view.data = static_cast<char*>(view.data) + view.byte_offset;
  return view;
}

bool is_contiguous(const View& tensor) {
  int64_t count = 1;
  for (int64_t i = tensor.ndim; i-- > 0;) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != count) return false;
    count *= tensor.shape[i];
  }
  return true;
}

bool is_channels_last(const View& tensor) {
  if (tensor.ndim != 4 && tensor.ndim != 5) return false;
  int64_t count = 1;
  const auto follows = [&](int64_t i) {
    const bool fits = tensor.shape[i] == 1 || tensor.strides[i] == count;
    count *= tensor.shape[i];
    return fits;
  };
  bool all = follows(1);
  for (int64_t i = tensor.ndim; i-- > 2;) all = follows(i) && all;
  return follows(0) && all;
}

int64_t count_of(const View& tensor) {
  return std::accumulate(tensor.shape, tensor.shape + tensor.ndim, int64_t{1}, std::multiplies<int64_t>());
}

void use_tensor_types(py::type tensor, py::type parameter) {
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  grad = py::object(tensor.attr("grad")).release().ptr();
  describe = nullptr;
  make_object = nullptr;
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  constexpr auto kName = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), kName)) return;
  auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), kName));
  while (api != nullptr && api->version.major != 1) api = api->prev_api;
  if (api == nullptr) return;
  describe = api->dltensor_from_py_object_no_sync;
  make_object = api->managed_tensor_to_py_object_no_sync;
}

py::object as_object(DLManagedTensorVersioned* tensor) {
  if (make_object != nullptr) {
    void* object = nullptr;
    if (make_object(tensor, &object) == 0) return owned(static_cast<PyObject*>(object));
    tensor->deleter(tensor);
    throw py::error_already_set();
  }
  // Whoever takes the tensor over renames the capsule.
  static constexpr auto kName = "dltensor_versioned";
  const py::capsule capsule(tensor, kName, [](PyObject* self) {
    if (!PyCapsule_IsValid(self, kName)) return;
    auto* unused = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(self, kName));
    unused->deleter(unused);
  });
  return owned(PyObject_CallOneArg(torch().from_dlpack, capsule.ptr()));
}

bool has_exchange_table() { return make_object != nullptr; }

py::object plain_gradients(py::sequence parameters) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  if (describe == nullptr) return py::none();
  py::list with_gradient, gradients;
  Addresses seen(parameters.size());
  Arrays arrays{{}, true, true};
  arrays.list.reserve(parameters.size());
  for (py::handle parameter : parameters) {
    PyObject* const p = parameter.ptr();
    auto gradient = py::reinterpret_steal<py::object>(
        is_plain(p) ? Py_TYPE(grad)->tp_descr_get(grad, p, (PyObject*)Py_TYPE(p)) : PyObject_GetAttr(p, name));
    if (!gradient) throw py::error_already_set();
    if (gradient.is_none()) continue;
    if (!is_plain(gradient.ptr())) return py::none();
    if (!seen.insert(gradient.ptr())) continue;
    if (!read(gradient.ptr(), arrays)) return py::none();
    with_gradient.append(parameter);
    gradients.append(std::move(gradient));
  }
  return py::make_tuple(std::move(with_gradient), std::move(gradients), py::cast(std::move(arrays)));
}

py::object read_tensors(py::sequence tensors) {
  if (describe == nullptr) return py::none();
  Arrays arrays{{}, true, true};
  arrays.list.reserve(tensors.size());
  for (py::handle tensor : tensors) {
    if (!is_plain(tensor.ptr()) || !read(tensor.ptr(), arrays)) return py::none();
  }
  return py::cast(std::move(arrays));
}

Arrays described_arrays(
    const std::vector<std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, int>>& tensors) {
  Arrays arrays{{}, true, true};
  for (const auto& [address, shape, strides, dtype] : tensors) {
    add(arrays, reinterpret_cast<void*>(address), dtype, static_cast<int64_t>(shape.size()), shape.data(),
        strides.data());
  }
  return arrays;
}

}  // namespace vgkern
