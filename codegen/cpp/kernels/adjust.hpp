// What a step does to the logits of a draw before its token is taken: bias, penalties, a mask.
//
// runtime/sampling/adjustments.py has the meaning, and the results are equal to the last bit.
#pragma once

#include <limits>

#include "abi.hpp"
#include "logits.hpp"
#include "simd.hpp"
#include "team.hpp"

namespace infc {

// Subnormal numbers are what they are while it lives, as in numpy.
class KeepSubnormals {
 public:
  KeepSubnormals() : saved_(float_mode()) { set_float_mode(saved_ & ~kFlushToZero); }
  ~KeepSubnormals() { set_float_mode(saved_); }

 private:
  uint64_t saved_;
};

// y [width] = x; false where x has a NaN, or an infinite greatest element.
template <class Row>
bool copy_logits(const Row& x, float* y, int64_t width) {
  const f32x16 infinity = set1(std::numeric_limits<float>::infinity());
  i32x16 valid = splat_int<i32x16>(-1);  // NaN is less than nothing
  for_each_group(width, [&](int64_t i, int64_t n) {
    const f32x16 v = x.group(i, n);
    valid = valid & lt(v, infinity);
    store_group(y + i, v, n);
  });
  return !any_lane(valid ^ splat_int<i32x16>(-1));
}

// Whether a row has bias or penalties.
inline bool edits_tokens(const infc_adjusted& row) {
  return row.bias_begin < row.bias_end || row.counts_begin < row.counts_end;
}

// Bias and penalties; minus infinity stays as it is. Not inlined: the compiler would be free to move
// what it computes past the change of mode.
__attribute__((noinline)) inline void edit_tokens(float* y, const infc_adjustments& a,
                                                  const infc_adjusted& row) {
  for (int32_t i = row.bias_begin; i < row.bias_end; ++i) y[a.bias_ids[i]] += a.bias[i];
  for (int32_t i = row.counts_begin; i < row.counts_end; ++i) {
    float score = y[a.count_ids[i]];
    score = score < 0.0f ? score * row.repetition : score / row.repetition;
    score -= static_cast<float>(a.counts[i]) * row.frequency;
    score -= a.counts[i] > 0 ? row.presence : 0.0f;
    y[a.count_ids[i]] = score;
  }
}

// y [width] = the adjusted row of logits x; false where x has a NaN, or an infinite greatest element.
template <class T>
bool adjust_row(const T* x, const infc_adjustments& a, const infc_adjusted& row, float* y,
                int64_t width) {
  const uint32_t* mask = row.mask < 0 ? nullptr : a.masks + row.mask * a.mask_words;
  // What is masked stays minus infinity, so the mask may come first.
  const bool valid = mask == nullptr ? copy_logits(Logits<T>{x}, y, width)
                                     : copy_logits(MaskedLogits<T>{x, mask}, y, width);
  const KeepSubnormals kept;
  edit_tokens(y, a, row);
  return valid;
}

}  // namespace infc
