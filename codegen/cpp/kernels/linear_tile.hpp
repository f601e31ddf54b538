// Products of a few rows with packed panels of weights: what linear and moe are made of.
//
// Weights of type W are packed [ceil(N/NR)][ceil(K/KP)][NR][KP], zero padded (codegen/cpp/layout.py;
// int4 lies in groups, see linear_i4_tile.hpp). Each output element has one accumulator and takes k
// in ascending order, whatever the number of rows and of panels that are read side by side: float
// and widened bf16 by acc = fma(x[k], w[k], acc) from 0, bf16 with AVX512-BF16 by one vdpbf16ps for
// each pair of k; sums of codes are exact.
#pragma once

#include "row_tiles.hpp"
#include "simd.hpp"

namespace infc {

// How a weight type is packed on this target, and how many rows one tile takes.
template <class W>
struct LinearLayout {
  static constexpr int kNR = INFC_AVX512 ? 64 : 16;
  static constexpr int kKP = 1;
  static constexpr int kMR = INFC_AVX512 || INFC_AVX2 ? 6 : 2;
};
template <>
struct LinearLayout<bf16> {
  static constexpr int kNR = INFC_AVX512 ? 64 : 16;
  static constexpr int kKP = INFC_DPBF16 ? 2 : 1;
  static constexpr int kMR = INFC_AVX512 || INFC_AVX2 ? 6 : 2;
};

// Bytes of one packed panel (kNR outputs), and of a packed [N, K] weight.
template <class L, class = void>
struct PanelBytes {
  static constexpr int64_t of(int64_t K, int64_t element) {
    return ceil_div(K, L::kKP) * L::kKP * L::kNR * element;
  }
};
// Panels of groups of 32 elements of K.
template <class L>
struct PanelBytes<L, std::void_t<decltype(L::kGroupBytes)>> {
  static constexpr int64_t of(int64_t K, int64_t) { return ceil_div(K, L::kGroupElements) * L::kGroupBytes; }
};
template <class W>
constexpr int64_t panel_bytes(int64_t K) {
  return PanelBytes<LinearLayout<W>>::of(K, static_cast<int64_t>(sizeof(W)));
}
template <class W>
constexpr int64_t packed_bytes(int64_t N, int64_t K) {
  return ceil_div(N, LinearLayout<W>::kNR) * panel_bytes<W>(K);
}

// A row as its products read it: `made` is what Rows<W>::prepare made of it, once for all panels.
template <class X>
struct PreparedRow {
  const X* x;
  const void* made;
};

// Asks for a part of what will be read behind `kBytes` of a panel that a lone row is at: the processor
// fetches the lines between (Zen 4: 1.1 to 1.25 times as fast; every line, or in several streams,
// is slower than none).
template <int MR, int64_t kBytes>
INFC_INLINE void ask_ahead(const char* at) {
  constexpr int64_t kAhead = 8 << 10;  // two pages
  constexpr int64_t kEvery = 512;
  if constexpr (INFC_AVX512 && MR == 1) {
    INFC_UNROLL for (int64_t i = 0; i < kBytes; i += kEvery) __builtin_prefetch(at + kAhead + i, 0, 2);
  }
}

// What rows that meet weights of type W consist of, what sums are made in, and what is prepared:
// `made_bytes(K)` bytes a row, a multiple of 64. By default rows are read as they are. Rows of float
// meet bf16 rounded to bf16, on every target.
template <class W>
struct Rows {
  using X = W;
  using Sum = float;
  static constexpr int64_t made_bytes(int64_t) { return 0; }
  static void prepare(const X*, int64_t, void*) {}
};
#if INFC_DPBF16
template <>
struct Rows<bf16> {
  using X = bf16;
  using Sum = float;
  static constexpr int64_t made_bytes(int64_t K) { return ceil_div(K * 2, 64) * 64; }
  static void prepare(const bf16*, int64_t, void*) {}
  // The rounded row.
  static const bf16* prepare(const float* x, int64_t K, void* made) {
    bf16* narrow = static_cast<bf16*>(made);
    for_each_group(K, [&](int64_t k, int64_t n) { store_group(narrow + k, load_group(x + k, n), n); });
    return narrow;
  }
};
#else
// bf16 is widened, and then treated as float.
template <>
struct Rows<bf16> {
  using X = bf16;
  using Sum = float;
  static constexpr int64_t made_bytes(int64_t K) { return ceil_div(K * 4, 64) * 64; }
  static void prepare(const bf16* x, int64_t K, void* made) {
    float* wide = static_cast<float*>(made);
    for_each_group(K, [&](int64_t k, int64_t n) { store_group(wide + k, load_group(x + k, n), n); });
  }
  // Products read what is made alone.
  static const bf16* prepare(const float* x, int64_t K, void* made) {
    float* wide = static_cast<float*>(made);
    for_each_group(K, [&](int64_t k, int64_t n) {
      bf16 narrow[kLanes];
      store(narrow, load_group(x + k, n));
      store_group(wide + k, load(narrow), n);
    });
    return nullptr;
  }
};
#endif

// A row of its products' own type, or one of floats that is rounded to it.
template <class W>
INFC_INLINE PreparedRow<typename Rows<W>::X> prepare_row(const typename Rows<W>::X* x, int64_t K,
                                                         void* made) {
  Rows<W>::prepare(x, K, made);
  return {x, made};
}
template <class W, class = std::enable_if_t<std::is_same_v<W, bf16>>>
INFC_INLINE PreparedRow<bf16> prepare_row(const float* x, int64_t K, void* made) {
  return {Rows<W>::prepare(x, K, made), made};
}

// The accumulators of MR rows by P panels.
template <class W, int MR, int P>
struct FloatAccumulators {
  static constexpr int kVectors = LinearLayout<W>::kNR / kLanes;
  f32x16 v[MR][P][kVectors];

