// Codes and scales of rows, bit for bit as ir/rounding.py makes them with torch, which says what
// they mean. Compiled without contraction of multiply-add, so that every operation rounds as there.
#include <cmath>
#include <cstdint>
#include <cstring>

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
    const float inverse = used ? 1 / (top < kTiny ? kTiny : top) * kLargest : 0;  // as torch divides
    scales[r] = used ? top / kLargest : 0;
    for (int64_t i = 0; i < depth; ++i) {
      const float code = std::nearbyint(widen(weights[i]) * inverse);
      codes[i] = static_cast<int8_t>(static_cast<int>(limited(code, -kLargest, kLargest)));
    }
  }
  return true;
}

}  // namespace

#define INFC_EXPORT extern "C" __attribute__((visibility("default")))

// Rows of `depth` floats (bfloat16 where `narrow`) as codes and scales. Returns 0 where one holds
// NaN or infinity: what torch makes of that is left to torch.
INFC_EXPORT int32_t quantize_int4(const void* weights, int32_t narrow, int64_t rows, int64_t depth,
                                  void* codes, float* scales) {
  auto* out = static_cast<uint8_t*>(codes);
  return narrow ? rows_to_i4(static_cast<const uint16_t*>(weights), rows, depth, out, scales)
                : rows_to_i4(static_cast<const float*>(weights), rows, depth, out, scales);
}

INFC_EXPORT int32_t quantize_int8(const void* weights, int32_t narrow, int64_t rows, int64_t depth,
                                  void* codes, float* scales) {
  auto* out = static_cast<int8_t*>(codes);
  return narrow ? rows_to_i8(static_cast<const uint16_t*>(weights), rows, depth, out, scales)
                : rows_to_i8(static_cast<const float*>(weights), rows, depth, out, scales);
}
