// The products of linear_tile.hpp for rows and weights of signed bytes.
//
// Sums are exact integers, so their order does not matter. With VNNI the weights lie as w + 128,
// which vpdpbusd takes as unsigned, and 128 times the row's sum is taken off; elsewhere bytes are
// widened to 16 bits first, as vpmaddubsw would saturate.
#pragma once

#include "linear_tile.hpp"

namespace infc {

template <>
struct LinearLayout<int8_t> {
  static constexpr int kNR = INFC_AVX512 ? 64 : 16;
  static constexpr int kKP = INFC_VNNI ? 4 : 2;
  static constexpr int kMR = INFC_AVX512 || INFC_AVX2 ? 6 : 2;
};

// The integer accumulators of MR rows by P panels of NR outputs.
template <int MR, int P, int NR>
struct IntAccumulators {
  static constexpr int kVectors = NR / kRegLanes;
  reg::i32 v[MR][P][kVectors];

  INFC_INLINE void set_row(int m, int32_t value) {
    INFC_UNROLL for (int p = 0; p < P; ++p) {
      INFC_UNROLL for (int j = 0; j < kVectors; ++j) v[m][p][j] = reg::i32{} + value;
    }
  }
  // As [MR][P][NR].
  INFC_INLINE void store_to(int32_t* sums) const {
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      INFC_UNROLL for (int p = 0; p < P; ++p) {
        INFC_UNROLL for (int j = 0; j < kVectors; ++j) {
          std::memcpy(sums + ((m * P + p) * kVectors + j) * kRegLanes, &v[m][p][j],
                      sizeof v[m][p][j]);
        }
      }
    }
  }
};

// The sum of `count` bytes.
INFC_INLINE int32_t sum_bytes(const int8_t* x, int64_t count) {
  int32_t sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += x[k];
  return sum;
}

#if INFC_VNNI
// What is made of a row: -128 times its sum.
template <>
struct Rows<int8_t> {
  using X = int8_t;
  using Sum = int32_t;
  static constexpr int64_t made_bytes(int64_t) { return 64; }
  static void prepare(const int8_t* x, int64_t K, void* made) {
    *static_cast<int32_t*>(made) = -128 * sum_bytes(x, K);
  }
};

// Four k at once: `quad` holds each row's four bytes.
template <int MR, int P>
INFC_INLINE void step_quad(IntAccumulators<MR, P, LinearLayout<int8_t>::kNR>& acc,
                           const char* const* panel, int64_t offset, const int32_t* quad) {
  INFC_UNROLL for (int p = 0; p < P; ++p) {
    __m512i b[acc.kVectors];
    INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
      b[j] = _mm512_loadu_si512(panel[p] + offset + j * kLanes * 4);
    }
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      const __m512i a = _mm512_set1_epi32(quad[m]);
      INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
        reg::i32& sum = acc.v[m][p][j];
        sum = (reg::i32)_mm512_dpbusd_epi32((__m512i)sum, b[j], a);
      }
    }
  }
}

template <int MR, int P>
struct Multiply<int8_t, MR, P> {
  static void run(const PreparedRow<int8_t>* rows, const char* const* panels, int64_t K,
                  int32_t* sums) {
    constexpr int kNR = LinearLayout<int8_t>::kNR;
    IntAccumulators<MR, P, kNR> acc;
    const int8_t* row[MR];
    const char* panel[P];
    INFC_UNROLL for (int p = 0; p < P; ++p) panel[p] = panels[p];
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      row[m] = rows[m].x;
      acc.set_row(m, *static_cast<const int32_t*>(rows[m].made));
    }
    const int64_t quads = K / 4;
    int32_t quad[MR];
#pragma GCC unroll 2
    for (int64_t k = 0; k < quads; ++k) {
      INFC_UNROLL for (int m = 0; m < MR; ++m) std::memcpy(&quad[m], row[m] + 4 * k, 4);
      step_quad<MR, P>(acc, panel, k * kNR * 4, quad);
    }
    if (K % 4 != 0) {
      INFC_UNROLL for (int m = 0; m < MR; ++m) {
        quad[m] = 0;
        std::memcpy(&quad[m], row[m] + 4 * quads, static_cast<size_t>(K % 4));
      }
      step_quad<MR, P>(acc, panel, quads * kNR * 4, quad);
    }
    acc.store_to(sums);
  }
};
#else
namespace reg {
typedef int16_t i16 __attribute__((vector_size(kRegLanes * 4)));

// As many bytes as a register holds of 16 bits, widened.
INFC_INLINE i16 widen_bytes(const int8_t* p) {
#if INFC_AVX512
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (i16)_mm512_maskz_cvtepi8_epi16(~0u, bytes);
#elif INFC_AVX2
  return (i16)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__SSE4_1__)
  return (i16)_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  i16 r;
  for (int i = 0; i < 2 * kRegLanes; ++i) r[i] = p[i];
  return r;
#endif
}

// Lane i: a[2i] * b[2i] + a[2i + 1] * b[2i + 1].
INFC_INLINE i32 add_products(i16 a, i16 b) {
#if INFC_AVX512
  return (i32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif INFC_AVX2
  return (i32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE4_1__)
  return (i32)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  i32 r;
  for (int i = 0; i < kRegLanes; ++i) r[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return r;
#endif
}
}  // namespace reg

// What is made of a row: its bytes as 16 bits, and a zero behind an odd last one.
template <>
struct Rows<int8_t> {
  using X = int8_t;
  using Sum = int32_t;
  static constexpr int64_t made_bytes(int64_t K) { return ceil_div(K * 2 + 2, 64) * 64; }
  static void prepare(const int8_t* x, int64_t K, void* made) {
    int16_t* wide = static_cast<int16_t*>(made);
    for (int64_t k = 0; k < K; ++k) wide[k] = x[k];
    wide[K] = 0;
  }
};

// Two k at once.
template <int MR, int P>
struct Multiply<int8_t, MR, P> {
  static void run(const PreparedRow<int8_t>* rows, const char* const* panels, int64_t K,
                  int32_t* sums) {
    constexpr int kNR = LinearLayout<int8_t>::kNR;
    IntAccumulators<MR, P, kNR> acc;
    const int16_t* row[MR];
    const int8_t* panel[P];
    INFC_UNROLL for (int p = 0; p < P; ++p) panel[p] = reinterpret_cast<const int8_t*>(panels[p]);
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      row[m] = static_cast<const int16_t*>(rows[m].made);
      acc.set_row(m, 0);
    }
    for (int64_t k = 0; k < K; k += 2) {
      INFC_UNROLL for (int p = 0; p < P; ++p) {
        reg::i16 b[acc.kVectors];
        INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
          b[j] = reg::widen_bytes(panel[p] + k * kNR + j * kRegLanes * 2);
        }
        INFC_UNROLL for (int m = 0; m < MR; ++m) {
          int32_t both;
          std::memcpy(&both, row[m] + k, sizeof both);
          const reg::i16 a = (reg::i16)(reg::i32{} + both);
          INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
            acc.v[m][p][j] += reg::add_products(b[j], a);
          }
        }
      }
    }
    acc.store_to(sums);
  }
};
#endif

}  // namespace infc
