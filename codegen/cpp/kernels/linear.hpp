// y = x · Wᵀ + bias over packed weights, for one row or many.
#pragma once

#include "linear_walk.hpp"

namespace infc {

// Adds the bias (or null) to the sums of a panel, rounds once, and writes the first `count` (<= NR).
template <class TY, class TB>
INFC_INLINE void write_sums(const float* sums, const TB* bias, TY* y, int64_t count) {
  for_each_group(count, [&](int64_t j, int64_t n) {
    f32x16 v = load(sums + j);
    if (bias != nullptr) v = v + load_group(bias + j, n);
    store_group(y + j, v, n);
  });
}

// x [M, K] (row stride ldx), packed_w from [N, K], bias [N] or null, y [M, N] (row stride ldy).
// TX and the weights' type TW are float or bf16; rows of float are rounded to bf16 where TW is that.
// TY may be float where TX is bf16.
// Needs product_scratch_bytes<TW>(K) of scratch on each thread. No barrier inside.
template <class TX, class TW, class TY, class TB = TY>
void linear(const Team& t, const TX* x, int64_t ldx, const void* packed_w, const TB* bias, TY* y,
            int64_t ldy, int64_t M, int64_t N, int64_t K) {
  constexpr int kNR = LinearLayout<TW>::kNR;
  Product<TW> product(t, packed_w, K);
  for_each_share<TW>(t, M, N, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    product.run(
        first, last, begin, end, [&](int64_t i) { return x + i * ldx; },
        [&](int64_t i, int64_t panel, const float* sums) {
          const int64_t n = panel * kNR;
          write_sums(sums, bias == nullptr ? bias : bias + n, y + i * ldy + n,
                     N - n < kNR ? N - n : kNR);
        });
  });
}

}  // namespace infc
