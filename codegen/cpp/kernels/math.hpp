// Elementary functions: one template for a float and for sixteen, so the bits agree.
//
// Largest errors over the tested ranges, in units of the last place: exp, erf, log 1 (1.2 without
// FMA), tanh and rsqrt 1.5, sigmoid and silu 2.5, softplus 3. sin, cos and pow go through double and
// are the float nearest to the C library's double.
// Scalar forms are branch-free, so a plain loop over them is vectorised by the compiler.
#pragma once

#include <limits>

#include "simd.hpp"

namespace infc {

// e**x. Overflow gives infinity, NaN stays NaN; subnormal results are kept unless flushing is on.
template <class V>
INFC_INLINE V exp(const V& x) {
  using I = ints_of<V>;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer
  // A NaN leaves min and max as the constant, so it is put back at the end.
  const V c = max(min(x, splat<V>(89.0f)), splat<V>(-104.0f));
  const V shifted = fma(c, splat<V>(1.44269504f), splat<V>(kMagic));
  const V n = shifted - splat<V>(kMagic);
  V r = fma(n, splat<V>(-0.693359375f), c);
  r = fma(n, splat<V>(2.12194440e-4f), r);
  V p = splat<V>(1.37805939e-3f);
  p = fma(p, r, splat<V>(8.37312452e-3f));
  p = fma(p, r, splat<V>(4.16695364e-2f));
  p = fma(p, r, splat<V>(1.66664720e-1f));
  p = fma(p, r, splat<V>(4.99999851e-1f));
  p = fma(p, r, splat<V>(1.0f));
  p = fma(p, r, splat<V>(1.0f));
  // Two factors, since 2**n alone may be out of range where the result isn't.
  const I k = bits_of(shifted) - splat_int<I>(0x4b400000);
  const I half = shift_right<1>(k);
  const V s1 = from_bits(shift_left<23>(half + splat_int<I>(127)));
  const V s2 = from_bits(shift_left<23>(k - half + splat_int<I>(127)));
  return select(ne(x, x), x, p * s1 * s2);
}

// 1 / (1 + e**-x).
template <class V>
INFC_INLINE V sigmoid(const V& x) {
  const V one = splat<V>(1.0f);
  return one / (one + exp(splat<V>(0.0f) - x));
}

// x * sigmoid(x).
template <class V>
INFC_INLINE V silu(const V& x) {
  return x / (splat<V>(1.0f) + exp(splat<V>(0.0f) - x));
}

template <class V>
INFC_INLINE V tanh(const V& x) {
  const V a = abs(x);
  const V s = x * x;
  V p = splat<V>(-5.70498872745e-3f);
  p = fma(p, s, splat<V>(2.06390887954e-2f));
  p = fma(p, s, splat<V>(-5.37397155531e-2f));
  p = fma(p, s, splat<V>(1.33314422036e-1f));
  p = fma(p, s, splat<V>(-3.33332819422e-1f));
  const V small = fma(p * s, x, x);
  const V e = exp(a + a);
  const V large = splat<V>(1.0f) - splat<V>(2.0f) / (e + splat<V>(1.0f));
  return select(lt(a, splat<V>(0.625f)), small, copy_sign(large, x));
}

template <class V>
INFC_INLINE V erf(const V& x) {
  const V t = abs(x);
  const V s = x * x;
  V r = fma(splat<V>(-1.72853470e-5f), t, splat<V>(3.83197126e-4f));
  const V u = fma(splat<V>(-3.88396438e-3f), t, splat<V>(2.42546219e-2f));
  r = fma(r, s, u);
  r = fma(r, t, splat<V>(-1.06777877e-1f));
  r = fma(r, t, splat<V>(-6.34846687e-1f));
  r = fma(r, t, splat<V>(-1.28717512e-1f));
  r = fma(r, t, splat<V>(0.0f) - t);
  // Past 4 the result is 1 in float; the polynomial isn't meant for what lies beyond.
  const V tail = select(gt(t, splat<V>(4.0f)), splat<V>(1.0f), splat<V>(1.0f) - exp(r));
  V p = splat<V>(-5.96761703e-4f);
  p = fma(p, s, splat<V>(4.99119423e-3f));
  p = fma(p, s, splat<V>(-2.67681349e-2f));
  p = fma(p, s, splat<V>(1.12819925e-1f));
  p = fma(p, s, splat<V>(-3.76125336e-1f));
  p = fma(p, s, splat<V>(1.28379166e-1f));
  const V body = fma(p, x, x);
  const V result = select(gt(t, splat<V>(0.927734375f)), copy_sign(tail, x), body);
  return select(ne(x, x), x, result);
}

// x * Phi(x), Phi the normal distribution (PyTorch's approximate="none").
template <class V>
INFC_INLINE V gelu(const V& x) {
  const V phi = splat<V>(1.0f) + erf(x * splat<V>(0.70710678f));
  return x * splat<V>(0.5f) * phi;
}

// The tanh form of gelu.
template <class V>
INFC_INLINE V gelu_tanh(const V& x) {
  const V cubic = fma(x * x * x, splat<V>(0.044715f), x);
  const V t = tanh(splat<V>(0.79788456f) * cubic);
  return x * splat<V>(0.5f) * (splat<V>(1.0f) + t);
}

// max(x, 0); a NaN stays one.
template <class V>
INFC_INLINE V relu(const V& x) {
  return select(lt(x, splat<V>(0.0f)), splat<V>(0.0f), x);
}

// Natural logarithm: -inf at 0, NaN below.
template <class V>
INFC_INLINE V log(const V& x) {
  using I = ints_of<V>;
  const V inf = splat<V>(std::numeric_limits<float>::infinity());
  const V tiny = splat<V>(std::numeric_limits<float>::min());
  const auto subnormal = lt(x, tiny);
  const V y = select(subnormal, x * splat<V>(8388608.0f), x);
  // y = 2**e * m with m in [sqrt(1/2), sqrt(2)).
  const I offset = bits_of(y) - splat_int<I>(0x3f3504f3);
  const I exponent = shift_right<23>(offset);
  const V m = from_bits(bits_of(y) - shift_left<23>(exponent)) - splat<V>(1.0f);
  const V e = to_float_value(exponent) - select(subnormal, splat<V>(23.0f), splat<V>(0.0f));
  const V z = m * m;
  V p = splat<V>(7.0376836292e-2f);
  p = fma(p, m, splat<V>(-1.1514610310e-1f));
  p = fma(p, m, splat<V>(1.1676998740e-1f));
  p = fma(p, m, splat<V>(-1.2420140846e-1f));
  p = fma(p, m, splat<V>(1.4249322787e-1f));
  p = fma(p, m, splat<V>(-1.6668057665e-1f));
  p = fma(p, m, splat<V>(2.0000714765e-1f));
  p = fma(p, m, splat<V>(-2.4999993993e-1f));
  p = fma(p, m, splat<V>(3.3333331174e-1f));
  V r = p * m * z;
  r = fma(e, splat<V>(-2.12194440e-4f), r);
  r = fma(z, splat<V>(-0.5f), r);
  r = fma(e, splat<V>(0.693359375f), m + r);
  const V zero = splat<V>(0.0f);
  r = select(eq(x, inf), inf, r);
  r = select(eq(x, zero), zero - inf, r);
  const V nan = splat<V>(std::numeric_limits<float>::quiet_NaN());
  r = select(lt(x, zero), nan, r);
  return select(ne(x, x), x, r);
}

// log(1 + e**x), without overflow.
template <class V>
INFC_INLINE V softplus(const V& x) {
  const V zero = splat<V>(0.0f);
  const V e = exp(zero - abs(x));
  // log1p(e) by the usual correction of log for the rounding of 1 + e.
  const V one = splat<V>(1.0f);
  const V w = one + e;
  const V d = w - one;
  const V l = select(eq(d, zero), e, log(w) * (e / select(eq(d, zero), one, d)));
  return select(ne(x, x), x, select(gt(x, zero), x, zero) + l);
}

INFC_INLINE float rsqrt(float x) { return 1.0f / sqrt(x); }
INFC_INLINE f32x16 rsqrt(const f32x16& x) { return splat<f32x16>(1.0f) / sqrt(x); }

INFC_INLINE float floor(float x) { return __builtin_floorf(x); }
INFC_INLINE int32_t abs(int32_t x) { return x < 0 ? -x : x; }
INFC_INLINE int64_t abs(int64_t x) { return x < 0 ? -x : x; }

// In double precision. By the compiler's names: <cmath> takes a tenth of a second to read.
inline float sin(float x) { return static_cast<float>(__builtin_sin(x)); }
inline float cos(float x) { return static_cast<float>(__builtin_cos(x)); }
// x**y; squares and cubes are plain products.
inline float pow(float x, float y) {
  if (y == 2.0f) return x * x;
  if (y == 3.0f) return x * x * x;
  return static_cast<float>(__builtin_pow(x, y));
}

}  // namespace infc
