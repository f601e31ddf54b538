// The inner product of a few rows of signed bytes with one packed panel: linear_tile.hpp for int8.
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
  static constexpr int kMR = INFC_AVX2 ? 6 : 2;
};

// The accumulators of MR rows by one panel.
template <int MR>
struct IntAccumulators {
  static constexpr int kVectors = LinearLayout<int8_t>::kNR / kLanes;
  i32x16 v[MR][kVectors];
};

#if INFC_VNNI
INFC_INLINE int32_t sum_bytes(const int8_t* x, int64_t count) {
  __m512i acc = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 64 <= count; k += 64) {
    acc = _mm512_dpbusd_epi32(acc, _mm512_set1_epi8(1), _mm512_loadu_si512(x + k));
  }
  int32_t lanes[kLanes];
  std::memcpy(lanes, &acc, sizeof lanes);
  int32_t sum = 0;
  for (int32_t lane : lanes) sum += lane;
  for (; k < count; ++k) sum += x[k];
  return sum;
}

// Four k at once: `quad` holds each row's four bytes.
template <int MR>
INFC_INLINE void step_quad(IntAccumulators<MR>& acc, const int8_t* w, const int32_t* quad) {
  constexpr int kVectors = IntAccumulators<MR>::kVectors;
  __m512i b[kVectors];
  INFC_UNROLL for (int j = 0; j < kVectors; ++j) b[j] = _mm512_loadu_si512(w + j * kLanes * 4);
  INFC_UNROLL for (int m = 0; m < MR; ++m) {
    const __m512i a = _mm512_set1_epi32(quad[m]);
    INFC_UNROLL for (int j = 0; j < kVectors; ++j) {
      reg::i32& sum = acc.v[m][j].v[0];
      sum = (reg::i32)_mm512_dpbusd_epi32((__m512i)sum, b[j], a);
    }
  }
}
template <int MR>
INFC_INLINE void multiply(IntAccumulators<MR>& acc, const int8_t* const* rows, const int8_t* panel,
                          int64_t K) {
  constexpr int kNR = LinearLayout<int8_t>::kNR;
  const int8_t* row[MR];
  INFC_UNROLL for (int m = 0; m < MR; ++m) {
    row[m] = rows[m];
    const i32x16 offset = splat_int<i32x16>(-128 * sum_bytes(row[m], K));
    INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) acc.v[m][j] = offset;
  }
  const int64_t quads = K / 4;
  int32_t quad[MR];
#pragma GCC unroll 2
  for (int64_t k = 0; k < quads; ++k) {
    INFC_UNROLL for (int m = 0; m < MR; ++m) std::memcpy(&quad[m], row[m] + 4 * k, 4);
    step_quad<MR>(acc, panel + k * kNR * 4, quad);
  }
  if (K % 4 != 0) {
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      quad[m] = 0;
      std::memcpy(&quad[m], row[m] + 4 * quads, static_cast<size_t>(K % 4));
    }
    step_quad<MR>(acc, panel + quads * kNR * 4, quad);
  }
}
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

// Two k at once: `pair` points at each row's two elements, of 16 bits.
template <int MR>
INFC_INLINE void step_pair(IntAccumulators<MR>& acc, const int8_t* w, const int16_t* const* pair) {
  reg::i16 b[acc.kVectors][kRegs];
  INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
    INFC_EACH(i) b[j][i] = reg::widen_bytes(w + (j * kRegs + i) * kRegLanes * 2);
  }
  INFC_UNROLL for (int m = 0; m < MR; ++m) {
    int32_t both;
    std::memcpy(&both, pair[m], sizeof both);
    const reg::i16 a = (reg::i16)(reg::i32{} + both);
    INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
      INFC_EACH(i) acc.v[m][j].v[i] += reg::add_products(b[j][i], a);
    }
  }
}
// A stretch of each row is widened once, and padded to whole steps with zeros.
template <int MR>
INFC_INLINE void multiply(IntAccumulators<MR>& acc, const int8_t* const* rows, const int8_t* panel,
                          int64_t K) {
  constexpr int kNR = LinearLayout<int8_t>::kNR;
  constexpr int kKP = LinearLayout<int8_t>::kKP;
  constexpr int64_t kStretch = 256;
  int16_t wide[MR][kStretch];
  INFC_UNROLL for (int m = 0; m < MR; ++m) {
    INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) acc.v[m][j] = splat_int<i32x16>(0);
  }
  for (int64_t start = 0; start < K; start += kStretch) {
    const int64_t count = K - start < kStretch ? K - start : kStretch;
    for (int m = 0; m < MR; ++m) {
      for (int64_t k = 0; k < count; ++k) wide[m][k] = rows[m][start + k];
      if (count % kKP != 0) wide[m][count] = 0;
    }
    for (int64_t k = 0; k < count; k += kKP) {
      const int16_t* at[MR];
      INFC_UNROLL for (int m = 0; m < MR; ++m) at[m] = wide[m] + k;
      step_pair<MR>(acc, panel + (start + k) * kNR, at);
    }
  }
}
#endif

// What a finished sum is multiplied with and added to: scales of the panel's outputs, and their
// bias or null.
template <class TB>
struct OutputScale {
  const float* scale;
  const TB* bias;
};

// MR rows by one panel: out[m][n] = float(sum) * (row_scale[m] * scale[n]) + bias[n], rounded once,
// for the first `count` (<= NR) outputs.
template <int MR, class TY, class TB>
__attribute__((noinline)) void scaled_tile(const int8_t* const* rows, const float* row_scale,
                                           const int8_t* panel, const OutputScale<TB>& outputs,
                                           TY* const* out, int64_t count, int64_t K) {
  IntAccumulators<MR> acc;
  multiply<MR>(acc, rows, panel, K);
  INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
    const int64_t left = count - j * kLanes;
    if (left <= 0) return;
    const int64_t n = left < kLanes ? left : kLanes;
    const f32x16 scale = load_group(outputs.scale + j * kLanes, n);
    f32x16 b = zeros();
    if (outputs.bias != nullptr) b = load_group(outputs.bias + j * kLanes, n);
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      f32x16 y = to_float_value(acc.v[m][j]) * (set1(row_scale[m]) * scale);
      if (outputs.bias != nullptr) y = y + b;
      store_group(out[m] + j * kLanes, y, n);
    }
  }
}

// The same for a number of rows known at run time, 1 <= rows <= kMR.
template <class TY, class TB>
void scaled_tile(int m, const int8_t* const* rows, const float* row_scale, const int8_t* panel,
                 const OutputScale<TB>& outputs, TY* const* out, int64_t count, int64_t K) {
  constexpr int kMR = LinearLayout<int8_t>::kMR;
  switch (m) {
    case 1: return scaled_tile<1>(rows, row_scale, panel, outputs, out, count, K);
    case 2: return scaled_tile<2>(rows, row_scale, panel, outputs, out, count, K);
    case 3: return scaled_tile<kMR < 3 ? kMR : 3>(rows, row_scale, panel, outputs, out, count, K);
    case 4: return scaled_tile<kMR < 4 ? kMR : 4>(rows, row_scale, panel, outputs, out, count, K);
    case 5: return scaled_tile<kMR < 5 ? kMR : 5>(rows, row_scale, panel, outputs, out, count, K);
    default: return scaled_tile<kMR>(rows, row_scale, panel, outputs, out, count, K);
  }
}

}  // namespace infc
