// A vector of floats as wide as the instruction set has it, and the elementary functions of the recurrences
// on it. Everything lies in the namespace of one instruction set, so that the linker cannot share a copy
// between two.
#pragma once

#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace ternary::TERNARY_ISA {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float Vec4 __attribute__((vector_size(16)));

inline Vec load(const float* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }

inline Vec broadcast(float x) { return x - Vec{}; }

// A NaN in the second argument comes through, one in the first does not.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

inline float sum(Vec v) {
#if defined(__AVX512F__)
  const auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Vec4 quarter =
      __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif defined(__AVX2__)
  const Vec4 quarter = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  const Vec4 quarter = v;
#endif
  const Vec4 pair = quarter + __builtin_shufflevector(quarter, quarter, 2, 3, 0, 1);
  return pair[0] + pair[1];
}

// e^x to 1 ulp where that lies in [2^-126, 2^127.5]; 0 below and infinity above. NaN stays NaN.
// x = k ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r + r^2 q(r), q a minimax polynomial (3e-9); times 2^k.
inline Vec exp(Vec x) {
  x = min(broadcast(89.0f), max(broadcast(-88.02f), x));  // k in [-127, 128]: 2^k is 0 ... infinity
  const Vec shifted = x * 1.44269504f + 0x1.8p23f;        // its low bits are k
  const Vec k = shifted - 0x1.8p23f;
  const Vec r = (x - k * 0x1.63p-1f) - k * -2.12194440e-4f;  // ln 2 in two parts; k times the first is exact
  Vec q = r * 1.381453825e-3f + 8.368745446e-3f;
  q = q * r + 4.166838899e-2f;
  q = q * r + 1.666652113e-1f;
  q = q * r + 4.999999404e-1f;
  return (r * r * q + r + 1.0f) * Vec(((IntVec(shifted) + 127) << 23));
}

// ln(1 + e^x) to 2 ulp = max(x, 0) + log1p(e^-|x|), where log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3.
inline Vec softplus(Vec x) {
  const Vec e = exp(min(x, -x));
  const Vec s = e / (e + 2.0f), u = s * s;
  Vec q = u * 1.401564632e-1f + 1.399893136e-1f;
  q = q * u + 2.001088560e-1f;
  q = q * u + 3.333320618e-1f;
  return max(x, Vec{}) + 2.0f * (s * u * q + s);
}

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

}  // namespace ternary::TERNARY_ISA
