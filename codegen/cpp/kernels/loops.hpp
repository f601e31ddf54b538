// What generated loops are made of: row sums in the written order, strided copies, fills.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "bf16.hpp"
#include "team.hpp"

namespace infc {

// 16 partial sums, then the tree 8-4-2-1: the order of docs/design/reduction-order.md.
template <class T>
inline float row_sum(const T* x, int64_t stride, int64_t n) {
  float lanes[16] = {};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + 16 <= n; i += 16)
      for (int l = 0; l < 16; ++l) lanes[l] += to_float(x[i + l]);
  }
  for (; i < n; ++i) lanes[i % 16] += to_float(x[i * stride]);
  for (int half = 8; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

template <class T>
inline int64_t row_sum_int(const T* x, int64_t stride, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i * stride];
  return total;
}

// The largest element, in the type that elements are computed in; NaN if there is one.
template <class T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
inline int64_t row_max(const T* x, int64_t stride, int64_t n) {
  int64_t best = std::numeric_limits<int64_t>::min();
  for (int64_t i = 0; i < n; ++i) best = x[i * stride] > best ? x[i * stride] : best;
  return best;
}
template <class T, std::enable_if_t<!std::is_integral_v<T>, int> = 0>
inline float row_max(const T* x, int64_t stride, int64_t n) {
  float best = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    const float v = to_float(x[i * stride]);
    best = (v > best || v != v) ? v : best;
  }
  return best;
}

// Element by element between two strided tensors of one shape.
template <int Rank, class T>
inline void copy_strided(const Team& t, const T* x, T* y, const int64_t (&sizes)[Rank],
                         const int64_t (&from)[Rank], const int64_t (&to)[Rank]) {
  int64_t count = 1;
  for (int d = 0; d + 1 < Rank; ++d) count *= sizes[d];
  const Share rows = share_of(t, count);
  const int64_t n = sizes[Rank - 1], sx = from[Rank - 1], sy = to[Rank - 1];
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    int64_t rest = r, ox = 0, oy = 0;
    for (int d = Rank - 2; d >= 0; --d) {
      ox += rest % sizes[d] * from[d];
      oy += rest % sizes[d] * to[d];
      rest /= sizes[d];
    }
    for (int64_t i = 0; i < n; ++i) y[oy + i * sy] = x[ox + i * sx];
  }
}

// The type that a T is computed in, and the way back.
template <class T>
struct Computed {
  using type = T;
  static T load(T v) { return v; }
  static T store(T v) { return v; }
};
template <>
struct Computed<bf16> {
  using type = float;
  static float load(bf16 v) { return to_float(v); }
  static bf16 store(float v) { return to_bf16(v); }
};

template <class T>
inline void fill(const Team& t, T* y, int64_t count, typename Computed<T>::type value) {
  const Share s = share_of(t, count);
  for (int64_t i = s.begin; i < s.end; ++i) y[i] = Computed<T>::store(value);
}

template <class T>
inline void iota(const Team& t, T* y, int64_t count) {
  const Share s = share_of(t, count);
  for (int64_t i = s.begin; i < s.end; ++i) {
    y[i] = Computed<T>::store(static_cast<typename Computed<T>::type>(i));
  }
}

// y[b] = a[b] x[b] for row-major matrices that are both computed; k ascending, one accumulator.
template <class T>
inline void matmul_plain(const Team& t, const T* a, const T* b, T* y, int64_t batch, int64_t m,
                         int64_t n, int64_t k) {
  const Share s = share_of(t, batch * m);
  for (int64_t r = s.begin; r < s.end; ++r) {
    const T* row = a + r * k;
    const T* matrix = b + r / m * k * n;
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0.0f;
      for (int64_t i = 0; i < k; ++i) sum += to_float(row[i]) * to_float(matrix[i * n + j]);
      y[r * n + j] = from_float<T>(sum);
    }
  }
}

}  // namespace infc
