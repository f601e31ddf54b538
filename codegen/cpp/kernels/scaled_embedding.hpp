// Rows of a table of codes, read out of the panels of scaled_linear.hpp.
//
// With the scale s of a row, an element is (w * c + u) * s: c is the number that its code stands for,
// w and u are the scale and minimum of its group, where the format has them. Everything is in
// float32 and each operation is rounded on its own, as in Format.decode (ir/formats.py).
#pragma once

#include "linear_decoded_tile.hpp"
#include "team.hpp"

namespace infc {

// The elements k of output n of a panel, as numbers in units of the scale of its row:
// Elements<W>::decode(panel, n, K, y) writes y[0 .. K - 1].
template <class W>
struct Elements;

template <>
struct Elements<int8_t> {
  static void decode(const char* panel, int64_t n, int64_t K, float* y) {
    constexpr int64_t kNR = LinearLayout<int8_t>::kNR, kKP = LinearLayout<int8_t>::kKP;
    for (int64_t k = 0; k < K; ++k) {
      y[k] = static_cast<float>(code_in_panel(panel[(k / kKP * kNR + n) * kKP + k % kKP]));
    }
  }
  // A signed code: with VNNI, panels hold it as an unsigned number.
  static int8_t code_in_panel(char byte) {
    return static_cast<int8_t>(static_cast<uint8_t>(byte) ^ (INFC_VNNI ? 0x80 : 0));
  }
};

// 32 codes of 4 bits of output n of a panel of NR outputs: byte i has the codes i and i + 16.
template <Levels kLevels, int64_t NR>
INFC_INLINE void decode_nibbles(const char* codes, int64_t n, float* y) {
  const auto level = [](int code) {
    return static_cast<float>(kLevels == Levels::book      ? kBook[code]
                              : kLevels == Levels::counted ? code
                                                           : code - 8);
  };
  for (int64_t i = 0; i < kGroup / 2; ++i) {
    const int byte = static_cast<uint8_t>(codes[(i / 4 * NR + n) * 4 + i % 4]);
    y[i] = level(byte & 15);
    y[i + kGroup / 2] = level(byte >> 4);
  }
}

// The scale of output n, of those that lie at p: whole registers, as half precision has no scalars
// everywhere.
template <class Scale>
INFC_INLINE float scale_of(const char* p, int64_t n) {
  const Scale* scales = reinterpret_cast<const Scale*>(p) + n / kRegLanes * kRegLanes;
  return reg::load_scales(scales)[n % kRegLanes];
}

// Decodes 32 elements after the other: one(g, y) writes those from 32 * g.
template <class One>
INFC_INLINE void decode_groups(int64_t K, float* y, One one) {
  for (int64_t k = 0; k < K; k += kGroup) {
    if (K - k >= kGroup) {
      one(k / kGroup, y + k);
    } else {
      float last[kGroup];
      one(k / kGroup, last);
      std::memcpy(y + k, last, static_cast<size_t>(K - k) * sizeof(float));
    }
  }
}

template <>
struct Elements<int4x2> {
  static void decode(const char* panel, int64_t n, int64_t K, float* y) {
    using Layout = LinearLayout<int4x2>;
    decode_groups(K, y, [panel, n](int64_t g, float* out) {
      const char* group = panel + g * Layout::kGroupBytes;
      decode_nibbles<Levels::centered, Layout::kNR>(group + Layout::kNR, n, out);
      const float scale = static_cast<int8_t>(group[n]);
      for (int64_t i = 0; i < kGroup; ++i) out[i] = out[i] * scale;
    });
  }
};

template <int kBits, class Scale, class Minimum, Levels kLevels, int kChunks>
struct Elements<Grouped<kBits, Scale, Minimum, kLevels, kChunks>> {
  static void decode(const char* panel, int64_t n, int64_t K, float* y) {
    using Layout = LinearLayout<Grouped<kBits, Scale, Minimum, kLevels, kChunks>>;
    decode_groups(K, y, [panel, n](int64_t g, float* out) {
      if constexpr (kBits == 8) {
        Elements<int8_t>::decode(Layout::codes(panel, g), n, kGroup, out);
      } else if constexpr (kBits == 6) {
        const char* codes = Layout::codes(panel, g);
        for (int64_t k = 0; k < kGroup; ++k) {
          out[k] = static_cast<float>(six_bits_in_panel<Layout::kNR>(codes, n, k) - kSixBitZero);
        }
      } else {
        decode_nibbles<kLevels, Layout::kNR>(Layout::codes(panel, g), n, out);
      }
      const float scale = scale_of<Scale>(Layout::scales(panel, g), n);
      for (int64_t i = 0; i < kGroup; ++i) out[i] = out[i] * scale;
      if constexpr (!std::is_same_v<Minimum, absent>) {
        const float minimum = scale_of<Minimum>(Layout::minima(panel, g), n);
        for (int64_t i = 0; i < kGroup; ++i) out[i] = out[i] + minimum;
      }
    });
  }
};

// What multiplies the codes of a product does not matter here.
template <class G>
struct Elements<Decoded<G>> : Elements<G> {};

// y[r, :] = row ids[r] of the table [vocabulary, dim] of codes W, packed as a weight of
// scaled_linear, with a scale for each row of the table; y is contiguous. ids must be in range.
template <class W, class T, class Id>
void scaled_embedding(const Team& t, const void* packed, const float* scale, const Id* ids, T* y,
                      int64_t rows, int64_t dim) {
  constexpr int64_t kNR = LinearLayout<W>::kNR, kPart = 8 * kGroup;
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) {
    const int64_t id = static_cast<int64_t>(ids[r]);
    const char* panel = static_cast<const char*>(packed) + id / kNR * panel_bytes<W>(dim);
    // Parts of the row are steps of whole panels, whatever the format.
    for (int64_t k = 0; k < dim; k += kPart, panel += panel_bytes<W>(kPart)) {
      float part[kPart];
      const int64_t count = dim - k < kPart ? dim - k : kPart;
      Elements<W>::decode(panel, id % kNR, count, part);
      for (int64_t i = 0; i < count; ++i) y[r * dim + k + i] = from_float<T>(part[i] * scale[id]);
    }
  }
}

}  // namespace infc
