// Codes and scales of rows, bit for bit as ir/rounding.py and ir/block_rounding.py make them with
// torch, which say what they mean. Compiled without contraction of multiply-add, so that every
// operation rounds as there.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "six_bits.hpp"

namespace {

constexpr int kGroup = 32;
constexpr int kGroupBytes = 1 + kGroup / 2;
constexpr float kLowest = -8.0f;
constexpr float kMost = 15.0f;
constexpr float kTiny = 1e-30f;

float widen(float x) { return x; }
float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

float limited(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// The largest magnitude of a row; NaN or infinity where the row holds either.
template <class T>
float largest(const T* row, int64_t depth) {
  float most[kGroup] = {};
  float probe[kGroup] = {};  // 0 * x is NaN where x is not finite
  int64_t i = 0;
  for (; i + kGroup <= depth; i += kGroup) {
    for (int j = 0; j < kGroup; ++j) {
      const float x = std::fabs(widen(row[i + j]));
      most[j] = x > most[j] ? x : most[j];
      probe[j] += x * 0.0f;
    }
  }
  for (int j = 0; i + j < depth; ++j) {
    const float x = std::fabs(widen(row[i + j]));
    most[j] = x > most[j] ? x : most[j];
    probe[j] += x * 0.0f;
  }
  float top = 0, bad = 0;
  for (int j = 0; j < kGroup; ++j) {
    top = most[j] > top ? most[j] : top;
    bad += probe[j];
  }
  return bad == 0 ? top : bad;
}

void nearest_codes(const float* x, float multiplier, float* codes) {
  for (int j = 0; j < kGroup; ++j) {
    codes[j] = limited(std::nearbyint(x[j] / multiplier), kLowest, -kLowest - 1);
  }
}

// The squared error of a group, summed in the order of torch's sum over 32 adjacent floats.
float squared_error(const float* x, const float* codes, float multiplier) {
  float wrong[kGroup];
  for (int j = 0; j < kGroup; ++j) {
    const float off = codes[j] * multiplier - x[j];
    wrong[j] = off * off;
  }
  float lanes[8];
  for (int j = 0; j < 8; ++j) lanes[j] = ((wrong[j] + wrong[j + 8]) + wrong[j + 16]) + wrong[j + 24];
  float sum = 0;
  for (int j = 0; j < 8; ++j) sum += lanes[j];
  return sum;
}

// A group in units of its row's scale, as its multiplier and 16 bytes of codes.
void code_group(const float* x, uint8_t* out) {
  float highest[8] = {}, lowest[8] = {};
  for (int i = 0; i < kGroup; i += 8) {
    for (int j = 0; j < 8; ++j) highest[j] = x[i + j] > highest[j] ? x[i + j] : highest[j];
    for (int j = 0; j < 8; ++j) lowest[j] = x[i + j] < lowest[j] ? x[i + j] : lowest[j];
  }
  float above = 0, below = 0;
  for (int j = 0; j < 8; ++j) {
    above = highest[j] > above ? highest[j] : above;
    below = -lowest[j] > below ? -lowest[j] : below;
  }
  const float most = above > below ? above : below;
  bool positive = above > below;
  if (above == below) {  // the first of them decides
    for (int j = kGroup - 1; j >= 0; --j) {
      if (std::fabs(x[j]) == most) positive = x[j] > 0;
    }
  }
  const float sign = positive ? -1.0f : 1.0f;
  const float nearest = std::nearbyint(most / -kLowest);
  float best[kGroup], codes[kGroup];
  float multiplier = sign * limited(nearest, 1, kMost);
  nearest_codes(x, multiplier, best);
  float error = squared_error(x, best, multiplier);
  for (int step = -1; step <= 1; step += 2) {
    const float other = sign * limited(nearest + static_cast<float>(step), 1, kMost);
    nearest_codes(x, other, codes);
    const float wrong = squared_error(x, codes, other);
    if (wrong < error) {
      error = wrong;
      multiplier = other;
      std::memcpy(best, codes, sizeof best);
    }
  }
  uint8_t bytes[kGroup];
  for (int j = 0; j < kGroup; ++j) bytes[j] = static_cast<uint8_t>(static_cast<int>(best[j] - kLowest));
  out[0] = static_cast<uint8_t>(static_cast<int8_t>(multiplier));
  for (int j = 0; j < kGroup / 2; ++j) {
    out[1 + j] = static_cast<uint8_t>(bytes[j] | bytes[j + kGroup / 2] << 4);
  }
}

template <class T>
bool rows_to_i4(const T* weights, int64_t rows, int64_t depth, uint8_t* codes, float* scales) {
  const int64_t groups = (depth + kGroup - 1) / kGroup;
  for (int64_t r = 0; r < rows; ++r, weights += depth) {
    const float top = largest(weights, depth);
    if (!(top <= 3.402823466e38f)) return false;
    float scale = top / (-kLowest * kMost);
    if (scale * -kLowest * kMost < kTiny) scale = 0;
    const float unit = scale == 0 ? 0 : 1 / (scale < kTiny ? kTiny : scale);
    scales[r] = scale;
    for (int64_t g = 0; g < groups; ++g, codes += kGroupBytes) {
      float x[kGroup] = {};
      const int64_t left = depth - g * kGroup;
      if (left >= kGroup) {
        for (int j = 0; j < kGroup; ++j) x[j] = widen(weights[g * kGroup + j]) * unit;
      } else {
        for (int j = 0; j < left; ++j) x[j] = widen(weights[g * kGroup + j]) * unit;
      }
      code_group(x, codes);
    }
  }
  return true;
}

template <class T>
bool rows_to_i8(const T* weights, int64_t rows, int64_t depth, int8_t* codes, float* scales) {
  constexpr float kLargest = 127;
  for (int64_t r = 0; r < rows; ++r, weights += depth, codes += depth) {
    const float top = largest(weights, depth);
    if (!(top <= 3.402823466e38f)) return false;
    const bool used = !(top < kTiny);
    const float inverse = used ? kLargest / (top < kTiny ? kTiny : top) : 0;
    scales[r] = used ? top / kLargest : 0;
    for (int64_t i = 0; i < depth; ++i) {
      const float code = std::nearbyint(widen(weights[i]) * inverse);
      codes[i] = static_cast<int8_t>(static_cast<int>(limited(code, -kLargest, kLargest)));
    }
  }
  return true;
}

// The grouped formats, as ir/block_rounding.py rounds to them.

constexpr float kFactors[] = {1.0f, 1.0625f, 1.125f, 0.9375f, 0.875f, 0.8125f};
constexpr float kMostFactor = 1.125f;
constexpr float kMostCode = 127.0f;

// A multiplier as it is stored: a whole number of 1 to 127 with a sign.
float stored_multiplier(float wanted) {
  return std::copysign(limited(std::fabs(std::nearbyint(wanted)), 1.0f, kMostCode), wanted);
}

// Halves are added to each other, as in ir/block_rounding.py: here the last eight numbers of a group.
float sum_halves(const f32x8& wrong) {
  float four[4], two[2];
  for (int j = 0; j < 4; ++j) four[j] = wrong[j] + wrong[j + 4];
  for (int j = 0; j < 2; ++j) two[j] = four[j] + four[j + 2];
  return two[0] + two[1];
}

Numbers scaled(const Numbers& x, float factor) {
  return {{x.part[0] * factor, x.part[1] * factor, x.part[2] * factor, x.part[3] * factor}};
}

template <int kSize>
float largest_of_group(const float* x) {
  float top[8] = {};
  for (int i = 0; i < kSize; i += 8) {
    for (int j = 0; j < 8; ++j) {
      const float magnitude = std::fabs(x[i + j]);
      top[j] = magnitude > top[j] ? magnitude : top[j];
    }
  }
  float most = 0;
  for (float one : top) most = one > most ? one : most;
  return most;
}

// A group of kSize in units of its row's scale, as its multiplier and codes of levels.
template <class Levels, int kSize>
void level_group(const float* weights, uint8_t* out) {
  constexpr int kParts = kSize / 32;
  Numbers x[kParts];
  std::memcpy(x, weights, sizeof x);
  const float needed = largest_of_group<kSize>(weights) * (1.0f / Levels::kTop);
  float best = 0, error = 0;
  for (float factor : kFactors) {
    for (int sign = 1; sign >= -1; sign -= 2) {
      const float multiplier = stored_multiplier(needed * (static_cast<float>(sign) * factor));
      f32x8 wrong[4 * kParts];
      for (int p = 0; p < kParts; ++p) {
        const Numbers levels = Levels::nearest(scaled(x[p], 1.0f / multiplier));
        for (int i = 0; i < 4; ++i) {
          const f32x8 off = levels.part[i] * multiplier - x[p].part[i];
          wrong[4 * p + i] = off * off;
        }
      }
      for (int half = 2 * kParts; half; half /= 2) {
        for (int i = 0; i < half; ++i) wrong[i] += wrong[i + half];
      }
      const float sum = sum_halves(wrong[0]);
      if (best == 0 || sum < error) {
        best = multiplier;
        error = sum;
      }
    }
  }
  float levels[kSize];
  for (int p = 0; p < kParts; ++p) {
    const Numbers found = Levels::nearest(scaled(x[p], 1.0f / best));
    std::memcpy(levels + 32 * p, &found, sizeof found);
  }
  out[0] = static_cast<uint8_t>(static_cast<int8_t>(best));
  Levels::template pack<kSize>(levels, out + 1);
}

// A group as its multiplier and 32 codes of 8 bits.
void byte_group(const float* x, uint8_t* out) {
  const float needed = largest_of_group<kGroup>(x) * (1.0f / kMostCode);
  const float multiplier = stored_multiplier(std::ceil(needed));
  const float inverse = 1.0f / multiplier;
  out[0] = static_cast<uint8_t>(static_cast<int8_t>(multiplier));
  for (int j = 0; j < kGroup; ++j) {
    const float code = limited(std::nearbyint(x[j] * inverse), -kMostCode, kMostCode);
    out[1 + j] = static_cast<uint8_t>(static_cast<int8_t>(static_cast<int>(code)));
  }
}

// `room` times the largest weight of a row is what the largest multiplier and level stand for;
// group(x, block) codes the kSize numbers of a group.
template <int kSize, class T, class Group>
bool rows_to_groups(const T* weights, int64_t rows, int64_t depth, uint8_t* codes, float* scales,
                    double room, int64_t block_bytes, Group group) {
  for (int64_t r = 0; r < rows; ++r, weights += depth) {
    const float top = largest(weights, depth);
    if (!(top <= 3.402823466e38f)) return false;
    const float scale = top < kTiny ? 0.0f : top * static_cast<float>(room);
    const float unit = scale == 0 ? 0 : 1 / scale;
    scales[r] = scale;
    for (int64_t g = 0; g < depth; g += kSize, codes += block_bytes) {
      float x[kSize] = {};
      const int64_t left = depth - g < kSize ? depth - g : kSize;
      for (int j = 0; j < left; ++j) x[j] = widen(weights[g + j]) * unit;
      group(x, codes);
    }
  }
  return true;
}

// Error feedback (passes/methods/feedback.py says what it computes), for kLanes rows side by side.

constexpr int kLanes = 32;
constexpr int kTile = 4;  // columns whose sums stay in registers
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

template <class Kind, int kGroup, int kBits>
struct Fitted {
  static constexpr int kSize = kGroup;
  static constexpr int64_t kBlockBytes = 1 + kSize * kBits / 8;
  static Lanes levels(const Lanes& numbers) {
    static_assert(sizeof(Lanes) == sizeof(Numbers));
    Numbers given;
    std::memcpy(&given, &numbers, sizeof given);
    const Numbers levels = Kind::nearest(given);
    Lanes found;
    std::memcpy(&found, &levels, sizeof found);
    return found;
  }

  // The multipliers with the least squared error, weighted by `importance`.
  static Lanes fit(const Lanes* x, const float* importance, int count, const Lanes& top) {
    Lanes best, error;
    bool first = true;
    for (float factor : kFactors) {
      for (int sign = 1; sign >= -1; sign -= 2) {
        Lanes tried;
        const float wanted = static_cast<float>(sign) * factor;
        for (int r = 0; r < kLanes; ++r) tried[r] = stored_multiplier(top[r] * (1.0f / Kind::kTop) * wanted);
        const Lanes inverse = 1.0f / tried;
        Lanes wrong = {};
        for (int k = 0; k < count; ++k) {
          const Lanes off = levels(x[k] * inverse) * tried - x[k];
          wrong += off * off * importance[k];
        }
        if (first) best = tried, error = wrong;
        first = false;
        for (int r = 0; r < kLanes; ++r) {
          best[r] = wrong[r] < error[r] ? tried[r] : best[r];
          error[r] = wrong[r] < error[r] ? wrong[r] : error[r];
        }
      }
    }
    return best;
  }

  static void pack(const float* levels, uint8_t* out) { Kind::template pack<kSize>(levels, out); }
};

struct Bytes {
  static constexpr int kSize = 32;
  static constexpr int64_t kBlockBytes = 1 + kSize;
  static Lanes levels(const Lanes& numbers) {
    Lanes found;
    for (int r = 0; r < kLanes; ++r) found[r] = limited(std::nearbyint(numbers[r]), -kMostCode, kMostCode);
    return found;
  }

  static Lanes fit(const Lanes*, const float*, int, const Lanes& top) {
    Lanes found;
    for (int r = 0; r < kLanes; ++r) found[r] = stored_multiplier(std::ceil(top[r] * (1.0f / kMostCode)));
    return found;
  }

  static void pack(const float* levels, uint8_t* out) {
    for (int j = 0; j < kSize; ++j) {
      out[j] = static_cast<uint8_t>(static_cast<int8_t>(static_cast<int>(levels[j])));
    }
  }
};

// Adds to `count` columns from `first` what the errors (w - q) of the columns before them pass on.
void pass_on(const Lanes* errors, const float* upper, int64_t depth, int64_t first, int count,
             Lanes* wanted) {
  for (int k = 0; k < count; k += kTile) {
    const int tile = count - k < kTile ? count - k : kTile;
    Lanes sums[kTile] = {};
    const auto add = [&](int columns) {
      for (int64_t j = 0; j < first; ++j) {
        const float* factors = upper + j * depth + first + k;
        for (int c = 0; c < columns; ++c) sums[c] += errors[j] * factors[c];
      }
    };
    tile == kTile ? add(kTile) : add(tile);  // a constant keeps the sums in registers
    for (int c = 0; c < tile; ++c) wanted[k + c] += sums[c];
  }
}

// What the columns of a group will be when their turn comes, if its own are rounded without error.
template <int kSize>
void expect(const Lanes* weights, const Lanes* wanted, const float* inner, int64_t depth, int count,
            Lanes* expected) {
  Lanes moved[kSize];
  for (int k = 0; k < count; ++k) {
    moved[k] = wanted[k] - weights[k];
    for (int j = 0; j < k; ++j) moved[k] -= moved[j] * inner[j * depth + k];
    expected[k] = weights[k] + moved[k];
  }
}

// `norms` gets of each row the squared error that feedback leaves, over the inputs of the Hessian.
template <class Kind>
void feed_back(const float* rows, int64_t count, int64_t depth, const float* upper, const float* d,
               const float* scales, uint8_t* codes, double* norms) {
  constexpr int kSize = Kind::kSize;
  const int64_t width = (depth + kSize - 1) / kSize * Kind::kBlockBytes;
  std::vector<Lanes> matrix(static_cast<size_t>(depth)), left(matrix.size());
  Lanes *const weights = matrix.data(), *const errors = left.data();
  for (int64_t first = 0; first < count; first += kLanes) {
    const int used = static_cast<int>(count - first < kLanes ? count - first : kLanes);
    Lanes scale = {}, unit = {};
    for (int r = 0; r < used; ++r) {
      scale[r] = scales[first + r];
      unit[r] = scale[r] == 0 ? 0 : 1 / scale[r];
    }
    for (int64_t k = 0; k < depth; ++k) {
      Lanes column = {};
      for (int r = 0; r < used; ++r) column[r] = rows[(first + r) * depth + k];
      weights[k] = column;
    }
    std::fill_n(norms + first, used, 0.0);
    for (int64_t g = 0; g < depth; g += kSize) {
      const int size = static_cast<int>(depth - g < kSize ? depth - g : kSize);
      const float* inner = upper + g * depth + g;
      Lanes wanted[kSize], units[kSize], top = {};
      for (int k = 0; k < size; ++k) wanted[k] = weights[g + k];
      pass_on(errors, upper, depth, g, size, wanted);
      expect<kSize>(weights + g, wanted, inner, depth, size, units);
      for (int k = 0; k < size; ++k) {
        units[k] *= unit;
        for (int r = 0; r < kLanes; ++r) {
          const float magnitude = std::fabs(units[k][r]);
          top[r] = magnitude > top[r] ? magnitude : top[r];
        }
      }
      const Lanes multiplier = Kind::fit(units, d + g, size, top);
      const Lanes inverse = 1.0f / multiplier;
      float chosen[kLanes][kSize] = {};
      Lanes norm = {};
      for (int k = 0; k < size; ++k) {
        const Lanes levels = Kind::levels(wanted[k] * unit * inverse);
        const Lanes wrong = weights[g + k] - levels * multiplier * scale;
        const Lanes off = wanted[k] * unit - levels * multiplier;  // squares of weights may overflow
        norm += off * off * d[g + k];
        errors[g + k] = wrong;
        for (int later = k + 1; later < size; ++later) wanted[later] += wrong * inner[k * depth + later];
        for (int r = 0; r < kLanes; ++r) chosen[r][k] = levels[r];
      }
      for (int r = 0; r < used; ++r) {
        norms[first + r] += static_cast<double>(norm[r]) * scale[r] * scale[r];
        uint8_t* block = codes + (first + r) * width + g / kSize * Kind::kBlockBytes;
        block[0] = static_cast<uint8_t>(static_cast<int8_t>(multiplier[r]));
        Kind::pack(chosen[r], block + 1);
      }
    }
  }
}

template <class F>
int32_t of_type(const void* weights, int32_t narrow, F f) {
  return narrow ? f(static_cast<const uint16_t*>(weights)) : f(static_cast<const float*>(weights));
}

}  // namespace

#define INFC_EXPORT extern "C" __attribute__((visibility("default")))

// Rows of `depth` floats (bfloat16 where `narrow`) as codes and scales. Returns 0 where one holds
// NaN or infinity: what torch makes of that is left to torch.
INFC_EXPORT int32_t quantize_i4_g32(const void* weights, int32_t narrow, int64_t rows, int64_t depth,
                                    void* codes, float* scales) {
  return of_type(weights, narrow, [&](auto* w) {
    return rows_to_i4(w, rows, depth, static_cast<uint8_t*>(codes), scales);
  });
}

INFC_EXPORT int32_t quantize_i8(const void* weights, int32_t narrow, int64_t rows, int64_t depth,
                                void* codes, float* scales) {
  return of_type(weights, narrow, [&](auto* w) {
    return rows_to_i8(w, rows, depth, static_cast<int8_t*>(codes), scales);
  });
}

#define QUANTIZE_LEVELS(FORMAT, LEVELS, SIZE, BITS)                                                 \
  INFC_EXPORT int32_t quantize_##FORMAT(const void* weights, int32_t narrow, int64_t rows,          \
                                        int64_t depth, void* codes, float* scales) {                \
    return of_type(weights, narrow, [&](auto* w) {                                                  \
      return rows_to_groups<SIZE>(w, rows, depth, static_cast<uint8_t*>(codes), scales,             \
                                  static_cast<double>(kMostFactor) / (LEVELS::kTop * 127.0),        \
                                  1 + SIZE * BITS / 8, level_group<LEVELS, SIZE>);                  \
    });                                                                                             \
  }
