#include "outputs.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <vector>

#include "entry.h"
#include "memory_pool.h"
#include "torch_objects.h"

namespace py = pybind11;

namespace vgkern {
namespace {

// Below, the C library's heap keeps its pages by itself. Forward and backward of four layers in a row took, with
// torch.empty's memory, times as long as with the pool's: 1.0 at 0.25 and 0.5 MiB, 1.5 at 1 MiB, 1.3 at 4 and 8, 1.7 at
// 16, 3.0 at 32, 3.5 at 103 (CPU time of one thread of an AMD EPYC, glibc 2.36, torch 2.13, huge pages on request,
// medians).
constexpr size_t kPooled = size_t{1} << 20;

size_t bytes_of(const DLTensor& tensor) {
  size_t bytes = tensor.dtype.bits / 8;
  for (int i = 0; i < tensor.ndim; ++i) bytes *= tensor.shape[i];
  return bytes;
}

// A tensor as DLPack hands it over. Its elements follow each other without gaps, in the order that the strides give: in
// a block of the pool, or behind it on the C library's heap.
struct alignas(64) OwnedTensor {
  static constexpr int kMaxRank = 8;

  // Of that shape, type and order.
  static DLManagedTensorVersioned* make(const DLTensor& like, MemoryBlock block) {
    constexpr size_t kLine = alignof(OwnedTensor);
    const size_t behind = block.data == nullptr ? (bytes_of(like) + kLine - 1) / kLine * kLine : 0;
    void* memory = std::aligned_alloc(kLine, sizeof(OwnedTensor) + behind);
    if (memory == nullptr) {
      if (block.data != nullptr) release_memory(block);
      throw std::bad_alloc();
    }
    auto* tensor = new (memory) OwnedTensor{};
    std::copy_n(like.shape, like.ndim, tensor->sizes);
    std::copy_n(like.strides, like.ndim, tensor->strides);
    tensor->block = block;
    tensor->managed.version = {1, 0};
    tensor->managed.deleter = [](DLManagedTensorVersioned* self) {
      const MemoryBlock block = reinterpret_cast<OwnedTensor*>(self)->block;
      if (block.data != nullptr) release_memory(block);
      std::free(self);
    };
    void* elements = block.data == nullptr ? tensor + 1 : block.data;
    tensor->managed.dl_tensor = {elements, {kDLCPU, 0}, like.ndim, like.dtype, tensor->sizes, tensor->strides, 0};
    return &tensor->managed;
  }

  DLManagedTensorVersioned managed;  // first: the deleter has its address
  int64_t sizes[kMaxRank], strides[kMaxRank];
  MemoryBlock block;
};

bool fills_what_is_empty() {
  static PyObject* const name = PyUnicode_InternFromString("fill_uninitialized_memory");
  return attribute(torch().deterministic, name).ptr() == Py_True;
}

bool is_deterministic() { return says_yes(torch().are_deterministic_algorithms_enabled); }

// Contiguous. Only the mask of a tensor of 8 Mi elements is so large that it comes from the pool.
py::object contiguous_tensor(std::initializer_list<int64_t> sizes, DLDataType dtype) {
  if (is_deterministic() || !has_exchange_table()) {
    const py::handle module = torch().module;
    const auto type = module.attr(dtype == kUInt8Type ? "uint8" : "float64");
    return module.attr("empty")(*py::cast(std::vector<int64_t>(sizes)), py::arg("dtype") = type,
                                py::arg("device") = "cpu");
  }
  int64_t strides[OwnedTensor::kMaxRank], count = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = count;
    count *= sizes.begin()[i];
  }
  auto* shape = const_cast<int64_t*>(sizes.begin());
  const DLTensor like{nullptr, {}, static_cast<int32_t>(sizes.size()), dtype, shape, strides, 0};
  const size_t bytes = bytes_of(like);
  return as_object(OwnedTensor::make(like, bytes < kPooled ? MemoryBlock{} : acquire_memory(bytes)));
}

// Those of vgkern.ops, for x.
py::object new_output(Arguments given) { return output_like(given[0], view_of(given[0])); }
py::object new_statistics(Arguments given) { return statistics_of(shape_of(view_of(given[0]))); }
py::object new_mask(Arguments given) { return mask_of(shape_of(view_of(given[0]))); }

}  // namespace

Shape shape_of(const View& x) {
  Shape shape{1, 1, count_of(x), false};
  if (x.ndim >= 2) {
    shape = {x.shape[0], x.shape[1], shape.spatial / (x.shape[0] * x.shape[1]), false};
    shape.rows = shape.spatial == 1 || !is_contiguous(x);
  }
  return shape;
}

py::object output_like(PyObject* x, const View& view) {
  const bool in_a_format = is_contiguous(view) || is_channels_last(view);
  if (in_a_format && code_of(view.dtype) >= 0 && view.ndim <= OwnedTensor::kMaxRank) {
    const size_t bytes = bytes_of(view);
    if (bytes >= kPooled) {
      const MemoryBlock block = acquire_memory(bytes);
      if (block.data != nullptr) {
        py::object y = as_object(OwnedTensor::make(view, block));
        if (is_deterministic() && fills_what_is_empty()) y.attr("fill_")(std::nan(""));  // as torch.empty does
        return y;
      }
    } else if (has_exchange_table() && memory_statistics().limit != 0 && !is_deterministic()) {
      return as_object(OwnedTensor::make(view, {}));
    }
  }
  return empty_like(x);
}

py::object statistics_of(const Shape& x) { return contiguous_tensor({3, x.channels}, kFloat64Type); }

py::object mask_of(const Shape& x) {
  const int64_t inner = x.rows ? x.channels : x.spatial;
  return contiguous_tensor({x.batch * x.channels * x.spatial / inner, (inner + 7) / 8}, kUInt8Type);
}

py::object new_record() { return contiguous_tensor({kRecordFields}, kFloat64Type); }

void add_output_functions(py::module_& module) {
  static PyMethodDef functions[] = {
      row<new_output, 1>("new_output"),
      row<new_statistics, 1>("new_statistics"),
      row<new_mask, 1>("new_mask"),
      {},
  };
  add_functions(module, functions);
}

}  // namespace vgkern
