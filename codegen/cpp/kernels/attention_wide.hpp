// Many query rows against one chunk: its keys and values become floats once, for all rows of a tile.
//
// Each sum is taken in the order of attention_tile.hpp, so the bits are the same.
#pragma once

#include "attention_tile.hpp"

namespace infc {

constexpr int kTileRows = 64;  // query rows that share a chunk's keys and values at most
constexpr int kWideRows = 12;  // rows from which on making floats of these pays
constexpr int kWideTile = INFC_AVX512 || INFC_AVX2 ? 6 : 2;  // rows that meet them at once

// Keys of the positions [begin, end), multiples of 16, as [groups of 16][D][16].
template <class TC>
void widen_keys(const HeadCache<TC>& cache, int64_t begin, int64_t end, float* wide) {
  const int64_t D = cache.kv->D;
  const int64_t stride = cache.kv->block_size;
  for (int64_t position = begin; position < end; position += kLanes) {
    const TC* k = cache.key(position);
    for (int64_t d = 0; d < D; ++d, wide += kLanes) store(wide, load(k + d * stride));
  }
}

// As score_rows, where `wide` holds the keys from `begin` on.
template <class TC>
void score_wide(const HeadCache<TC>& cache, const float* wide, const float* q, int rows,
                int64_t chunk, int64_t begin, int64_t end, float* scores) {
  const int64_t D = cache.kv->D;
  KeyGroups<float, 1> keys;
  keys.stride = kLanes;
  for (int64_t position = begin; position < end; position += kLanes) {
    keys.k[0] = wide + (position - begin) * D;
    if (kHoldsCodes<TC>) keys.scale[0] = cache.key_scale(position);
    for_each_tile<kWideTile>(rows, [&](int64_t r, auto height) {
      float* out = scores + r * kChunk + (position - chunk);
      score_block<kHoldsCodes<TC>, decltype(height)::value, 1>(q + r * D, keys, D, out);
    });
  }
}

// Values of the positions from `begin` on, as [positions][width], `width` a multiple of 16.
struct WideValues {
  const float* values;
  int64_t begin;
  int64_t width;

  INFC_INLINE const float* at(int64_t position) const {
    return values + (position - begin) * width;
  }
  INFC_INLINE int64_t stride() const { return width; }
  INFC_INLINE int64_t run_end(int64_t, int64_t last) const { return last; }
};

template <class TC>
WideValues widen_values(const HeadCache<TC>& cache, int64_t begin, int64_t end, int64_t width,
                        float* wide) {
  const int64_t Dv = cache.kv->Dv;
  for (int64_t position = begin; position < end; ++position) {
    const TC* v = cache.value(position);
    float* to = wide + (position - begin) * width;
    for_each_group(Dv, [&](int64_t i, int64_t n) { store(to + i, load_group(v + i, n)); });
  }
  return {wide, begin, width};
}

}  // namespace infc
