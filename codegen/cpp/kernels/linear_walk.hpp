// How a thread walks through its rows and panels: blocks of rows that stay in the second-level
// cache, tiles of them for each panel, and where rows are few several panels side by side.
#pragma once

#include "linear_decoded_tile.hpp"
#include "row_tiles.hpp"
#include "team.hpp"

namespace infc {

// Rows that are prepared at once: so many that they stay near while all panels pass.
template <class W>
constexpr int64_t block_rows(int64_t K) {
  constexpr int64_t kBytes = 256 << 10;
  constexpr int64_t kLeast = 8 * LinearLayout<W>::kMR;
  const int64_t plain = K * static_cast<int64_t>(sizeof(typename Rows<W>::X));
  const int64_t size = plain > Rows<W>::made_bytes(K) ? plain : Rows<W>::made_bytes(K);
  const int64_t rows = kBytes / (size < 1 ? 1 : size) / kLeast * kLeast;
  return rows < kLeast ? kLeast : rows < 1024 ? rows : 1024;
}

// Panels that a tile of m rows reads side by side. A lone row makes little of each panel it reads:
// several streams keep more of the memory busy, and more sums under way (Zen 2 with AVX2, two
// threads: one stream 37 GB/s, four 51). With AVX-512 a panel has sums enough, and the processor
// fetches one stream better than several (Zen 4, one and two threads: 1.1 to 1.4 times as fast).
template <class W>
constexpr int streams_of(int m) {
  if (INFC_AVX512) return 1;
  return LinearLayout<W>::kMR / m >= 4 ? 4 : LinearLayout<W>::kMR / m >= 2 ? 2 : 1;
}
// How panels are widened to bytes where many rows are multiplied by them: the type of the result,
// and a row prepared for it. By default they are not.
template <class W>
struct Widened {
  using Type = void;
};
#if INFC_VNNI
template <>
struct Widened<int4x2> {
  using Type = int8_t;
  static PreparedRow<int8_t> row(const PreparedRow<int8_t>& row, int64_t K) {
    return {row.x, static_cast<const int32_t*>(row.made) + ceil_div(K, kGroup4)};
  }
  static void panel(const char* panel, int64_t K, char* wide) { widen_panel(panel, K, wide); }
};
template <int kBits, class Scale, class Minimum, Levels kLevels, int kChunks>
struct WidenedGroups {
  using Type = Grouped<8, float, WideMinimum<Minimum>>;
  static PreparedRow<int8_t> row(const PreparedRow<int8_t>& row, int64_t) { return row; }
  static void panel(const char* panel, int64_t K, char* wide) {
    widen_groups<kBits, Scale, Minimum, kLevels, kChunks>(panel, K, wide);
  }
};
template <class Scale, class Minimum, Levels kLevels, int kChunks>
struct Widened<Grouped<4, Scale, Minimum, kLevels, kChunks>>
    : WidenedGroups<4, Scale, Minimum, kLevels, kChunks> {};
template <class Scale, class Minimum, Levels kLevels, int kChunks>
struct Widened<Grouped<6, Scale, Minimum, kLevels, kChunks>>
    : WidenedGroups<6, Scale, Minimum, kLevels, kChunks> {};
#endif
template <class W>
constexpr bool kWidensPanels = !std::is_void_v<typename Widened<W>::Type>;
template <class W>
constexpr int64_t wide_panel_bytes(int64_t K) {
  if constexpr (kWidensPanels<W>) {
    return panel_bytes<typename Widened<W>::Type>(ceil_div(K, kGroup4) * kGroup4);
  } else {
    return 0;
  }
}
constexpr int64_t kRowsToWiden = 24;

// Bytes of a thread's scratch that products with panels of depth K need, for any number of rows.
template <class W>
constexpr int64_t product_scratch_bytes(int64_t K) {
  const int64_t rows = block_rows<W>(K);
  const int64_t row = static_cast<int64_t>(sizeof(PreparedRow<char>)) + Rows<W>::made_bytes(K);
  return ceil_div(rows * row, 64) * 64 + 64 + wide_panel_bytes<W>(K);
}

// Sums [MR][P][NR] of MR rows by P panels. Not inlined: one function for all that write sums out.
template <class W, int MR, int P>
__attribute__((noinline)) void multiply_rows(const PreparedRow<typename Rows<W>::X>* rows,
                                             const char* const* panels, int64_t K,
                                             typename Rows<W>::Sum* sums) {
  Multiply<W, MR, P>::run(rows, panels, K, sums);
}

// Rows of a tile where there are many: with groups of bytes as few as leave room for float totals
// beside the integer sums (Zen 4: 0.77 of the speed of int8_t with 6 rows, 0.91 with 3).
template <class W>
constexpr int kRowsOfTile = LinearLayout<W>::kMR;
#if INFC_VNNI
template <class Scale, class Minimum, Levels kLevels, int kChunks>
constexpr int kRowsOfTile<Grouped<8, Scale, Minimum, kLevels, kChunks>> = 3;
#endif

// The products of rows with packed panels of one weight, by one thread.
template <class W>
class Product {
 public:
  using X = typename Rows<W>::X;
  using Sum = typename Rows<W>::Sum;

  // `packed` is the weight's first panel; uses the thread's scratch, see product_scratch_bytes.
  Product(const Team& t, const void* packed, int64_t K)
      : packed_(static_cast<const char*>(packed)), scratch_(reinterpret_cast<char*>(t.scratch)), K_(K) {}

