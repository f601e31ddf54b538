// The products of linear_tile.hpp for rows of signed bytes and weights of few bits that share scales
// in groups of 32, 64 or 128 along K.
//
// Rows have a scale for each 32 elements, whatever the groups of the weight. With row codes x and
// scales s, and a weight's codes c, scales w and minima u, an output is
//     sum over g, 32 elements each, ascending:
//         float(sum of x * c) * (s[g] * w[g]) + u[g] * (s[g] * float(sum of x))
// where w[g] and u[g] are those of the group that has these elements. The sum of 32 is an exact integer. All other operations are in float32 and are rounded
// one by one (no fused multiply-add), so that every target gives the same bits.
//
// A panel holds, group after group of K: NR scales, NR minima (of formats that have them), and the codes
// of 32 elements after the other: with 8 bits as int8_t panels lie, with 4 bits as int4x2 panels do,
// with 6 bits as linear_six_bits.hpp says.
#pragma once

#include "linear_six_bits.hpp"

namespace infc {

constexpr int64_t kGroup = 32;  // elements of K that share a scale of a row

// IEEE half precision, as stored.
struct half {
  uint16_t bits;
};
// No scales, or no minima.
struct absent {};

// What the codes of 4 bits stand for: -8 .. 7 (stored as 0 .. 15), 0 .. 15, or the levels of a book,
// which are denser around zero (ir/formats.py: BOOK_I4).
enum class Levels { centered, counted, book };
constexpr int8_t kBook[16] = {-63, -52, -41, -32, -24, -17, -11, -5, 0, 6, 12, 19, 26, 34, 44, 56};
constexpr int kBookZero = 64;  // added to a level where it is multiplied as an unsigned number

// A weight of kBits per code (8, 6 or 4), with the types of its scales and minima: one for kChunks * 32
// elements of K. Codes of 8 and 6 bits are signed, whatever kLevels.
template <int kBits, class Scale, class Minimum = absent, Levels kLevels = Levels::centered,
          int kChunks = 1>
struct Grouped {};

template <class T>
constexpr int64_t size_in_panel = sizeof(T);
template <>
constexpr int64_t size_in_panel<absent> = 0;

namespace reg {
// As many elements as a register has lanes, as floats.
INFC_INLINE f32 load_scales(const float* p) { return load(p); }
INFC_INLINE f32 load_scales(const int8_t* p) { return load(p); }
INFC_INLINE f32 load_scales(const half* p) {
#if INFC_AVX512
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif INFC_AVX2 && defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  u16 narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  const u32 h = __builtin_convertvector(narrow, u32);
  // Infinity would become 65536 and NaN a larger number here. No artifact has either: quantization
  // refuses matrices that need them (BlockRounding.check_scales in ir/block_rounding.py).
  // The exponent is shifted by 112; subnormal numbers get their leading 1 and lose it again.
  const u32 wide = ((h & 0x7fff) << 13) + 0x38000000u;
  const f32 lifted = (f32)(wide + 0x00800000u) - (f32)(u32{} + 0x38800000u);
  const u32 magnitude = (h & 0x7c00) == 0 ? (u32)lifted : wide;
  return (f32)(magnitude | ((h & 0x8000) << 16));
#endif
}
}  // namespace reg

template <int kBits, class Scale, class Minimum, Levels kLevels, int kChunks>
struct LinearLayout<Grouped<kBits, Scale, Minimum, kLevels, kChunks>> {
  static constexpr int kNR = INFC_AVX512 ? 64 : 16;
  static constexpr int kMR = !(INFC_AVX512 || INFC_AVX2) ? 2 : kBits == 8 ? 6 : 4;
  static constexpr int64_t kScaleBytes = kNR * size_in_panel<Scale>;
  static constexpr int64_t kHeader = kScaleBytes + kNR * size_in_panel<Minimum>;
  static constexpr int64_t kChunkBytes = kNR * kGroup * kBits / 8;
  static constexpr int64_t kGroupElements = kGroup * kChunks;
  static constexpr int64_t kGroupBytes = kHeader + kChunks * kChunkBytes;

