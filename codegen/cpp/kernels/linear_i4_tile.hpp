// The products of linear_tile.hpp for rows of signed bytes and weights of 4 bits in groups of 32.
//
// A weight is the integer m * c: a code c in -8 .. 7, kept as c + 8, and its group's multiplier m in
// -15 .. 15 (ir/formats.py: I4_G32). A panel holds, group after group of k: NR multipliers, then four times
// [NR][4] bytes, whose lower halves are the codes of k = 4j .. 4j + 3 and the upper of 16 more.
// A group's sum of x * c lies within 32512 and is multiplied by m as 16 bits; all is exact.
#pragma once

#include "linear_i8_tile.hpp"

namespace infc {

// Two codes of 4 bits.
struct int4x2 {
  uint8_t bits;
};

constexpr int64_t kGroup4 = 32;  // weights that share a multiplier

// How bytes are multiplied: four products a 32-bit lane (VNNI), two a 16-bit lane, or one by one.
#if defined(__SSSE3__) && !INFC_VNNI
#define INFC_MADDUBS 1
#else
#define INFC_MADDUBS 0
#endif

template <>
struct LinearLayout<int4x2> {
  static constexpr int kNR = INFC_AVX512 ? 64 : 16;
  static constexpr int kMR = INFC_AVX512 || INFC_AVX2 ? 4 : 2;
  static constexpr int64_t kGroupElements = kGroup4;
  static constexpr int64_t kGroupBytes = kNR * (1 + kGroup4 / 2);
};

// What is made of a row, as codes lie 8 too high: -8 times the sum of each group, of every four
// elements the first two apart from the last two where products are summed in 16 bits. Behind it
// with VNNI: -128 times the sum of all, for panels that are widened to bytes.
template <>
struct Rows<int4x2> {
  using X = int8_t;
  using Sum = int32_t;
  static constexpr int64_t made_bytes(int64_t K) {
    return ceil_div((ceil_div(K, kGroup4) + 1) * 4, 64) * 64;
  }
  static void prepare(const int8_t* x, int64_t K, void* made) {
    int32_t* offsets = static_cast<int32_t*>(made);
    const int64_t groups = ceil_div(K, kGroup4);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t left = K - g * kGroup4;
      int8_t part[kGroup4] = {};
      std::memcpy(part, x + g * kGroup4, static_cast<size_t>(left < kGroup4 ? left : kGroup4));
      int32_t pairs[2] = {0, 0};
      for (int64_t k = 0; k < kGroup4; k += 4) {
        pairs[0] += part[k] + part[k + 1];
        pairs[1] += part[k + 2] + part[k + 3];
      }
#if INFC_MADDUBS
      const int16_t halves[2] = {static_cast<int16_t>(-8 * pairs[0]),
                                 static_cast<int16_t>(-8 * pairs[1])};
      std::memcpy(&offsets[g], halves, sizeof halves);
#else
      offsets[g] = -8 * (pairs[0] + pairs[1]);
#endif
    }
    offsets[groups] = -128 * sum_bytes(x, K);
  }
};

#if INFC_VNNI || INFC_MADDUBS
// A register of bytes, and what is done with it.
namespace reg {
typedef uint8_t u8 __attribute__((vector_size(kRegLanes * 4)));
typedef uint16_t u16x2 __attribute__((vector_size(kRegLanes * 4)));

INFC_INLINE u8 load_codes(const char* p) {
  u8 r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
INFC_INLINE u8 low_codes(u8 codes) { return codes & 15; }
INFC_INLINE u8 high_codes(u8 codes) { return (u8)((u16x2)codes >> 4) & 15; }

// Has the sum in a register here. gcc would first add up products of one accumulator, which takes
// more registers than there are (Zen 2, one thread: 148 GOP/s without, 177 with).
template <class R>
INFC_INLINE void keep_sum(R& sum) {
  asm("" : "+x"(sum));
}

// acc + products of unsigned codes by the four signed bytes x: with VNNI four products a lane of 32
// bits, else two a lane of 16.
INFC_INLINE i32 add_codes(i32 acc, u8 codes, int32_t x) {
  const i32 xs = i32{} + x;
#if INFC_VNNI
  return (i32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)xs);
#elif INFC_AVX512
  return (i32)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16((__m512i)codes, (__m512i)xs));
#elif INFC_AVX2
  __m256i sum = _mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)codes, (__m256i)xs));
  keep_sum(sum);
  return (i32)sum;
