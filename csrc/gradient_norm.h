// Norms of a list of arrays, their scaling, and the clipping of their units, each in one call on all threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"

namespace vgkern {

struct Array {
  void* data;
  int64_t count;
  DataType dtype;
  int64_t units;  // an array of rank 2 or more is one unit for each index of its first axis, any other is one
};

struct Norms {
  double total;   // of all arrays together
  double factor;  // min(1, max_norm / (total + 1e-6)), NaN where the total is
};

// norms[i] = (Σ|x|ᵖ)^(1/p) of array i, 0 for one of no elements; p > 0, and inf for the largest magnitude. In float64
// throughout, scaled where a power would leave it: a finite array has a finite norm. inf and NaN propagate. The same
// bits for every number of threads: chunks are cut by the sizes alone and merged in order. Reads each element once
// (other p than 1, 2 and inf: twice, the second time from the cache).
Norms gradient_norms(const KernelTable& table, const std::vector<Array>& arrays, double p, double max_norm, int threads,
                     double* norms);

// The norm of the first kSampled elements of each array, by which a change of the array is noticed: reads 4 KB of it.
constexpr int64_t kSampled = 1024;
void sample_norms(const KernelTable& table, const std::vector<Array>& arrays, double* norms);

// x ← x·factor for all elements of all arrays, rounded once; in half precision towards 0.
void scale_arrays(const KernelTable& table, const std::vector<Array>& arrays, double factor, int threads);

// Both: gradient_norms, and scale_arrays by its factor where that is not 1; with `only_if_finite`, not where the total
// is inf or NaN. Returns the factor that the arrays were scaled by, 1 where they were not written.
Norms clip_arrays(const KernelTable& table, const std::vector<Array>& arrays, double p, double max_norm,
                  bool only_if_finite, int threads);

// Adaptive clipping (Brock et al. 2021, arXiv:2102.06171): each unit of gradient i whose norm exceeds
// clip_factor·max(norm of the same unit of weight i, eps) is scaled down to that; NaN where one of the norms is. The
// units of an array lie one behind the other, and the two arrays have the same number of them. Returns for each
// gradient whether it was written. Reads each element once, and those of the units that it writes again, from the
// cache; other p than 1, 2 and inf as above.
std::vector<bool> clip_units(const KernelTable& table, const std::vector<Array>& weights,
                             const std::vector<Array>& gradients, double clip_factor, double eps, double p,
                             int threads);

}  // namespace vgkern
