// What the memory of this machine gives: the roof under which the kernels are judged by `python -m benchmarks`.
#pragma once

#include <cstdint>
#include <memory>

namespace vgkern {

// a = b + k·c over three float arrays that together are `bytes` long, so `bytes` is also what one pass moves: two reads
// and a write, as a forward pass with a residual. The memory is paged in (in huge pages where Linux gives them).
//
// The constructor throws std::invalid_argument for fewer bytes than three cache lines or no thread, std::bad_alloc for
// too many bytes.
class Triad {
 public:
  Triad(int64_t bytes, int threads);

  // Once. With `streaming` the stores go past the caches, where the machine has SSE2; without, a store of a line that
  // is not cached reads it first, which is not counted.
  void run(bool streaming);
  // Bytes a second of the fastest of several passes.
  double bandwidth(bool streaming);

 private:
  struct Free {
    void operator()(float* p) const;
  };

  const int64_t lines_;
  const int threads_;
  const std::unique_ptr<float, Free> memory_;
};

}  // namespace vgkern
