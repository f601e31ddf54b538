// Sixteen floats as one value, on AVX-512, AVX2+FMA, or whatever the compiler has.
//
// Every reduction order in the kernels is written in terms of 16 lanes, so the lane count is the
// same everywhere; only the number of registers behind it differs. Each operation also exists for a
// plain float, with the same bits: a function template over {float, f32x16} has one meaning.
#pragma once

#include <cstdint>
#include <cstring>

#include "bf16.hpp"

// Given from outside where tests run these paths on a processor that lacks them.
#ifndef INFC_AVX512
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define INFC_AVX512 1
#else
#define INFC_AVX512 0
#endif
#endif
#ifndef INFC_AVX2
#if defined(__AVX2__) && defined(__FMA__)
#define INFC_AVX2 1
#else
#define INFC_AVX2 0
#endif
#endif
#ifndef INFC_DPBF16
#if INFC_AVX512 && defined(__AVX512BF16__)
#define INFC_DPBF16 1
#else
#define INFC_DPBF16 0
#endif
#endif
#ifndef INFC_VNNI
#if INFC_AVX512 && defined(__AVX512VNNI__)
#define INFC_VNNI 1
#else
#define INFC_VNNI 0
#endif
#endif
#if INFC_AVX2 || INFC_AVX512 || defined(__ARM_FEATURE_FMA)
#define INFC_FMA 1
#else
#define INFC_FMA 0
#endif
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__x86_64__)
#include <smmintrin.h>  // read in a tenth of the time that <immintrin.h> takes
#endif

#define INFC_INLINE inline __attribute__((always_inline))
#define INFC_UNROLL _Pragma("GCC unroll 16")

