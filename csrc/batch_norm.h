// Forward and backward of act(batch_norm(x) + residual) over whole tensors: raw pointers, sizes and a thread count. The
// residual may have a batch norm of its own.
//
// The arguments mean what vgkern/ops.py says; a null pointer stands for a tensor that is absent, or not wanted.
// Results are the same bits for every thread count: sums are made over slices that depend on the shape alone and are
// merged in order, in float64.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"

namespace vgkern {

// x as (batch, channels, spatial) planes, or, with `rows`, as batch·spatial rows of the channels.
struct Shape {
  int64_t batch, channels, spatial;
  bool rows;
};

// A tensor of channels, in a type of its own.
struct ChannelArray {
  const void* data;
  DataType dtype;
};

// The parameters of a batch norm.
struct BatchNorm {
  ChannelArray weight, bias;
  double eps;
  ChannelArray running_mean, running_var;  // of the forward
};

struct Common {
  Shape shape;
  DataType dtype;
  int threads;
  bool training;
  int activation;  // row of KernelTable::activations
  std::vector<double> activation_args;
  const void *x, *residual;
  BatchNorm norm;
  ChannelArray activation_weight;
  int64_t activation_weight_size;  // 1 or channels; 1 where there is none
  bool normalises_residual;        // then there are statistics, and the same mode is that of both
  BatchNorm residual_norm;
};

struct Forward : Common {
  void* y;              // null in training mode: only the statistics are wanted
  double* statistics;   // (3, C), of two batch norms (2, 3, C), or null: no normalisation
  uint8_t* saved_mask;  // where the backward will want it
};

constexpr int kRecordFields = 9;

struct Backward : Common {
  const void* dy;
  const uint8_t* mask;
  const double* statistics;  // as the forward's
  double min_norm, max_norm;
  void *dx, *dresidual, *dweight, *dbias, *dactivation_weight;
  DataType gradient_dtype;  // of dweight and dbias; dactivation_weight has activation_weight's
  double* record;           // (kRecordFields,)
  // Of a residual that is normalised. dx and dresidual are then both wanted, in training, or both not; no bounds.
  void *dresidual_weight, *dresidual_bias;
  DataType residual_gradient_dtype;
  double* residual_record;
  // Where other tensors share the statistics: the means of dz and dz·x̂ over all of them, (2, C), and a factor on dx.
  // All that is made then is dx and ‖dx‖². Else null.
  const double *mean_gradients, *dx_factor;
  double* dx_squares;
};

// Has the last level of cache taken to be of that size, which decides what is written past it; returns what it was.
int64_t set_cache_bytes(int64_t bytes);

void batch_norm_act_forward(const KernelTable& table, const Forward& call);
void batch_norm_act_backward(const KernelTable& table, const Backward& call);

}  // namespace vgkern
