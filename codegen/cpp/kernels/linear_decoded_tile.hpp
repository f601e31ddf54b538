// The products of linear_tile.hpp for rows of floats and the panels of linear_groups_tile.hpp.
//
// With the row x, and a weight's levels c (the numbers that codes stand for), scales w and minima u,
// an output is
//     sum over g, 32 elements each, ascending:
//         (sum of x[k] * c[k], k ascending) * w[g] + u[g] * (sum of x[k])
// Everything is in float32, and each operation is rounded on its own (no fused multiply-add), so that
// every target gives the same bits. The sum of 32 elements of x is that of lanes i and i + 16, and then
// the tree of sum_lanes.
#pragma once

#include "linear_groups_tile.hpp"

namespace infc {

// The codes of G, a Grouped, where rows that they are multiplied by are floats.
template <class G>
struct Decoded {};

template <class W>
constexpr bool kIsDecoded = false;
template <class G>
constexpr bool kIsDecoded<Decoded<G>> = true;

template <class G>
struct LinearLayout<Decoded<G>> : LinearLayout<G> {
  static constexpr int kMR = INFC_AVX512 || INFC_AVX2 ? 6 : 2;
};

// What is made of a row: floats, the last 32 padded with zeros, then the sums of each 32 where the format
// has minima.
template <int kBits, class Scale, class Minimum, Levels kLevels, int kChunks>
struct Rows<Decoded<Grouped<kBits, Scale, Minimum, kLevels, kChunks>>> {
  using X = float;
  using Sum = float;
  static constexpr bool kHasMinima = !std::is_same_v<Minimum, absent>;

  static constexpr int64_t made_bytes(int64_t K) {
    const int64_t groups = ceil_div(K, kGroup);
    return ceil_div((groups * kGroup + (kHasMinima ? groups : 0)) * 4, 64) * 64;
  }
  static const float* group_sums(const float* made, int64_t K) {
    return made + ceil_div(K, kGroup) * kGroup;
  }
  template <class T>
  static void prepare(const T* x, int64_t K, void* made) {
    float* row = static_cast<float*>(made);
    const int64_t groups = ceil_div(K, kGroup);
    for_each_group(K, [&](int64_t k, int64_t n) { store_group(row + k, load_group(x + k, n), n); });
    std::memset(row + K, 0, static_cast<size_t>(groups * kGroup - K) * sizeof(float));
    if constexpr (kHasMinima) {
      for (int64_t g = 0; g < groups; ++g) {
        const float* part = row + g * kGroup;
        row[groups * kGroup + g] = sum_lanes(load(part) + load(part + kLanes));
      }
    }
  }
};

template <class W, class = std::enable_if_t<kIsDecoded<W>>>
INFC_INLINE PreparedRow<float> prepare_row(const bf16* x, int64_t K, void* made) {
  Rows<W>::prepare(x, K, made);
  return {nullptr, made};
}

// The codes of 32 elements as a register has them: words of kPer neighbors in K for each output, as
// unsigned numbers that are kZero above their levels (with AVX-512, the codes of 4 bits themselves).
template <int kBits, Levels kLevels, int kNR>
struct CodeWords {
  static constexpr int kPer = kBits == 8 ? LinearLayout<int8_t>::kKP : 4;
  static constexpr int kCount = kGroup / kPer;
  static constexpr int kZero = kBits == 8                    ? 128
                               : kBits == 6                  ? kSixBitZero
                               : kLevels == Levels::book     ? kBookZero
                               : kLevels == Levels::centered ? 8
                                                             : 0;

  // Word w of the outputs that begin with n.
  INFC_INLINE static reg::u32 load(const char* codes, int w, int64_t n) {
    if constexpr (kPer == 2) {
      reg::u16 pairs;
      std::memcpy(&pairs, codes + (w * kNR + n) * 2, sizeof pairs);
      return __builtin_convertvector(pairs, reg::u32) ^ 0x8080;  // signed codes, plus 128
    } else {
      if constexpr (kBits == 6) {
        const int half = w / 4, quad = w % 4;
        const reg::u32 high = word_at(codes + six_bit_row<kNR>(half, 0, n)) >> (2 * quad);
        const reg::u32 low = word_at(codes + six_bit_row<kNR>(half, 1 + quad % 2, n)) >> (quad / 2 * 4);
        return ((high & 0x03030303u) << 4) | (low & 0x0f0f0f0fu);
      }
      const int step = kBits == 4 ? w % 4 : w;
      const reg::u32 word = word_at(codes + (step * kNR + n) * 4);
      return kBits == 4 ? unsigned_codes(word >> (w / 4 * 4)) : word;
    }
  }

  // The levels of neighbor i.
  INFC_INLINE static reg::f32 level(reg::u32 word, int i) {
#if INFC_AVX512
    if constexpr (kBits == 4) {
      alignas(64) static constexpr auto kTable = table();
      const __m512 levels = _mm512_load_ps(kTable.x);
      return _mm512_maskz_permutexvar_ps(0xffff, (__m512i)(word >> (8 * i)), levels);
    }
#endif
    // A small whole number is the last bits of 2^23 plus that number.
    const reg::u32 bits = ((word >> (8 * i)) & 0xff) | 0x4b000000u;
    return (reg::f32)bits - reg::set1(8388608.0f + kZero);
  }

