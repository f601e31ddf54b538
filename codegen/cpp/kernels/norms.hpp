// RMSNorm and LayerNorm over rows, alone or with the residual addition before them.
//
// Sums are in float, 16 lanes (lane i takes elements i, i + 16, ...), then the tree 8-4-2-1.
// Rows come as [outer][inner][dim] with a stride per outer row, so that the heads inside a merged
// QKV output are normalised in place; a plain matrix has inner = 1.
#pragma once

#include "simd.hpp"
#include "team.hpp"

namespace infc {

// The sum of f(offset, count) -> f32x16 over a row. f gives zero in lanes past `count`.
template <class F>
INFC_INLINE float sum_row(int64_t dim, F f) {
  f32x16 acc = zeros();
  for_each_group(dim, [&](int64_t i, int64_t n) { acc = f(acc, i, n); });
  return sum_lanes(acc);
}

// y = x / sqrt(mean(x²) + eps) * w. RoundBeforeScale: rounded to T before the weight and again
// after (Llama); else one rounding after it (Gemma). The last rounding is to TY. y may be x
// where TY is T.
template <bool RoundBeforeScale, class T, class TW, class TY>
INFC_INLINE void rms_norm_row(const T* x, const TW* w, TY* y, int64_t dim, float eps) {
  const float sum = sum_row(dim, [&](const f32x16& acc, int64_t i, int64_t n) {
    const f32x16 v = load_group(x + i, n);
    return fma(v, v, acc);
  });
  const f32x16 scale = set1(rsqrt(sum / static_cast<float>(dim) + eps));
  for_each_group(dim, [&](int64_t i, int64_t n) {
    f32x16 v = load_group(x + i, n) * scale;
    if (RoundBeforeScale) {
      T rounded[kLanes];
      store(rounded, v);
      v = load(rounded);
    }
    store_group(y + i, v * load_group(w + i, n), n);
  });
}

// y = (x - mean) / sqrt(variance + eps) * w + b; b may be null. y may be x where TY is T.
template <class T, class TW, class TY>
INFC_INLINE void layer_norm_row(const T* x, const TW* w, const TW* b, TY* y, int64_t dim,
                                float eps) {
  const float sum = sum_row(dim, [&](const f32x16& acc, int64_t i, int64_t n) {
    return acc + load_group(x + i, n);
  });
  const f32x16 mean = set1(sum / static_cast<float>(dim));
  const float squares = sum_row(dim, [&](const f32x16& acc, int64_t i, int64_t n) {
    f32x16 v = load_group(x + i, n) - mean;
    if (n < kLanes) v = select(lanes_between(0, 0, static_cast<int32_t>(n)), v, zeros());
    return fma(v, v, acc);
  });
  const f32x16 scale = set1(rsqrt(squares / static_cast<float>(dim) + eps));
  for_each_group(dim, [&](int64_t i, int64_t n) {
    f32x16 v = (load_group(x + i, n) - mean) * scale * load_group(w + i, n);
    if (b != nullptr) v = v + load_group(b + i, n);
    store_group(y + i, v, n);
  });
}

// sum = round(x + residual); sum may be x or residual.
template <class T>
INFC_INLINE void add_row(const T* x, const T* residual, T* sum, int64_t dim) {
  for_each_group(dim, [&](int64_t i, int64_t n) {
    store_group(sum + i, load_group(x + i, n) + load_group(residual + i, n), n);
  });
}

// Rows of [outer][inner][dim]; ldx, ldy: elements from one outer row to the next.
template <bool RoundBeforeScale, class T, class TW, class TY>
void rms_norm(const Team& t, const T* x, int64_t ldx, const TW* w, TY* y, int64_t ldy,
              int64_t outer, int64_t inner, int64_t dim, float eps) {
  const Share share = share_of(t, outer * inner);
  for (int64_t r = share.begin; r < share.end; ++r) {
    const int64_t o = r / inner;
    const int64_t i = r % inner * dim;
    rms_norm_row<RoundBeforeScale>(x + o * ldx + i, w, y + o * ldy + i, dim, eps);
  }
}

// Plain matrix: x [rows, dim] with row stride ldx, y contiguous.
template <bool RoundBeforeScale, class T, class TW, class TY>
void rms_norm(const Team& t, const T* x, int64_t ldx, const TW* w, TY* y, int64_t rows, int64_t dim,
              float eps) {
  rms_norm<RoundBeforeScale>(t, x, ldx, w, y, dim, rows, 1, dim, eps);
}

// sum = round(x + residual), y = rms_norm(sum). All contiguous; sum may be x or residual.
template <bool RoundBeforeScale, class T, class TW, class TY>
void add_rms_norm(const Team& t, const T* x, const T* residual, const TW* w, TY* y, T* sum,
                  int64_t rows, int64_t dim, float eps) {
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) {
    add_row(x + r * dim, residual + r * dim, sum + r * dim, dim);
    rms_norm_row<RoundBeforeScale>(sum + r * dim, w, y + r * dim, dim, eps);
  }
}

// As rms_norm, for LayerNorm; b may be null.
template <class T, class TW, class TY>
void layer_norm(const Team& t, const T* x, int64_t ldx, const TW* w, const TW* b, TY* y,
                int64_t ldy, int64_t outer, int64_t inner, int64_t dim, float eps) {
  const Share share = share_of(t, outer * inner);
  for (int64_t r = share.begin; r < share.end; ++r) {
    const int64_t o = r / inner;
    const int64_t i = r % inner * dim;
    layer_norm_row(x + o * ldx + i, w, b, y + o * ldy + i, dim, eps);
  }
}
template <class T, class TW, class TY>
void layer_norm(const Team& t, const T* x, int64_t ldx, const TW* w, const TW* b, TY* y,
                int64_t rows, int64_t dim, float eps) {
  layer_norm(t, x, ldx, w, b, y, dim, rows, 1, dim, eps);
}

// sum = round(x + residual), y = layer_norm(sum). All contiguous; sum may be x or residual.
template <class T, class TW, class TY>
void add_layer_norm(const Team& t, const T* x, const T* residual, const TW* w, const TW* b, TY* y,
                    T* sum, int64_t rows, int64_t dim, float eps) {
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) {
    add_row(x + r * dim, residual + r * dim, sum + r * dim, dim);
    layer_norm_row(sum + r * dim, w, b, y + r * dim, dim, eps);
  }
}

}  // namespace infc
