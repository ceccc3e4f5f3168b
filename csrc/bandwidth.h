// What the memory of this machine gives: the roof under which the kernels are judged by `python -m benchmarks`.
#pragma once

#include <cstdint>

namespace vgkern {

// Bytes a second of a = b + k·c over three float arrays that together are `bytes` long, so `bytes` is also what one
// pass moves: two reads and a write, as a forward pass with a residual. Best of several passes over memory that is
// paged in (in huge pages where Linux gives them), on up to `threads` threads. With `streaming` the stores go past the
// caches, where the machine has SSE2; without, a store of a line that is not cached reads it first, which is not
// counted.
//
// Throws std::invalid_argument for fewer bytes than three cache lines or no thread, std::bad_alloc for too many bytes.
double measure_bandwidth(int64_t bytes, int threads, bool streaming);

}  // namespace vgkern