QUANTIZE_LEVELS(b4_g32, BookLevels, 32, 4)
QUANTIZE_LEVELS(b4_g64, BookLevels, 64, 4)
QUANTIZE_LEVELS(b4_g128, BookLevels, 128, 4)
QUANTIZE_LEVELS(i6_g32, SixBitLevels, 32, 6)

INFC_EXPORT int32_t quantize_i8_g32(const void* weights, int32_t narrow, int64_t rows, int64_t depth,
                                    void* codes, float* scales) {
  return of_type(weights, narrow, [&](auto* w) {
    return rows_to_groups<kGroup>(w, rows, depth, static_cast<uint8_t*>(codes), scales,
                                  1.0 / (127.0 * 127.0), 1 + kGroup, byte_group);
  });
}

// Finite rows of float32 as codes by error feedback, given their scales and the factor of the Hessian:
// `upper` `[depth, depth]` unit upper triangular, `d` `[depth]`.
#define FEED_BACK(FORMAT, ...)                                                                      \
  INFC_EXPORT void feed_back_##FORMAT(const float* rows, int64_t count, int64_t depth,              \
                                      const float* upper, const float* d, const float* scales,      \
                                      void* codes, double* norms) {                                 \
    feed_back<__VA_ARGS__>(rows, count, depth, upper, d, scales, static_cast<uint8_t*>(codes),      \
                           norms);                                                                  \
  }
FEED_BACK(b4_g32, Fitted<BookLevels, 32, 4>)
FEED_BACK(b4_g64, Fitted<BookLevels, 64, 4>)
FEED_BACK(b4_g128, Fitted<BookLevels, 128, 4>)
FEED_BACK(i6_g32, Fitted<SixBitLevels, 32, 6>)
FEED_BACK(i8_g32, Bytes)
