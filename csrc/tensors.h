// Lists of PyTorch's tensors as arrays of the kernels, without PyTorch's headers: by the functions of DLPack, which
// describe a tensor in 40 ns where its methods take 60 ns for each thing that is asked.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "dlpack.h"
#include "gradient_norm.h"

namespace vgkern {

// Arrays and what kernels may do with them.
struct Arrays {
  std::vector<Array> list;
  bool dense;      // each is a stretch of memory
  bool unit_wise;  // and the units of each lie one behind the other
};

// The types whose tensors are plain memory: torch.Tensor and torch.nn.Parameter, and no subclass of them. To be called
// once, before the functions below, with a table of functions in the first type's __dlpack_c_exchange_api__; without
// one (torch 2.9) those find no plain tensor.
void use_tensor_types(pybind11::type tensor, pybind11::type parameter);

// Whether the object is of exactly one of the two types.
bool is_plain(PyObject* object);

constexpr DLDataType kInt64Type{0, 64, 1}, kUInt8Type{1, 8, 1}, kFloat32Type{2, 32, 1}, kFloat64Type{2, 64, 1};

inline bool operator==(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// The code of a type that the kernels take, or -1.
int code_of(DLDataType dtype);

// A strided CPU tensor as DLPack describes it; its data is null where it has no elements, or no memory that holds them.
struct View : DLTensor {
  std::vector<int64_t> sizes;  // what shape and strides point at, where they are not the tensor's own
};

// Throws py::error_already_set for what has no such description.
View view_of(PyObject* tensor);

int64_t count_of(const View& tensor);
bool is_contiguous(const View& tensor);

// Of rank 4 or 5, in torch.channels_last or channels_last_3d.
bool is_channels_last(const View& tensor);

// A tensor of torch's that owns the memory, whose storage cannot be resized, as any of DLPack's. Throws
// py::error_already_set; the memory is then released.
pybind11::object as_object(DLManagedTensorVersioned* tensor);

// Whether torch has the table of functions, without which as_object goes by a capsule and Python.
bool has_exchange_table();

// (parameters, gradients, Arrays of the gradients) of those that have a gradient, each gradient once; None if a
// gradient is not plain CPU memory of the kernels' types.
pybind11::object plain_gradients(pybind11::sequence parameters);

// None if one is not plain CPU memory of the kernels' types.
pybind11::object read_tensors(pybind11::sequence tensors);

// The same from (address, shape, strides, code of the type) of each, for torch without the table of functions.
Arrays described_arrays(const std::vector<std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, int>>&);

}  // namespace vgkern
