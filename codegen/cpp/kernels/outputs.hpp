// What leaves a step as float32: hidden states and logits; and where the greatest of a row stands.
#pragma once

#include <limits>

#include "abi.hpp"
#include "logits.hpp"
#include "simd.hpp"
#include "team.hpp"

namespace infc {

// Whether anybody wants what the head makes.
inline bool needs_head(const infc_step& s) { return s.num_draws > 0 || s.num_logits > 0; }

// y[0 .. count) = x as float.
template <class T>
void widen_rows(const Team& t, const T* x, float* y, int64_t count) {
  const Share share = share_of(t, count, kLanes);
  for_each_group(share.end - share.begin, [&](int64_t i, int64_t n) {
    store_group(y + share.begin + i, load_group(x + share.begin + i, n), n);
  });
}

// y [count, width] = the rows of x [.., width] that `rows` names, the first ones where it is null.
template <class T>
void widen_chosen(const Team& t, const T* x, const int32_t* rows, int64_t count, float* y,
                  int64_t width) {
  if (rows == nullptr) return widen_rows(t, x, y, count * width);
  for (int64_t i = 0; i < count; ++i) widen_rows(t, x + rows[i] * width, y + i * width, width);
}

// The place of the greatest of `width` elements, the lowest of equals; -1 where one is NaN or the
// greatest is infinite.
template <class Row>
inline int32_t greatest(const Row& x, int64_t width) {
  const f32x16 low = set1(-std::numeric_limits<float>::infinity());
  f32x16 top = low;
  f32x16 place = zeros();  // the bits of where each lane's group of 16 begins
  i32x16 wrong = splat_int<i32x16>(0);
  for_each_group(width, [&](int64_t i, int64_t n) {
    f32x16 v = x.group(i, n);
    if (n < kLanes) v = select(lanes_between(0, 0, static_cast<int32_t>(n)), v, low);
    const i32x16 greater = gt(v, top);
    wrong = wrong | ne(v, v);
    top = select(greater, v, top);
    place = select(greater, from_bits(splat_int<i32x16>(static_cast<int32_t>(i))), place);
  });
  const Lanes values = lanes_of(top), starts = lanes_of(place), faults = lanes_of(from_bits(wrong));
  int best = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (bits_of(faults.x[lane]) != 0) return -1;
    const int32_t before = bits_of(starts.x[best]) + best, here = bits_of(starts.x[lane]) + lane;
    if (values.x[lane] > values.x[best] || (values.x[lane] == values.x[best] && here < before)) {
      best = lane;
    }
  }
  const float most = values.x[best];
  return most - most == 0.0f ? bits_of(starts.x[best]) + best : -1;
}

}  // namespace infc
