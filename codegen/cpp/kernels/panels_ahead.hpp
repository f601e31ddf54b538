// Reading ahead: a thread that waits at a barrier asks for the panels that it will read next.
//
// A decode step is as long as its weights take to read. While one thread still works, the others
// would leave the memory to it; what they ask for is in their second-level cache when they go on.
#pragma once

#include "linear_walk.hpp"

namespace infc {

// The first lines of what a thread reads of a product: `streams` panels at once, `apart` bytes from
// each other, `left` bytes of each still to be asked for.
struct PanelsAhead {
  const char* at = nullptr;
  int64_t apart = 0;
  int64_t left = 0;
  int streams = 0;

  // Asks for one line of each panel, or does nothing once all have been asked for.
  INFC_INLINE void operator()() {
    if (left <= 0) return;
    for (int p = 0; p < streams; ++p) __builtin_prefetch(at + p * apart, 0, 2);
    at += 64;
    left -= 64;
  }
};

// For this thread's share of M rows by the panels of N outputs, as Product streams them; nothing
// where there are so many rows that panels are not what a product waits for.
template <class W>
PanelsAhead panels_ahead(const Team& t, const void* packed, int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kBytes = 64 << 10;  // an eighth of a small second-level cache
  if (t.size == 1 || M < 1 || M > LinearLayout<W>::kMR / 2) return {};
  const Share share = share_of(t, ceil_div(N, LinearLayout<W>::kNR));
  const int streams = streams_of<W>(static_cast<int>(M));
  const int64_t apart = (share.end - share.begin) / streams * panel_bytes<W>(K);
  const int64_t most = kBytes / streams;
  return {static_cast<const char*>(packed) + share.begin * panel_bytes<W>(K), apart,
          apart < most ? apart : most, streams};
}

}  // namespace infc
