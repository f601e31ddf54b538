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

namespace infc {

constexpr int64_t kChunk = 256;  // positions; chunks start at multiples of it
constexpr int kTileRows = 16;    // query rows that share loads of K and V at most

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
template <class TC, int P>
struct KeyGroups {
  const TC* k[P];
  const float* scale[P];
  int64_t stride;
};

// Scores of R rows at the first P of the groups; out[r] + 16 p receives q · k.
template <int R, int P, class TC, int Groups>
INFC_INLINE void score_block(const float* q, int64_t ldq, const KeyGroups<TC, Groups>& keys,
                             int64_t D, float* out) {
  f32x16 acc[R][P];
  const TC* key[P];
  INFC_UNROLL for (int p = 0; p < P; ++p) key[p] = keys.k[p];
  INFC_UNROLL for (int r = 0; r < R; ++r) {
    INFC_UNROLL for (int p = 0; p < P; ++p) acc[r][p] = zeros();
  }
  for (int64_t d = 0; d < D; ++d) {
    f32x16 b[P];
    INFC_UNROLL for (int p = 0; p < P; ++p) b[p] = load(key[p] + d * keys.stride);
    INFC_UNROLL for (int r = 0; r < R; ++r) {
      const f32x16 a = set1(q[r * ldq + d]);
      INFC_UNROLL for (int p = 0; p < P; ++p) acc[r][p] = fma(a, b[p], acc[r][p]);
    }
  }
  INFC_UNROLL for (int r = 0; r < R; ++r) {
    INFC_UNROLL for (int p = 0; p < P; ++p) {
      if constexpr (kHoldsCodes<TC>) acc[r][p] = acc[r][p] * load(keys.scale[p]);
      store(out + r * kChunk + p * kLanes, acc[r][p]);
    }
  }
}

// Scores of `rows` rows (q [rows, D]) at the positions [begin, end), both multiples of 16 inside
// one chunk that starts at `chunk`; scores is [rows][kChunk].
template <class TC>
void score_rows(const HeadCache<TC>& cache, const float* q, int rows, int64_t chunk, int64_t begin,
                int64_t end, float* scores) {
  constexpr int kR = INFC_AVX512 ? 4 : 2;
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
    float* out = scores + (position - chunk);
    int r = 0;
    for (; r + kR <= rows; r += kR) {
      if (groups == kP) {
        score_block<kR, kP>(q + r * D, D, keys, D, out + r * kChunk);
      } else {
        score_block<kR, 1>(q + r * D, D, keys, D, out + r * kChunk);
      }
    }
    for (; r < rows; ++r) {
      if (groups == kP) {
        score_block<1, kP>(q + r * D, D, keys, D, out + r * kChunk);
      } else {
        score_block<1, 1>(q + r * D, D, keys, D, out + r * kChunk);
      }
    }
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

// acc[r][0 .. width) = fma(weights[r][position], V[position], acc) for positions in [first, last),
// which all R rows attend to; `width` <= 16 C elements from column `column` on.
template <int R, int C, class TC>
INFC_INLINE void value_block(const HeadCache<TC>& cache, const float* weights, int64_t chunk,
                             int64_t first, int64_t last, int64_t column, int64_t width, float* out,
                             int64_t ldo) {
  f32x16 acc[R][C];
  INFC_UNROLL for (int r = 0; r < R; ++r) {
    INFC_UNROLL for (int c = 0; c < C; ++c) acc[r][c] = load(out + r * ldo + c * kLanes);
  }
  const int64_t bs = cache.kv->block_size;
  const int64_t Dv = cache.kv->Dv;
  for (int64_t position = first; position < last;) {
    const int64_t next = (position / bs + 1) * bs < last ? (position / bs + 1) * bs : last;
    const TC* v = cache.value(position) + column;
    for (; position < next; ++position, v += Dv) {
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

// All columns of R rows over positions that all of them attend to. out rows are padded to 16.
template <int R, class TC>
void add_values(const HeadCache<TC>& cache, const float* weights, int64_t chunk, int64_t first,
                int64_t last, float* out, int64_t ldo) {
  if (first >= last) return;
  constexpr int kC = INFC_AVX512 ? 4 : 2;
  const int64_t Dv = cache.kv->Dv;
  int64_t column = 0;
  for (; column + kC * kLanes <= Dv; column += kC * kLanes) {
    value_block<R, kC>(cache, weights, chunk, first, last, column, kC * kLanes, out + column, ldo);
  }
  for (; column < Dv; column += kLanes) {
    const int64_t width = Dv - column < kLanes ? Dv - column : kLanes;
    value_block<R, 1>(cache, weights, chunk, first, last, column, width, out + column, ldo);
  }
}

// Rows whose spans differ: first each row's own positions before those all share, then the shared
// ones together, then the rest, so that each row still takes its positions in ascending order.
template <class TC>
void value_rows(const HeadCache<TC>& cache, const float* weights, const Span* spans, int rows,
                int64_t chunk, float* out, int64_t ldo) {
  constexpr int kR = INFC_AVX512 ? 4 : 2;
  int r = 0;
  for (; r + kR <= rows; r += kR) {
    int64_t first = spans[r].first;
    int64_t last = spans[r].last;
    for (int i = 1; i < kR; ++i) {
      first = spans[r + i].first > first ? spans[r + i].first : first;
      last = spans[r + i].last < last ? spans[r + i].last : last;
    }
    const bool shared = first < last;
    for (int i = 0; i < kR; ++i) {
      const Span& s = spans[r + i];
      add_values<1>(cache, weights + (r + i) * kChunk, chunk, s.first, shared ? first : s.last,
                    out + (r + i) * ldo, ldo);
    }
    if (!shared) continue;
    add_values<kR>(cache, weights + r * kChunk, chunk, first, last, out + r * ldo, ldo);
    for (int i = 0; i < kR; ++i) {
      add_values<1>(cache, weights + (r + i) * kChunk, chunk, last, spans[r + i].last,
                    out + (r + i) * ldo, ldo);
    }
  }
  for (; r < rows; ++r) {
    add_values<1>(cache, weights + r * kChunk, chunk, spans[r].first, spans[r].last, out + r * ldo,
                  ldo);
  }
}

}  // namespace infc
