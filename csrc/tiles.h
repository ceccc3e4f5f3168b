// The inner kernels: one function for each pass, type in memory T and activation F, whatever the layout
// (kernel_table.h). An instruction set's file includes this and returns make_table's result.
//
// A vector's tail runs the body's code with the missing lanes filled in: dy with 0 and x with the pivot, so that they
// add nothing to any sum.
#pragma once

#include "activations.h"
#include "channels.h"
#include "kernel_table.h"
#include "math_probe.h"
#include "norm_kernels.h"
#include "vec.h"

namespace vgkern {
namespace {

// ---- The walk ------------------------------------------------------------------------------------------------------

// Terms of a sum in R before float64 takes over: few, so that rounding stays at that of one addition; more where they
// have fewer digits than R.
template <class T>
constexpr int64_t kSummedTerms = sizeof(T) == 2 ? 32 : 8;
// Of a pass that sums nothing in R.
constexpr int64_t kNoTerms = int64_t{1} << 32;

// How a pass walks: how many vectors it works on at a time, so that it asks once for all of them what is there and what
// is wanted, and how many columns at a time, whose chains of operations then overlap. One each where a vector is
// several registers: it would be code without end.
template <int VECTORS, int COLUMNS>
struct Width {
  static constexpr int vectors = VECTORS, columns = COLUMNS;
};
template <class T>
using WidthOf = std::conditional_t<kParts != 1 || sizeof(T) == 8, Width<1, 1>, Width<4, 2>>;

// Where the bits of a row's block lie in a mask: of stretches side by side (planes, or rows taken together), each of
// which starts a byte, so that there are gaps between their bits.
struct GappedBits {
  int64_t byte;     // of the row: where the eight bytes begin that have them
  uint64_t select;  // them there; 0 where there are no gaps

  VGKERN_INLINE uint32_t load(const uint8_t* row) const {
    uint64_t word;
    std::memcpy(&word, row + byte, sizeof word);
    return static_cast<uint32_t>(compress_bits(word, select));
  }

  // Clears what lies behind them in the eight bytes: the columns there come later.
  VGKERN_INLINE void store(uint8_t* row, uint32_t bits) const {
    const uint64_t before = (select & -select) - 1;
    // But at a row's end it is one byte at most. A load of all would wait for the store that it is to find some in.
    uint64_t word = row[byte];
    if (before > 0xff) std::memcpy(&word, row + byte, sizeof word);
    word = (word & before) | expand_bits(bits, select);
    std::memcpy(row + byte, &word, sizeof word);
  }
};

// Whether those of so many elements always lie in eight bytes, where they begin at a multiple of as many.
VGKERN_INLINE bool fit_word(int64_t elements, int64_t stretch) {
  const int64_t gap = -stretch & 7;
  if (elements % stretch == 0) return elements + (elements / stretch - 1) * gap <= 64;
  return 7 + elements + (elements + stretch - 2) / stretch * gap <= 64;
}

// Of elements [begin, end) of a run.
VGKERN_INLINE GappedBits gapped_bits(const Tile& tile, int64_t begin, int64_t end) {
  const auto stretch = static_cast<unsigned>(tile.bits_stretch), width = static_cast<unsigned>(tile.width);
  const unsigned bytes = (stretch + 7) / 8, last_byte = width / stretch * bytes - 8;
  auto element = static_cast<unsigned>(begin), number = element / stretch, before = element % stretch;
  const unsigned first_byte = number * bytes + before / 8, byte = first_byte < last_byte ? first_byte : last_byte;
  uint64_t select = 0;
  for (; element < end; ++number, before = 0) {
    const unsigned left = static_cast<unsigned>(end) - element,
                   count = stretch - before < left ? stretch - before : left;
    select |= ((uint64_t{1} << count) - 1) << (8 * (number * bytes - byte) + before);
    element += count;
  }
  return {byte, select};
}

// Where a block lies: with one column, vectors side by side; with two, rows of two side by side.
template <class R, int COLUMNS>
struct Block {
  int64_t element, row;
  int64_t mask_byte, mask_row;
  int64_t dz, dz_row;
  int64_t ahead, ahead_row;  // an element that the walk comes to later, to be asked for now, and one a row further
  int lanes;                 // of the last vector; the others have all
  GappedBits gapped;         // those of the columns, where mask_byte is that of the row

  VGKERN_INLINE static int64_t offset(int j, int64_t row, int64_t step) {
    return COLUMNS == 1 ? j * step : (j / 2) * row + (j % 2) * step;
  }
  VGKERN_INLINE int64_t element_of(int j) const { return element + offset(j, row, kLanes<R>); }
  VGKERN_INLINE int64_t mask_byte_of(int j) const { return mask_byte + offset(j, mask_row, kLanes<R> / 8); }
  VGKERN_INLINE int64_t dz_of(int j) const { return dz + offset(j, dz_row, kLanes<R>); }
  VGKERN_INLINE int64_t ahead_of(int j) const { return ahead + offset(j, ahead_row, kLanes<R>); }
  VGKERN_INLINE bool has_gaps() const { return gapped.select != 0; }
  VGKERN_INLINE bool whole() const { return __builtin_expect(lanes == kLanes<R>, 1); }
  // A bit for each lane of the last vector that is not filled in.
  VGKERN_INLINE unsigned bits() const { return (1u << lanes) - 1; }

  VGKERN_INLINE void advance(int vectors) {
    element += offset(vectors, row, kLanes<R>);
    mask_byte += offset(vectors, mask_row, kLanes<R> / 8);
    dz += offset(vectors, dz_row, kLanes<R>);
    if (COLUMNS == 2) ahead += offset(vectors, ahead_row, kLanes<R>);
  }
};

// How many bytes ahead of itself a walk asks for: far enough for memory to answer, near enough for the cache to keep
// them; further where it reads one tensor alone, and comes there sooner.
constexpr int64_t kNear = 8192, kFar = 16384;
// The same along each of the rows that planes make side by side, which lie in as many pages.
constexpr int64_t kAlong = 1024;
// Rows of a band of planes: what a pass reads and writes for each column is then little beside them.
constexpr int64_t kPlaneRows = 32;
// What a band of rows takes of each tensor: more where it is one tensor alone.
constexpr int64_t kNarrow = 8192, kBroad = 16384;
// Rows of a band, at least: with fewer, the numbers of a column take longer to read than its elements, of which a line
// has two vectors' in half precision; with more, the rows of several tensors leave the caches before their turn, in the
// backward sooner.
template <class T>
constexpr int64_t kRowsToWrite = sizeof(T) == 2 ? 16 : 4;
template <class T>
constexpr int64_t kRowsToWriteBack = sizeof(T) == 2 ? 8 : 4;
constexpr int64_t kRowsToAddUp = 32;  // what is added up for a stretch is worth a few rows more

// An element that a walk over planes comes to some way on: further along the planes of a run, which lie side by side,
// in a run after it, or in the tile that follows.
class Lookout {
 public:
  VGKERN_INLINE Lookout(const Tile& tile, int64_t ahead)
      : run_(tile.channels * tile.width),
        jump_(tile.stride - run_),
        last_jump_(tile.following - tile.offset - (tile.runs - 1) * tile.stride - run_),
        element_(tile.offset),
        left_(run_),
        runs_(tile.runs) {
    advance(ahead);
  }
  VGKERN_INLINE int64_t element() const { return element_; }
  VGKERN_INLINE void advance(int64_t elements) {
    element_ += elements;
    for (left_ -= elements; left_ <= 0; left_ += run_) element_ += --runs_ == 0 ? last_jump_ : jump_;
  }