#else
  __m128i sum = _mm_add_epi16((__m128i)acc, _mm_maddubs_epi16((__m128i)codes, (__m128i)xs));
  keep_sum(sum);
  return (i32)sum;
#endif
}

// The multipliers at p: with VNNI in the lower half of each lane, above it zero; else in both.
INFC_INLINE i32 load_multipliers(const char* p) {
  i32 m;
#if INFC_AVX512
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  m = (i32)_mm512_maskz_cvtepi8_epi32(0xffff, bytes) & 0xffff;
#elif INFC_AVX2
  m = (i32)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))) & 0xffff;
#else
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  for (int i = 0; i < kRegLanes; ++i) m[i] = static_cast<int8_t>(four >> (8 * i)) & 0xffff;
#endif
  return INFC_VNNI ? m : m | (m << 16);
}

// total + multiplier * the group's sum.
INFC_INLINE i32 add_group(i32 total, i32 sum, i32 multipliers) {
#if INFC_VNNI
  return (i32)_mm512_dpwssd_epi32((__m512i)total, (__m512i)sum, (__m512i)multipliers);
#elif INFC_AVX512
  return total + (i32)_mm512_madd_epi16((__m512i)sum, (__m512i)multipliers);
#elif INFC_AVX2
  return total + (i32)_mm256_madd_epi16((__m256i)sum, (__m256i)multipliers);
#else
  return total + (i32)_mm_madd_epi16((__m128i)sum, (__m128i)multipliers);
#endif
}
}  // namespace reg

// One group: x[m] points at 32 elements of each row, offset[m] is what its sums start from, and
// group[p] points at the group in each panel. Adds to sums [MR][P][NR].
template <int MR, int P>
INFC_INLINE void multiply_group(const int8_t* const* x, const int32_t* offset,
                                const char* const* group, int32_t* sums) {
  constexpr int kNR = LinearLayout<int4x2>::kNR;
  IntAccumulators<MR, P, kNR> acc;
  INFC_UNROLL for (int m = 0; m < MR; ++m) acc.set_row(m, offset[m]);
  // A lone row has many instructions to few bytes, so the processor itself does not look far ahead
  // (AVX2 on Zen 2, two threads: 35 GB/s without, 42 with). With AVX-512 it does, and prefetching
  // only delays the loads (Zen 4, one thread: 47 GB/s without, 16 with).
  if constexpr (MR == 1 && !INFC_AVX512) {
    constexpr int64_t kBytes = LinearLayout<int4x2>::kGroupBytes;
    for (int p = 0; p < P; ++p) {
      INFC_UNROLL for (int64_t b = 0; b < kBytes; b += 64) prefetch(group[p] + 2 * kBytes + b);
    }
  }
  // Lower halves are 16 elements before the upper ones. Codes wait in registers, not elements: there
  // is no room for both.
#pragma GCC unroll 1
  for (int step = 0; step < 4; ++step) {
    INFC_UNROLL for (int p = 0; p < P; ++p) {
      const char* bytes = group[p] + kNR + step * kNR * 4;
      INFC_UNROLL for (int upper = 0; upper < 2; ++upper) {
        reg::u8 codes[acc.kVectors];
        INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
          const reg::u8 both = reg::load_codes(bytes + j * kRegLanes * 4);
          codes[j] = upper ? reg::high_codes(both) : reg::low_codes(both);
        }
        INFC_UNROLL for (int m = 0; m < MR; ++m) {
          int32_t four;
          std::memcpy(&four, x[m] + 16 * upper + 4 * step, 4);
          INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
            acc.v[m][p][j] = reg::add_codes(acc.v[m][p][j], codes[j], four);
          }
        }
      }
    }
  }
  // Totals stay in memory: the registers are for the sums.
  asm volatile("" ::: "memory");
  INFC_UNROLL for (int p = 0; p < P; ++p) {
    INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
      const reg::i32 multipliers = reg::load_multipliers(group[p] + j * kRegLanes);
      INFC_UNROLL for (int m = 0; m < MR; ++m) {
        int32_t* at = sums + ((m * P + p) * acc.kVectors + j) * kRegLanes;
        reg::i32 total;
        std::memcpy(&total, at, sizeof total);
        total = reg::add_group(total, acc.v[m][p][j], multipliers);
        std::memcpy(at, &total, sizeof total);
      }
    }
  }
}
#else
template <int MR, int P>
INFC_INLINE void multiply_group(const int8_t* const* x, const int32_t* offset,
                                const char* const* group, int32_t* sums) {
  constexpr int kNR = LinearLayout<int4x2>::kNR;
  for (int m = 0; m < MR; ++m) {
    for (int p = 0; p < P; ++p) {
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(group[p]) + kNR;
      for (int n = 0; n < kNR; ++n) {
        int32_t sum = offset[m];
        for (int k = 0; k < kGroup4 / 2; ++k) {
          const int byte = codes[(k / 4 * kNR + n) * 4 + k % 4];
          sum += (byte & 15) * x[m][k] + (byte >> 4) * x[m][k + 16];
        }
        sums[(m * P + p) * kNR + n] += sum * static_cast<int8_t>(group[p][n]);
      }
    }
  }
}
#endif