  // Where the scales, minima and codes of the 32 elements from 32 * g lie in a panel.
  INFC_INLINE static const char* scales(const char* panel, int64_t g) {
    return panel + g / kChunks * kGroupBytes;
  }
  INFC_INLINE static const char* minima(const char* panel, int64_t g) {
    return scales(panel, g) + kScaleBytes;
  }
  INFC_INLINE static const char* codes(const char* panel, int64_t g) {
    return scales(panel, g) + kHeader + g % kChunks * kChunkBytes;
  }
};

// A row of codes with a scale for each group.
struct ScaledRow {
  const int8_t* x;
  const float* scale;
};

// How codes are multiplied: unsigned bytes by signed ones, four products in a 32-bit lane (VNNI, and
// levels of a book and codes of 6 bits, which are below 128: no pair of products overflows 16 bits); two
// in a 16-bit lane (other 4-bit codes elsewhere); signed numbers of 16 bits in pairs (bytes elsewhere).
template <int kBits>
constexpr bool kWidensRows = kBits == 8 && !INFC_VNNI;
template <int kBits, Levels kLevels>
constexpr bool kSumsHalves = kBits == 4 && kLevels != Levels::book && INFC_MADDUBS;

// 32 elements of a row as products read it: its scale, the sum of its elements times that, what its
// integer sums start from (since codes are stored as unsigned numbers), and its elements.
template <class X>
struct GroupRow {
  float scale;
  float sum;
  int32_t offset;
  int32_t unused;
  X x[kGroup];
};

// What is made of a row: its groups of 32, the last one padded with zeros.
template <int kBits, class Scale, class Minimum, Levels kLevels, int kChunks>
struct Rows<Grouped<kBits, Scale, Minimum, kLevels, kChunks>> {
  using X = int8_t;
  using Sum = float;
  using Group = GroupRow<std::conditional_t<kWidensRows<kBits>, int16_t, int8_t>>;
  // How far above their values codes are multiplied.
  static constexpr int kZero = kBits == 8                      ? (INFC_VNNI ? 128 : 0)
                               : kBits == 6                    ? kSixBitZero
                               : kLevels == Levels::book       ? kBookZero
                               : kLevels == Levels::centered   ? 8
                                                               : 0;

  static constexpr int64_t made_bytes(int64_t K) {
    return ceil_div(ceil_div(K, kGroup) * static_cast<int64_t>(sizeof(Group)), 64) * 64;
  }
  static void prepare(const ScaledRow& row, int64_t K, void* made) {
    Group* group = static_cast<Group*>(made);
    for (int64_t k = 0; k < K; k += kGroup, ++group) {
      int8_t x[kGroup] = {};
      std::memcpy(x, row.x + k, static_cast<size_t>(K - k < kGroup ? K - k : kGroup));
      int32_t halves[2] = {0, 0};  // of every four elements the first two, and the last two
      for (int64_t i = 0; i < kGroup; i += 4) {
        halves[0] += x[i] + x[i + 1];
        halves[1] += x[i + 2] + x[i + 3];
      }
      const int32_t sum = halves[0] + halves[1];
      group->scale = row.scale[k / kGroup];
      group->sum = group->scale * static_cast<float>(sum);
      group->offset = -kZero * sum;
      if constexpr (kSumsHalves<kBits, kLevels>) {
        const int16_t starts[2] = {static_cast<int16_t>(-kZero * halves[0]),
                                   static_cast<int16_t>(-kZero * halves[1])};
        std::memcpy(&group->offset, starts, sizeof starts);
      }
      for (int64_t i = 0; i < kGroup; ++i) group->x[i] = x[i];
    }
  }
};

template <class W>
INFC_INLINE PreparedRow<int8_t> prepare_row(const ScaledRow& row, int64_t K, void* made) {
  Rows<W>::prepare(row, K, made);
  return {row.x, made};
}

#if INFC_VNNI || INFC_MADDUBS
namespace reg {
// The unsigned numbers that codes of 4 bits are multiplied as.
template <Levels kLevels>
INFC_INLINE u8 unsigned_levels(u8 codes) {
  if constexpr (kLevels != Levels::book) return codes;
  alignas(16) static constexpr uint8_t kUnsigned[16] = {
      kBook[0] + kBookZero,  kBook[1] + kBookZero,  kBook[2] + kBookZero,  kBook[3] + kBookZero,
      kBook[4] + kBookZero,  kBook[5] + kBookZero,  kBook[6] + kBookZero,  kBook[7] + kBookZero,
      kBook[8] + kBookZero,  kBook[9] + kBookZero,  kBook[10] + kBookZero, kBook[11] + kBookZero,
      kBook[12] + kBookZero, kBook[13] + kBookZero, kBook[14] + kBookZero, kBook[15] + kBookZero};
  const __m128i book = _mm_load_si128(reinterpret_cast<const __m128i*>(kUnsigned));
#if INFC_AVX512
  return (u8)_mm512_shuffle_epi8(_mm512_maskz_broadcast_i32x4(0xffff, book), (__m512i)codes);
#elif INFC_AVX2
  return (u8)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(book), (__m256i)codes);
#else
  return (u8)_mm_shuffle_epi8(book, (__m128i)codes);
#endif
}

// acc + products of unsigned levels by the four signed bytes x.
template <Levels kLevels>
INFC_INLINE i32 add_levels(i32 acc, u8 levels, int32_t x) {
  if constexpr (kLevels == Levels::book) return add_small_bytes(acc, levels, x);
  return add_codes(acc, levels, x);
}
}  // namespace reg

