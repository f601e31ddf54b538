// The inner product of a few rows with one packed panel of weights: what linear and moe share.
//
// Weights are packed [ceil(N/NR)][ceil(K/KP)][NR][KP], zero padded (see codegen/cpp/layout.py).
// Each output element has one accumulator and takes k in ascending order, whatever the number of
// rows: float and widened bf16 by acc = fma(x[k], w[k], acc) from 0, bf16 with AVX512-BF16 by one
// vdpbf16ps for each pair of k.
#pragma once

#include "simd.hpp"

namespace infc {

// How a weight type is packed and how many rows one tile takes on this target.
template <class TW>
struct LinearLayout {
  static constexpr int kNR = INFC_AVX512 ? 64 : 16;
  static constexpr int kKP = 1;
  static constexpr int kMR = INFC_AVX512 ? 6 : INFC_AVX2 ? 6 : 2;
};
template <>
struct LinearLayout<bf16> {
  static constexpr int kNR = INFC_AVX512 ? 64 : 16;
  static constexpr int kKP = INFC_DPBF16 ? 2 : 1;
  static constexpr int kMR = INFC_AVX512 ? 6 : INFC_AVX2 ? 6 : 2;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of one packed panel (kNR outputs).
template <class TW>
constexpr int64_t panel_elements(int64_t K) {
  return ceil_div(K, LinearLayout<TW>::kKP) * LinearLayout<TW>::kKP * LinearLayout<TW>::kNR;
}
// Elements of a packed [N, K] weight.
template <class TW>
constexpr int64_t packed_elements(int64_t N, int64_t K) {
  return ceil_div(N, LinearLayout<TW>::kNR) * panel_elements<TW>(K);
}

// The accumulators of MR rows by one panel.
template <class TW, int MR>
struct LinearAccumulators {
  static constexpr int kVectors = LinearLayout<TW>::kNR / kLanes;
  f32x16 v[MR][kVectors];
};

// There is no software prefetch: panels lie in the order they are read, and asking ahead of the
// hardware made a lone row slower (Zen 4, one thread: 20.3 GB/s with it, 22.8 without, of 25.4).
template <int MR, class TW>
INFC_INLINE void clear(LinearAccumulators<TW, MR>& acc) {
  INFC_UNROLL for (int m = 0; m < MR; ++m) {
    INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) acc.v[m][j] = zeros();
  }
}

// One step of k: `w` points at NR weights, x(m) is the row's element.
template <int MR, class TW, class X>
INFC_INLINE void step_k(LinearAccumulators<TW, MR>& acc, const TW* w, X x) {
  constexpr int kVectors = LinearLayout<TW>::kNR / kLanes;
  f32x16 b[kVectors];
  INFC_UNROLL for (int j = 0; j < kVectors; ++j) b[j] = load(w + j * kLanes);
  INFC_UNROLL for (int m = 0; m < MR; ++m) {
    const f32x16 a = set1(x(m));
    INFC_UNROLL for (int j = 0; j < kVectors; ++j) acc.v[m][j] = fma(a, b[j], acc.v[m][j]);
  }
}

// float: the rows are read in place.
template <int MR>
INFC_INLINE void multiply(LinearAccumulators<float, MR>& acc, const float* const* rows,
                          const float* panel, int64_t K) {
  constexpr int kNR = LinearLayout<float>::kNR;
  const float* row[MR];
  INFC_UNROLL for (int m = 0; m < MR; ++m) row[m] = rows[m];
  clear(acc);
#pragma GCC unroll 2
  for (int64_t k = 0; k < K; ++k) {
    step_k<MR>(acc, panel + k * kNR, [&](int m) { return row[m][k]; });
  }
}

#if INFC_DPBF16
// bf16 by pairs of k. An odd last element is paired with zero.
template <int MR>
INFC_INLINE void step_pair(LinearAccumulators<bf16, MR>& acc, const bf16* w, const uint32_t* pair) {
  constexpr int kVectors = LinearLayout<bf16>::kNR / kLanes;
  __m512i b[kVectors];
  INFC_UNROLL for (int j = 0; j < kVectors; ++j) b[j] = _mm512_loadu_si512(w + j * kLanes * 2);
  INFC_UNROLL for (int m = 0; m < MR; ++m) {
    const __m512i a = _mm512_set1_epi32(static_cast<int>(pair[m]));
    INFC_UNROLL for (int j = 0; j < kVectors; ++j) {
      acc.v[m][j].v[0] = _mm512_dpbf16_ps(acc.v[m][j].v[0], (__m512bh)b[j], (__m512bh)a);
    }
  }
}
template <int MR>
INFC_INLINE void multiply(LinearAccumulators<bf16, MR>& acc, const bf16* const* rows,
                          const bf16* panel, int64_t K) {
  constexpr int kNR = LinearLayout<bf16>::kNR;
  const bf16* row[MR];
  INFC_UNROLL for (int m = 0; m < MR; ++m) row[m] = rows[m];
  clear(acc);
  const int64_t pairs = K / 2;
  uint32_t pair[MR];
#pragma GCC unroll 2
  for (int64_t k = 0; k < pairs; ++k) {
    INFC_UNROLL for (int m = 0; m < MR; ++m) std::memcpy(&pair[m], row[m] + 2 * k, 4);
    step_pair<MR>(acc, panel + k * kNR * 2, pair);
  }
  if (K % 2 != 0) {
    INFC_UNROLL for (int m = 0; m < MR; ++m) pair[m] = row[m][K - 1].bits;
    step_pair<MR>(acc, panel + pairs * kNR * 2, pair);
  }
}
#else
// bf16 widened: a stretch of each row is widened once and then treated as float.
template <int MR>
INFC_INLINE void multiply(LinearAccumulators<bf16, MR>& acc, const bf16* const* rows,
                          const bf16* panel, int64_t K) {
  constexpr int kNR = LinearLayout<bf16>::kNR;
  constexpr int64_t kStretch = 256;
  float wide[MR][kStretch];
  clear(acc);
  for (int64_t start = 0; start < K; start += kStretch) {
    const int64_t count = K - start < kStretch ? K - start : kStretch;
    for (int m = 0; m < MR; ++m) {
      for (int64_t k = 0; k < count; ++k) wide[m][k] = to_float(rows[m][start + k]);
    }
    for (int64_t k = 0; k < count; ++k) {
      step_k<MR>(acc, panel + (start + k) * kNR, [&](int m) { return wide[m][k]; });
    }
  }
}
#endif

// Adds the bias, rounds once, and writes the first `count` (<= NR) outputs of each row.
template <int MR, class TW, class TY, class TB>
INFC_INLINE void write_tile(const LinearAccumulators<TW, MR>& acc, const TB* bias, TY* const* out,
                            int64_t count) {
  constexpr int kVectors = LinearLayout<TW>::kNR / kLanes;
  INFC_UNROLL for (int j = 0; j < kVectors; ++j) {
    const int64_t left = count - j * kLanes;
    if (left <= 0) return;
    const int64_t n = left < kLanes ? left : kLanes;
    f32x16 b = zeros();
    if (bias != nullptr) b = load_group(bias + j * kLanes, n);
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      const f32x16 y = bias != nullptr ? acc.v[m][j] + b : acc.v[m][j];
      store_group(out[m] + j * kLanes, y, n);
    }
  }
}

