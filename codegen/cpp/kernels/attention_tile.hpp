// One tile of query rows against one chunk of a sequence's cache: what attention.hpp is made of.
//
// Order (docs/design/reduction-order.md): scores by fma over d ascending, one accumulator each;
// values by fma over positions ascending. A position outside a row's range [first, last) never
// enters that row's arithmetic, so what the cache holds there doesn't matter, be it NaN. Of codes
// the finished score is multiplied by the key's scale, and a weight by the value's before it
// meets the codes.
#pragma once

#include "kv.hpp"
#include "math.hpp"
#include "row_tiles.hpp"

namespace infc {

constexpr int64_t kChunk = 256;  // positions; chunks start at multiples of it

// Rows that meet K and V at once as these come from the cache.
constexpr int kStreamedRows = INFC_AVX512 ? 4 : 2;

// The positions [first, last) that a row attends to.
struct Span {
  int64_t first;
  int64_t last;
};

// Where one (sequence, KV head) finds its cache.
template <class TC>
struct HeadCache {
  const KvView* kv;
  const int32_t* table;  // the sequence's block ids
  int64_t head;

  INFC_INLINE const TC* key(int64_t position) const {
    return key_at<TC>(*kv, table[position / kv->block_size], head, position % kv->block_size);
  }
  INFC_INLINE const TC* value(int64_t position) const {
    return value_at<TC>(*kv, table[position / kv->block_size], head, position % kv->block_size);
  }
  INFC_INLINE const float* key_scale(int64_t position) const {
    return key_scale_at(*kv, table[position / kv->block_size], head, position % kv->block_size);
  }
  INFC_INLINE const float* value_scale(int64_t position) const {
    return value_scale_at(*kv, table[position / kv->block_size], head, position % kv->block_size);
  }
};

// P groups of 16 keys: k[p] points at the group's first, with `stride` elements from one d to the
// next; scale[p] at their scales, where the cache has any.
template <class TK, int P>
struct KeyGroups {
  const TK* k[P];
  const float* scale[P];
  int64_t stride;
};

// Scores of R rows at the first P of the groups; out[r] + 16 p receives q · k, times the key's scale
// where `Scaled`.
template <bool Scaled, int R, int P, class TK, int Groups>
INFC_INLINE void score_block(const float* q, const KeyGroups<TK, Groups>& keys, int64_t D,
                             float* out) {
  f32x16 acc[R][P];
  const TK* key[P];
  INFC_UNROLL for (int p = 0; p < P; ++p) key[p] = keys.k[p];
  INFC_UNROLL for (int r = 0; r < R; ++r) {
    INFC_UNROLL for (int p = 0; p < P; ++p) acc[r][p] = zeros();
  }
  for (int64_t d = 0; d < D; ++d) {
    f32x16 b[P];
    INFC_UNROLL for (int p = 0; p < P; ++p) b[p] = load(key[p] + d * keys.stride);
    INFC_UNROLL for (int r = 0; r < R; ++r) {
      const f32x16 a = set1(q[r * D + d]);
      INFC_UNROLL for (int p = 0; p < P; ++p) acc[r][p] = fma(a, b[p], acc[r][p]);
    }
  }
  INFC_UNROLL for (int r = 0; r < R; ++r) {
    INFC_UNROLL for (int p = 0; p < P; ++p) {
      if constexpr (Scaled) acc[r][p] = acc[r][p] * load(keys.scale[p]);
      store(out + r * kChunk + p * kLanes, acc[r][p]);
    }
  }
}

// Scores of `rows` rows (q [rows, D]) at the positions [begin, end), both multiples of 16 inside
// one chunk that starts at `chunk`; scores is [rows][kChunk].
template <class TC>
void score_rows(const HeadCache<TC>& cache, const float* q, int rows, int64_t chunk, int64_t begin,
                int64_t end, float* scores) {
  constexpr int kR = kStreamedRows;
  constexpr int kP = INFC_AVX512 ? 4 : 2;
  const int64_t D = cache.kv->D;
  KeyGroups<TC, kP> keys;
  keys.stride = cache.kv->block_size;
  for (int64_t position = begin; position < end;) {
    const int groups = end - position >= kP * kLanes ? kP : 1;
    for (int p = 0; p < groups; ++p) {
      keys.k[p] = cache.key(position + p * kLanes);
      if (kHoldsCodes<TC>) keys.scale[p] = cache.key_scale(position + p * kLanes);
    }
    for_each_tile<kR>(rows, [&](int64_t r, auto height) {
      constexpr int kRows = decltype(height)::value;
      float* out = scores + r * kChunk + (position - chunk);
      if (groups == kP) {
        score_block<kHoldsCodes<TC>, kRows, kP>(q + r * D, keys, D, out);
      } else {
        score_block<kHoldsCodes<TC>, kRows, 1>(q + r * D, keys, D, out);
      }
    });
    position += groups * kLanes;
  }
}

// Turns a row's scores into weights p = exp(s - max) over its span, zero in the lanes beside it
// that share a group of 16. Returns the maximum and the sum of the weights.
struct ChunkSums {
  float max;
  float sum;
};
INFC_INLINE ChunkSums weigh_row(float* scores, int64_t chunk, const Span& span, float scale,
                                float softcap) {
  const int64_t begin = span.first / kLanes * kLanes;
  const f32x16 low = set1(-std::numeric_limits<float>::infinity());
  f32x16 m = low;
  for (int64_t p = begin; p < span.last; p += kLanes) {
    const i32x16 inside = lanes_between(static_cast<int32_t>(p), static_cast<int32_t>(span.first),
                                        static_cast<int32_t>(span.last));
    f32x16 s = load(scores + (p - chunk)) * set1(scale);
    if (softcap != 0.0f) s = tanh(s / set1(softcap)) * set1(softcap);
    s = select(inside, s, low);
    store(scores + (p - chunk), s);
    m = max(s, m);
  }
  const float top = max_lanes(m);
  f32x16 sum = zeros();
  for (int64_t p = begin; p < span.last; p += kLanes) {
    const i32x16 inside = lanes_between(static_cast<int32_t>(p), static_cast<int32_t>(span.first),
                                        static_cast<int32_t>(span.last));
    const f32x16 e = select(inside, exp(load(scores + (p - chunk)) - set1(top)), zeros());
    store(scores + (p - chunk), e);
    sum = sum + e;
  }
  return {top, sum_lanes(sum)};
}

// Multiplies a row's weights by the scales of the values that they meet. Lanes beside the span that
// share a group of 16 become zero.
INFC_INLINE void scale_weights(const HeadCache<int8_t>& cache, float* weights, int64_t chunk,
                               const Span& span) {
  for (int64_t p = span.first / kLanes * kLanes; p < span.last; p += kLanes) {
    const i32x16 inside = lanes_between(static_cast<int32_t>(p), static_cast<int32_t>(span.first),
                                        static_cast<int32_t>(span.last));
    const f32x16 scaled = load(weights + (p - chunk)) * load(cache.value_scale(p));
    store(weights + (p - chunk), select(inside, scaled, zeros()));
  }
}

// The values of a chunk where the cache has them: block by block.
template <class TC>
struct CachedValues {
  HeadCache<TC> cache;

