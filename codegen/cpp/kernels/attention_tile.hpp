// One strip of a sequence's cache against a few query rows: what attention.hpp is made of.
//
// Order (docs/design/reduction-order.md): scores by fma over d ascending, one accumulator each;
// values by fma over positions ascending. A position outside a row's range [first, last) never
// enters that row's arithmetic, so what the cache holds there doesn't matter, be it NaN. Of codes
// the finished score is multiplied by the key's scale.
#pragma once

#include "attention_cache.hpp"
#include "row_tiles.hpp"

namespace infc {

constexpr int64_t kChunk = 256;  // positions; chunks start at multiples of it

// Rows that meet keys or values at once, at most: with two registers of sums each, and those of what
// they meet, they fill the sixteen of AVX2.
constexpr int kBlockRows = 6;

// Registers of sums that each of R such rows has at most. A dozen hide the latency of two fmas a
// cycle, but one or two rows wait for memory, or for codes to become floats.
constexpr int block_registers(int R) {
  if (INFC_AVX512) return R <= 4 ? 4 : 2;
  return R <= 3 ? 4 : R == 4 ? 3 : 2;
}

// Calls f(from, width) for pieces of n registers that are whole groups of 16: of Most, and of the
// least that divides them, two where there are two and more to a group.
template <int Most, class F>
INFC_INLINE void for_each_piece(int64_t n, F f) {
  constexpr int kLeast = kRegs == 1 ? 1 : 2;
  int64_t from = 0;
  // Of four registers, three would leave one.
  for (; from + Most <= n && (kLeast == 1 || n - from != Most + 1); from += Most) {
    f(from, std::integral_constant<int, Most>{});
  }
  for (; from < n; from += kLeast) f(from, std::integral_constant<int, kLeast>{});
}

// acc[r][u] = fma(a(r), b(u), acc[r][u]); holds the fewer of both in registers.
template <int R, int U, class A, class B>
INFC_INLINE void multiply_add(reg::f32 (&acc)[R][U], A a, B b) {
  if constexpr (R < U) {
    reg::f32 held[R];
    INFC_UNROLL for (int r = 0; r < R; ++r) held[r] = a(r);
    INFC_UNROLL for (int u = 0; u < U; ++u) {
      const reg::f32 x = b(u);
      INFC_UNROLL for (int r = 0; r < R; ++r) acc[r][u] = reg::fma(held[r], x, acc[r][u]);
    }
  } else {
    reg::f32 held[U];
    INFC_UNROLL for (int u = 0; u < U; ++u) held[u] = b(u);
    INFC_UNROLL for (int r = 0; r < R; ++r) {
      const reg::f32 x = a(r);
      INFC_UNROLL for (int u = 0; u < U; ++u) acc[r][u] = reg::fma(x, held[u], acc[r][u]);
    }
  }
}

// Scores of R rows (q [R, D]) at U registers of positions from register `from` of the strip on;
// out[r] + its position receives q · k, times the key's scale.
template <int R, int U, class TK>
INFC_INLINE void score_block(const Strip<TK>& keys, int64_t from, const float* q, int64_t D,
                             float* out) {
  reg::f32 acc[R][U] = {};
  const int64_t stride = keys.stride;
  const TK* key[U];
  const TK* ahead[U];
  INFC_UNROLL for (int u = 0; u < U; ++u) {
    key[u] = keys.at[(from + u) / kRegs] + (from + u) % kRegs * kRegLanes;
    ahead[u] = keys.ahead[(from + u) / kRegs];
  }
  for (int64_t d = 0; d < D; ++d) {
    multiply_add<R, U>(
        acc, [&](int r) { return reg::set1(q[r * D + d]); },
        [&](int u) {
          if (u % kRegs == 0) prefetch(ahead[u] + d * stride);
          return reg::load(key[u] + d * stride);
        });
  }
  INFC_UNROLL for (int u = 0; u < U; ++u) {
    const float* scale = keys.scale[(from + u) / kRegs];
    if (scale != nullptr) {
      const reg::f32 s = reg::load(scale + (from + u) % kRegs * kRegLanes);
      INFC_UNROLL for (int r = 0; r < R; ++r) acc[r][u] = acc[r][u] * s;
    }
    INFC_UNROLL for (int r = 0; r < R; ++r) {
      reg::store(out + r * kChunk + (from + u) * kRegLanes, acc[r][u]);
    }
  }
}

// The same for the whole strip.
template <int R, class TK>
void score_strip(const Strip<TK>& keys, const float* q, int64_t D, float* out) {
  for_each_piece<block_registers(R)>(keys.groups * kRegs, [&](int64_t from, auto width) {
    score_block<R, width>(keys, from, q, D, out);
  });
}

// Weights of rows at the positions of a strip, and which of these all the rows attend to.
struct StripWeights {
  const float* weights;  // of the strip's first position; rows are kChunk apart
  int first;
  int last;

