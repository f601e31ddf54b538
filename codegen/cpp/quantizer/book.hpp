// The levels of 4-bit codes (ir/formats.py: BOOK_I4) that are nearest to 32 numbers.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int kBook[16] = {-63, -52, -41, -32, -24, -17, -11, -5, 0, 6, 12, 19, 26, 34, 44, 56};

// Eight numbers as one vector.
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

struct Numbers {
  f32x8 part[4];
};

// The last whole number for which level c of the book is nearest: of two levels that are equally near,
// the lower is taken.
constexpr int last_of_level(size_t c) {
  const int middle = kBook[c] + kBook[c + 1];
  return middle >= 0 ? middle / 2 : -((1 - middle) / 2);
}

using Steps = std::make_index_sequence<15>;

#ifdef __AVX2__

// Numbers are rounded to whole numbers, to even, and saturate at the ends of a byte: integers of
// numbers beyond their range, and of NaN, are the lowest one. The code of a byte is how many levels it is
// beyond, and its level is looked up.
template <size_t... kSteps>
Numbers nearest_levels(const Numbers& numbers, std::index_sequence<kSteps...>) {
  const __m256 most = _mm256_set1_ps(127.0f);
  const auto whole = [&](int i) { return _mm256_cvtps_epi32(_mm256_min_ps(most, (__m256)numbers.part[i])); };
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(whole(0), whole(1)),
                                           _mm256_packs_epi32(whole(2), whole(3)));
  __m256i code = _mm256_setzero_si256();
  ((code = _mm256_sub_epi8(
        code, _mm256_cmpgt_epi8(bytes, _mm256_set1_epi8(static_cast<char>(last_of_level(kSteps)))))),
   ...);
  static constexpr auto kLevels = [] {
    std::array<int8_t, 16> levels{};
    for (size_t c = 0; c < 16; ++c) levels[c] = static_cast<int8_t>(kBook[c]);
    return levels;
  }();
  const __m128i book = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kLevels.data()));
  // Packing took four numbers of each vector in turn: in pairs of lanes.
  const __m256i places = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i levels = _mm256_permutevar8x32_epi32(
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(book), code), places);
  const __m128i low = _mm256_castsi256_si128(levels), high = _mm256_extracti128_si256(levels, 1);
  const auto wide = [](__m128i eight) { return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)); };
  return {{wide(low), wide(_mm_srli_si128(low, 8)), wide(high), wide(_mm_srli_si128(high, 8))}};
}

#else

// Adding 1.5 * 2^23 rounds numbers below 2^22 to whole numbers, to even.
template <size_t... kSteps>
Numbers nearest_levels(const Numbers& numbers, std::index_sequence<kSteps...>) {
  Numbers found;
  for (int i = 0; i < 4; ++i) {
    const f32x8 whole = (numbers.part[i] + 12582912.0f) - 12582912.0f;
    f32x8 level = f32x8{} + static_cast<float>(kBook[0]);
    ((level += (f32x8)((i32x8)(whole > static_cast<float>(last_of_level(kSteps))) &
                       (i32x8)(f32x8{} + static_cast<float>(kBook[kSteps + 1] - kBook[kSteps])))),
     ...);
    found.part[i] = level;
  }
  return found;
}

#endif

inline Numbers nearest_levels(const Numbers& numbers) { return nearest_levels(numbers, Steps{}); }

inline uint8_t code_of(float level) {
  static constexpr auto kCodes = [] {
    std::array<uint8_t, 128> codes{};
    for (int c = 0; c < 16; ++c) codes[static_cast<size_t>(kBook[c] + 64)] = static_cast<uint8_t>(c);
    return codes;
  }();
  return kCodes[static_cast<size_t>(static_cast<int>(level) + 64)];
}

// Levels of the book: of every 32 codes, one and the one 16 later share a byte.
struct BookLevels {
  static constexpr float kTop = 63.0f;

  static Numbers nearest(const Numbers& numbers) { return nearest_levels(numbers); }

  template <int kSize>
  static void pack(const float* levels, uint8_t* out) {
    for (int first = 0; first < kSize; first += 32) {
      for (int j = first; j < first + 16; ++j) {
        *out++ = static_cast<uint8_t>(code_of(levels[j]) | code_of(levels[j + 16]) << 4);
      }
    }
  }
};

}  // namespace