 private:
  const int64_t run_, jump_, last_jump_;
  int64_t element_, left_, runs_;
};

// Takes a pass over a tile. For every stretch of a plane, and, across, for every pair of columns, it makes a
// Pass::Stretch<COLUMNS>(pass, channel), calls run<VECTORS>(block) for its blocks, end_strip() as often as the
// pass's kTerms say, and finish() in the end.
//
// The hardware's prefetching ends with a page or a plane, and does not follow a walk down columns. So every vector asks
// for one that comes later: over planes, for that of the Lookout; across, for one of the next band, and these in the
// order in which they lie in memory, or, of planes side by side, for one further along its own run; and at the end of a
// tile for the beginning of the one that follows.
template <class Pass>
VGKERN_INLINE void walk(Pass& pass) {
  using T = typename Pass::Element;
  using R = Opmath<T>;
  constexpr int kStep = kLanes<R>, kWidth = Pass::Width::vectors;
  const Tile& tile = pass.tile;
  constexpr int64_t kColumnStrip =
      Pass::kTerms * (kWidth > 1 ? 2 : 1);  // a StretchSum adds one column up in two halves
  const int64_t whole = tile.width / kStep, vectors = (tile.width + kStep - 1) / kStep;
  const int rest = static_cast<int>(tile.width - whole * kStep);

  if (!tile.across) {
    Lookout lookout(tile, Pass::kAhead / static_cast<int64_t>(sizeof(T)));
    for (int64_t run = 0; run < tile.runs; ++run) {
      pass.start_run(tile.offset + run * tile.stride);
      for (int64_t channel = 0; channel < tile.channels; ++channel) {
        typename Pass::template Stretch<1> stretch(pass, channel);
        Block<R, 1> at{};
        at.element = tile.offset + run * tile.stride + channel * tile.channel_stride;
        at.mask_byte = tile.mask_offset + run * tile.mask_stride + channel * tile.mask_channel_stride;
        at.dz = (run * tile.channels + channel) * vectors * kStep;
        const auto take = [&](auto count, int lanes) VGKERN_LAMBDA {
          at.lanes = lanes;
          at.ahead = lookout.element();
          lookout.advance((count - 1) * kStep + lanes);
          stretch.template run<count>(at);
          at.advance(count);
        };
        constexpr std::integral_constant<int, kWidth> kBlock;
        constexpr std::integral_constant<int, 1> kSingle;
        for (int64_t v = 0; v < vectors;) {
          const int64_t end = v + kColumnStrip < vectors ? v + kColumnStrip : vectors;
          if constexpr (kWidth > 1) {
            for (const int64_t full = end < whole ? end : whole; v + kWidth <= full; v += kWidth) take(kBlock, kStep);
            if (v + kWidth <= end) {
              take(kBlock, rest);
              v += kWidth;
            }
          }
          for (; v < end; ++v) take(kSingle, v < whole ? kStep : rest);
          stretch.end_strip();
        }
        stretch.finish();
      }
      pass.finish_run(tile.offset + run * tile.stride);
    }
    return;
  }

  // Band by band: rows that stay in the L1 cache while all columns are walked down, one after the other, but not fewer
  // than the pass asks for. Where there is but one column, all rows.
  const int64_t rows_in_band = Pass::kBandBytes / (vectors * kStep * static_cast<int64_t>(sizeof(T)));
  const int64_t whole_bands = rows_in_band / Pass::kBandRows * Pass::kBandRows;
  const int64_t band = tile.planes       ? kPlaneRows
                       : vectors <= 2    ? tile.runs
                       : whole_bands > 0 ? whole_bands
                                         : Pass::kBandRows;
  const bool gaps = tile.bits_stretch % 8 != 0;
  const bool of_one_vector = tile.stride == kStep && tile.width == kStep && !gaps;  // rows that lie side by side
  int64_t next_row = band, next_column = 0;
  for (int64_t first_row = 0; first_row < tile.runs; first_row += band) {
    const int64_t end_row = first_row + band < tile.runs ? first_row + band : tile.runs;
    int64_t v = 0;
    const auto start = [&](auto& at, int columns) VGKERN_LAMBDA {
      at.element = tile.offset + first_row * tile.stride + v * kStep;
      at.row = tile.stride;
      at.mask_byte = tile.mask_offset + first_row * tile.mask_stride;
      at.mask_row = tile.mask_stride;
      at.dz = (first_row * vectors + v) * kStep;
      at.dz_row = vectors * kStep;
      at.lanes = kStep;
      if (!gaps) {
        at.mask_byte += v * (kStep / 8);
      } else {
        const int64_t first = v * kStep, end = first + columns * kStep;
        at.gapped = gapped_bits(tile, first, end < tile.width ? end : tile.width);
      }
    };
    const auto next = [&](int columns) VGKERN_LAMBDA {
      const int64_t beyond = next_row - tile.runs;
      const int64_t row = beyond < 0 ? tile.offset + next_row * tile.stride : tile.following + beyond * tile.stride;
      const int64_t ahead = row + next_column * kStep;
      for (next_column += columns * band; next_column >= vectors; next_column -= vectors) ++next_row;
      return ahead;
    };
    const auto look_ahead = [&](auto& at, int columns) VGKERN_LAMBDA {
      if (!tile.planes) {
        at.ahead = next(columns);
        at.ahead_row = columns * kStep;
        return;
      }
      const int64_t column = v + kAlong / (kStep * static_cast<int64_t>(sizeof(T)));
      const int64_t next_band = end_row < tile.runs ? tile.offset + end_row * tile.stride : tile.following;
      at.ahead = column < vectors ? tile.offset + first_row * tile.stride + column * kStep
                                  : next_band + (column - vectors) * kStep;
      at.ahead_row = tile.stride;
    };
    if constexpr (Pass::Width::columns == 2) {
      const bool pairs = !gaps || fit_word(2 * kStep, tile.bits_stretch);
      for (const int64_t paired = pairs ? whole : 0; v + 2 <= paired; v += 2) {
        typename Pass::template Stretch<2> stretch(pass, v * kStep);
        Block<R, 2> at{};
        start(at, 2);
        look_ahead(at, 2);
        for (int64_t row = first_row; row < end_row;) {
          const int64_t end = row + Pass::kTerms < end_row ? row + Pass::kTerms : end_row;
          for (; row + kWidth / 2 <= end; row += kWidth / 2) {
            stretch.template run<kWidth>(at);
            at.advance(kWidth);
          }
          for (; row < end; ++row) {
            stretch.template run<2>(at);
            at.advance(2);
          }
          stretch.end_strip();
        }
        stretch.finish();
      }
    }
    for (; v < vectors; ++v) {
      typename Pass::template Stretch<1> stretch(pass, v * kStep);
      Block<R, 1> at{};
      start(at, 1);
      look_ahead(at, 1);
      for (int64_t row = first_row; row < end_row;) {
        const int64_t end = row + kColumnStrip < end_row ? row + kColumnStrip : end_row;
        if (kWidth > 1 && of_one_vector) {
          at.lanes = kStep;
          at.ahead = at.element + kNear / static_cast<int64_t>(sizeof(T));
          for (; row + kWidth <= end; row += kWidth) {
            stretch.template run<kWidth>(at);
            at.advance(kWidth);
            at.ahead += kWidth * kStep;
          }
        }
        at.lanes = v < whole ? kStep : rest;
        for (; row < end; ++row) {
          stretch.template run<1>(at);
          at.element += at.row;
          at.mask_byte += at.mask_row;
          at.dz += at.dz_row;
          at.ahead += at.ahead_row;
        }
        stretch.end_strip();
      }
      stretch.finish();
    }
  }
}

// ---- What stretches are made of ------------------------------------------------------------------------------------

// Asks for a line that is read later. Into the L2 cache: of requests for the L1 cache few are under way at a time, and
// what has to come from memory would hold up the loads of now. (Zen 4, float32 planes from memory: the passes take 0.8
// to 0.9 of the time that they take with requests for the L1 cache.)
VGKERN_INLINE void ask_for(const void* line) { __builtin_prefetch(line, 0, 2); }

// PAIRS: vectors side by side at once, where there is a way: faster, but for many sums over stretches that begin
// anywhere, as those do that end within a vector. ASKS: whether for those to come, too.
template <bool PAIRS, bool ASKS = true, int VECTORS, class T, class R, int COLUMNS>
VGKERN_INLINE void load_block(Vec<R> (&v)[VECTORS], const T* base, const Block<R, COLUMNS>& at, R fill) {
  constexpr int kLast = VECTORS - 1;
  unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
    if constexpr (ASKS && j * kLanes<R> * sizeof(T) % 64 == 0) ask_for(base + at.ahead_of(j));
  });
  const bool whole = COLUMNS == 2 || at.whole();
  if constexpr (PAIRS && VECTORS > 1) {
    if (whole) {
      unroll<VECTORS / 2>([&](auto j)
                              VGKERN_LAMBDA { load_pair(base + at.element_of(2 * j), v[2 * j], v[2 * j + 1]); });
      return;
    }
  }
  unroll<kLast>([&](auto j) VGKERN_LAMBDA { v[j] = load(base + at.element_of(j)); });
  const T* p = base + at.element_of(kLast);
  v[kLast] = whole ? load(p) : load(p, at.lanes, fill);
}

