// Scores into weights: what stands between a chunk's keys and its values. A weight is multiplied by
// its value's scale before it meets the codes, where there are any.
#pragma once

#include "attention_tile.hpp"
#include "math.hpp"

namespace infc {

// Sets what groups of 16 at a span's ends hold beside it.
INFC_INLINE void fill_beside(float* row, int64_t chunk, const Span& span, float filling) {
  const auto fill = [&](int64_t p) {
    const i32x16 inside = lanes_between(static_cast<int32_t>(p), static_cast<int32_t>(span.first),
                                        static_cast<int32_t>(span.last));
    store(row + (p - chunk), select(inside, load(row + (p - chunk)), set1(filling)));
  };
  if (span.first % kLanes != 0) fill(span.first / kLanes * kLanes);
  if (span.last % kLanes != 0) fill(span.last / kLanes * kLanes);
}

struct ChunkSums {
  float max;
  float sum;
};
// Turns a row's scores into weights p = exp(s - max) over its span, zero in the lanes beside it
// that share a group of 16. Returns the maximum and the sum of the weights.
INFC_INLINE ChunkSums weigh_row(float* scores, int64_t chunk, const Span& span, float scale,
                                float softcap) {
  constexpr float kLow = -std::numeric_limits<float>::infinity();
  float* begin = scores + (span.first / kLanes * kLanes - chunk);
  float* end = scores + (span.last - chunk);
  for (float* p = begin; p < end; p += kLanes) store(p, load(p) * set1(scale));
  if (softcap != 0.0f) {
    for (float* p = begin; p < end; p += kLanes) {
      store(p, tanh(load(p) / set1(softcap)) * set1(softcap));
    }
  }
  fill_beside(scores, chunk, span, kLow);
  f32x16 m = set1(kLow);
  for (float* p = begin; p < end; p += kLanes) m = max(load(p), m);
  const float top = max_lanes(m);
  for (float* p = begin; p < end; p += kLanes) store(p, exp(load(p) - set1(top)));
  fill_beside(scores, chunk, span, 0.0f);
  f32x16 sum = zeros();
  for (float* p = begin; p < end; p += kLanes) sum = sum + load(p);
  return {top, sum_lanes(sum)};
}

// Multiplies rows' weights at the positions [begin, end) by the scales of the values that they meet;
// both are multiples of 16, and what lies beside a row's span doesn't matter any more.
INFC_INLINE void scale_weights(const HeadCache<int8_t>& cache, float* weights, int rows,
                               int64_t chunk, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; p += kLanes) {
    const f32x16 scale = load(cache.value_scale(p));
    float* weight = weights + (p - chunk);
    for (int r = 0; r < rows; ++r, weight += kChunk) store(weight, load(weight) * scale);
  }
}

}  // namespace infc
