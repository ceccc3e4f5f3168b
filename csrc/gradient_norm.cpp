#include "gradient_norm.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace vgkern {
namespace {

// Elements of a chunk, the unit of work of a thread and of summation: 64 KB of float32, which stay in the L2 cache for
// the second pass that some norms need.
constexpr int64_t kChunkElements = 16384;

struct Chunk {
  int64_t array, first, count;
};

std::vector<Chunk> chunks_of(const std::vector<Array>& arrays) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < arrays.size(); ++i) {
    for (int64_t first = 0; first < arrays[i].count; first += kChunkElements) {
      chunks.push_back({static_cast<int64_t>(i), first, std::min(kChunkElements, arrays[i].count - first)});
    }
  }
  return chunks;
}

char* address(const Array& array, int64_t element) {
  const int64_t item = array.dtype == kFloat64 ? 8 : array.dtype == kFloat32 ? 4 : 2;
  return static_cast<char*>(array.data) + element * item;
}

// Calls f(chunk number) for all chunks.
template <class F>
void for_each_chunk(const std::vector<Chunk>& chunks, int threads, F f) {
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.count;
  const int64_t count = static_cast<int64_t>(chunks.size());
  parallel_ranges(threads, count, count == 0 ? 0 : std::max<int64_t>(1, elements / count),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) f(i);
                  });
}

NormKind kind_of(double p) { return p == 1 ? kMagnitudes : p == 2 ? kSquares : std::isinf(p) ? kLargest : kPowers; }

// The parts [begin, end) as one, in their order.
NormPart merge(const NormPart* begin, const NormPart* end, NormKind kind, double p) {
  NormPart whole{0, 0};
  if (kind == kLargest) {
    whole.scale = 1;
    for (const NormPart* part = begin; part != end; ++part) {
      whole.sum = part->sum > whole.sum || std::isnan(part->sum) ? part->sum : whole.sum;
    }
    return whole;
  }
  for (const NormPart* part = begin; part != end; ++part) whole.scale = std::max(whole.scale, part->scale);
  for (const NormPart* part = begin; part != end; ++part) {
    if (part->scale == whole.scale) {
      whole.sum += part->sum;
    } else if (part->scale > 0) {
      whole.sum += part->sum * std::pow(part->scale / whole.scale, p);
    }
  }
  return whole;
}

double norm_of(const NormPart& part, NormKind kind, double p) {
  switch (kind) {
    case kLargest:
    case kMagnitudes:
      return part.scale * part.sum;
    case kSquares:
      return part.scale * std::sqrt(part.sum);
    default:
      return part.scale * std::pow(part.sum, 1 / p);
  }
}

}  // namespace

void gradient_norms(const KernelTable& table, const std::vector<Array>& arrays, double p, int threads, double* norms,
                    double* total) {
  const NormKind kind = kind_of(p);
  const std::vector<Chunk> chunks = chunks_of(arrays);
  std::vector<NormPart> parts(chunks.size());
  for_each_chunk(chunks, threads, [&](int64_t i) {
    const Array& array = arrays[chunks[i].array];
    parts[i] = table.norm[array.dtype](address(array, chunks[i].first), chunks[i].count, kind, p);
  });
  std::vector<NormPart> of_arrays(arrays.size());
  const NormPart* part = parts.data();
  for (size_t i = 0; i < arrays.size(); ++i) {
    const NormPart* end = part + (arrays[i].count + kChunkElements - 1) / kChunkElements;
    of_arrays[i] = merge(part, end, kind, p);
    norms[i] = norm_of(of_arrays[i], kind, p);
    part = end;
  }
  *total = norm_of(merge(of_arrays.data(), of_arrays.data() + of_arrays.size(), kind, p), kind, p);
}

void scale_arrays(const KernelTable& table, const std::vector<Array>& arrays, double factor, int threads) {
  const std::vector<Chunk> chunks = chunks_of(arrays);
  for_each_chunk(chunks, threads, [&](int64_t i) {
    const Array& array = arrays[chunks[i].array];
    table.scale[array.dtype](address(array, chunks[i].first), chunks[i].count, factor);
  });
}

}  // namespace vgkern