namespace infc {

constexpr int kLanes = 16;
#if INFC_AVX512
constexpr int kRegs = 1;
#elif INFC_AVX2
constexpr int kRegs = 2;
#else
constexpr int kRegs = 4;
#endif
constexpr int kRegLanes = kLanes / kRegs;

namespace reg {
typedef float f32 __attribute__((vector_size(kRegLanes * 4)));
typedef int32_t i32 __attribute__((vector_size(kRegLanes * 4)));
typedef uint32_t u32 __attribute__((vector_size(kRegLanes * 4)));
typedef uint16_t u16 __attribute__((vector_size(kRegLanes * 2)));
typedef int8_t i8 __attribute__((vector_size(kRegLanes)));

INFC_INLINE f32 fma(f32 a, f32 b, f32 c) {
#if INFC_AVX512
  return _mm512_fmadd_ps(a, b, c);
#elif INFC_AVX2
  return _mm256_fmadd_ps(a, b, c);
#elif INFC_FMA
  f32 r;
  for (int i = 0; i < kRegLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

INFC_INLINE f32 set1(float x) {
#if INFC_AVX512
  return _mm512_set1_ps(x);
#elif INFC_AVX2
  return _mm256_set1_ps(x);
#else
  f32 r;
  INFC_UNROLL for (int i = 0; i < kRegLanes; ++i) r[i] = x;
  return r;
#endif
}

INFC_INLINE f32 max(f32 a, f32 b) {
#if INFC_AVX2 && !INFC_AVX512
  return _mm256_max_ps(a, b);  // gcc makes two instructions of the comparison
#else
  return a > b ? a : b;
#endif
}
INFC_INLINE f32 min(f32 a, f32 b) {
#if INFC_AVX2 && !INFC_AVX512
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

INFC_INLINE f32 sqrt(f32 a) {
#if INFC_AVX512
  return _mm512_maskz_sqrt_ps(0xffff, a);  // see kAllLanes
#elif INFC_AVX2
  return _mm256_sqrt_ps(a);
#else
  f32 r{};
  for (int i = 0; i < kRegLanes; ++i) r[i] = __builtin_sqrtf(a[i]);
  return r;
#endif
}
}  // namespace reg

// Sixteen 32-bit integers; as a mask, a lane is 0 or -1.
struct i32x16 {
  reg::i32 v[kRegs];
};

struct f32x16 {
  reg::f32 v[kRegs];
};

#define INFC_EACH(i) INFC_UNROLL for (int i = 0; i < kRegs; ++i)

#define INFC_BINARY(TYPE, OP)                              \
  INFC_INLINE TYPE operator OP(const TYPE& a, const TYPE& b) { \
    TYPE r;                                                \
    INFC_EACH(i) r.v[i] = a.v[i] OP b.v[i];                \
    return r;                                              \
  }
INFC_BINARY(f32x16, +)
INFC_BINARY(f32x16, -)
INFC_BINARY(f32x16, *)
INFC_BINARY(f32x16, /)
INFC_BINARY(i32x16, +)
INFC_BINARY(i32x16, -)
INFC_BINARY(i32x16, &)
INFC_BINARY(i32x16, |)
INFC_BINARY(i32x16, ^)
#undef INFC_BINARY

#define INFC_COMPARE(NAME, OP)                                      \
  INFC_INLINE i32x16 NAME(const f32x16& a, const f32x16& b) {       \
    i32x16 r;                                                       \
    INFC_EACH(i) r.v[i] = (reg::i32)(a.v[i] OP b.v[i]);             \
    return r;                                                       \
  }                                                                 \
  INFC_INLINE bool NAME(float a, float b) { return a OP b; }
INFC_COMPARE(lt, <)
INFC_COMPARE(gt, >)
INFC_COMPARE(eq, ==)
INFC_COMPARE(ne, !=)
#undef INFC_COMPARE
INFC_INLINE i32x16 ge(const i32x16& a, const i32x16& b) {
  i32x16 r;
  INFC_EACH(i) r.v[i] = a.v[i] >= b.v[i];
  return r;
}

template <class V>
struct vector_traits;
template <>
struct vector_traits<float> {
  using ints = int32_t;
};
template <>
struct vector_traits<f32x16> {
  using ints = i32x16;
};
template <class V>
using ints_of = typename vector_traits<V>::ints;

// `splat<V>(x)`: x in every lane.
template <class V>
INFC_INLINE V splat(float x);
template <>
INFC_INLINE float splat<float>(float x) {
  return x;
}
template <>
INFC_INLINE f32x16 splat<f32x16>(float x) {
  f32x16 r;
  INFC_EACH(i) r.v[i] = reg::f32{} + x;
  return r;
}
template <class I>
INFC_INLINE I splat_int(int32_t x);
template <>
INFC_INLINE int32_t splat_int<int32_t>(int32_t x) {
  return x;
}
template <>
INFC_INLINE i32x16 splat_int<i32x16>(int32_t x) {
  i32x16 r;
  INFC_EACH(i) r.v[i] = reg::i32{} + x;
  return r;
}
INFC_INLINE f32x16 set1(float x) {
  f32x16 r;
  const reg::f32 one = reg::set1(x);
  INFC_EACH(i) r.v[i] = one;
  return r;
}
INFC_INLINE f32x16 zeros() {
  f32x16 r;
  INFC_EACH(i) r.v[i] = reg::f32{};
  return r;
}

// a * b + c: one rounding where the target has FMA, two where it has not (in scalar code too).
INFC_INLINE float fma(float a, float b, float c) {
#if INFC_FMA
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
INFC_INLINE f32x16 fma(const f32x16& a, const f32x16& b, const f32x16& c) {
  f32x16 r;
  INFC_EACH(i) r.v[i] = reg::fma(a.v[i], b.v[i], c.v[i]);
  return r;
}
INFC_INLINE float sqrt(float a) { return __builtin_sqrtf(a); }
INFC_INLINE f32x16 sqrt(const f32x16& a) {
  f32x16 r;
  INFC_EACH(i) r.v[i] = reg::sqrt(a.v[i]);
  return r;
}

INFC_INLINE float select(bool m, float a, float b) { return m ? a : b; }
INFC_INLINE f32x16 select(const i32x16& m, const f32x16& a, const f32x16& b) {
  f32x16 r;
  INFC_EACH(i) r.v[i] = m.v[i] != 0 ? a.v[i] : b.v[i];
  return r;
}
// The second operand where either is NaN.
INFC_INLINE float max(float a, float b) { return a > b ? a : b; }
INFC_INLINE float min(float a, float b) { return a < b ? a : b; }
INFC_INLINE f32x16 max(const f32x16& a, const f32x16& b) {
  f32x16 r;
  INFC_EACH(i) r.v[i] = reg::max(a.v[i], b.v[i]);
  return r;
}
INFC_INLINE f32x16 min(const f32x16& a, const f32x16& b) {
  f32x16 r;
  INFC_EACH(i) r.v[i] = reg::min(a.v[i], b.v[i]);
  return r;
}

INFC_INLINE i32x16 max(const i32x16& a, const i32x16& b) {
  i32x16 r;
  INFC_EACH(i) r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return r;
}

// The bits of a float as an integer, and back.
INFC_INLINE int32_t bits_of(float x) { return static_cast<int32_t>(float_bits(x)); }
INFC_INLINE i32x16 bits_of(const f32x16& x) {
  i32x16 r;
  INFC_EACH(i) r.v[i] = (reg::i32)x.v[i];
  return r;
}
INFC_INLINE float from_bits(int32_t x) { return bits_float(static_cast<uint32_t>(x)); }
INFC_INLINE f32x16 from_bits(const i32x16& x) {
  f32x16 r;
  INFC_EACH(i) r.v[i] = (reg::f32)x.v[i];
  return r;
}
template <int N>
INFC_INLINE int32_t shift_left(int32_t x) {
  return static_cast<int32_t>(static_cast<uint32_t>(x) << N);
}
template <int N>
INFC_INLINE i32x16 shift_left(const i32x16& x) {
  i32x16 r;
  INFC_EACH(i) r.v[i] = x.v[i] << N;
  return r;
}
template <int N>
INFC_INLINE int32_t shift_right(int32_t x) {
  return x >> N;
}
template <int N>
INFC_INLINE i32x16 shift_right(const i32x16& x) {
  i32x16 r;
  INFC_EACH(i) r.v[i] = x.v[i] >> N;
  return r;
}
INFC_INLINE float to_float_value(int32_t x) { return static_cast<float>(x); }
INFC_INLINE f32x16 to_float_value(const i32x16& x) {
  f32x16 r;
  INFC_EACH(i) r.v[i] = __builtin_convertvector(x.v[i], reg::f32);
  return r;
}
template <class V>
INFC_INLINE V abs(const V& x) {
  using I = ints_of<V>;
  return from_bits(bits_of(x) & splat_int<I>(0x7fffffff));
}
template <class V>
INFC_INLINE V copy_sign(const V& magnitude, const V& sign) {
  using I = ints_of<V>;
  return from_bits((bits_of(magnitude) & splat_int<I>(0x7fffffff)) |
                   (bits_of(sign) & splat_int<I>(INT32_MIN)));
}

}  // namespace infc

#include "simd_memory.hpp"