  INFC_INLINE const TC* at(int64_t position) const { return cache.value(position); }
  INFC_INLINE int64_t stride() const { return cache.kv->Dv; }
  // Where those that lie behind each other end.
  INFC_INLINE int64_t run_end(int64_t position, int64_t last) const {
    const int64_t end = (position / cache.kv->block_size + 1) * cache.kv->block_size;
    return end < last ? end : last;
  }
};

// acc[r][0 .. width) = fma(weights[r][position], V[position], acc) for positions in [first, last),
// which all R rows attend to; `width` <= 16 C elements from column `column` on.
template <int R, int C, class Values>
INFC_INLINE void value_block(const Values& values, const float* weights, int64_t chunk,
                             int64_t first, int64_t last, int64_t column, int64_t width, float* out,
                             int64_t ldo) {
  f32x16 acc[R][C];
  INFC_UNROLL for (int r = 0; r < R; ++r) {
    INFC_UNROLL for (int c = 0; c < C; ++c) acc[r][c] = load(out + r * ldo + c * kLanes);
  }
  const int64_t stride = values.stride();
  for (int64_t position = first; position < last;) {
    const int64_t end = values.run_end(position, last);
    const auto* v = values.at(position) + column;
    for (; position < end; ++position, v += stride) {
      f32x16 b[C];
      if (C == 1 && width < kLanes) {
        b[0] = load_partial(v, width);
      } else {
        INFC_UNROLL for (int c = 0; c < C; ++c) b[c] = load(v + c * kLanes);
      }
      INFC_UNROLL for (int r = 0; r < R; ++r) {
        const f32x16 a = set1(weights[r * kChunk + (position - chunk)]);
        INFC_UNROLL for (int c = 0; c < C; ++c) acc[r][c] = fma(a, b[c], acc[r][c]);
      }
    }
  }
  INFC_UNROLL for (int r = 0; r < R; ++r) {
    INFC_UNROLL for (int c = 0; c < C; ++c) store(out + r * ldo + c * kLanes, acc[r][c]);
  }
}

// All `columns` of R rows over positions that all of them attend to. out rows are padded to 16.
template <int R, class Values>
void add_values(const Values& values, const float* weights, int64_t chunk, int64_t first,
                int64_t last, int64_t columns, float* out, int64_t ldo) {
  if (first >= last) return;
  constexpr int kC = INFC_AVX512 ? (R <= 4 ? 4 : 2) : R <= 2 ? 2 : 1;
  int64_t column = 0;
  for (; column + kC * kLanes <= columns; column += kC * kLanes) {
    value_block<R, kC>(values, weights, chunk, first, last, column, kC * kLanes, out + column, ldo);
  }
  for (; column < columns; column += kLanes) {
    const int64_t width = columns - column < kLanes ? columns - column : kLanes;
    value_block<R, 1>(values, weights, chunk, first, last, column, width, out + column, ldo);
  }
}

// R rows whose spans differ: first each row's own positions before those all share, then the shared
// ones together, then the rest, so that each row still takes its positions in ascending order.
template <int R, class Values>
void value_tile(const Values& values, const float* weights, const Span* spans, int64_t chunk,
                int64_t columns, float* out, int64_t ldo) {
  int64_t first = spans[0].first;
  int64_t last = spans[0].last;
  for (int r = 1; r < R; ++r) {
    first = spans[r].first > first ? spans[r].first : first;
    last = spans[r].last < last ? spans[r].last : last;
  }
  const bool shared = first < last;
  const auto alone = [&](int r, int64_t from, int64_t to) {
    add_values<1>(values, weights + r * kChunk, chunk, from, to, columns, out + r * ldo, ldo);
  };
  if constexpr (R > 1) {
    for (int r = 0; r < R; ++r) alone(r, spans[r].first, shared ? first : spans[r].last);
  }
  if (!shared) return;
  add_values<R>(values, weights, chunk, first, last, columns, out, ldo);
  if constexpr (R > 1) {
    for (int r = 0; r < R; ++r) alone(r, last, spans[r].last);
  }
}

// Any number of rows, at most Most of them at once.
template <int Most, class Values>
void value_rows(const Values& values, const float* weights, const Span* spans, int rows,
                int64_t chunk, int64_t columns, float* out, int64_t ldo) {
  for_each_tile<Most>(rows, [&](int64_t r, auto height) {
    value_tile<decltype(height)::value>(values, weights + r * kChunk, spans + r, chunk, columns,
                                        out + r * ldo, ldo);
  });
}

}  // namespace infc
