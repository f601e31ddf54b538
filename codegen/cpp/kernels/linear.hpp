// y = x · Wᵀ + bias over packed weights, for one row or many.
#pragma once

#include "linear_tile.hpp"
#include "team.hpp"

namespace infc {

// Rows [first, last) of x by one panel. Tiles are of nearly equal height, as each costs a pass over
// the panel.
template <class TW, class TY, class TB>
void linear_panel(const TW* x, int64_t ldx, const TW* panel, const TB* bias, TY* y, int64_t ldy,
                  int64_t first, int64_t last, int64_t count, int64_t K) {
  constexpr int kMR = LinearLayout<TW>::kMR;
  const int64_t rows = last - first;
  const int64_t tiles = ceil_div(rows, kMR);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = first + rows * tile / tiles;
    const int m = static_cast<int>(first + rows * (tile + 1) / tiles - begin);
    const TW* in[kMR];
    TY* out[kMR];
    for (int i = 0; i < m; ++i) {
      in[i] = x + (begin + i) * ldx;
      out[i] = y + (begin + i) * ldy;
    }
    linear_tile(m, in, panel, bias, out, count, K);
  }
}

// x [M, K] (row stride ldx), packed_w from [N, K], bias [N] or null, y [M, N] (row stride ldy).
// TX is float or bf16 and the weights' type TW is the same; TY may be float where TX is bf16.
// Threads share the panels; where these are few, also the rows. No barrier inside.
template <class TX, class TW, class TY, class TB = TY>
void linear(const Team& t, const TX* x, int64_t ldx, const void* packed_w, const TB* bias, TY* y,
            int64_t ldy, int64_t M, int64_t N, int64_t K) {
  static_assert(sizeof(TX) == sizeof(TW), "activations and weights have one type");
  constexpr int kNR = LinearLayout<TW>::kNR;
  constexpr int kMR = LinearLayout<TW>::kMR;
  const TW* w = static_cast<const TW*>(packed_w);
  const int64_t panels = ceil_div(N, kNR);
  int64_t parts = 1;  // stretches of rows a panel is cut into
  if (t.size > 1 && panels < 8 * t.size) {
    const int64_t wanted = ceil_div(8 * t.size, panels);
    const int64_t most = ceil_div(M, 4 * kMR);
    parts = wanted < most ? wanted : most;
    if (parts < 1) parts = 1;
  }
  const Share share = share_of(t, panels * parts);
  for (int64_t unit = share.begin; unit < share.end; ++unit) {
    const int64_t p = unit / parts;
    const int64_t part = unit % parts;
    const int64_t n = p * kNR;
    const int64_t count = N - n < kNR ? N - n : kNR;
    linear_panel(x, ldx, w + p * panel_elements<TW>(K), bias == nullptr ? nullptr : bias + n, y + n,
                 ldy, M * part / parts, M * (part + 1) / parts, count, K);
  }
}

// As above without a bias (`linear<TX, TW, TY>(t, x, ldx, w, nullptr, ...)`).
template <class TX, class TW, class TY>
void linear(const Team& t, const TX* x, int64_t ldx, const void* packed_w, std::nullptr_t, TY* y,
            int64_t ldy, int64_t M, int64_t N, int64_t K) {
  linear<TX, TW, TY, TY>(t, x, ldx, packed_w, static_cast<const TY*>(nullptr), y, ldy, M, N, K);
}

}  // namespace infc