// Adds the products of 32 elements of each row by as many 4-bit codes of each output.
template <Levels kLevels, int MR, int P, int NR>
INFC_INLINE void add_nibbles(IntAccumulators<MR, P, NR>& acc, const int8_t* const* x,
                             const char* const* codes) {
#pragma GCC unroll 1
  for (int step = 0; step < 4; ++step) {
    INFC_UNROLL for (int p = 0; p < P; ++p) {
      const char* bytes = codes[p] + step * NR * 4;
      INFC_UNROLL for (int upper = 0; upper < 2; ++upper) {
        reg::u8 c[acc.kVectors];
        INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
          const reg::u8 both = reg::load_codes(bytes + j * kRegLanes * 4);
          c[j] = reg::unsigned_levels<kLevels>(upper ? reg::high_codes(both) : reg::low_codes(both));
        }
        INFC_UNROLL for (int m = 0; m < MR; ++m) {
          int32_t four;
          std::memcpy(&four, x[m] + 16 * upper + 4 * step, 4);
          INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
            acc.v[m][p][j] = reg::add_levels<kLevels>(acc.v[m][p][j], c[j], four);
          }
        }
      }
    }
  }
}
#else
template <Levels kLevels, int MR, int P, int NR>
INFC_INLINE void add_nibbles(IntAccumulators<MR, P, NR>& acc, const int8_t* const* x,
                             const char* const* codes) {
  const auto level = [](int code) {
    return kLevels == Levels::book ? kBook[code] + kBookZero : code;
  };
  for (int m = 0; m < MR; ++m) {
    for (int p = 0; p < P; ++p) {
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(codes[p]);
      for (int n = 0; n < NR; ++n) {
        int32_t sum = 0;
        for (int k = 0; k < kGroup / 2; ++k) {
          const int byte = bytes[(k / 4 * NR + n) * 4 + k % 4];
          sum += level(byte & 15) * x[m][k] + level(byte >> 4) * x[m][k + 16];
        }
        acc.v[m][p][n / kRegLanes][n % kRegLanes] += sum;
      }
    }
  }
}
#endif

