// y = (q · Wᵀ) * scales + bias over packed weights of few bits, for one row or many.
#pragma once

#include "linear_walk.hpp"
#include "quantize.hpp"

namespace infc {

// What a finished sum is multiplied with and added to: scales of the panel's outputs, and their
// bias or null.
template <class TB>
struct OutputScale {
  const float* scale;
  const TB* bias;

  OutputScale from(int64_t n) const { return {scale + n, bias == nullptr ? bias : bias + n}; }
};

// y[n] = float(sum[n]) * (row_scale * scale[n]) + bias[n], rounded once, for the first `count`.
template <class TY, class TB>
INFC_INLINE void write_scaled(const int32_t* sums, float row_scale, const OutputScale<TB>& outputs,
                              TY* y, int64_t count) {
  for_each_group(count, [&](int64_t j, int64_t n) {
    f32x16 v = to_float_value(load_int32(sums + j)) *
               (set1(row_scale) * load_group(outputs.scale + j, n));
    if (outputs.bias != nullptr) v = v + load_group(outputs.bias + j, n);
    store_group(y + j, v, n);
  });
}

// y[n] = sum[n] * scale[n] + bias[n], rounded once, for the first `count`.
template <class TY, class TB>
INFC_INLINE void write_scaled(const float* sums, const OutputScale<TB>& outputs, TY* y,
                              int64_t count) {
  for_each_group(count, [&](int64_t j, int64_t n) {
    f32x16 v = load(sums + j) * load_group(outputs.scale + j, n);
    if (outputs.bias != nullptr) v = v + load_group(outputs.bias + j, n);
    store_group(y + j, v, n);
  });
}

// How rows of codes are scaled that meet weights of type W: one scale a row, or one a group.
template <class W>
struct RowScales {
  using Row = const int8_t*;
  static constexpr int64_t count(int64_t) { return 1; }
  static Row row(const int8_t* q, const float*) { return q; }
  template <class T>
  static void quantize(const Team& t, const T* x, int64_t ldx, int8_t* q, float* scale, int64_t rows,
                       int64_t dim) {
    quantize_rows(t, x, ldx, q, scale, rows, dim);
  }
  template <class TY, class TB>
  static void write(const int32_t* sums, const float* row_scale, const OutputScale<TB>& outputs,
                    TY* y, int64_t count) {
    write_scaled(sums, *row_scale, outputs, y, count);
  }
};
template <int kBits, class Scale, class Minimum, Levels kLevels, int kChunks>
struct RowScales<Grouped<kBits, Scale, Minimum, kLevels, kChunks>> {
  using Row = ScaledRow;
  static constexpr int64_t count(int64_t K) { return ceil_div(K, kGroup); }
  static Row row(const int8_t* q, const float* row_scale) { return {q, row_scale}; }
  template <class T>
  static void quantize(const Team& t, const T* x, int64_t ldx, int8_t* q, float* scale, int64_t rows,
                       int64_t dim) {
    quantize_row_groups(t, x, ldx, q, scale, rows, dim);
  }
  template <class TY, class TB>
  static void write(const float* sums, const float*, const OutputScale<TB>& outputs, TY* y,
                    int64_t count) {
    write_scaled(sums, outputs, y, count);
  }
};

// q [M, K] (row stride ldq) with row_scale [M], packed_w from [N, K] with scale [N], bias [N] or
// null, y [M, N] (row stride ldy). An element is float(exact sum) * (row_scale * scale), plus the
// bias, rounded once to TY; K <= 65536, so that no sum overflows. W is int8_t, or int4x2 for codes
// of 4 bits. With a W of Grouped, row_scale is [M, ceil(K / 32)], and an element is the sum of
// linear_groups_tile.hpp times scale, plus the bias, for any K. Needs product_scratch_bytes<W>(K) of
// scratch on each thread. No barrier inside.
template <class W, class TY, class TB = TY>
void scaled_linear(const Team& t, const int8_t* q, int64_t ldq, const float* row_scale,
                   const void* packed_w, const float* scale, const TB* bias, TY* y, int64_t ldy,
                   int64_t M, int64_t N, int64_t K) {
  constexpr int kNR = LinearLayout<W>::kNR;
  const OutputScale<TB> outputs{scale, bias};
  using Scales = RowScales<W>;
  const int64_t count = Scales::count(K);
  Product<W> product(t, packed_w, K);
  for_each_share<W>(t, M, N, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    product.run(
        first, last, begin, end,
        [&](int64_t i) { return Scales::row(q + i * ldq, row_scale + i * count); },
        [&](int64_t i, int64_t panel, const auto* sums) {
          const int64_t n = panel * kNR;
          Scales::write(sums, row_scale + i * count, outputs.from(n), y + i * ldy + n,
                        N - n < kNR ? N - n : kNR);
        });
  });
}

}  // namespace infc