// Asks for the lines of an output that the walk comes to later: a store to a line that is not there holds up those that
// follow it.
template <int VECTORS, class T, class R, int COLUMNS>
VGKERN_INLINE void claim_block(T* base, const Block<R, COLUMNS>& at, Outputs outputs) {
  if (outputs != Outputs::cached) return;
  unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
    if constexpr (j * kLanes<R> * sizeof(T) % 64 == 0) __builtin_prefetch(base + at.ahead_of(j), 1);
  });
}

// `EXACT`: v holds numbers of T.
template <bool EXACT = false, int VECTORS, class T, class R, int COLUMNS>
VGKERN_INLINE void store_block(const Vec<R> (&v)[VECTORS], T* base, const Block<R, COLUMNS>& at, Outputs outputs) {
  constexpr int kLast = VECTORS - 1;
  if (COLUMNS == 1 && !at.whole()) {
    unroll<kLast / 2>([&](auto j)
                          VGKERN_LAMBDA { store_pair<EXACT>(base + at.element_of(2 * j), v[2 * j], v[2 * j + 1]); });
    if constexpr (VECTORS == 1) {
      store(base + at.element_of(0), v[0], at.lanes);
    } else {
      store_pair<EXACT>(base + at.element_of(kLast - 1), v[kLast - 1], v[kLast], at.lanes);
    }
  } else if constexpr (VECTORS == 1) {
    outputs == Outputs::streamed ? stream(base + at.element_of(0), v[0]) : store(base + at.element_of(0), v[0]);
  } else if (outputs == Outputs::streamed) {
    unroll<VECTORS / 2>([&](auto j)
                            VGKERN_LAMBDA { stream_pair<EXACT>(base + at.element_of(2 * j), v[2 * j], v[2 * j + 1]); });
  } else {
    unroll<VECTORS / 2>([&](auto j)
                            VGKERN_LAMBDA { store_pair<EXACT>(base + at.element_of(2 * j), v[2 * j], v[2 * j + 1]); });
  }
}

// Returns how many bits are set; behind the last element none is.
template <int VECTORS, class R, int COLUMNS>
VGKERN_INLINE int load_masks(Mask<R> (&mask)[VECTORS], const uint8_t* base, const Block<R, COLUMNS>& at) {
  int set = 0;
  if (at.has_gaps()) {
    unroll<VECTORS / COLUMNS>([&](auto row) VGKERN_LAMBDA {
      const uint32_t bits = at.gapped.load(base + at.mask_byte + row * at.mask_row);
      unroll<COLUMNS>([&](auto c) VGKERN_LAMBDA {
        mask[row * COLUMNS + c] = mask_from_bits<R>(bits >> c * kLanes<R> & ((1u << kLanes<R>)-1));
      });
      set += __builtin_popcount(bits);
    });
  } else if (VECTORS == 1 || (COLUMNS == 1 && !at.whole())) {
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
      const int lanes = j < VECTORS - 1 ? kLanes<R> : at.lanes;
      const unsigned bits = load_bits(base + at.mask_byte_of(j), lanes);
      mask[j] = mask_from_bits<R>(bits);
      set += __builtin_popcount(bits);
    });
  } else {
    unroll<VECTORS / 2>([&](auto j) VGKERN_LAMBDA {
      const unsigned bits = load_bit_pair<R>(base + at.mask_byte_of(2 * j));
      mask[2 * j] = mask_from_bits<R>(bits & ((1u << kLanes<R>)-1));
      mask[2 * j + 1] = mask_from_bits<R>(bits >> kLanes<R>);
      set += __builtin_popcount(bits);
    });
  }
  return set;
}

template <int VECTORS, class R, int COLUMNS>
VGKERN_INLINE void store_masks(const Mask<R> (&mask)[VECTORS], uint8_t* base, const Block<R, COLUMNS>& at) {
  if (at.has_gaps()) {
    unroll<VECTORS / COLUMNS>([&](auto row) VGKERN_LAMBDA {
      uint32_t all = bits(mask[row * COLUMNS]);
      if (COLUMNS == 2) all |= bits(mask[row * COLUMNS + COLUMNS - 1]) << kLanes<R>;
      at.gapped.store(base + at.mask_byte + row * at.mask_row, all);
    });
  } else if (VECTORS == 1 || (COLUMNS == 1 && !at.whole())) {
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
      if (j < VECTORS - 1) {
        store_bits(base + at.mask_byte_of(j), bits(mask[j]), kLanes<R>);
      } else {
        store_bits(base + at.mask_byte_of(j), bits(mask[j]) & at.bits(), at.lanes);
      }
    });
  } else {
    unroll<VECTORS / 2>(
        [&](auto j) VGKERN_LAMBDA { store_bit_pair(base + at.mask_byte_of(2 * j), mask[2 * j], mask[2 * j + 1]); });
  }
}

// The parameters of a vector: one channel's in every lane, or those of the channels that lie across.
template <class R>
struct Parameters {
  const Tile& tile;
  int64_t channel;

  VGKERN_INLINE const R* at(Parameter which) const {
    return static_cast<const R*>(tile.parameters) + which * tile.padded_channels + channel;
  }
  VGKERN_INLINE Vec<R> operator[](Parameter which) const { return tile.across ? load(at(which)) : Vec<R>(*at(which)); }
};

// One parameter of each column of a stretch.
template <class R, int COLUMNS>
struct PerColumn {
  Vec<R> column[COLUMNS];

  VGKERN_INLINE PerColumn(const Tile& tile, int64_t channel, Parameter which) {
    unroll<COLUMNS>([&](auto c) VGKERN_LAMBDA { column[c] = Parameters<R>{tile, channel + c * kLanes<R>}[which]; });
  }
  VGKERN_INLINE Vec<R> operator[](int j) const { return column[j % COLUMNS]; }
};

// A sum over a strip, then over a stretch, by column and lane. Strips are summed in S, which is Vec<R>, or Wide<R>
// where R's range does not do; one column's in two halves, so that two additions are under way at a time.
template <class R, class S, int COLUMNS>
struct StretchSum {
  using Term = S;

  S half[2] = {S(0), S(0)};
  Wide<R> total[COLUMNS];

  VGKERN_INLINE StretchSum() {
    unroll<COLUMNS>([&](auto c) VGKERN_LAMBDA { total[c] = Wide<R>(0.0); });
  }
  VGKERN_INLINE void add(int j, S value) { half[j % 2] += value; }
  VGKERN_INLINE void add_product(int j, S a, S b) { half[j % 2] = fma(a, b, half[j % 2]); }
  VGKERN_INLINE void end_strip() {
    if constexpr (COLUMNS == 1) {
      total[0] += Wide<R>(half[0] + half[1]);
    } else {
      total[0] += Wide<R>(half[0]);
      total[1] += Wide<R>(half[1]);
    }
    half[0] = half[1] = S(0);
  }
};

// A sum in float64 from the first term on, by column and lane.
template <class R, int COLUMNS>
struct WideSum {
  using Term = Wide<R>;

  Wide<R> total[COLUMNS];

  VGKERN_INLINE WideSum() {
    unroll<COLUMNS>([&](auto c) VGKERN_LAMBDA { total[c] = Wide<R>(0.0); });
  }
  VGKERN_INLINE void end_strip() {}
  VGKERN_INLINE void add(int j, Wide<R> value) { total[j % COLUMNS] += value; }
  VGKERN_INLINE void add_product(int j, Wide<R> a, Wide<R> b) { total[j % COLUMNS] = fma(a, b, total[j % COLUMNS]); }
};

// For terms that cancel. Eight of them added up in float32 would make errors of twice PyTorch's where x is float32;
// where x and dy have fewer digits than that, they make none that shows.
template <class T, class R, class S, int COLUMNS>
using CancellingSum = std::conditional_t<sizeof(T) == 2, StretchSum<R, S, COLUMNS>, WideSum<R, COLUMNS>>;

// Outputs of a pass over planes that are staged: for each run the tile's pointer leads to the stage, whose whole cache
// lines then go past the caches.
template <class T, int COUNT>
class Stages {
 public:
  template <class... Pointers>
  VGKERN_INLINE explicit Stages(Tile& tile, Pointers... outputs)
      : tile_(tile), outputs_{outputs...}, targets_{static_cast<T*>(tile.*outputs)...} {}

