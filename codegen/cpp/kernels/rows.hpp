// Softmax, top-k, gather and scatter over rows.
#pragma once

#include <limits>

#include "math.hpp"
#include "team.hpp"

namespace infc {

// The largest element of a row; -inf for an empty one.
template <class T>
INFC_INLINE float max_row(const T* x, int64_t dim) {
  const f32x16 low = set1(-std::numeric_limits<float>::infinity());
  f32x16 m = low;
  for_each_group(dim, [&](int64_t i, int64_t n) {
    f32x16 v = load_group(x + i, n);
    if (n < kLanes) v = select(lanes_between(0, 0, static_cast<int32_t>(n)), v, low);
    m = max(v, m);
  });
  return max_lanes(m);
}

// y = exp(x - max) / sum, in float: 16 lanes, then the tree. TY may be wider than T. y may be x
// where the types are equal.
template <class T, class TY>
INFC_INLINE void softmax_row(const T* x, TY* y, int64_t dim) {
  const f32x16 top = set1(max_row(x, dim));
  f32x16 acc = zeros();
  for_each_group(dim, [&](int64_t i, int64_t n) {
    f32x16 e = exp(load_group(x + i, n) - top);
    if (n < kLanes) e = select(lanes_between(0, 0, static_cast<int32_t>(n)), e, zeros());
    acc = acc + e;
  });
  const f32x16 sum = set1(sum_lanes(acc));
  for_each_group(dim, [&](int64_t i, int64_t n) {
    store_group(y + i, exp(load_group(x + i, n) - top) / sum, n);
  });
}
template <class T, class TY>
void softmax_rows(const Team& t, const T* x, int64_t ldx, TY* y, int64_t ldy, int64_t rows,
                  int64_t dim) {
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) softmax_row(x + r * ldx, y + r * ldy, dim);
}

// Whether a comes before b in descending order; NaN counts as the greatest, as in PyTorch.
INFC_INLINE bool before(float a, float b) { return a > b || (a != a && b == b); }

// The k largest of each row, descending, ties to the lower index: values [rows, k] and indices
// [rows, k], contiguous. 1 <= k <= dim.
template <class T, class Id>
void topk_rows(const Team& t, const T* x, int64_t ldx, T* values, Id* indices, int64_t rows,
               int64_t dim, int64_t k) {
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) {
    const T* row = x + r * ldx;
    T* value = values + r * k;
    Id* index = indices + r * k;
    int64_t filled = 0;
    for (int64_t i = 0; i < dim; ++i) {
      // Insertion from the end: an equal element that came earlier stays in front.
      const float key = to_float(row[i]);
      if (filled == k && !before(key, to_float(value[k - 1]))) continue;
      int64_t at = filled < k ? filled++ : k - 1;
      for (; at > 0 && before(key, to_float(value[at - 1])); --at) {
        value[at] = value[at - 1];
        index[at] = index[at - 1];
      }
      value[at] = row[i];
      index[at] = static_cast<Id>(i);
    }
  }
}

// y [rows, count] = x[r][index[r][i]], with index [rows, count] in [0, dim), contiguous.
template <class T, class Id>
void gather_rows(const Team& t, const T* x, int64_t ldx, const Id* index, T* y, int64_t rows,
                 int64_t count) {
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) {
    for (int64_t i = 0; i < count; ++i) y[r * count + i] = x[r * ldx + index[r * count + i]];
  }
}

// y [rows, dim] = x, but `value` at index[r][i] of row r; index [rows, count], y contiguous.
template <class T, class Id>
void scatter_rows(const Team& t, const T* x, int64_t ldx, const Id* index, T* y, int64_t rows,
                  int64_t dim, int64_t count, float value) {
  const Share share = share_of(t, rows);
  const T element = from_float<T>(value);
  for (int64_t r = share.begin; r < share.end; ++r) {
    for (int64_t i = 0; i < dim; ++i) y[r * dim + i] = x[r * ldx + i];
    for (int64_t i = 0; i < count; ++i) y[r * dim + index[r * count + i]] = element;
  }
}

}  // namespace infc
