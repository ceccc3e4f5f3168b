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

constexpr DLDataType kInt64Type{0, 64, 1}, kUInt8Type{1, 8, 1}, kFloat64Type{2, 64, 1};

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

bool is_contiguous(const View& tensor);
int64_t count_of(const View& tensor);

// Uninitialised CPU tensors on the C library's heap, in half the time of torch.empty or less: (rows, columns), of
// float64 or bytes; and one of a dense tensor's shape, strides and type. As any of DLPack's, their storage cannot be
// resized. With `by_torch`, and where torch has no table of functions, torch.empty makes them. Throw
// py::error_already_set or std::bad_alloc.
pybind11::object new_tensor(int64_t rows, int64_t columns, DLDataType dtype, bool by_torch);
pybind11::object new_like(PyObject* tensor, bool by_torch);

// (parameters, gradients, Arrays of the gradients) of those that have a gradient, each gradient once; None if a
// gradient is not plain CPU memory of the kernels' types.
pybind11::object plain_gradients(pybind11::sequence parameters);

// None if one is not plain CPU memory of the kernels' types.
pybind11::object read_tensors(pybind11::sequence tensors);

// The same from (address, shape, strides, code of the type) of each, for torch without the table of functions.
Arrays described_arrays(const std::vector<std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, int>>&);

}  // namespace vgkern