  VGKERN_INLINE void start(int64_t first) {
    if (tile_.outputs != Outputs::staged) return;
    for (int i = 0; i < COUNT; ++i) {
      if (targets_[i]) tile_.*outputs_[i] = reinterpret_cast<T*>(stages_[i]) - first;
    }
  }

  VGKERN_INLINE void finish(int64_t first) {
    if (tile_.outputs != Outputs::staged) return;
    for (int i = 0; i < COUNT; ++i) {
      if (targets_[i]) stream_run(stages_[i], targets_[i] + first);
    }
  }

 private:
  VGKERN_INLINE void stream_run(const char* from, T* target) const {
    char* to = reinterpret_cast<char*>(target);
    char* const end = to + tile_.channels * tile_.width * static_cast<int64_t>(sizeof(T));
    const auto copy = [&](int64_t bytes) VGKERN_LAMBDA {
      std::memcpy(to, from, bytes);
      to += bytes;
      from += bytes;
    };
    const int64_t before = -reinterpret_cast<uintptr_t>(to) % 64;  // the first line
    copy(before < end - to ? before : end - to);
    for (; end - to >= 64; to += 64, from += 64) {
      stream(reinterpret_cast<float*>(to), load(reinterpret_cast<const float*>(from)));
    }
    copy(end - to);
  }

  Tile& tile_;
  void* Tile::* const outputs_[COUNT];
  T* const targets_[COUNT];
  alignas(64) char stages_[COUNT][kStageBytes];
};

// Rows [kFirst, kEnd) of a tile's sums, by channel and lane. Lanes are channels where those lie across; else they are
// added up once a tile, which for planes of a few vectors would be most of the arithmetic if done once a plane.
template <class R, int kFirst, int kEnd>
class LaneSums {
 public:
  VGKERN_INLINE explicit LaneSums(const Tile& tile, bool wanted = true) : tile_(tile), wanted_(wanted) {
    if (tile.across || !wanted) return;
    for (int row = kFirst; row < kEnd; ++row) {
      for (int64_t i = 0; i < tile.channels; ++i) store(lanes(row, i), Wide<R>(0.0));
    }
  }

  template <class Sum>
  VGKERN_INLINE void add(int row, int64_t channel, const Sum& sum) {
    unroll<sizeof sum.total / sizeof sum.total[0]>([&](auto c) VGKERN_LAMBDA {
      double* p = tile_.across ? sums(row) + channel + c * kLanes<R> : lanes(row, channel);
      store(p, load_wide<R>(p) + sum.total[c]);
    });
  }

  VGKERN_INLINE void finish() {
    if (tile_.across || !wanted_) return;
    for (int row = kFirst; row < kEnd; ++row) {
      for (int64_t i = 0; i < tile_.channels; ++i) sums(row)[i] += sum(load_wide<R>(lanes(row, i)));
    }
  }

 private:
  VGKERN_INLINE double* sums(int row) const { return tile_.sums + row * tile_.padded_channels; }
  VGKERN_INLINE double* lanes(int row, int64_t channel) {
    return lanes_ + ((row - kFirst) * kTileChannels + channel) * kLanes<R>;
  }

  const Tile tile_;  // a copy: a reference would let whoever adds to the sums reach the pass
  const bool wanted_;
  double lanes_[(kEnd - kFirst) * kTileChannels * kLanes<R>];
};

// A block of a residual that is normalised, and z or dz of it. Its parameters are looked up for each block: in
// registers, as those of x, they would take these from residuals that are not.
//
// OUT_OF_LINE: where it is rare, or little beside what else is done. Then it is no part of the pass's code but one
// function for all activations, and all is given as copies, since what a function may reach by its address stays in no
// register.
template <class T, int VECTORS, int COLUMNS, bool OUT_OF_LINE>
struct NormalisedResidual {
  using R = Opmath<T>;

  std::conditional_t<OUT_OF_LINE, const Tile, const Tile&> tile;
  const int64_t channel;
  std::conditional_t<OUT_OF_LINE, const Block<R, COLUMNS>, const Block<R, COLUMNS>&> at;
  Vec<R> values[VECTORS];

  VGKERN_INLINE NormalisedResidual(const Tile& tile, int64_t channel, const Block<R, COLUMNS>& at,
                                   const Vec<R> (&given)[VECTORS])
      : tile(tile), channel(channel), at(at) {
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { values[j] = given[j]; });
  }

  // To z.
  VGKERN_INLINE void add() {
    if constexpr (OUT_OF_LINE) {
      call_add();
    } else {
      add_here();
    }
  }

  // The sum of dz·e, strips in S; dresidual under frozen statistics.
  template <class S, class Sums>
  VGKERN_INLINE void reduce(Sums& sums) const {
    if constexpr (OUT_OF_LINE) {
      call_reduce<S>(sums);
    } else {
      reduce_here<S>(sums);
    }
  }

  // dresidual, and its squares where they are asked for.
  template <class Sums>
  VGKERN_INLINE void apply(Sums& sums) const {
    Vec<R> e[VECTORS], dresidual[VECTORS];
    deviations(e);
    const auto scale = parameter(kInputScale), slope = parameter(kInputSlope), shift = parameter(kInputShift);
    unroll<VECTORS>([&](auto j)
                        VGKERN_LAMBDA { dresidual[j] = fma(values[j], scale[j], fma(e[j], slope[j], shift[j])); });
    store_block(dresidual, static_cast<T*>(tile.dresidual), at, tile.outputs);
    if (!tile.sums) return;
    WideSum<R, COLUMNS> sum;
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
      const Wide<R> wide(j < VECTORS - 1 ? dresidual[j] : select(first_lanes<R>(at.lanes), dresidual[j], Vec<R>(0)));
      sum.add_product(j, wide, wide);
    });
    sums.add(kDresidualSquares, channel, sum);
  }

 private:
  VGKERN_INLINE void add_here() {
    Vec<R> e[VECTORS];
    deviations(e);
    add_product(e, kScale, kShift);
    if (sizeof(T) > 2) add_product(e, kScaleLow, kShiftLow);
  }

  template <class S, class Sums>
  VGKERN_INLINE void reduce_here(Sums& sums) const {
    using Sum = CancellingSum<T, R, S, COLUMNS>;
    using Term = typename Sum::Term;
    Vec<R> e[VECTORS], dresidual[VECTORS];
    deviations(e);
    Sum sum;
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { sum.add_product(j, Term(values[j]), Term(e[j])); });
    sum.end_strip();
    sums.add(kDzResidualDeviation, channel, sum);
    if (!tile.dresidual) return;
    const PerColumn<R, COLUMNS> scale = parameter(kInputScale);
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { dresidual[j] = values[j] * scale[j]; });
    store_block(dresidual, static_cast<T*>(tile.dresidual), at, tile.outputs);
  }

  VGKERN_NOINLINE void call_add() { add_here(); }

  template <class S, class Sums>
  VGKERN_NOINLINE void call_reduce(Sums& sums) const {
    reduce_here<S>(sums);
  }

  VGKERN_INLINE PerColumn<R, COLUMNS> parameter(Parameter which) const { return {tile, channel, of_residual(which)}; }

  VGKERN_INLINE void deviations(Vec<R> (&e)[VECTORS]) const {
    const PerColumn<R, COLUMNS> pivot = parameter(kPivot);
    load_block<true>(e, static_cast<const T*>(tile.residual), at,
                     *Parameters<R>{tile, channel}.at(of_residual(kPivot)));
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { e[j] = e[j] - pivot[j]; });
  }

  VGKERN_INLINE void add_product(const Vec<R> (&e)[VECTORS], Parameter scale, Parameter shift) {
    const PerColumn<R, COLUMNS> a = parameter(scale), b = parameter(shift);
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { values[j] = values[j] + fma(e[j], a[j], b[j]); });
  }
};

// Whether a tile is that of a usual forward: with a residual, and a mask to be saved. Columns of float32 are not: its
// order of instructions takes 3 to 10 % more there where they come from memory.
template <class T, class F>
VGKERN_INLINE bool is_usual_forward(const Tile& tile) {
  return F::reads == Reads::mask && tile.normalises && tile.residual && !tile.normalises_residual && tile.saved_mask &&
         (sizeof(T) == 2 || !tile.across);
}

