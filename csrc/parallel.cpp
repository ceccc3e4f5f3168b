#include "parallel.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#include <pthread.h>

namespace vgkern {
namespace {

bool forked = false;

}  // namespace

void run_serially_after_fork() {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

bool may_run_parallel(int threads) {
#if defined(_OPENMP)
  return threads > 1 && !forked && !omp_in_parallel();
#else
  (void)threads;
  return false;
#endif
}

}  // namespace vgkern
