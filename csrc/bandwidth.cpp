#include "bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "parallel.h"

namespace vgkern {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kLine = 16;  // floats of a cache line
constexpr int64_t kHugePage = 2 << 20;
// Between the arrays: their starts must not be the same distance from a page's, or a store and the loads of the other
// arrays that follow it look alike to the processor.
constexpr int64_t kGap = 21 * kLine;

constexpr auto kShortest = std::chrono::milliseconds(50);  // long enough to outlast a moment in which others run
constexpr int kFewestPasses = 5;

float* allocate(int64_t count) {
  const int64_t bytes = (count * int64_t{sizeof(float)} + kHugePage - 1) / kHugePage * kHugePage;
  void* p = std::aligned_alloc(kHugePage, bytes);
  if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  madvise(p, bytes, MADV_HUGEPAGE);  // a wish: without huge pages the figure is what small ones give
#endif
  return static_cast<float*>(p);
}

int64_t stride(int64_t lines) { return lines * kLine + kGap; }

// a, b and c begin at a cache line and are `lines` of them long.
template <bool kStreaming>
void triad(float* a, const float* b, const float* c, int64_t lines) {
#if defined(__SSE2__)
  const __m128 k = _mm_set1_ps(3.0f);
  for (int64_t i = 0; i < lines * kLine; i += kLine) {
    for (int64_t j = i; j < i + kLine; j += 4) {
      const __m128 sum = _mm_add_ps(_mm_load_ps(b + j), _mm_mul_ps(k, _mm_load_ps(c + j)));
      if constexpr (kStreaming) {
        _mm_stream_ps(a + j, sum);
      } else {
        _mm_store_ps(a + j, sum);
      }
    }
  }
  if constexpr (kStreaming) _mm_sfence();
#else
  for (int64_t i = 0; i < lines * kLine; ++i) a[i] = b[i] + 3.0f * c[i];
#endif
}

}  // namespace

void Triad::Free::operator()(float* p) const { std::free(p); }

Triad::Triad(int64_t bytes, int threads)
    : lines_(bytes / (3 * kLine * int64_t{sizeof(float)})),
      threads_(threads),
      memory_(lines_ < 1 || threads < 1 ? nullptr : allocate(3 * stride(lines_))) {
  if (lines_ < 1) throw std::invalid_argument("bytes: expected at least three cache lines, 192");
  if (threads < 1) throw std::invalid_argument("threads: expected at least one");
  // Each page is first touched by the thread that will use it.
  parallel_ranges(threads_, lines_, kLine, [this](int64_t begin, int64_t end) {
    for (int array = 0; array < 3; ++array) {
      float* start = memory_.get() + array * stride(lines_);
      std::fill(start + begin * kLine, start + end * kLine, 1.0f);
    }
  });
}

void Triad::run(bool streaming) {
  float *a = memory_.get(), *b = a + stride(lines_), *c = b + stride(lines_);
  parallel_ranges(threads_, lines_, kLine, [=](int64_t begin, int64_t end) {
    const auto run = streaming ? triad<true> : triad<false>;
    run(a + begin * kLine, b + begin * kLine, c + begin * kLine, end - begin);
  });
}

double Triad::bandwidth(bool streaming) {
  auto best = Clock::duration::max();
  const auto start = Clock::now();
  for (int i = 0; i < kFewestPasses || Clock::now() - start < kShortest; ++i) {
    const auto begun = Clock::now();
    run(streaming);
    best = std::min(best, Clock::now() - begun);
  }
  const double moved = static_cast<double>(3 * lines_ * kLine) * sizeof(float);
  return moved / std::chrono::duration<double>(std::max(best, Clock::duration(1))).count();
}

}  // namespace vgkern
