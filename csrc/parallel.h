// OpenMP threads, where the compiler has them. torch brings the same runtime, so its threads are the ones that run
// here.
#pragma once

#include <cstdint>

namespace vgkern {

// In the child of a fork the threads of the parent's pool are gone and OpenMP would wait for them forever: from then on
// everything runs on the calling thread. Called once, when the module is loaded.
void run_serially_after_fork();

// Whether a parallel region may start: more than one thread, not in a forked child, not inside another region.
bool may_run_parallel(int threads);

// Work that costs less than this many element operations is not worth waking threads for.
constexpr int64_t kParallelCost = 32768;

// Calls f(begin, end) for ranges that make up [0, count), on up to `threads` threads; `cost` is that of one index.
template <class F>
void parallel_ranges(int threads, int64_t count, int64_t cost, F f) {
  if (count > 1 && count * cost >= kParallelCost && may_run_parallel(threads)) {
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
    for (int part = 0; part < threads; ++part) {
      const int64_t begin = count * part / threads, end = count * (part + 1) / threads;
      if (begin < end) f(begin, end);
    }
  } else {
    f(int64_t{0}, count);
  }
}

}  // namespace vgkern
