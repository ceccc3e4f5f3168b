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

// Calls f(begin, end) for ranges of chunks that make up all of them.
template <class F>
void ranges_of(const std::vector<Chunk>& chunks, int threads, F f) {
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.count;
  const int64_t count = static_cast<int64_t>(chunks.size());
  parallel_ranges(threads, count, count == 0 ? 0 : std::max<int64_t>(1, elements / count), f);
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

Norms gradient_norms(const KernelTable& table, const std::vector<Array>& arrays, double p, double max_norm, int threads,
                     double* norms) {
  const NormKind kind = kind_of(p);
  const std::vector<Chunk> chunks = chunks_of(arrays);
  std::vector<NormPart> parts(chunks.size());
  ranges_of(chunks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Array& array = arrays[chunks[i].array];
      parts[i] = table.norm[array.dtype](address(array, chunks[i].first), chunks[i].count, kind, p);
    }
  });
  std::vector<NormPart> of_arrays(arrays.size());
  const NormPart* part = parts.data();
  for (size_t i = 0; i < arrays.size(); ++i) {
    const NormPart* end = part + (arrays[i].count + kChunkElements - 1) / kChunkElements;
    of_arrays[i] = merge(part, end, kind, p);
    norms[i] = norm_of(of_arrays[i], kind, p);
    part = end;
  }
  const double total = norm_of(merge(of_arrays.data(), of_arrays.data() + of_arrays.size(), kind, p), kind, p);
  const double factor = max_norm / (total + 1e-6);
  return {total, factor > 1 ? 1 : factor};
}

void sample_norms(const KernelTable& table, const std::vector<Array>& arrays, double* norms) {
  for (size_t i = 0; i < arrays.size(); ++i) {
    const Array& array = arrays[i];
    norms[i] = norm_of(table.norm[array.dtype](array.data, std::min(array.count, kSampled), kSquares, 2), kSquares, 2);
  }
}

void scale_arrays(const KernelTable& table, const std::vector<Array>& arrays, double factor, int threads) {
  const std::vector<Chunk> chunks = chunks_of(arrays);
  ranges_of(chunks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) {
      const Array& array = arrays[chunks[i].array];
      table.scale[array.dtype](address(array, chunks[i].first), chunks[i].count, factor);
    }
  });
}

std::vector<bool> clip_units(const KernelTable& table, const std::vector<Array>& weights,
                             const std::vector<Array>& gradients, double clip_factor, double eps, double p,
                             int threads) {
  const NormKind kind = kind_of(p);
  // Chunks of whole units: as many as fit, so that a gradient is still in the cache when it is scaled.
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const int64_t units = gradients[i].count == 0 ? 0 : gradients[i].units;
    const int64_t unit = units == 0 ? 0 : gradients[i].count / units;
    const int64_t step = units == 0 ? 1 : std::max<int64_t>(1, kChunkElements / unit);
    for (int64_t first = 0; first < units; first += step) {
      chunks.push_back({static_cast<int64_t>(i), first * unit, std::min(step, units - first) * unit});
    }
  }
  std::vector<char> written(chunks.size(), false);
  ranges_of(chunks, threads, [&](int64_t begin, int64_t end) {
    std::vector<double> limits;
    for (int64_t i = begin; i < end; ++i) {
      const Array &weight = weights[chunks[i].array], &gradient = gradients[chunks[i].array];
      const int64_t unit = gradient.count / gradient.units, first = chunks[i].first, last = first + chunks[i].count;
      const auto norm = [&](const Array& array, int64_t at) {
        return norm_of(table.norm[array.dtype](address(array, at), unit, kind, p), kind, p);
      };
      // All of the weights first: one stretch of memory, and then another.
      limits.clear();
      for (int64_t at = first; at < last; at += unit) {
        limits.push_back(clip_factor * std::max(norm(weight, at), eps));  // max keeps NaN
      }
      const double* limit = limits.data();
      for (int64_t at = first; at < last; at += unit, ++limit) {
        const double found = norm(gradient, at);
        if (found <= *limit) continue;
        table.scale[gradient.dtype](address(gradient, at), unit, *limit / found);
        written[i] = true;
      }
    }
  });
  std::vector<bool> result(gradients.size(), false);
  for (size_t i = 0; i < chunks.size(); ++i) {
    if (written[i]) result[chunks[i].array] = true;
  }
  return result;
}

}  // namespace vgkern
