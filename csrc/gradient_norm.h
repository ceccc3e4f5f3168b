// Norms of a list of arrays, and their scaling, each in one call on all threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"

namespace vgkern {

struct Array {
  void* data;
  int64_t count;
  DataType dtype;
};

// norms[i] = (Σ|x|ᵖ)^(1/p) of array i, 0 for one of no elements, and *total that of all of them together; p > 0, and
// inf for the largest magnitude. In float64 throughout, scaled where a power would leave it: a finite array has a
// finite norm. inf and NaN propagate. The same bits for every number of threads: chunks are cut by the sizes alone and
// merged in order. Reads each element once (other p than 1, 2 and inf: twice, the second time from the cache).
void gradient_norms(const KernelTable& table, const std::vector<Array>& arrays, double p, int threads, double* norms,
                    double* total);

// x ← x·factor for all elements of all arrays, rounded once.
void scale_arrays(const KernelTable& table, const std::vector<Array>& arrays, double factor, int threads);

}  // namespace vgkern
