// Elements of any DType to and from float, rounded to nearest even as torch does.
// Everything is in the namespace of the instruction set, so that the linker never merges two copies.
#pragma once

#include "kernels/dtype.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace ternary::TERNARY_ISA {

inline float widen(float v) { return v; }
inline float widen(float16 v) { return static_cast<float>(v); }
inline float widen(bfloat16 v) { return __builtin_bit_cast(float, uint32_t{v.bits} << 16); }

inline void narrow(float v, float& to) { to = v; }
inline void narrow(float v, float16& to) { to = static_cast<float16>(v); }
inline void narrow(float v, bfloat16& to) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = static_cast<uint16_t>(v == v ? rounded : 0x7fc0);  // rounding could turn a NaN into infinity
}

template <class T>
inline void widen_run(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <class T>
inline void narrow_run(const float* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i]);
}

#ifdef __F16C__  // the compiler vectorises the loops above, but not for halves
inline void widen_run(const float16* from, int64_t n, float* to) {
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (int64_t i = whole; i < n; ++i) to[i] = widen(from[i]);
}

inline void narrow_run(const float* from, int64_t n, float16* to) {
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (int64_t i = whole; i < n; ++i) narrow(from[i], to[i]);
}
#endif

// Element i of `from`.
inline float load_float(const void* from, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(from)[i];
  if (dtype == DType::f16) return widen(static_cast<const float16*>(from)[i]);
  return widen(static_cast<const bfloat16*>(from)[i]);
}

// Elements first .. first + n of `from`.
inline void load_floats(const void* from, DType dtype, int64_t first, int64_t n, float* to) {
  if (dtype == DType::f32) return widen_run(static_cast<const float*>(from) + first, n, to);
  if (dtype == DType::f16) return widen_run(static_cast<const float16*>(from) + first, n, to);
  widen_run(static_cast<const bfloat16*>(from) + first, n, to);
}

// Element i of `to`.
inline void store_float(float v, void* to, DType dtype, int64_t i) {
  if (dtype == DType::f32) return narrow(v, static_cast<float*>(to)[i]);
  if (dtype == DType::f16) return narrow(v, static_cast<float16*>(to)[i]);
  narrow(v, static_cast<bfloat16*>(to)[i]);
}

// Elements first .. first + n of `to`.
inline void store_floats(const float* from, int64_t n, void* to, DType dtype, int64_t first) {
  if (dtype == DType::f32) return narrow_run(from, n, static_cast<float*>(to) + first);
  if (dtype == DType::f16) return narrow_run(from, n, static_cast<float16*>(to) + first);
  narrow_run(from, n, static_cast<bfloat16*>(to) + first);
}

}  // namespace ternary::TERNARY_ISA