#if INFC_VNNI
// The same for bytes.
template <int MR, int P, int NR>
INFC_INLINE void add_bytes(IntAccumulators<MR, P, NR>& acc, const int8_t* const* x,
                           const char* const* codes) {
#pragma GCC unroll 8
  for (int64_t k = 0; k < kGroup / 4; ++k) {
    int32_t quad[MR];
    INFC_UNROLL for (int m = 0; m < MR; ++m) std::memcpy(&quad[m], x[m] + 4 * k, 4);
    step_quad<MR, P>(acc, codes, k * NR * 4, quad);
  }
}
#else
template <int MR, int P, int NR>
INFC_INLINE void add_bytes(IntAccumulators<MR, P, NR>& acc, const int16_t* const* x,
                           const char* const* codes) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < kGroup; k += 2) {
    INFC_UNROLL for (int p = 0; p < P; ++p) {
      reg::i16 b[acc.kVectors];
      INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
        b[j] = reg::widen_bytes(reinterpret_cast<const int8_t*>(codes[p]) + k * NR +
                                j * kRegLanes * 2);
      }
      INFC_UNROLL for (int m = 0; m < MR; ++m) {
        int32_t both;
        std::memcpy(&both, x[m] + k, sizeof both);
        const reg::i16 a = (reg::i16)(reg::i32{} + both);
        INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
          acc.v[m][p][j] += reg::add_products(b[j], a);
        }
      }
    }
  }
}
#endif

namespace reg {
// An integer sum as a float, of lanes as they were accumulated.
template <bool kHalves>
INFC_INLINE f32 group_sum(i32 sum) {
#if INFC_AVX512
  if constexpr (kHalves) sum = (i32)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1));
#elif INFC_AVX2
  if constexpr (kHalves) sum = (i32)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
#elif INFC_MADDUBS
  if constexpr (kHalves) sum = (i32)_mm_madd_epi16((__m128i)sum, _mm_set1_epi16(1));
#endif
  return __builtin_convertvector(sum, f32);
}
}  // namespace reg

// Also multiplies panels of 4-bit codes that widen_groups has widened to bytes: these are panels of
// Grouped<8, float, ...>.
template <int kBits, class Scale, class Minimum, Levels kLevels, int kChunks, int MR,
          int P>
struct Multiply<Grouped<kBits, Scale, Minimum, kLevels, kChunks>, MR, P> {
  using W = Grouped<kBits, Scale, Minimum, kLevels, kChunks>;
  using Layout = LinearLayout<W>;
  using Group = typename Rows<W>::Group;
  static constexpr int kNR = Layout::kNR;
  static constexpr int kVectors = kNR / kRegLanes;
  // Whether totals fit into registers beside the sums of a group; else they stay in memory.
  static constexpr bool kTotalsInRegisters = INFC_AVX512 && MR * P <= 3;

  static void run(const PreparedRow<int8_t>* rows, const char* const* panels, int64_t K,
                  float* sums) {
    const Group* row[MR];
    const char* panel[P];
    INFC_UNROLL for (int m = 0; m < MR; ++m) row[m] = static_cast<const Group*>(rows[m].made);
    INFC_UNROLL for (int p = 0; p < P; ++p) panel[p] = panels[p];
    reg::f32 totals[MR * P * kVectors];
    if constexpr (kTotalsInRegisters) {
      INFC_UNROLL for (int i = 0; i < MR * P * kVectors; ++i) totals[i] = reg::f32{};
    } else {
      std::memset(sums, 0, sizeof totals);
    }
    for (int64_t g = 0; g < ceil_div(K, kGroup); ++g) {
      ask_ahead<MR, Layout::kGroupBytes / kChunks>(Layout::codes(panel[0], g));
      IntAccumulators<MR, P, kNR> acc;
      multiply(acc, row, panel, g);
      const auto add = [&](int i, reg::f32 scaled) {
        if constexpr (kTotalsInRegisters) {
          totals[i] = totals[i] + scaled;
        } else {
          reg::store(sums + i * kRegLanes, reg::load(sums + i * kRegLanes) + scaled);
        }
      };
      if constexpr (!kTotalsInRegisters) asm volatile("" ::: "memory");
      scale(acc, row, panel, g, add);
    }
    if constexpr (kTotalsInRegisters) {
      INFC_UNROLL for (int i = 0; i < MR * P * kVectors; ++i) {
        reg::store(sums + i * kRegLanes, totals[i]);
      }
    }
  }

