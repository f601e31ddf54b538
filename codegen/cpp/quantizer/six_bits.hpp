// Codes of 6 bits (ir/formats.py: CENTERED_I6): what is nearest to 32 numbers, and how codes are stored.
#pragma once

#include <cmath>
#include <cstdint>

#include "book.hpp"

namespace {

// Evenly spaced levels of -32 to 31; numbers beyond them become the first or the last.
struct SixBitLevels {
  static constexpr float kTop = 32.0f;

  static Numbers nearest(const Numbers& numbers) {
    Numbers found;
    for (int part = 0; part < 4; ++part) {
      for (int i = 0; i < 8; ++i) {
        float level = std::nearbyint(numbers.part[part][i]);
        level = level < -kTop ? -kTop : level;
        found.part[part][i] = level > kTop - 1 ? kTop - 1 : level;
      }
    }
    return found;
  }

  // Of every 16 codes the upper two bits come first, four codes in a byte, then the lower four bits.
  template <int kSize>
  static void pack(const float* levels, uint8_t* out) {
    for (int first = 0; first < kSize; first += 16, out += 12) {
      for (int i = 0; i < 4; ++i) {
        int code[4];
        for (int quad = 0; quad < 4; ++quad) {
          code[quad] = static_cast<int>(levels[first + 4 * quad + i]) + 32;
        }
        out[i] = static_cast<uint8_t>(code[0] >> 4 | code[1] >> 4 << 2 | code[2] >> 4 << 4 |
                                      code[3] >> 4 << 6);
        out[4 + i] = static_cast<uint8_t>((code[0] & 15) | (code[2] & 15) << 4);
        out[8 + i] = static_cast<uint8_t>((code[1] & 15) | (code[3] & 15) << 4);
      }
    }
  }
};

}  // namespace
