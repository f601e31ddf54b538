// y = x · Wᵀ + bias over packed weights, for one row or many.
#pragma once

#include "linear_tile.hpp"
#include "team.hpp"

namespace infc {

// Calls f(begin, height) for tiles of at most MR rows that cover [first, last). Tiles are of nearly
// equal height, as each costs a pass over the panel.
template <int MR, class F>
INFC_INLINE void for_each_tile(int64_t first, int64_t last, F f) {
  const int64_t rows = last - first;
  const int64_t tiles = ceil_div(rows, MR);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = first + rows * tile / tiles;
    f(begin, static_cast<int>(first + rows * (tile + 1) / tiles - begin));
  }
}

// Calls f(panel, outputs in it, first row, last row) for this thread's share of M rows by the
// panels of N outputs. Threads share the panels; where these are few, also the rows.
template <int NR, int MR, class F>
INFC_INLINE void for_each_panel(const Team& t, int64_t M, int64_t N, F f) {
  const int64_t panels = ceil_div(N, NR);
  int64_t parts = 1;  // stretches of rows a panel is cut into
  if (t.size > 1 && panels < 8 * t.size) {
    const int64_t wanted = ceil_div(8 * t.size, panels);
    const int64_t most = ceil_div(M, 4 * MR);
    parts = wanted < most ? wanted : most;
    if (parts < 1) parts = 1;
  }
  const Share share = share_of(t, panels * parts);
  for (int64_t unit = share.begin; unit < share.end; ++unit) {
    const int64_t p = unit / parts;
    const int64_t part = unit % parts;
    const int64_t left = N - p * NR;
    f(p, left < NR ? left : NR, M * part / parts, M * (part + 1) / parts);
  }
}

// x [M, K] (row stride ldx), packed_w from [N, K], bias [N] or null, y [M, N] (row stride ldy).
// TX is float or bf16 and the weights' type TW is the same; TY may be float where TX is bf16.
// No barrier inside.
template <class TX, class TW, class TY, class TB = TY>
void linear(const Team& t, const TX* x, int64_t ldx, const void* packed_w, const TB* bias, TY* y,
            int64_t ldy, int64_t M, int64_t N, int64_t K) {
  static_assert(sizeof(TX) == sizeof(TW), "activations and weights have one type");
  constexpr int kNR = LinearLayout<TW>::kNR;
  constexpr int kMR = LinearLayout<TW>::kMR;
  const TW* w = static_cast<const TW*>(packed_w);
  for_each_panel<kNR, kMR>(t, M, N, [&](int64_t p, int64_t count, int64_t first, int64_t last) {
    const TB* panel_bias = bias == nullptr ? nullptr : bias + p * kNR;
    for_each_tile<kMR>(first, last, [&](int64_t begin, int m) {
      const TW* in[kMR];
      TY* out[kMR];
      for (int i = 0; i < m; ++i) {
        in[i] = x + (begin + i) * ldx;
        out[i] = y + (begin + i) * ldy + p * kNR;
      }
      linear_tile(m, in, w + p * panel_elements<TW>(K), panel_bias, out, count, K);
    });
  });
}

// As above without a bias (`linear<TX, TW, TY>(t, x, ldx, w, nullptr, ...)`).
template <class TX, class TW, class TY>
void linear(const Team& t, const TX* x, int64_t ldx, const void* packed_w, std::nullptr_t, TY* y,
            int64_t ldy, int64_t M, int64_t N, int64_t K) {
  linear<TX, TW, TY, TY>(t, x, ldx, packed_w, static_cast<const TY*>(nullptr), y, ldy, M, N, K);
}

}  // namespace infc
