#include "memory_pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <mutex>
#include <vector>

namespace vgkern {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// Where in its first page a block's data begins: addresses that agree modulo 4096 share a set of the L1 cache, and a
// load waits for an earlier store to such a one. Other allocators begin large tensors at the beginning of a page, or a
// line behind it, and rows of channels_last may be whole pages. So blocks keep away from there, and by turns from each
// other. (32, 2048, 7, 7) in bfloat16, inputs at the beginnings of pages: backward 1.5 times as fast (AMD EPYC, Zen 4).
constexpr size_t kOffsets[] = {3072, 1536, 2560, 1024, 3584, 2048, 512};

size_t page_size() {
  static const size_t page = sysconf(_SC_PAGESIZE);
  return page;
}

// What a block occupies: from a huge page's beginning to the end of the page in which its data ends.
struct Mapping {
  char* begin;
  size_t bytes;
};

Mapping mapping_of(MemoryBlock block) {
  char* data = static_cast<char*>(block.data);
  return {data - reinterpret_cast<uintptr_t>(data) % kHugePage, block.bytes + page_size()};
}

void unmap(MemoryBlock block) {
  const Mapping mapping = mapping_of(block);
  munmap(mapping.begin, mapping.bytes);
}

void advise([[maybe_unused]] Mapping mapping, [[maybe_unused]] int advice) {
#if defined(__linux__)
  madvise(mapping.begin, mapping.bytes, advice);  // where the kernel has no such advice, nothing but time is lost
#endif
}

// The `count`th block. Its data is null where the system refuses.
MemoryBlock map(size_t bytes, uint64_t count) {
  const size_t occupied = bytes + page_size();
  void* mapped = mmap(nullptr, occupied + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (mapped == MAP_FAILED) return {};
  char* begin = static_cast<char*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  begin += before;
  munmap(begin + occupied, kHugePage - before);
#if defined(MADV_HUGEPAGE)
  advise({begin, occupied}, MADV_HUGEPAGE);
#endif
  return {begin + kOffsets[count % std::size(kOffsets)], bytes};
}

struct Pool {
  std::mutex mutex;
  std::vector<MemoryBlock> idle;  // the one that has been idle for longest comes first
  MemoryStatistics statistics{};

  void shrink_idle_to(size_t bytes) {
    auto block = idle.begin();
    for (; statistics.idle > bytes; ++block) {
      statistics.idle -= block->bytes;
      unmap(*block);
    }
    idle.erase(idle.begin(), block);
  }
};

Pool& pool();

// Around a fork nobody else is in the pool, so that the child finds it whole. Idle blocks stay out of the child:
// shared, they would be copied page by page when the parent writes into them next, and would no longer be huge pages.
void before_fork() {
  pool().mutex.lock();
#if defined(MADV_DONTFORK)
  for (MemoryBlock block : pool().idle) advise(mapping_of(block), MADV_DONTFORK);
#endif
}

void after_fork_in_parent() {
#if defined(MADV_DOFORK)
  for (MemoryBlock block : pool().idle) advise(mapping_of(block), MADV_DOFORK);
#endif
  pool().mutex.unlock();
}

void after_fork_in_child() {
#if defined(MADV_DONTFORK)
  pool().idle.clear();
  pool().statistics.idle = 0;
#endif
  pool().mutex.unlock();
}

// Never destroyed: a tensor may die after the static objects of this library.
Pool& pool() {
  static Pool& instance = *[] {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    return new Pool;
  }();
  return instance;
}

}  // namespace

MemoryBlock acquire_memory(size_t bytes) {
  const size_t wanted = (bytes + page_size() - 1) / page_size() * page_size();
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  if (p.statistics.limit == 0) return {};
  auto best = p.idle.end();
  for (auto block = p.idle.begin(); block != p.idle.end(); ++block) {
    const bool fits = block->bytes >= wanted && block->bytes - wanted <= wanted / 4;
    // Of two equal ones the later, which is likelier to be in cache.
    if (fits && (best == p.idle.end() || block->bytes <= best->bytes)) best = block;
  }
  MemoryBlock block{};
  if (best != p.idle.end()) {
    block = *best;
    p.idle.erase(best);
    p.statistics.idle -= block.bytes;
    ++p.statistics.hits;
  } else {
    block = map(wanted, p.statistics.misses);
    if (block.data == nullptr) {
      p.shrink_idle_to(0);
      block = map(wanted, p.statistics.misses);
    }
    if (block.data == nullptr) return {};
    ++p.statistics.misses;
  }
  p.statistics.in_use += block.bytes;
  p.statistics.peak = std::max(p.statistics.peak, p.statistics.in_use);
  return block;
}

void release_memory(MemoryBlock block) noexcept {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  p.statistics.in_use -= block.bytes;
  if (block.bytes > p.statistics.limit) {  // nothing idle has to go for it
    unmap(block);
    return;
  }
  p.idle.push_back(block);
  p.statistics.idle += block.bytes;
  p.shrink_idle_to(p.statistics.limit);
}

void set_memory_limit(size_t bytes) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  p.statistics.limit = bytes;
  p.shrink_idle_to(bytes);
}

void return_idle_memory() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  p.shrink_idle_to(0);
}

MemoryStatistics memory_statistics() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  return p.statistics;
}

}  // namespace vgkern
