// Random numbers that depend on what they are asked for alone: Philox4x64-10 (Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as numpy.random.Philox has it.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace infc {

struct WideProduct {
  uint64_t high;
  uint64_t low;
};
INFC_INLINE WideProduct multiply_wide(uint64_t a, uint64_t b) {
  __extension__ using u128 = unsigned __int128;
  const u128 product = static_cast<u128>(a) * b;
  return {static_cast<uint64_t>(product >> 64), static_cast<uint64_t>(product)};
}

// The first of the four words that key (k0, 0) gives for counter (c0, c1, 0, 0).
INFC_INLINE uint64_t philox(uint64_t k0, uint64_t c0, uint64_t c1) {
  uint64_t c[4] = {c0, c1, 0, 0};
  uint64_t k[2] = {k0, 0};
  for (int round = 0; round < 10; ++round) {
    const WideProduct a = multiply_wide(c[0], 0xD2E7470EE14C6C93);
    const WideProduct b = multiply_wide(c[2], 0xCA5A826395121157);
    const uint64_t next[4] = {b.high ^ c[1] ^ k[0], b.low, a.high ^ c[3] ^ k[1], a.low};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    k[0] += 0x9E3779B97F4A7C15;
    k[1] += 0xBB67AE8584CAA73B;
  }
  return c[0];
}

// A number in [0, 1) for a token: the same for the same seed, choice and position (in the sequence).
// The counter is one ahead, as numpy's is when it gives its first number.
INFC_INLINE double uniform(uint64_t seed, int32_t choice, int32_t position) {
  const uint64_t word = philox(seed, static_cast<uint64_t>(position) + 1, static_cast<uint64_t>(choice));
  return static_cast<double>(word >> 11) * 0x1p-53;
}

}  // namespace infc
