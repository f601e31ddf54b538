// Codes of 6 bits in panels, -32 .. 31 kept as 0 .. 63: how they are multiplied by rows of signed bytes.
//
// 16 codes of an output are 12 bytes: four with the upper two bits (byte i has those of codes i, i + 4,
// i + 8 and i + 12, the first in its lowest bits), then eight with the lower four (byte i has codes i and
// i + 8). In a panel, each 16 outputs have three rows [16][4] of bytes for 16 codes: what a lone row reads
// is then in one ascending order, which processors fetch ahead (Zen 5, one thread: 12 GB/s where a row
// of all outputs lies behind the other, 40 so).
#pragma once

#include "linear_i4_tile.hpp"

namespace infc {

constexpr int kSixBitZero = 32;  // added to a code where it is multiplied as an unsigned number

// Where row `row` (0: upper bits, 1 and 2: lower bits) of the 16 codes from 16 * half lies for output n
// of NR, in the bytes of 32 codes.
template <int64_t NR>
constexpr int64_t six_bit_row(int64_t half, int64_t row, int64_t n) {
  return ((half * (NR / 16) + n / 16) * 3 + row) * 64 + n % 16 * 4;
}

// Code k of output n, of the 32 codes that lie at `codes`.
template <int64_t NR>
INFC_INLINE int six_bits_in_panel(const char* codes, int64_t n, int64_t k) {
  const int64_t quad = k / 4 % 4;
  const auto byte = [&](int64_t row) {
    return static_cast<int>(static_cast<uint8_t>(codes[six_bit_row<NR>(k / 16, row, n) + k % 4]));
  };
  const int high = byte(0) >> (2 * quad) & 3, low = byte(1 + quad % 2) >> (quad / 2 * 4) & 15;
  return high << 4 | low;
}

#if INFC_VNNI || INFC_MADDUBS
namespace reg {
// acc + products of unsigned bytes below 128 by the four signed bytes x, four in a 32-bit lane.
INFC_INLINE i32 add_small_bytes(i32 acc, u8 bytes, int32_t x) {
#if INFC_VNNI
  return add_codes(acc, bytes, x);
#else
  const i32 xs = i32{} + x;
#if INFC_AVX512
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)bytes, (__m512i)xs);
  return acc + (i32)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif INFC_AVX2
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)bytes, (__m256i)xs);
  return acc + (i32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  const __m128i pairs = _mm_maddubs_epi16((__m128i)bytes, (__m128i)xs);
  return acc + (i32)_mm_madd_epi16(pairs, _mm_set1_epi16(1));
#endif
#endif
}

// 16 codes of a register of outputs, four neighbors of K in each of the four.
struct SixBits {
  u8 quad[4];
};
template <int64_t NR>
INFC_INLINE SixBits load_six_bits(const char* codes, int64_t half, int64_t n) {
  const u16x2 high = (u16x2)load_codes(codes + six_bit_row<NR>(half, 0, n));
  const u16x2 low[2] = {(u16x2)load_codes(codes + six_bit_row<NR>(half, 1, n)),
                        (u16x2)load_codes(codes + six_bit_row<NR>(half, 2, n))};
  const auto both = [](u16x2 upper, u16x2 lower) { return ((u8)upper & 0x30) | ((u8)lower & 0x0f); };
  return {{both(high << 4, low[0]), both(high << 2, low[1]), both(high, low[0] >> 4),
           both(high >> 2, low[1] >> 4)}};
}
}  // namespace reg

// Adds the products of 32 elements of each row by as many codes of each output.
template <int MR, int P, int NR>
INFC_INLINE void add_six_bits(IntAccumulators<MR, P, NR>& acc, const int8_t* const* x,
                              const char* const* codes) {
#pragma GCC unroll 1
  for (int half = 0; half < 2; ++half) {
    INFC_UNROLL for (int p = 0; p < P; ++p) {
      INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
        const reg::SixBits c = reg::load_six_bits<NR>(codes[p], half, j * kRegLanes);
        INFC_UNROLL for (int q = 0; q < 4; ++q) {
          INFC_UNROLL for (int m = 0; m < MR; ++m) {
            int32_t four;
            std::memcpy(&four, x[m] + 16 * half + 4 * q, 4);
            acc.v[m][p][j] = reg::add_small_bytes(acc.v[m][p][j], c.quad[q], four);
          }
        }
      }
    }
  }
}
#else
template <int MR, int P, int NR>
INFC_INLINE void add_six_bits(IntAccumulators<MR, P, NR>& acc, const int8_t* const* x,
                              const char* const* codes) {
  for (int p = 0; p < P; ++p) {
    for (int n = 0; n < NR; ++n) {
      for (int k = 0; k < 32; ++k) {
        const int code = six_bits_in_panel<NR>(codes[p], n, k);
        for (int m = 0; m < MR; ++m) acc.v[m][p][n / kRegLanes][n % kRegLanes] += code * x[m][k];
      }
    }
  }
}
#endif

#if INFC_VNNI
// 32 codes of each output as unsigned bytes, [8][NR][4].
template <int NR>
INFC_INLINE void widen_six_bits(const char* codes, char* wide) {
  for (int half = 0; half < 2; ++half) {
    INFC_UNROLL for (int n = 0; n < NR; n += kRegLanes) {
      const reg::SixBits c = reg::load_six_bits<NR>(codes, half, n);
      INFC_UNROLL for (int q = 0; q < 4; ++q) {
        std::memcpy(wide + ((4 * half + q) * NR + n) * 4, &c.quad[q], sizeof c.quad[q]);
      }
    }
  }
}
#endif

}  // namespace infc
