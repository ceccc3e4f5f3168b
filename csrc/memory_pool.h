// Memory for outputs and gradients that is not paged in anew at each step: blocks that outlive the tensors in them.
//
// All functions may be called from any thread. A child of fork keeps its copy of the blocks that are in use; idle ones
// it does not inherit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vgkern {

struct MemoryBlock {
  void* data;    // aligned to 512, in the first page of a huge one (2 MiB) but not at its beginning; contents undefined
  size_t bytes;  // whole pages, of which one more is occupied
};

struct MemoryStatistics {
  size_t in_use, idle;    // bytes of blocks that are handed out, and of those that wait for reuse
  size_t peak;            // most bytes that were in use at once
  size_t limit;           // of idle
  uint64_t hits, misses;  // blocks that were reused, and that were mapped
};

// A block of at least `bytes`, which must not be 0: an idle one that is at most a quarter larger than need be, or a new
// one. Its data is null where the limit is 0 or the system has no memory left.
MemoryBlock acquire_memory(size_t bytes);

// The block becomes idle. Those that have been idle for longest go back to the system where the limit is exceeded.
void release_memory(MemoryBlock block) noexcept;

void set_memory_limit(size_t bytes);
void return_idle_memory();
MemoryStatistics memory_statistics();

}  // namespace vgkern