  INFC_INLINE void clear() {
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      INFC_UNROLL for (int p = 0; p < P; ++p) {
        INFC_UNROLL for (int j = 0; j < kVectors; ++j) v[m][p][j] = zeros();
      }
    }
  }
  // As [MR][P][NR].
  INFC_INLINE void store_to(float* sums) const {
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      INFC_UNROLL for (int p = 0; p < P; ++p) {
        INFC_UNROLL for (int j = 0; j < kVectors; ++j) {
          store(sums + ((m * P + p) * kVectors + j) * kLanes, v[m][p][j]);
        }
      }
    }
  }
};

// Products of float rows (or widened ones) with panels of W, one k at a time.
template <class W, int MR, int P>
INFC_INLINE void multiply_float(const float* const* rows, const W* const* panels, int64_t K,
                                float* sums) {
  constexpr int kNR = LinearLayout<W>::kNR;
  FloatAccumulators<W, MR, P> acc;
  const float* row[MR];
  const W* panel[P];
  INFC_UNROLL for (int m = 0; m < MR; ++m) row[m] = rows[m];
  INFC_UNROLL for (int p = 0; p < P; ++p) panel[p] = panels[p];
  acc.clear();
#pragma GCC unroll 2
  for (int64_t k = 0; k < K; ++k) {
    INFC_UNROLL for (int p = 0; p < P; ++p) {
      f32x16 b[acc.kVectors];
      INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
        b[j] = load(panel[p] + k * kNR + j * kLanes);
      }
      INFC_UNROLL for (int m = 0; m < MR; ++m) {
        const f32x16 a = set1(row[m][k]);
        INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
          acc.v[m][p][j] = fma(a, b[j], acc.v[m][p][j]);
        }
      }
    }
  }
  acc.store_to(sums);
}

#if INFC_DPBF16
// bf16 by pairs of k. An odd last element is paired with zero.
template <int MR, int P>
INFC_INLINE void step_pair(FloatAccumulators<bf16, MR, P>& acc, const bf16* const* panel,
                           int64_t offset, const uint32_t* pair) {
  INFC_UNROLL for (int p = 0; p < P; ++p) {
    __m512i b[acc.kVectors];
    INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
      b[j] = _mm512_loadu_si512(panel[p] + offset + j * kLanes * 2);
    }
    INFC_UNROLL for (int m = 0; m < MR; ++m) {
      const __m512i a = _mm512_set1_epi32(static_cast<int>(pair[m]));
      INFC_UNROLL for (int j = 0; j < acc.kVectors; ++j) {
        reg::f32& sum = acc.v[m][p][j].v[0];
        sum = _mm512_dpbf16_ps(sum, (__m512bh)b[j], (__m512bh)a);
      }
    }
  }
}
template <int MR, int P>
INFC_INLINE void multiply_pairs(const PreparedRow<bf16>* rows, const bf16* const* panels, int64_t K,
                                float* sums) {
  constexpr int kNR = LinearLayout<bf16>::kNR;
  FloatAccumulators<bf16, MR, P> acc;
  const bf16* row[MR];
  const bf16* panel[P];
  INFC_UNROLL for (int m = 0; m < MR; ++m) row[m] = rows[m].x;
  INFC_UNROLL for (int p = 0; p < P; ++p) panel[p] = panels[p];
  acc.clear();
  const int64_t pairs = K / 2;
  uint32_t pair[MR];
#pragma GCC unroll 2
  for (int64_t k = 0; k < pairs; ++k) {
    INFC_UNROLL for (int m = 0; m < MR; ++m) std::memcpy(&pair[m], row[m] + 2 * k, 4);
    step_pair<MR, P>(acc, panel, k * kNR * 2, pair);
  }
  if (K % 2 != 0) {
    INFC_UNROLL for (int m = 0; m < MR; ++m) pair[m] = row[m][K - 1].bits;
    step_pair<MR, P>(acc, panel, pairs * kNR * 2, pair);
  }
  acc.store_to(sums);
}
#endif

// Sums [MR][P][NR] of MR rows by P panels that begin at `panels`: one struct a type of weights, as
// functions cannot be specialised in part.
template <class W, int MR, int P>
struct Multiply;

template <int MR, int P>
struct Multiply<float, MR, P> {
  static void run(const PreparedRow<float>* rows, const char* const* panels, int64_t K,
                  float* sums) {
    const float* x[MR];
    const float* panel[P];
    for (int m = 0; m < MR; ++m) x[m] = rows[m].x;
    for (int p = 0; p < P; ++p) panel[p] = reinterpret_cast<const float*>(panels[p]);
    multiply_float<float, MR, P>(x, panel, K, sums);
  }
};

template <int MR, int P>
struct Multiply<bf16, MR, P> {
  static void run(const PreparedRow<bf16>* rows, const char* const* panels, int64_t K,
                  float* sums) {
    const bf16* panel[P];
    for (int p = 0; p < P; ++p) panel[p] = reinterpret_cast<const bf16*>(panels[p]);
#if INFC_DPBF16
    multiply_pairs<MR, P>(rows, panel, K, sums);
#else
    const float* x[MR];
    for (int m = 0; m < MR; ++m) x[m] = static_cast<const float*>(rows[m].made);
    multiply_float<bf16, MR, P>(x, panel, K, sums);
#endif
  }
};

}  // namespace infc