// Whether a tile is that of a usual backward: over the batch's statistics, its mask saved, no second batch norm, and dx
// as it comes.
//
// Such a tile has code of its own, where what it has need not be asked of each block, and none is for what it has not.
// That takes a third less time. It is also a third as long, and of that more hangs than the length would say: loops
// that lay strewn over several pages took up to three times as long in one copy of a file as in another of the same
// bytes (Zen 5). Where z is evaluated that takes most of the time, and only the pass that sums has such code.
template <class F>
VGKERN_INLINE bool is_usual_backward(const Tile& tile) {
  return tile.x && tile.normalises && !tile.normalises_residual && !tile.dz && tile.dx_factor == 1.0 &&
         (F::reads == Reads::nothing || (F::reads == Reads::mask && tile.mask));
}

// In the place of an activation where a tile's dz is already there: by the pass before.
template <class R>
struct Given : Traits<Reads::nothing> {
  static constexpr bool passes_dy = false;

  explicit Given(const double*) {}
};
template <class F>
constexpr bool kIsGiven = false;
template <class R>
constexpr bool kIsGiven<Given<R>> = true;

// What a pass may take for granted.
enum class Usual {
  no,
  yes,
  unshifted,  // and that all pivots are 0: in half precision, where arithmetic counts, x − 0 is not computed
};

VGKERN_INLINE constexpr bool is_usual(Usual usual) { return usual != Usual::no; }

template <class T>
VGKERN_INLINE bool has_pivots(const Tile& tile) {
  using R = Opmath<T>;
  const R* pivots = static_cast<const R*>(tile.parameters) + kPivot * tile.padded_channels;
  const int64_t count = tile.across ? tile.width : tile.channels;
  unsigned any = 0;
  for (int64_t i = 0; i < count; i += kLanes<R>) {
    const int lanes = static_cast<int>(count - i < kLanes<R> ? count - i : kLanes<R>);
    any |= bits(load(pivots + i, lanes, R(0)) != Vec<R>(0));
  }
  return any != 0;
}

// Calls take(usual) for a tile that is usual.
template <class T, class F>
VGKERN_INLINE void take_usual(const Tile& tile, F take) {
  if constexpr (sizeof(T) == 2) {
    if (!has_pivots<T>(tile)) return take(std::integral_constant<Usual, Usual::unshifted>{});
  }
  take(std::integral_constant<Usual, Usual::yes>{});
}

// z and its way there.
template <class T, int COLUMNS, Usual USUAL, bool OUT_OF_LINE = false>
struct PreActivation {
  using R = Opmath<T>;

  const Tile& tile;
  const int64_t channel;
  PerColumn<R, COLUMNS> pivot, scale, scale_low, shift, shift_low, weight;
  R fill;

  VGKERN_INLINE PreActivation(const Tile& tile, int64_t channel)
      : tile(tile),
        channel(channel),
        pivot(tile, channel, kPivot),
        scale(tile, channel, kScale),
        scale_low(tile, channel, kScaleLow),
        shift(tile, channel, kShift),
        shift_low(tile, channel, kShiftLow),
        weight(tile, channel, kActivationWeight),
        fill(*Parameters<R>{tile, channel}.at(kPivot)) {}

  template <bool PAIRS, bool ASKS = true, int VECTORS>
  VGKERN_INLINE void deviations(Vec<R> (&d)[VECTORS], const Block<R, COLUMNS>& at) const {
    load_block<PAIRS, ASKS>(d, static_cast<const T*>(tile.x), at, fill);
    if constexpr (USUAL != Usual::unshifted) {
      unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { d[j] = d[j] - pivot[j]; });
    }
  }

  template <int VECTORS>
  VGKERN_INLINE void operator()(Vec<R> (&z)[VECTORS], const Vec<R> (&d)[VECTORS], const Block<R, COLUMNS>& at) const {
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { z[j] = fma(d[j], scale[j], shift[j]); });
    if (!is_usual(USUAL) && tile.normalises_residual) {
      NormalisedResidual<T, VECTORS, COLUMNS, OUT_OF_LINE> residual(tile, channel, at, z);
      residual.add();
      unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { z[j] = residual.values[j]; });
    } else if (is_usual(USUAL) || tile.residual) {
      Vec<R> residual[VECTORS];
      load_block<true>(residual, static_cast<const T*>(tile.residual), at, R(0));
      unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { z[j] = z[j] + residual[j]; });
    }
    // Last, for a sum of opposite terms is exact, and small, and the low parts then are not. Half precision does not
    // see them.
    if (sizeof(T) > 2 && (is_usual(USUAL) || tile.normalises)) {
      unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { z[j] = z[j] + fma(d[j], scale_low[j], shift_low[j]); });
    }
  }
};

// What the chain rule takes from z.
template <class R, int VECTORS>
struct Derivative {
  Vec<R> dz[VECTORS];
  Vec<R> dweight[VECTORS];  // the share of a learnable activation's weight
  int counted = 0;          // elements with φ'(z) = 0; of an activation with a mask, those that are on

  template <int COLUMNS>
  VGKERN_INLINE void count(int j, Mask<R> mask, const Block<R, COLUMNS>& at) {
    counted += __builtin_popcount(j < VECTORS - 1 ? bits(mask) : bits(mask) & at.bits());
  }
};

template <Usual USUAL, class F, class T, class R, int VECTORS, int COLUMNS>
VGKERN_INLINE void differentiate(Derivative<R, VECTORS>& out, const F& activation,
                                 const PreActivation<T, COLUMNS, USUAL, true>& z_of, const Block<R, COLUMNS>& at,
                                 const Vec<R> (&d)[VECTORS], const Vec<R> (&dy)[VECTORS]) {
  const Vec<R> zero(0);
  if constexpr (F::reads == Reads::nothing) {
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { out.dz[j] = dy[j]; });
  } else if constexpr (F::reads == Reads::mask) {
    Mask<R> on[VECTORS];
    if (is_usual(USUAL) || z_of.tile.mask) {
      out.counted = load_masks(on, z_of.tile.mask, at);
    } else {
      Vec<R> z[VECTORS];
      z_of(z, d, at);
      unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
        on[j] = activation.on(z[j]);
        out.count(j, on[j], at);
      });
    }
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { out.dz[j] = activation.backward(dy[j], on[j]); });
  } else {
    Vec<R> z[VECTORS];
    z_of(z, d, at);
    unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
      if constexpr (F::has_weight) {
        const Vec<R> slope = activation.derivative(z[j], z_of.weight[j]);
        out.dz[j] = dy[j] * slope;
        out.count(j, slope == zero, at);
        out.dweight[j] = activation.weight_gradient(dy[j], z[j]);
      } else {
        const Vec<R> slope = activation.derivative(z[j]);
        if constexpr (F::has_backward) {
          out.dz[j] = activation.backward(dy[j], z[j]);
        } else {
          out.dz[j] = dy[j] * slope;
        }
        out.count(j, slope == zero, at);
      }
    });
  }
}

// ---- Passes --------------------------------------------------------------------------------------------------------

// Σ (x − pivot), and Σ (x − pivot)² over strips in S: mean is right to its own last place, where it is small
// beside the deviation too; var, which has no such place, to 1e-7.
//
// Of float32 the former is Σx − n·pivot in float64, which has room for as many digits as float32 tells x from the pivot
// by, and takes no difference of each x, which in float32 would be rounded.
template <class T, class S>
struct StatisticsPass {
  using Element = T;
  using R = Opmath<T>;
  using Width = std::conditional_t<std::is_same_v<S, Vec<R>>, WidthOf<T>, vgkern::Width<1, 1>>;  // sums in S are rare
  static constexpr int64_t kTerms = kSummedTerms<T>, kBandBytes = kBroad, kAhead = kFar;
  static constexpr int64_t kBandRows = kRowsToAddUp;

  const Tile tile;  // a copy: what the kernel stores cannot be one of its fields
  LaneSums<R, 0, 2> sums{tile};

  VGKERN_INLINE void start_run(int64_t) {}
  VGKERN_INLINE void finish_run(int64_t) {}

  template <int COLUMNS>
  struct Stretch {
    StatisticsPass& pass;
    int64_t channel;
    PerColumn<R, COLUMNS> pivot{pass.tile, channel, kPivot};
    R fill = *Parameters<R>{pass.tile, channel}.at(kPivot);
    CancellingSum<T, R, S, COLUMNS> sum;
    StretchSum<R, S, COLUMNS> squares;
    static constexpr bool kSumsX = std::is_same_v<T, float> && std::is_same_v<S, Vec<R>>;
    int64_t vectors = 0;  // of a column

