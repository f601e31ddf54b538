// Any number of rows against a chunk of a sequence's cache, strip by strip.
//
// Each sum is taken in the order of attention_tile.hpp, whoever shares a strip.
#pragma once

#include "attention_weights.hpp"

namespace infc {

// Calls f(first row, height) for tiles of rows that meet a cache of type TC. What widening codes
// costs is shared by the rows of a tile alone, so there tiles are as high as they can be, and none
// has one row where it could have two.
template <class TC, class F>
INFC_INLINE void for_each_cache_tile(int rows, F f) {
  if constexpr (kHoldsCodes<TC>) {
    for (int r = 0; r < rows;) {
      const int left = rows - r;
      const int rows_here = left == kBlockRows + 1 ? kBlockRows - 1 : left;
      const int height = rows_here < kBlockRows ? rows_here : kBlockRows;
      with_height<kBlockRows>(height, [&](auto constant) { f(r, constant); });
      r += height;
    }
  } else {
    for_each_tile<kBlockRows>(rows, f);
  }
}

// Scores of `rows` rows (q [rows, D]) at the positions [begin, end), both multiples of 16 inside
// one chunk that starts at `chunk`; scores is [rows][kChunk].
template <class TC>
void score_rows(const HeadCache<TC>& cache, const float* q, int rows, int64_t chunk, int64_t begin,
                int64_t end, float* scores) {
  const int64_t D = cache.view().D;
  for (int64_t position = begin; position < end; position += cache.strip_positions(D)) {
    Strip<TC> keys = cache.keys(position, end);
    float* out = scores + (position - chunk);
    for_each_cache_tile<TC>(rows, [&](int64_t r, auto height) {
      score_strip<height>(keys, q + r * D, D, out + r * kChunk);
      keys.was_asked_ahead();
    });
  }
}

// Adds the weighted values of rows that all attend to `span`. A strip stays near while they meet it.
template <class TC>
void shared_values(const HeadCache<TC>& cache, const float* weights, const Span& span, int rows,
                   int64_t chunk, const Sums& sums) {
  const int64_t columns = cache.view().Dv;
  const int64_t positions = cache.strip_positions(columns);
  for (int64_t begin = span.first / kLanes * kLanes; begin < span.last; begin += positions) {
    Strip<TC> values = cache.values(begin, span.last);
    const StripWeights here{weights + (begin - chunk),
                            static_cast<int>(most(span.first - begin, 0)),
                            static_cast<int>(least(span.last - begin, positions))};
    for_each_cache_tile<TC>(rows, [&](int64_t r, auto height) {
      value_strip<height>(values, here.from(r), columns, sums.from(r));
      values.was_asked_ahead();
    });
  }
}

// Rows whose spans differ: first each row's own positions before those all share, then the shared
// ones together, then the rest, so that each row still takes its positions in ascending order.
template <class TC>
void value_tile(const HeadCache<TC>& cache, const float* weights, const Span* spans, int rows,
                int64_t chunk, const Sums& sums) {
  Span shared = spans[0];
  for (int r = 1; r < rows; ++r) {
    shared.first = most(shared.first, spans[r].first);
    shared.last = least(shared.last, spans[r].last);
  }
  const bool any = shared.first < shared.last;
  const auto alone = [&](int r, int64_t first, int64_t last) {
    shared_values(cache, weights + r * kChunk, Span{first, last}, 1, chunk, sums.from(r));
  };
  for (int r = 0; r < rows; ++r) alone(r, spans[r].first, any ? shared.first : spans[r].last);
  if (!any) return;
  shared_values(cache, weights, shared, rows, chunk, sums);
  for (int r = 0; r < rows; ++r) alone(r, shared.last, spans[r].last);
}

// Adds the weighted values of any number of rows, each over its span.
template <class TC>
void value_rows(const HeadCache<TC>& cache, const float* weights, const Span* spans, int rows,
                int64_t chunk, const Sums& sums) {
  bool equal = true;
  for (int r = 1; r < rows; ++r) {
    equal = equal && spans[r].first == spans[0].first && spans[r].last == spans[0].last;
  }
  const int together = equal ? rows : kBlockRows;
  for (int r = 0; r < rows; r += together) {
    const int count = rows - r < together ? rows - r : together;
    value_tile(cache, weights + r * kChunk, spans + r, count, chunk, sums.from(r));
  }
}

}  // namespace infc
