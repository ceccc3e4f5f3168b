// The part of DLPack's binary interface that hands a CPU tensor over: https://dmlc.github.io/dlpack/latest/c_api.html
// DLManagedTensorVersioned is DLPack 1.0's and torch's since 2.9; the table of functions is 1.3's, and torch's since
// 2.10.
#pragma once

#include <cstdint>

extern "C" {

enum DLDeviceType : int32_t { kDLCPU = 1 };

struct DLDevice {
  DLDeviceType device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;  // 2: IEEE float, 4: bfloat
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackVersion {
  uint32_t major, minor;
};

struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor dl_tensor;
};

// What a type of tensors gives in its attribute __dlpack_c_exchange_api__, a capsule "dlpack_exchange_api".
struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* prev_api;
  void* not_used_here[2];
  // Makes a Python object of that type, which owns the tensor from then on. 0, or -1 with a Python exception set.
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned* tensor, void** out);
  // Describes a Python object of that type without owning it. 0, or -1 with a Python exception set. May be null.
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

}  // extern "C"