    VGKERN_INLINE Stretch(StatisticsPass& pass, int64_t channel) : pass(pass), channel(channel) {}

    template <int VECTORS>
    VGKERN_INLINE void run(const Block<R, COLUMNS>& at) {
      Vec<R> x[VECTORS];
      load_block<true>(x, static_cast<const T*>(pass.tile.x), at, fill);
      vectors += VECTORS / COLUMNS;
      unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
        using Term = typename CancellingSum<T, R, S, COLUMNS>::Term;
        const S deviation = S(x[j]) - S(pivot[j]);
        sum.add(j, kSumsX ? Term(x[j]) : Term(deviation));
        squares.add_product(j, deviation, deviation);
      });
    }
    VGKERN_INLINE void end_strip() {
      sum.end_strip();
      squares.end_strip();
    }
    VGKERN_INLINE void finish() {
      if constexpr (kSumsX) {
        const Wide<R> all(-static_cast<double>(vectors));
        unroll<COLUMNS>([&](auto c) VGKERN_LAMBDA { sum.total[c] = fma(Wide<R>(pivot[c]), all, sum.total[c]); });
      }
      pass.sums.add(kDeviation, channel, sum);
      pass.sums.add(kDeviationSquares, channel, squares);
    }
  };
};

template <class T, class S>
void statistics_tile(const Tile& tile) {
  StatisticsPass<T, S> pass{tile};
  walk(pass);
  pass.sums.finish();
}

template <class T, class F, Usual USUAL>
struct ForwardPass {
  using Element = T;
  using R = Opmath<T>;
  using Width = WidthOf<T>;
  static constexpr int64_t kTerms = kNoTerms, kBandBytes = kNarrow, kAhead = kNear;
  static constexpr int64_t kBandRows = kRowsToWrite<T>;

  Tile tile;
  const F activation{tile.activation_args};
  Stages<T, 1> stages{tile, &Tile::y};

  VGKERN_INLINE void start_run(int64_t first) { stages.start(first); }
  VGKERN_INLINE void finish_run(int64_t first) { stages.finish(first); }

  template <int COLUMNS>
  struct Stretch {
    ForwardPass& pass;
    PreActivation<T, COLUMNS, USUAL> z_of;

    VGKERN_INLINE Stretch(ForwardPass& pass, int64_t channel) : pass(pass), z_of(pass.tile, channel) {}

    template <int VECTORS>
    VGKERN_INLINE void run(const Block<R, COLUMNS>& at) {
      Vec<R> d[VECTORS], z[VECTORS], y[VECTORS];
      z_of.template deviations<true>(d, at);
      z_of(z, d, at);
      if constexpr (F::reads == Reads::mask) {
        if (is_usual(USUAL) || pass.tile.saved_mask) {
          Mask<R> on[VECTORS];
          unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { on[j] = pass.activation.on(z[j]); });
          store_masks(on, pass.tile.saved_mask, at);
        }
      }
      unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
        if constexpr (F::has_weight) {
          y[j] = pass.activation.forward(z[j], z_of.weight[j]);
        } else {
          y[j] = pass.activation.forward(z[j]);
        }
      });
      // Over planes the stores would wait for y's lines; down columns they do not.
      if (COLUMNS == 1 && !pass.tile.across) {
        claim_block<VECTORS>(static_cast<T*>(pass.tile.y), at, pass.tile.outputs);
      }
      store_block(y, static_cast<T*>(pass.tile.y), at, pass.tile.outputs);
    }
    VGKERN_INLINE void end_strip() {}
    VGKERN_INLINE void finish() {}
  };
};

template <class T, class F, Usual USUAL>
VGKERN_NOINLINE void forward_as(const Tile& tile) {
  ForwardPass<T, F, USUAL> pass{tile};
  walk(pass);
}

template <class T, class F>
void forward_tile(const Tile& tile) {
  if constexpr (F::reads == Reads::mask) {
    if (is_usual_forward<T, F>(tile)) {
      return take_usual<T>(tile, [&](auto usual) VGKERN_LAMBDA { forward_as<T, F, usual>(tile); });
    }
  }
  forward_as<T, F, Usual::no>(tile);
}

// Squares are summed over strips in S; the terms of dβ, dγ and a slope's gradient cancel (CancellingSum).
template <class T, class F, class S, Usual USUAL>
struct ReducePass {
  using Element = T;
  using R = Opmath<T>;
  static constexpr bool kRare = !std::is_same_v<S, Vec<R>>;
  using Width = std::conditional_t<kRare, vgkern::Width<1, 1>, WidthOf<T>>;
  static constexpr int64_t kTerms = kSummedTerms<T>, kBandBytes = kNarrow, kAhead = kNear;
  static constexpr int64_t kBandRows = kRowsToAddUp;

  Tile tile;
  const F activation{tile.activation_args};
  Stages<T, 2> stages{tile, &Tile::dx, &Tile::dresidual};
  LaneSums<R, 0, F::has_weight ? kDzResidualDeviation : kDySquares> sums{tile};
  LaneSums<R, kDzResidualDeviation, kDxSquares> residual_sums{tile, tile.normalises_residual};
  int64_t counted = 0;  // by Derivative
  // Σdy², of all channels: in S over some strips, whichever stretch they are of, for they are all positive.
  S dy_squares[2] = {S(0), S(0)};
  Wide<R> dy_total = 0.0;
  int64_t strips = 0;

  // Without it GCC zeroes the whole object, stages and all, with each call.
  VGKERN_INLINE explicit ReducePass(const Tile& tile) : tile(tile) {}

  VGKERN_INLINE void start_run(int64_t first) { stages.start(first); }
  VGKERN_INLINE void finish_run(int64_t first) { stages.finish(first); }

  VGKERN_INLINE void widen_dy_squares(S (&squares)[2]) {
    dy_total += Wide<R>(squares[0] + squares[1]);
    squares[0] = squares[1] = S(0);
  }

  // Elements of the tile with φ'(z) = 0.
  int64_t dead() const {
    if constexpr (F::reads == Reads::mask) {
      const Slopes<R> slopes = activation.slopes();
      const int64_t off = tile.runs * tile.channels * tile.width - counted;
      return (slopes.off == 0 ? off : 0) + (slopes.on == 0 ? counted : 0);
    } else {
      return counted;
    }
  }

  template <int COLUMNS>
  struct Stretch {
    ReducePass& pass;
    int64_t channel;
    PreActivation<T, COLUMNS, USUAL, true> z_of;  // what z costs hides the call
    CancellingSum<T, R, S, COLUMNS> dz_sum, dz_deviation, dweight;
    StretchSum<R, S, COLUMNS> dz_squares;
    S dy_squares[2]{pass.dy_squares[0], pass.dy_squares[1]};  // here, to be in registers

    VGKERN_INLINE Stretch(ReducePass& pass, int64_t channel) : pass(pass), channel(channel), z_of(pass.tile, channel) {}

