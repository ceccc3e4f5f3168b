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
  int64_t before;  // elements of all chunks before this one
};

struct Chunks {
  std::vector<Chunk> list;
  int64_t elements = 0;

  void add(int64_t array, int64_t first, int64_t count) {
    list.push_back({array, first, count, elements});
    elements += count;
  }
};

Chunks chunks_of(const std::vector<Array>& arrays) {
  Chunks chunks;
  chunks.list.reserve(arrays.size());
  for (size_t i = 0; i < arrays.size(); ++i) {
    for (int64_t first = 0; first < arrays[i].count; first += kChunkElements) {
      chunks.add(static_cast<int64_t>(i), first, std::min(kChunkElements, arrays[i].count - first));
    }
  }
  return chunks;
}

char* address(const Array& array, int64_t element) {
  const int64_t item = array.dtype == kFloat64 ? 8 : array.dtype == kFloat32 ? 4 : 2;
  return static_cast<char*>(array.data) + element * item;
}

// Calls f(i) for all chunks, on each thread in order and for about as many elements.
template <class F>
void for_each_chunk(const Chunks& chunks, int threads, F f) {
  const auto begin = [&](int64_t thread) {
    const auto is_earlier = [](const Chunk& chunk, int64_t element) { return chunk.before < element; };
    const auto& list = chunks.list;
    return std::lower_bound(list.begin(), list.end(), chunks.elements * thread / threads, is_earlier) - list.begin();
  };
  parallel_ranges(threads, threads, chunks.elements / threads, [&](int64_t first, int64_t last) {
    for (int64_t i = begin(first), end = begin(last); i < end; ++i) f(i);
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

// norms may be null.
Norms norms_of(const KernelTable& table, const std::vector<Array>& arrays, const Chunks& chunks, double p,
               double max_norm, int threads, double* norms) {
  const NormKind kind = kind_of(p);
  std::vector<NormPart> parts(chunks.list.size());
  for_each_chunk(chunks, threads, [&](int64_t i) {
    const Chunk& chunk = chunks.list[i];
    const Array& array = arrays[chunk.array];
    const int64_t following = array.count - chunk.first - chunk.count;
    parts[i] = table.norm[array.dtype](address(array, chunk.first), chunk.count, following, kind, p);
  });
  std::vector<NormPart> of_arrays(arrays.size());
  const NormPart* part = parts.data();
  for (size_t i = 0; i < arrays.size(); ++i) {
    const NormPart* end = part + (arrays[i].count + kChunkElements - 1) / kChunkElements;
    of_arrays[i] = merge(part, end, kind, p);
    if (norms != nullptr) norms[i] = norm_of(of_arrays[i], kind, p);
    part = end;
  }
  const double total = norm_of(merge(of_arrays.data(), of_arrays.data() + of_arrays.size(), kind, p), kind, p);
  const double factor = max_norm / (total + 1e-6);
  return {total, factor > 1 ? 1 : factor};
}

// In the order of norms_of, and not back from its end: what the caches still hold saves less than memory that is
// walked against its order costs.
void scale_chunks(const KernelTable& table, const std::vector<Array>& arrays, const Chunks& chunks, double factor,
                  int threads) {
  for_each_chunk(chunks, threads, [&](int64_t i) {
    const Chunk& chunk = chunks.list[i];
    const Array& array = arrays[chunk.array];
    const int64_t following = array.count - chunk.first - chunk.count;
    table.scale[array.dtype](address(array, chunk.first), chunk.count, following, factor);
  });
}

}  // namespace

Norms gradient_norms(const KernelTable& table, const std::vector<Array>& arrays, double p, double max_norm, int threads,
                     double* norms) {
  return norms_of(table, arrays, chunks_of(arrays), p, max_norm, threads, norms);
}

void scale_arrays(const KernelTable& table, const std::vector<Array>& arrays, double factor, int threads) {
  scale_chunks(table, arrays, chunks_of(arrays), factor, threads);
}

Norms clip_arrays(const KernelTable& table, const std::vector<Array>& arrays, double p, double max_norm,
                  bool only_if_finite, int threads) {
  const Chunks chunks = chunks_of(arrays);
  Norms all = norms_of(table, arrays, chunks, p, max_norm, threads, nullptr);
  if (only_if_finite && !std::isfinite(all.total)) all.factor = 1;
  if (all.factor != 1) scale_chunks(table, arrays, chunks, all.factor, threads);
  return all;
}

void sample_norms(const KernelTable& table, const std::vector<Array>& arrays, double* norms) {
  for (size_t i = 0; i < arrays.size(); ++i) {
    const Array& array = arrays[i];
    const NormPart part = table.norm[array.dtype](array.data, std::min(array.count, kSampled), 0, kSquares, 2);
    norms[i] = norm_of(part, kSquares, 2);
  }
}

std::vector<bool> clip_units(const KernelTable& table, const std::vector<Array>& weights,
                             const std::vector<Array>& gradients, double clip_factor, double eps, double p,
                             int threads) {
  const NormKind kind = kind_of(p);
  // Chunks of whole units: as many as fit, so that a gradient is still in the cache when it is scaled.
  Chunks chunks;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const int64_t units = gradients[i].count == 0 ? 0 : gradients[i].units;
    const int64_t unit = units == 0 ? 0 : gradients[i].count / units;
    const int64_t step = units == 0 ? 1 : std::max<int64_t>(1, kChunkElements / unit);
    for (int64_t first = 0; first < units; first += step) {
      chunks.add(static_cast<int64_t>(i), first * unit, std::min(step, units - first) * unit);
    }
  }
  std::vector<char> written(chunks.list.size(), false);
  for_each_chunk(chunks, threads, [&](int64_t i) {
    const Chunk& chunk = chunks.list[i];
    const Array &weight = weights[chunk.array], &gradient = gradients[chunk.array];
    const int64_t unit = gradient.count / gradient.units, last = chunk.first + chunk.count;
    const auto norm = [&](const Array& array, int64_t at) {
      const int64_t following = array.count - at - unit;
      return norm_of(table.norm[array.dtype](address(array, at), unit, following, kind, p), kind, p);
    };
    // All of the weights first: one stretch of memory, and then another.
    std::vector<double> limits(chunk.count / unit);
    double* limit = limits.data();
    for (int64_t at = chunk.first; at < last; at += unit) {
      *limit++ = clip_factor * std::max(norm(weight, at), eps);  // max keeps NaN
    }
    limit = limits.data();
    for (int64_t at = chunk.first; at < last; at += unit, ++limit) {
      const double found = norm(gradient, at);
      if (found <= *limit) continue;
      table.scale[gradient.dtype](address(gradient, at), unit, 0, *limit / found);
      written[i] = true;
    }
  });
  std::vector<bool> result(gradients.size(), false);
  for (size_t i = 0; i < written.size(); ++i) {
    if (written[i]) result[chunks.list[i].array] = true;
  }
  return result;
}

}  // namespace vgkern