template <int MR, int P>
struct Multiply<int4x2, MR, P> {
  static void run(const PreparedRow<int8_t>* rows, const char* const* panels, int64_t K,
                  int32_t* sums) {
    constexpr int64_t kBytes = LinearLayout<int4x2>::kGroupBytes;
    std::memset(sums, 0, sizeof(int32_t) * MR * P * LinearLayout<int4x2>::kNR);
    const int64_t whole = K / kGroup4;
    for (int64_t g = 0; g < whole; ++g) {
      const int8_t* x[MR];
      INFC_UNROLL for (int m = 0; m < MR; ++m) x[m] = rows[m].x + g * kGroup4;
      step(rows, x, panels, g, kBytes, sums);
    }
    if (whole * kGroup4 < K) {
      int8_t last[MR][kGroup4] = {};
      const int8_t* x[MR];
      for (int m = 0; m < MR; ++m) {
        x[m] = last[m];
        std::memcpy(last[m], rows[m].x + whole * kGroup4, static_cast<size_t>(K % kGroup4));
      }
      step(rows, x, panels, whole, kBytes, sums);
    }
  }

 private:
  INFC_INLINE static void step(const PreparedRow<int8_t>* rows, const int8_t* const* x,
                               const char* const* panels, int64_t g, int64_t bytes,
                               int32_t* sums) {
    int32_t offset[MR];
    const char* group[P];
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      offset[m] = static_cast<const int32_t*>(rows[m].made)[g];
    }
    INFC_UNROLL for (int p = 0; p < P; ++p) group[p] = panels[p] + g * bytes;
    multiply_group<MR, P>(x, offset, group, sums);
  }
};

#if INFC_VNNI
// One panel as int8_t panels lie: m * c + 128 for each weight, [K / 4][NR][4], K rounded up to
// whole groups. Many rows then spare unpacking it for every few of them.
INFC_INLINE void widen_panel(const char* panel, int64_t K, char* wide) {
  constexpr int kNR = LinearLayout<int4x2>::kNR;
  static_assert(kNR == LinearLayout<int8_t>::kNR, "panels of one become panels of the other");
  constexpr int64_t kQuad = kNR * 4;
  const __m512i odd = _mm512_set1_epi16(static_cast<int16_t>(0xff00));
  for (int64_t g = 0; g < ceil_div(K, kGroup4); ++g) {
    for (int j = 0; j < kNR / kLanes; ++j) {
      const reg::i32 single = reg::load_multipliers(panel + j * kLanes);
      const __m512i m = (__m512i)(single | (single << 16));
      const reg::u32 low = (reg::u32)(128 - 8 * single) & 0xff;
      const __m512i shift = (__m512i)(low * 0x01010101u);
      const auto put = [&](reg::u8 codes, int64_t quad) {
        const __m512i u = (__m512i)codes;
        const __m512i evens = _mm512_andnot_si512(odd, _mm512_mullo_epi16(_mm512_andnot_si512(odd, u), m));
        const __m512i odds = _mm512_and_si512(odd, _mm512_mullo_epi16(_mm512_and_si512(odd, u), m));
        const __m512i w = _mm512_add_epi8(_mm512_or_si512(evens, odds), shift);
        _mm512_storeu_si512(wide + quad * kQuad + j * kLanes * 4, w);
      };
      for (int step = 0; step < 4; ++step) {
        const reg::u8 codes = reg::load_codes(panel + kNR + (step * kNR + j * kLanes) * 4);
        put(reg::low_codes(codes), g * 8 + step);
        put(reg::high_codes(codes), g * 8 + 4 + step);
      }
    }
    panel += LinearLayout<int4x2>::kGroupBytes;
  }
}
#endif

}  // namespace infc