    template <int VECTORS>
    VGKERN_INLINE void run(const Block<R, COLUMNS>& at) {
      const Tile& tile = pass.tile;
      Vec<R> dy[VECTORS], deviation[VECTORS];
      constexpr bool kPairs = COLUMNS == 2, kGiven = kIsGiven<F>;
      if constexpr (!kGiven) load_block<kPairs>(dy, static_cast<const T*>(tile.dy), at, R(0));
      if (is_usual(USUAL) || tile.x) {
        z_of.template deviations<kPairs, !kGiven>(deviation, at);
      } else {
        unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { deviation[j] = Vec<R>(0); });
      }
      Derivative<R, VECTORS> d;
      if constexpr (kGiven) {
        unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { d.dz[j] = load(static_cast<const R*>(tile.dz) + at.dz_of(j)); });
      } else {
        differentiate<USUAL>(d, pass.activation, z_of, at, deviation, dy);
      }
      if (!is_usual(USUAL) && tile.normalises_residual) {
        NormalisedResidual<T, VECTORS, COLUMNS, kRare>(tile, channel, at, d.dz).template reduce<S>(pass.residual_sums);
      } else if (tile.dresidual) {
        claim_block<VECTORS>(static_cast<T*>(tile.dresidual), at, tile.outputs);
        store_block<F::passes_dy>(d.dz, static_cast<T*>(tile.dresidual), at, tile.outputs);
      }
      if (!is_usual(USUAL) && !kGiven && tile.dz) {
        unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { store(static_cast<R*>(tile.dz) + at.dz_of(j), d.dz[j]); });
      }
      if (!is_usual(USUAL) && tile.dx) {
        const PerColumn<R, COLUMNS> scale(tile, channel, kInputScale);
        const Vec<R> factor(static_cast<R>(tile.dx_factor));
        Vec<R> dx[VECTORS];
        unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { dx[j] = d.dz[j] * scale[j] * factor; });
        claim_block<VECTORS>(static_cast<T*>(tile.dx), at, tile.outputs);
        store_block(dx, static_cast<T*>(tile.dx), at, tile.outputs);
      }
      using Term = typename CancellingSum<T, R, S, COLUMNS>::Term;
      // Of float32 two of a column are added up before float64 takes over, which converts half as many: an error of
      // half a unit in their last place, that comes down by √count, and is small beside the rounding of dβ and dγ
      // themselves.
      if constexpr (std::is_same_v<T, float> && VECTORS == 4) {
        unroll<2>([&](auto j) VGKERN_LAMBDA {
          const Vec<R>&a = d.dz[j], &b = d.dz[j + 2];  // of one column
          dz_sum.add(j, Term(a + b));
          dz_deviation.add(j, Term(fma(a, deviation[j], b * deviation[j + 2])));
        });
      } else {
        unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
          const Term dz(d.dz[j]);
          dz_sum.add(j, dz);
          dz_deviation.add_product(j, dz, Term(deviation[j]));
        });
      }
      unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
        dz_squares.add_product(j, S(d.dz[j]), S(d.dz[j]));
        if constexpr (F::has_weight) dweight.add(j, Term(d.dweight[j]));
      });
      if (tile.record) {
        pass.counted += d.counted;
        if constexpr (kGiven) load_block<kPairs, false>(dy, static_cast<const T*>(tile.dy), at, R(0));
        unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { dy_squares[j % 2] = fma(S(dy[j]), S(dy[j]), dy_squares[j % 2]); });
      }
    }
    VGKERN_INLINE void end_strip() {
      dz_sum.end_strip();
      dz_deviation.end_strip();
      if constexpr (F::has_weight) dweight.end_strip();
      dz_squares.end_strip();
      constexpr int64_t kStrips = 64 / kTerms;
      if (pass.tile.record && ++pass.strips % kStrips == 0) pass.widen_dy_squares(dy_squares);
    }
    VGKERN_INLINE void finish() {
      pass.sums.add(kDz, channel, dz_sum);
      pass.sums.add(kDzDeviation, channel, dz_deviation);
      pass.sums.add(kDzSquares, channel, dz_squares);
      if constexpr (F::has_weight) pass.sums.add(kActivationDweight, channel, dweight);
      unroll<2>([&](auto i) VGKERN_LAMBDA { pass.dy_squares[i] = dy_squares[i]; });
    }
  };
};

// To a tile's sums.
template <class Pass>
VGKERN_INLINE void finish_reduction(Pass& pass, const Tile& tile) {
  pass.sums.finish();
  pass.residual_sums.finish();
  if (tile.record) {
    pass.widen_dy_squares(pass.dy_squares);
    tile.sums[kDySquares * tile.padded_channels] += sum(pass.dy_total);
    tile.sums[kDead * tile.padded_channels] += static_cast<double>(pass.dead());
  }
}

template <class T, class F, class S, Usual USUAL>
VGKERN_NOINLINE void reduce_as(const Tile& tile) {
  ReducePass<T, F, S, USUAL> pass{tile};
  walk(pass);
  finish_reduction(pass, tile);
}

// dz, to the tile's own, and dresidual, where z is evaluated. What that takes in constants and the sums do not fit the
// registers together: a part of the tile goes through this pass, and then, from the caches, through that of the sums,
// which is the same for all activations.
template <class T, class F>
struct DerivativePass {
  using Element = T;
  using R = Opmath<T>;
  using Width = WidthOf<T>;
  static constexpr int64_t kTerms = kNoTerms, kBandBytes = kNarrow, kAhead = kNear;
  static constexpr int64_t kBandRows = kRowsToWriteBack<T>;

  Tile tile;
  const F activation{tile.activation_args};
  Stages<T, 1> stages{tile, &Tile::dresidual};
  int64_t counted = 0;  // by Derivative

  VGKERN_INLINE explicit DerivativePass(const Tile& tile) : tile(tile) {}  // as ReducePass's

  VGKERN_INLINE void start_run(int64_t first) { stages.start(first); }
  VGKERN_INLINE void finish_run(int64_t first) { stages.finish(first); }

  template <int COLUMNS>
  struct Stretch {
    DerivativePass& pass;
    PreActivation<T, COLUMNS, Usual::no, true> z_of;

    VGKERN_INLINE Stretch(DerivativePass& pass, int64_t channel) : pass(pass), z_of(pass.tile, channel) {}

    template <int VECTORS>
    VGKERN_INLINE void run(const Block<R, COLUMNS>& at) {
      Vec<R> dy[VECTORS], deviation[VECTORS];
      load_block<true>(dy, static_cast<const T*>(pass.tile.dy), at, R(0));
      z_of.template deviations<true>(deviation, at);
      Derivative<R, VECTORS> d;
      differentiate<Usual::no>(d, pass.activation, z_of, at, deviation, dy);
      const Tile& tile = pass.tile;
      if (tile.dresidual) {
        claim_block<VECTORS>(static_cast<T*>(tile.dresidual), at, tile.outputs);
        store_block(d.dz, static_cast<T*>(tile.dresidual), at, tile.outputs);
      }
      unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { store(static_cast<R*>(tile.dz) + at.dz_of(j), d.dz[j]); });
      pass.counted += d.counted;
    }
    VGKERN_INLINE void end_strip() {}
    VGKERN_INLINE void finish() {}
  };
};

// Returns how many elements have φ'(z) = 0.
template <class T, class F>
VGKERN_NOINLINE int64_t derive(const Tile& tile) {
  DerivativePass<T, F> pass{tile};
  walk(pass);
  return pass.counted;
}

// Elements of a part, but for a run of planes, which is 16 KiB of the tensor and is padded to whole vectors. (Half as
// many take up to 1.04 times as long, a quarter 1.1, twice as many about the same.)
constexpr int64_t kPartElements = 8192, kMaxPartElements = kPartElements + kTileChannels * kChannelPadding;

template <class T, class S, Usual USUAL>
VGKERN_NOINLINE void reduce_parts(const Tile& tile, int64_t (*derive)(const Tile& part)) {
  using R = Opmath<T>;
  constexpr int64_t kStep = kLanes<R>;
  alignas(64) R scratch[kMaxPartElements];
  const auto padded = [](int64_t width) { return (width + kStep - 1) / kStep * kStep; };
  const int64_t run = tile.channels * padded(tile.width);
  const bool whole_runs = run <= kMaxPartElements;  // as are those of several channels
  const int64_t runs = run < kPartElements ? kPartElements / run : 1;
  const int64_t width = whole_runs ? tile.width : kPartElements;

  ReducePass<T, Given<R>, S, USUAL> pass{tile};
  for (int64_t first = 0; first < tile.runs; first += runs) {
    for (int64_t begin = 0; begin < tile.width; begin += width) {
      Tile part = tile;
      part.runs = runs < tile.runs - first ? runs : tile.runs - first;
      part.width = width < tile.width - begin ? width : tile.width - begin;
      part.offset = tile.offset + first * tile.stride + begin;
      part.following = begin + width < tile.width ? part.offset + width
                       : first + runs < tile.runs ? tile.offset + (first + runs) * tile.stride
                                                  : tile.following;
      part.dz = tile.dz ? static_cast<R*>(tile.dz) + first * run + begin : scratch;
      void* const dresidual = std::exchange(part.dresidual, tile.normalises_residual ? nullptr : part.dresidual);
      pass.counted += derive(part);
      part.dresidual = tile.normalises_residual ? dresidual : nullptr;
      pass.tile = part;
      walk(pass);
    }
  }
  finish_reduction(pass, tile);
}