 private:
  INFC_INLINE static reg::u32 word_at(const char* p) {
    reg::u32 word;
    std::memcpy(&word, p, sizeof word);
    return word;
  }

  struct Table {
    float x[16];
  };
  static constexpr Table table() {
    Table t{};
    for (int i = 0; i < 16; ++i) {
      t.x[i] = static_cast<float>(kLevels == Levels::book ? kBook[i] : i - kZero);
    }
    return t;
  }

  INFC_INLINE static reg::u32 unsigned_codes(reg::u32 shifted) {
#if INFC_AVX512
    return shifted;  // a permutation reads the lower four bits of a lane alone
#else
    const reg::u32 codes = shifted & 0x0f0f0f0fu;
    if constexpr (kLevels != Levels::book) {
      return codes;
    } else {
#if INFC_MADDUBS
      return (reg::u32)reg::unsigned_levels<kLevels>((reg::u8)codes);
#else
      uint8_t bytes[sizeof codes];
      std::memcpy(bytes, &codes, sizeof bytes);
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(kBook[byte] + kBookZero);
      reg::u32 levels;
      std::memcpy(&levels, bytes, sizeof levels);
      return levels;
#endif
    }
#endif
  }
};

template <int kBits, class Scale, class Minimum, Levels kLevels, int kChunks, int MR,
          int P>
struct Multiply<Decoded<Grouped<kBits, Scale, Minimum, kLevels, kChunks>>, MR, P> {
  using W = Decoded<Grouped<kBits, Scale, Minimum, kLevels, kChunks>>;
  using Layout = LinearLayout<W>;
  static constexpr int kNR = Layout::kNR;
  static constexpr int kVectors = kNR / kRegLanes;
  using Words = CodeWords<kBits, kLevels, kNR>;
  struct Sums {
    reg::f32 v[MR][P][kVectors];
  };

  static void run(const PreparedRow<float>* rows, const char* const* panels, int64_t K,
                  float* sums) {
    const float* row[MR];
    const float* row_sums[MR];
    const char* panel[P];
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      row[m] = static_cast<const float*>(rows[m].made);
      row_sums[m] = Rows<W>::group_sums(row[m], K);
    }
    INFC_UNROLL for (int p = 0; p < P; ++p) panel[p] = panels[p];
    std::memset(sums, 0, sizeof(float) * MR * P * kNR);
    for (int64_t g = 0; g < ceil_div(K, kGroup); ++g) {
      Sums acc;
      multiply(acc, row, panel, g);
      asm volatile("" ::: "memory");  // totals stay in memory: the registers are for the sums
      scale(acc, row_sums, panel, g, sums);
    }
  }

 private:
  // The sums of 32 elements, those from 32 * g, before they are scaled.
  INFC_INLINE static void multiply(Sums& acc, const float* const* row, const char* const* panel,
                                   int64_t g) {
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      INFC_UNROLL for (int p = 0; p < P; ++p) {
        INFC_UNROLL for (int j = 0; j < kVectors; ++j) acc.v[m][p][j] = reg::f32{};
      }
    }
#pragma GCC unroll 1
    for (int w = 0; w < Words::kCount; ++w) {
      INFC_UNROLL for (int p = 0; p < P; ++p) {
        const char* codes = Layout::codes(panel[p], g);
        INFC_UNROLL for (int i = 0; i < Words::kPer; ++i) {
          // With many rows there are no registers for words: they are read anew for each k.
          if constexpr (MR > 3) asm volatile("" ::: "memory");
          reg::f32 b[kVectors];
          INFC_UNROLL for (int j = 0; j < kVectors; ++j) {
            b[j] = Words::level(Words::load(codes, w, j * kRegLanes), i);
          }
          INFC_UNROLL for (int m = 0; m < MR; ++m) {
            const reg::f32 a = reg::set1(row[m][g * kGroup + w * Words::kPer + i]);
            INFC_UNROLL for (int j = 0; j < kVectors; ++j) {
              acc.v[m][p][j] = acc.v[m][p][j] + a * b[j];
            }
          }
        }
      }
    }
  }

  // Adds them to the totals, times their scales, and what the minima add.
  INFC_INLINE static void scale(const Sums& acc, const float* const* row_sums,
                                const char* const* panel, int64_t g, float* sums) {
    INFC_UNROLL for (int p = 0; p < P; ++p) {
      const char* group = Layout::scales(panel[p], g);
      INFC_UNROLL for (int j = 0; j < kVectors; ++j) {
        const reg::f32 scales =
            reg::load_scales(reinterpret_cast<const Scale*>(group) + j * kRegLanes);
        INFC_UNROLL for (int m = 0; m < MR; ++m) {
          float* at = sums + ((m * P + p) * kVectors + j) * kRegLanes;
          reg::f32 total = reg::load(at) + acc.v[m][p][j] * scales;
          if constexpr (Rows<W>::kHasMinima) {
            const char* minima = Layout::minima(panel[p], g);
            total = total +
                    reg::load_scales(reinterpret_cast<const Minimum*>(minima) + j * kRegLanes) *
                        reg::set1(row_sums[m][g]);
          }
          reg::store(at, total);
        }
      }
    }
  }
};

}  // namespace infc