 private:
  // The integer sums of 32 elements, those from 32 * g.
  INFC_INLINE static void multiply(IntAccumulators<MR, P, kNR>& acc, const Group* const* row,
                                   const char* const* panel, int64_t g) {
    const std::remove_extent_t<decltype(Group::x)>* x[MR];
    const char* codes[P];
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      x[m] = row[m][g].x;
      acc.set_row(m, row[m][g].offset);
    }
    INFC_UNROLL for (int p = 0; p < P; ++p) codes[p] = Layout::codes(panel[p], g);
    if constexpr (kBits == 8) {
      add_bytes(acc, x, codes);
    } else if constexpr (kBits == 6) {
      add_six_bits(acc, x, codes);
    } else {
      add_nibbles<kLevels>(acc, x, codes);
    }
  }

  // Calls add(i, scaled sums) for each register of totals.
  template <class Add>
  INFC_INLINE static void scale(const IntAccumulators<MR, P, kNR>& acc, const Group* const* row,
                                const char* const* panel, int64_t g, Add add) {
    INFC_UNROLL for (int p = 0; p < P; ++p) {
      const char* scales = Layout::scales(panel[p], g);
      INFC_UNROLL for (int j = 0; j < kVectors; ++j) {
        INFC_UNROLL for (int m = 0; m < MR; ++m) {
          const reg::f32 sum = reg::group_sum<kSumsHalves<kBits, kLevels>>(acc.v[m][p][j]);
          reg::f32 by = reg::set1(row[m][g].scale);
          if constexpr (!std::is_same_v<Scale, absent>) {
            by = by * reg::load_scales(reinterpret_cast<const Scale*>(scales) + j * kRegLanes);
          }
          add((m * P + p) * kVectors + j, sum * by);
          if constexpr (!std::is_same_v<Minimum, absent>) {
            const char* minima = Layout::minima(panel[p], g);
            add((m * P + p) * kVectors + j,
                reg::load_scales(reinterpret_cast<const Minimum*>(minima) + j * kRegLanes) *
                    reg::set1(row[m][g].sum));
          }
        }
      }
    }
  }
};

#if INFC_VNNI
// The unsigned numbers that 32 codes of 4 bits of each output are multiplied as, [8][NR][4].
template <Levels kLevels, int NR>
INFC_INLINE void widen_nibbles(const char* codes, char* wide) {
  for (int step = 0; step < 4; ++step) {
    INFC_UNROLL for (int j = 0; j < NR / kLanes; ++j) {
      const int64_t at = (step * NR + j * kLanes) * 4;
      const reg::u8 both = reg::load_codes(codes + at);
      const reg::u8 low = reg::unsigned_levels<kLevels>(reg::low_codes(both));
      const reg::u8 high = reg::unsigned_levels<kLevels>(reg::high_codes(both));
      std::memcpy(wide + at, &low, sizeof low);
      std::memcpy(wide + at + 4 * NR * 4, &high, sizeof high);
    }
  }
}

// A panel with its codes as bytes, and floats as scales of 32 each: many rows then spare unpacking them
// for every few of them.
template <class Minimum>
using WideMinimum = std::conditional_t<std::is_same_v<Minimum, absent>, absent, float>;
template <int kBits, class Scale, class Minimum, Levels kLevels, int kChunks>
INFC_INLINE void widen_groups(const char* panel, int64_t K, char* wide) {
  using From = LinearLayout<Grouped<kBits, Scale, Minimum, kLevels, kChunks>>;
  using To = LinearLayout<Grouped<8, float, WideMinimum<Minimum>>>;
  constexpr int kNR = From::kNR;
  for (int64_t g = 0; g < ceil_div(K, kGroup); ++g) {
    INFC_UNROLL for (int j = 0; j < kNR; j += kRegLanes) {
      reg::store(reinterpret_cast<float*>(wide) + j,
                 reg::load_scales(reinterpret_cast<const Scale*>(From::scales(panel, g)) + j));
      if constexpr (!std::is_same_v<Minimum, absent>) {
        reg::store(reinterpret_cast<float*>(wide + To::kScaleBytes) + j,
                   reg::load_scales(reinterpret_cast<const Minimum*>(From::minima(panel, g)) + j));
      }
    }
    if constexpr (kBits == 6) {
      widen_six_bits<kNR>(From::codes(panel, g), wide + To::kHeader);
    } else {
      widen_nibbles<kLevels, kNR>(From::codes(panel, g), wide + To::kHeader);
    }
    wide += To::kGroupBytes;
  }
}
#endif

}  // namespace infc