template <class T, class F, class S>
void reduce_tile(const Tile& tile) {
  constexpr bool kRare = !std::is_same_v<S, Vec<Opmath<T>>>;
  constexpr bool kInParts = F::reads == Reads::z && !F::has_weight;
  if constexpr (kInParts && !kRare) {
    if (!tile.normalises_residual && !tile.dx) {
      return take_usual<T>(tile, [&](auto usual) VGKERN_LAMBDA { reduce_parts<T, S, usual>(tile, derive<T, F>); });
    }
  }
  if constexpr (F::reads != Reads::z && !kRare) {
    if (is_usual_backward<F>(tile) && !tile.dx) {
      return take_usual<T>(tile, [&](auto usual) VGKERN_LAMBDA { reduce_as<T, F, S, usual>(tile); });
    }
  }
  if constexpr (kInParts) {
    reduce_parts<T, S, Usual::no>(tile, derive<T, F>);
  } else {
    reduce_as<T, F, S, Usual::no>(tile);
  }
}

template <class T, class F, Usual USUAL>
struct ApplyPass {
  using Element = T;
  using R = Opmath<T>;
  using Width = WidthOf<T>;
  static constexpr int64_t kTerms = kNoTerms, kBandBytes = kNarrow, kAhead = kNear;
  static constexpr int64_t kBandRows = kRowsToWriteBack<T>;

  Tile tile;
  const F activation{tile.activation_args};
  Stages<T, 2> stages{tile, &Tile::dx, &Tile::dresidual};
  LaneSums<R, kDxSquares, kSums> sums{tile, tile.sums != nullptr};

  VGKERN_INLINE void start_run(int64_t first) { stages.start(first); }
  VGKERN_INLINE void finish_run(int64_t first) { stages.finish(first); }

  template <int COLUMNS>
  struct Stretch {
    ApplyPass& pass;
    int64_t channel;
    PreActivation<T, COLUMNS, USUAL, true> z_of{pass.tile, channel};
    PerColumn<R, COLUMNS> scale{pass.tile, channel, kInputScale}, slope{pass.tile, channel, kInputSlope};
    PerColumn<R, COLUMNS> shift{pass.tile, channel, kInputShift};
    Vec<R> factor{static_cast<R>(pass.tile.dx_factor)};
    WideSum<R, COLUMNS> squares;

    VGKERN_INLINE Stretch(ApplyPass& pass, int64_t channel) : pass(pass), channel(channel) {}

    template <int VECTORS>
    VGKERN_INLINE void run(const Block<R, COLUMNS>& at) {
      const Tile& tile = pass.tile;
      Vec<R> deviation[VECTORS], dx[VECTORS];
      Derivative<R, VECTORS> d;
      z_of.template deviations<true>(deviation, at);
      if (!is_usual(USUAL) && tile.dz) {
        unroll<VECTORS>([&](auto j) VGKERN_LAMBDA { d.dz[j] = load(static_cast<const R*>(tile.dz) + at.dz_of(j)); });
      } else {
        Vec<R> dy[VECTORS];
        load_block<true>(dy, static_cast<const T*>(tile.dy), at, R(0));
        differentiate<USUAL>(d, pass.activation, z_of, at, deviation, dy);
        // As it would be read from dresidual, so that dx does not depend on whether that is wanted.
        if constexpr (sizeof(T) == 2 && F::reads == Reads::z) {
          if (tile.residual && !tile.normalises_residual) {
            unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
              T rounded[kLanes<R>];
              store(rounded, d.dz[j]);
              d.dz[j] = load(rounded);
            });
          }
        }
      }
      unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
        dx[j] = fma(d.dz[j], scale[j], fma(deviation[j], slope[j], shift[j]));
        if constexpr (!is_usual(USUAL)) dx[j] = dx[j] * factor;
      });
      claim_block<VECTORS>(static_cast<T*>(tile.dx), at, tile.outputs);
      store_block(dx, static_cast<T*>(tile.dx), at, tile.outputs);
      if (!is_usual(USUAL) && tile.sums) {
        unroll<VECTORS>([&](auto j) VGKERN_LAMBDA {
          const Wide<R> wide(j < VECTORS - 1 ? dx[j] : select(first_lanes<R>(at.lanes), dx[j], Vec<R>(0)));
          squares.add_product(j, wide, wide);
        });
      }
      if (!is_usual(USUAL) && tile.normalises_residual) {
        NormalisedResidual<T, VECTORS, COLUMNS, false>(tile, channel, at, d.dz).apply(pass.sums);
      }
    }
    VGKERN_INLINE void end_strip() {}
    VGKERN_INLINE void finish() {
      if (!is_usual(USUAL) && pass.tile.sums) pass.sums.add(kDxSquares, channel, squares);
    }
  };
};

template <class T, class F, Usual USUAL>
VGKERN_NOINLINE void apply_as(const Tile& tile) {
  ApplyPass<T, F, USUAL> pass{tile};
  walk(pass);
  if (!is_usual(USUAL) && tile.sums) pass.sums.finish();
}

template <class T, class F>
void apply_tile(const Tile& tile) {
  if constexpr (F::reads != Reads::z) {
    if (is_usual_backward<F>(tile) && !tile.sums) {
      return take_usual<T>(tile, [&](auto usual) VGKERN_LAMBDA { apply_as<T, F, usual>(tile); });
    }
  }
  apply_as<T, F, Usual::no>(tile);
}

// ---- The table -----------------------------------------------------------------------------------------------------

#define VGKERN_EACH_TYPE(function) {function<float>, function<double>, function<bfloat16>, function<float16>}

// What strips are summed in where R's range may not do: float64.
template <class T>
using WideStrip = std::conditional_t<std::is_same_v<T, double>, Vec<double>, Wide<Opmath<T>>>;

template <class T>
constexpr TileFunction statistics = statistics_tile<T, Vec<Opmath<T>>>;
template <class T>
constexpr TileFunction statistics_wide = statistics_tile<T, WideStrip<T>>;

template <template <class R, class M> class Functor>
struct OfActivation {
  template <class T>
  using Forward = Functor<Opmath<T>, Math<T>>;
  // Of bfloat16 as of float16: what rounding hides in each y shows in the sums of dz.
  template <class T>
  using Backward = Functor<Opmath<T>, Math<std::conditional_t<sizeof(T) == 2, float16, T>>>;
  template <class T>
  static constexpr TileFunction forward = forward_tile<T, Forward<T>>;
  template <class T>
  static constexpr TileFunction reduce = reduce_tile<T, Backward<T>, Vec<Opmath<T>>>;
  template <class T>
  static constexpr TileFunction reduce_wide = reduce_tile<T, Backward<T>, WideStrip<T>>;
  template <class T>
  static constexpr TileFunction apply = apply_tile<T, Backward<T>>;
};

#define VGKERN_ROW(name, Functor)                        \
  {#name,                                                \
   Functor<float, Math<float>>::costly,                  \
   VGKERN_EACH_TYPE(OfActivation<Functor>::forward),     \
   VGKERN_EACH_TYPE(OfActivation<Functor>::reduce),      \
   VGKERN_EACH_TYPE(OfActivation<Functor>::reduce_wide), \
   VGKERN_EACH_TYPE(OfActivation<Functor>::apply)},

constexpr ActivationKernels kActivationKernels[] = {VGKERN_ACTIVATIONS(VGKERN_ROW)};

static_assert(Identity<float, Math<float>>::reads == Reads::nothing, "identity");

constexpr KernelTable make_table(const char* name) {
  return {name,
          kActivationKernels,
          sizeof kActivationKernels / sizeof kActivationKernels[0],
          VGKERN_EACH_TYPE(statistics),
          VGKERN_EACH_TYPE(statistics_wide),
          VGKERN_EACH_TYPE(to_double),
          VGKERN_EACH_TYPE(from_double),
          VGKERN_EACH_TYPE(find_origins),
          VGKERN_EACH_TYPE(to_columns),
          add_columns,
          add_slices,
          add_up,
          add_up_squares,
          all_finite,
          look_at_slice,
          reciprocal_roots,
          make_statistics,
          far_from_mean,
          VGKERN_EACH_TYPE(update_running),
          VGKERN_EACH_TYPE(normalise),
          settle_gradients,
          VGKERN_EACH_TYPE(input_lines),
          VGKERN_EACH_TYPE(apply_math),
          VGKERN_EACH_TYPE(norm_part),
          VGKERN_EACH_TYPE(scale_array)};
}

#undef VGKERN_ROW
#undef VGKERN_EACH_TYPE

}  // namespace
}  // namespace vgkern
