// Rows in tiles whose height the compiler knows.
#pragma once

#include <type_traits>

#include "simd.hpp"

namespace infc {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with m as a constant, 1 <= m <= Most.
template <int Most, class F>
INFC_INLINE void with_height(int m, F f) {
  static_assert(Most >= 1 && Most <= 6, "there is a case for each height");
  if constexpr (Most > 1) {
    if (m < Most) return with_height<Most - 1>(m, f);
  }
  f(std::integral_constant<int, Most>{});
}

// Calls f(first row, height) for tiles of at most Most rows. They are of nearly equal height, as
// each costs a pass over what its rows meet.
template <int Most, class F>
INFC_INLINE void for_each_tile(int64_t rows, F f) {
  const int64_t tiles = ceil_div(rows, Most);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t from = rows * tile / tiles;
    const int64_t to = rows * (tile + 1) / tiles;
    with_height<Most>(static_cast<int>(to - from), [&](auto height) { f(from, height); });
  }
}

}  // namespace infc