// MR rows by one panel, written to out[m][0 .. count).
template <int MR, class TW, class TY, class TB>
__attribute__((noinline)) void linear_tile(const TW* const* rows, const TW* panel, const TB* bias,
                                           TY* const* out, int64_t count, int64_t K) {
  LinearAccumulators<TW, MR> acc;
  multiply<MR>(acc, rows, panel, K);
  write_tile<MR>(acc, bias, out, count);
}

// The same for a number of rows known at run time, 1 <= rows <= kMR.
template <class TW, class TY, class TB>
void linear_tile(int m, const TW* const* rows, const TW* panel, const TB* bias, TY* const* out,
                 int64_t count, int64_t K) {
  constexpr int kMR = LinearLayout<TW>::kMR;
  switch (m) {
    case 1: return linear_tile<1>(rows, panel, bias, out, count, K);
    case 2: return linear_tile<2>(rows, panel, bias, out, count, K);
    case 3: return linear_tile<kMR < 3 ? kMR : 3>(rows, panel, bias, out, count, K);
    case 4: return linear_tile<kMR < 4 ? kMR : 4>(rows, panel, bias, out, count, K);
    case 5: return linear_tile<kMR < 5 ? kMR : 5>(rows, panel, bias, out, count, K);
    default: return linear_tile<kMR>(rows, panel, bias, out, count, K);
  }
}

}  // namespace infc