  INFC_INLINE StripWeights from(int64_t row) const {
    return {weights + row * kChunk, first, last};
  }
};

// Where weighted values are summed: rows padded to 16 elements, `stride` apart.
struct Sums {
  float* rows;
  int64_t stride;

  INFC_INLINE Sums from(int64_t row) const { return {rows + row * stride, stride}; }
};

// sums[r][column .. U registers) = fma(weights[r][position], V[position], sums), position
// ascending. With U = 1 there may be fewer columns than a register has lanes: `width`.
template <int R, int U, class TV>
INFC_INLINE void value_block(const Strip<TV>& values, const StripWeights& w, int64_t column,
                             int64_t width, const Sums& sums) {
  reg::f32 acc[R][U];
  float* out = sums.rows + column;
  const int64_t out_stride = sums.stride;
  INFC_UNROLL for (int r = 0; r < R; ++r) {
    INFC_UNROLL for (int u = 0; u < U; ++u) {
      acc[r][u] = reg::load(out + r * out_stride + u * kRegLanes);
    }
  }
  const int64_t stride = values.stride;
  for (int position = w.first; position < w.last;) {
    const int group = position / kLanes;
    const int end = (group + 1) * kLanes < w.last ? (group + 1) * kLanes : w.last;
    const float* weight = w.weights + position;
    const TV* v = values.at[group] + position % kLanes * stride + column;
    const TV* ahead = values.ahead[group] + position % kLanes * stride + column;
    for (; position < end; ++position) {
      multiply_add<R, U>(
          acc, [&](int r) { return reg::set1(weight[r * kChunk]); },
          [&](int u) {
            if (u % kRegs == 0) prefetch(ahead + u * kRegLanes);
            if (U == 1 && width < kRegLanes) return load_partial(v, width).v[0];
            return reg::load(v + u * kRegLanes);
          });
      ++weight;
      v += stride;
      ahead += stride;
    }
  }
  INFC_UNROLL for (int r = 0; r < R; ++r) {
    INFC_UNROLL for (int u = 0; u < U; ++u) {
      reg::store(out + r * out_stride + u * kRegLanes, acc[r][u]);
    }
  }
}

// The same for all `columns`.
template <int R, class TV>
void value_strip(const Strip<TV>& values, const StripWeights& w, int64_t columns,
                 const Sums& sums) {
  const int64_t whole = columns / kLanes * kRegs;
  for_each_piece<block_registers(R)>(whole, [&](int64_t from, auto width) {
    value_block<R, width>(values, w, from * kRegLanes, kRegLanes, sums);
  });
  for (int64_t column = whole * kRegLanes; column < columns; column += kRegLanes) {
    const int64_t left = columns - column;
    for (int r = 0; r < R; ++r) {  // few heads have such a size: not worth code for all heights
      value_block<1, 1>(values, w.from(r), column, left < kRegLanes ? left : kRegLanes, sums.from(r));
    }
  }
}

}  // namespace infc