  // Rows [first, last) by panels [begin, end): row(i) gives the i-th row (its address, or a ScaledRow),
  // and write(i, panel, sums) receives the NR sums of one row by one panel.
  template <class RowAt, class Write>
  void run(int64_t first, int64_t last, int64_t begin, int64_t end, RowAt row, Write write) {
    if (begin >= end) return;
    const int64_t blocks = ceil_div(last - first, block_rows<W>(K_));
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t from = first + (last - first) * b / blocks;
      const int64_t to = first + (last - first) * (b + 1) / blocks;
      prepare(from, to, row);
      const auto shifted = [&](int64_t i, int64_t panel, const Sum* sums) {
        write(from + i, panel, sums);
      };
      if (to - from <= LinearLayout<W>::kMR / 2) {
        stream(static_cast<int>(to - from), begin, end, shifted);
      } else {
        for (int64_t p = begin; p < end; ++p) tiles(to - from, p, shifted);
      }
    }
  }

 private:
  static constexpr int kNR = LinearLayout<W>::kNR;
  static constexpr int kMR = LinearLayout<W>::kMR;

  template <class RowAt>
  void prepare(int64_t from, int64_t to, RowAt row) {
    rows_ = reinterpret_cast<PreparedRow<X>*>(scratch_);
    const int64_t count = to - from;
    char* made = scratch_ + ceil_div(count * static_cast<int64_t>(sizeof(PreparedRow<X>)), 64) * 64;
    for (int64_t i = 0; i < count; ++i, made += Rows<W>::made_bytes(K_)) {
      rows_[i] = prepare_row<W>(row(from + i), K_, made);
    }
    wide_ = made;
  }

  // m rows, as many panels side by side as that allows.
  template <class Write>
  void stream(int m, int64_t begin, int64_t end, Write write) {
    with_height<kMR / 2>(m, [&](auto height) {
      constexpr int kRows = decltype(height)::value;
      constexpr int kStreams = streams_of<W>(kRows);
      const int64_t length = (end - begin) / kStreams;
      for (int64_t i = 0; i < length; ++i) {
        multiply_tile<kRows, kStreams>(rows_, begin + i, length, write);
      }
      for (int64_t p = begin + length * kStreams; p < end; ++p) {
        multiply_tile<kRows, 1>(rows_, p, 0, write);
      }
    });
  }

  template <class Write>
  void tiles(int64_t rows, int64_t panel, Write write) {
    if constexpr (kWidensPanels<W>) {
      if (rows >= kRowsToWiden) return widened_tiles(rows, panel, write);
    }
    // Few rows are one tile, so that a panel is read once.
    if (kRowsOfTile<W> < kMR && rows <= kMR) {
      return with_height<kMR>(static_cast<int>(rows), [&](auto height) {
        multiply_tile<decltype(height)::value, 1>(rows_, panel, 0, write);
      });
    }
    for_each_tile<kRowsOfTile<W>>(rows, [&](int64_t from, auto height) {
      const auto shifted = [&](int64_t i, int64_t p, const Sum* sums) { write(from + i, p, sums); };
      multiply_tile<decltype(height)::value, 1>(rows_ + from, panel, 0, shifted);
    });
  }
  // The same over the panel as bytes.
  template <class Write>
  void widened_tiles(int64_t rows, int64_t panel, Write write) {
    using Wide = typename Widened<W>::Type;
    Widened<W>::panel(packed_ + panel * panel_bytes<W>(K_), K_, wide_);
    for_each_tile<kRowsOfTile<Wide>>(rows, [&](int64_t from, auto height) {
      constexpr int kRows = decltype(height)::value;
      PreparedRow<int8_t> tile[kRows];
      for (int m = 0; m < kRows; ++m) tile[m] = Widened<W>::row(rows_[from + m], K_);
      alignas(64) Sum sums[kRows * kNR];
      const char* panels[1] = {wide_};
      multiply_rows<Wide, kRows, 1>(tile, panels, K_, sums);
      for (int m = 0; m < kRows; ++m) write(from + m, panel, sums + m * kNR);
    });
  }
  // MR rows by P panels that lie `apart` panels from each other.
  template <int MR, int P, class Write>
  INFC_INLINE void multiply_tile(const PreparedRow<X>* rows, int64_t panel, int64_t apart,
                                 Write write) {
    alignas(64) Sum sums[MR * P * kNR];
    const char* panels[P];
    for (int p = 0; p < P; ++p) panels[p] = packed_ + (panel + p * apart) * panel_bytes<W>(K_);
    multiply_rows<W, MR, P>(rows, panels, K_, sums);
    for (int m = 0; m < MR; ++m) {
      for (int p = 0; p < P; ++p) write(m, panel + p * apart, sums + (m * P + p) * kNR);
    }
  }

  const char* packed_;
  char* scratch_;
  int64_t K_;
  PreparedRow<X>* rows_ = nullptr;
  char* wide_ = nullptr;
};

// Calls f(first panel, last panel, first row, last row) for this thread's share of M rows by the
// panels of N outputs. Threads share the panels; where these are few, also the rows.
template <class W, class F>
INFC_INLINE void for_each_share(const Team& t, int64_t M, int64_t N, F f) {
  const int64_t panels = ceil_div(N, LinearLayout<W>::kNR);
  int64_t parts = 1;  // stretches of rows that panels are cut into
  if (t.size > 1 && panels < 8 * t.size) {
    const int64_t wanted = ceil_div(8 * t.size, panels);
    const int64_t most = ceil_div(M, 4 * LinearLayout<W>::kMR);
    parts = wanted < most ? wanted : most;
    if (parts < 1) parts = 1;
  }
  const Share share = share_of(t, panels * parts);
  for (int64_t unit = share.begin; unit < share.end;) {
    const int64_t part = unit / panels;
    const int64_t begin = unit % panels;
    const int64_t left = begin + share.end - unit;
    const int64_t end = left < panels ? left : panels;
    f(begin, end, M * part / parts, M * (part + 1) / parts);
    unit += end - begin;
  }
}

}  // namespace infc
