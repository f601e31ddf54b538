// y = (q · Wᵀ) * scales + bias over packed 8-bit weights, for one row or many.
#pragma once

#include "linear.hpp"
#include "linear_i8_tile.hpp"

namespace infc {

// q [M, K] (row stride ldq) with row_scale [M], packed_w from [N, K] with scale [N], bias [N] or
// null, y [M, N] (row stride ldy). An element is float(exact sum) * (row_scale * scale), plus the
// bias, rounded once to TY; K <= 65536, so that no sum overflows. No barrier inside.
template <class TY, class TB = TY>
void scaled_linear(const Team& t, const int8_t* q, int64_t ldq, const float* row_scale,
                   const void* packed_w, const float* scale, const TB* bias, TY* y, int64_t ldy,
                   int64_t M, int64_t N, int64_t K) {
  constexpr int kMR = LinearLayout<int8_t>::kMR;
  constexpr int kNR = LinearLayout<int8_t>::kNR;
  const int8_t* w = static_cast<const int8_t*>(packed_w);
  for_each_panel<kNR, kMR>(t, M, N, [&](int64_t p, int64_t count, int64_t first, int64_t last) {
    const OutputScale<TB> outputs{scale + p * kNR, bias == nullptr ? nullptr : bias + p * kNR};
    for_each_tile<kMR>(first, last, [&](int64_t begin, int m) {
      const int8_t* in[kMR];
      TY* out[kMR];
      for (int i = 0; i < m; ++i) {
        in[i] = q + (begin + i) * ldq;
        out[i] = y + (begin + i) * ldy + p * kNR;
      }
      scaled_tile(m, in, row_scale + begin, w + p * panel_elements<int8_t>(K), outputs, out, count,
                  K);
    });
  });
}

// As above without a bias.
template <class TY>
void scaled_linear(const Team& t, const int8_t* q, int64_t ldq, const float* row_scale,
                   const void* packed_w, const float* scale, std::nullptr_t, TY* y, int64_t ldy,
                   int64_t M, int64_t N, int64_t K) {
  scaled_linear<TY, TY>(t, q, ldq, row_scale, packed_w, scale, static_cast<const TY*>(nullptr), y,
                        ldy, M, N, K);
}

}  // namespace infc
