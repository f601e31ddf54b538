// Rows as signed bytes with one scale each, or one for each 32 elements: what products of codes and the
// 8-bit cache are fed.
//
// In float: amax = max |x|; a row (or a group of its elements) with amax < 1e-30 is all zeros with scale 0, else
// scale = amax / 127 and q = rint(x * (127 / amax)), ties to even, in [-127, 127].
#pragma once

#include "simd.hpp"
#include "team.hpp"

namespace infc {

// What turns a row into bytes, and back.
struct RowScale {
  float inverse;  // q = rint(x * inverse)
  float scale;    // x is about q * scale
};
INFC_INLINE RowScale row_scale(float amax) {
  if (amax < 1e-30f) return {0.0f, 0.0f};
  return {127.0f / amax, amax / 127.0f};
}

// rint(x * inverse) in [-127, 127]; 0 where the product is no number.
template <class V>
INFC_INLINE ints_of<V> quantize(const V& x, const V& inverse) {
  // Added to 1.5 * 2^23 a small float loses its fraction to rounding, and its integer part is in
  // the last bits of the sum.
  const V shift = splat<V>(12582912.0f);
  V y = x * inverse;
  y = select(eq(y, y), y, splat<V>(0.0f));
  y = max(min(y, splat<V>(127.0f)), splat<V>(-127.0f));
  return bits_of(y + shift) - bits_of(shift);
}

// The largest of sixteen non-negative integers.
INFC_INLINE int32_t max_int_lanes(const i32x16& v) {
#if INFC_AVX512
  return _mm512_reduce_max_epi32((__m512i)v.v[0]);
#else
  const Lanes lanes = lanes_of(from_bits(v));
  int32_t most = 0;
  for (float lane : lanes.x) most = bits_of(lane) > most ? bits_of(lane) : most;
  return most;
#endif
}

// The largest magnitude of a row as a float; NaN where the row holds one. Magnitudes are compared
// by their bits, which order like the floats they are, NaN above all.
template <class T>
INFC_INLINE float abs_max_row(const T* x, int64_t dim) {
  i32x16 top = splat_int<i32x16>(0);
  for_each_group(dim, [&](int64_t i, int64_t n) {
    top = max(top, bits_of(abs(load_group(x + i, n))));
  });
  return from_bits(max_int_lanes(top));
}

// One row of `dim` elements into q; returns its scale.
template <class T>
INFC_INLINE float quantize_row(const T* x, int8_t* q, int64_t dim) {
  const RowScale s = row_scale(abs_max_row(x, dim));
  const f32x16 inverse = set1(s.inverse);
  for_each_group(dim, [&](int64_t i, int64_t n) {
    store_group(q + i, quantize(load_group(x + i, n), inverse), n);
  });
  return s.scale;
}

// x [rows, dim] (row stride ldx) → q [rows, dim], contiguous, and scale [rows].
template <class T>
void quantize_rows(const Team& t, const T* x, int64_t ldx, int8_t* q, float* scale, int64_t rows,
                   int64_t dim) {
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) {
    scale[r] = quantize_row(x + r * ldx, q + r * dim, dim);
  }
}

// As quantize_row for each 32 elements of a row: scale [ceil(dim / 32)].
template <class T>
INFC_INLINE void quantize_row_groups(const T* x, int8_t* q, float* scale, int64_t dim) {
  constexpr int64_t kWide = 2 * kLanes;
  int64_t i = 0;
  for (; i + kWide <= dim; i += kWide, ++scale) {
    const f32x16 low = load(x + i), high = load(x + i + kLanes);
    // NaN must show: magnitudes are compared by their bits, as in abs_max_row.
    const i32x16 top = max(bits_of(abs(low)), bits_of(abs(high)));
    const RowScale s = row_scale(from_bits(max_int_lanes(top)));
    const f32x16 inverse = set1(s.inverse);
    store(q + i, quantize(low, inverse));
    store(q + i + kLanes, quantize(high, inverse));
    *scale = s.scale;
  }
  if (i < dim) *scale = quantize_row(x + i, q + i, dim - i);
}

// As quantize_rows with a scale for each 32 elements of a row: scale [rows, ceil(dim / 32)].
template <class T>
void quantize_row_groups(const Team& t, const T* x, int64_t ldx, int8_t* q, float* scale,
                         int64_t rows, int64_t dim) {
  const int64_t groups = (dim + 31) / 32;
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) {
    quantize_row_groups(x + r * ldx, q + r * dim, scale + r * groups, dim);
  }
}

}  // namespace infc
