// The intrinsics that the kernels use, in plain code, for processors that have no AVX-512: SIMDe's,
// and those that SIMDe 0.7.4 lacks. It stands in place of the compiler's own header of this name.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_NATIVE
// Calls instead of bodies everywhere: a fraction of the code for the compiler.
#define SIMDE_NO_INLINE
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

namespace emulated {

template <class V, class E>
struct Lanes {
  static constexpr int kCount = sizeof(V) / sizeof(E);
  E x[kCount];
  explicit Lanes(V v) { std::memcpy(x, &v, sizeof x); }
  Lanes() : x{} {}
  V value() const {
    V v;
    std::memcpy(&v, x, sizeof x);
    return v;
  }
};

// Each lane of From converted to a lane of To, zero where the mask has no bit.
template <class To, class ToLane, class From, class FromLane, class Mask>
To convert(Mask mask, From from) {
  const Lanes<From, FromLane> in(from);
  Lanes<To, ToLane> out;
  for (int i = 0; i < out.kCount; ++i) {
    if (mask >> i & 1) out.x[i] = static_cast<ToLane>(in.x[i]);
  }
  return out.value();
}

template <class V, class E, class Mask>
V load(Mask mask, const void* p) {
  Lanes<V, E> out;
  for (int i = 0; i < out.kCount; ++i) {
    if (mask >> i & 1) std::memcpy(&out.x[i], static_cast<const E*>(p) + i, sizeof(E));
  }
  return out.value();
}

template <class V, class E, class Mask>
void store(void* p, Mask mask, V v) {
  const Lanes<V, E> in(v);
  for (int i = 0; i < in.kCount; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<E*>(p) + i, &in.x[i], sizeof(E));
  }
}

inline simde__m512 square_root(__mmask16 mask, simde__m512 v) {
  Lanes<simde__m512, float> lanes(v);
  for (int i = 0; i < lanes.kCount; ++i) lanes.x[i] = mask >> i & 1 ? std::sqrt(lanes.x[i]) : 0.0f;
  return lanes.value();
}

// SIMDe's rounds twice.
inline simde__m512 fma(simde__m512 a, simde__m512 b, simde__m512 c) {
  const Lanes<simde__m512, float> x(a), y(b);
  Lanes<simde__m512, float> sum(c);
  for (int i = 0; i < sum.kCount; ++i) sum.x[i] = std::fma(x.x[i], y.x[i], sum.x[i]);
  return sum.value();
}

}  // namespace emulated

#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps(A, B, C) emulated::fma(A, B, C)
#define _mm512_maskz_sqrt_ps(M, A) emulated::square_root(M, A)
#define _mm512_maskz_loadu_ps(M, P) (emulated::load<simde__m512, float>(M, P))
#define _mm512_mask_storeu_ps(P, M, A) emulated::store<simde__m512, float>(P, M, A)
#define _mm256_maskz_loadu_epi16(M, P) (emulated::load<simde__m256i, int16_t>(M, P))
#define _mm256_mask_storeu_epi16(P, M, A) emulated::store<simde__m256i, int16_t>(P, M, A)
#define _mm512_maskz_cvtepi32_epi16(M, A) \
  (emulated::convert<simde__m256i, int16_t, simde__m512i, int32_t>(M, A))
#define _mm512_maskz_cvtepi32_epi8(M, A) \
  (emulated::convert<simde__m128i, int8_t, simde__m512i, int32_t>(M, A))
#define _mm512_maskz_cvtepi8_epi16(M, A) \
  (emulated::convert<simde__m512i, int16_t, simde__m256i, int8_t>(M, A))
#define _mm512_maskz_cvtepi8_epi32(M, A) \
  (emulated::convert<simde__m512i, int32_t, simde__m128i, int8_t>(M, A))
#define _mm512_maskz_cvtepu16_epi32(M, A) \
  (emulated::convert<simde__m512i, int32_t, simde__m256i, uint16_t>(M, A))

// The processor's own: whether tiny numbers become zero is a part of what the kernels promise.
#undef _mm_getcsr
#undef _mm_setcsr
#undef _mm_pause
#define _mm_getcsr() __builtin_ia32_stmxcsr()
#define _mm_setcsr(A) __builtin_ia32_ldmxcsr(A)
#define _mm_pause() __builtin_ia32_pause()
