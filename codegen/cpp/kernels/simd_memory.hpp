// Loads, stores and cross-lane sums of f32x16 (included by simd.hpp).
#pragma once

#include "simd.hpp"

namespace infc {

#if INFC_AVX512
// The masked forms with every lane set: gcc 12 warns about its own headers in the plain ones.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

namespace reg {
// As many elements as a register has lanes, as floats.
INFC_INLINE f32 load(const float* p) {
  f32 r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
INFC_INLINE f32 load(const bf16* p) {
#if INFC_AVX512
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps((__m512i)((u32)_mm512_maskz_cvtepu16_epi32(kAllLanes, h) << 16));
#elif INFC_AVX2
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
#else
  u16 h;
  std::memcpy(&h, p, sizeof h);
  return (f32)(__builtin_convertvector(h, u32) << 16);
#endif
}
INFC_INLINE i32 load_ints(const int8_t* p) {
#if INFC_AVX512
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (i32)_mm512_maskz_cvtepi8_epi32(kAllLanes, bytes);
#elif INFC_AVX2
  return (i32)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  i8 bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, i32);
#endif
}
INFC_INLINE f32 load(const int8_t* p) { return __builtin_convertvector(load_ints(p), f32); }

INFC_INLINE void store(float* p, f32 x) { std::memcpy(p, &x, sizeof x); }
}  // namespace reg

template <class T>
INFC_INLINE f32x16 load(const T* p) {
  f32x16 r;
  // Register by register: gcc copies the whole through the stack.
  INFC_EACH(i) r.v[i] = reg::load(p + i * kRegLanes);
  return r;
}

INFC_INLINE i32x16 load_int32(const int32_t* p) {
  i32x16 r;
  INFC_EACH(i) std::memcpy(&r.v[i], p + i * kRegLanes, sizeof r.v[i]);
  return r;
}
// Sixteen bytes, widened.
INFC_INLINE i32x16 load_ints(const int8_t* p) {
  i32x16 r;
  INFC_EACH(i) r.v[i] = reg::load_ints(p + i * kRegLanes);
  return r;
}

INFC_INLINE void store(float* p, const f32x16& x) {
  INFC_EACH(i) reg::store(p + i * kRegLanes, x.v[i]);
}
INFC_INLINE void store(bf16* p, const f32x16& x) {
  INFC_EACH(i) {
    const reg::u32 u = (reg::u32)x.v[i];
    const reg::u32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const reg::u32 quiet = (u >> 16) | 0x40u;
    const reg::u32 result = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
#if INFC_AVX512
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)result));
#else
    const reg::u16 h = __builtin_convertvector(result, reg::u16);
    std::memcpy(p + i * kRegLanes, &h, sizeof h);
#endif
  }
}

// Each lane's low byte.
INFC_INLINE void store(int8_t* p, const i32x16& x) {
#if INFC_AVX512
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm512_maskz_cvtepi32_epi8(kAllLanes, (__m512i)x.v[0]));
#else
  INFC_EACH(i) {
    const reg::i8 bytes = __builtin_convertvector(x.v[i], reg::i8);
    std::memcpy(p + i * kRegLanes, &bytes, sizeof bytes);
  }
#endif
}

// The first n (0 <= n <= 16) elements; the other lanes are zero and their memory isn't touched.
template <class T>
INFC_INLINE f32x16 load_partial(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T, class V>
INFC_INLINE void store_partial(T* p, const V& x, int64_t n) {
  T buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}
#if INFC_AVX512
INFC_INLINE f32x16 widen(__m256i h) {
  f32x16 r;
  r.v[0] = (reg::f32)((reg::u32)_mm512_maskz_cvtepu16_epi32(kAllLanes, h) << 16);
  return r;
}
INFC_INLINE __mmask16 lane_mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
template <>
INFC_INLINE f32x16 load_partial(const float* p, int64_t n) {
  f32x16 r;
  r.v[0] = _mm512_maskz_loadu_ps(lane_mask(n), p);
  return r;
}
template <>
INFC_INLINE f32x16 load_partial(const bf16* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(lane_mask(n), p));
}
template <>
INFC_INLINE void store_partial(float* p, const f32x16& x, int64_t n) {
  _mm512_mask_storeu_ps(p, lane_mask(n), x.v[0]);
}
template <>
INFC_INLINE void store_partial(bf16* p, const f32x16& x, int64_t n) {
  alignas(32) bf16 rounded[kLanes];
  store(rounded, x);
  const __m256i h = _mm256_load_si256(reinterpret_cast<const __m256i*>(rounded));
  _mm256_mask_storeu_epi16(p, lane_mask(n), h);
}
#endif

// Groups of 16 that n elements fill, the last perhaps in part.
constexpr int64_t ceil_groups(int64_t n) { return (n + kLanes - 1) / kLanes; }

// Calls f(offset, count) for each group of 16 elements of n; the last count may be smaller.
template <class F>
INFC_INLINE void for_each_group(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, static_cast<int64_t>(kLanes));
  if (i < n) f(i, n - i);
}
template <class T>
INFC_INLINE f32x16 load_group(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_partial(p, count);
}
template <class T, class V>
INFC_INLINE void store_group(T* p, const V& x, int64_t count) {
  if (count == kLanes) {
    store(p, x);
  } else {
    store_partial(p, x, count);
  }
}

// Lanes as an array: for what is done once a row.
struct Lanes {
  alignas(64) float x[kLanes];
};
INFC_INLINE Lanes lanes_of(const f32x16& v) {
  Lanes l;
  store(l.x, v);
  return l;
}

namespace reg {
typedef float quad __attribute__((vector_size(16)));
}
// f over lanes by the fixed tree 8-4-2-1: lane i takes lane i+8, then i+4, i+2, i+1.
template <class F>
INFC_INLINE float reduce_lanes(const f32x16& v, F f) {
  const Lanes l = lanes_of(v);
  reg::quad q[4];
  std::memcpy(q, l.x, sizeof q);
  const reg::quad four = f(f(q[0], q[2]), f(q[1], q[3]));
  const reg::quad two = f(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
  return f(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
}
INFC_INLINE float sum_lanes(const f32x16& v) {
  return reduce_lanes(v, [](reg::quad a, reg::quad b) { return a + b; });
}
INFC_INLINE float max_lanes(const f32x16& v) {
  return reduce_lanes(v, [](reg::quad a, reg::quad b) { return a > b ? a : b; });
}

// Whether a mask has any lane.
INFC_INLINE bool any_lane(const i32x16& m) {
  reg::i32 all = m.v[0];
  for (int i = 1; i < kRegs; ++i) all |= m.v[i];
  int64_t words[kRegLanes / 2];
  std::memcpy(words, &all, sizeof words);
  int64_t any = 0;
  for (const int64_t word : words) any |= word;
  return any != 0;
}

// A mask of the lanes i with first <= base + i < last.
INFC_INLINE i32x16 lanes_between(int32_t base, int32_t first, int32_t last) {
  alignas(64) static constexpr int32_t kIota[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                        8, 9, 10, 11, 12, 13, 14, 15};
  i32x16 iota;
  std::memcpy(&iota, kIota, sizeof iota);
  i32x16 r;
  const reg::i32 low = reg::i32{} + (first - base);
  const reg::i32 high = reg::i32{} + (last - base);
  INFC_EACH(i) r.v[i] = (reg::i32)(iota.v[i] >= low) & (reg::i32)(iota.v[i] < high);
  return r;
}

// Asks for the cache line at p, near.
INFC_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace infc
