// Floats as 16-bit integers of two bytes, 256 upper + lower, both of which fit int8: for the integer tensor
// cores.
#pragma once

#include <cstdint>

namespace ternary::sm90 {

constexpr float kLargestInteger = 127 * 256;

// Compares as the magnitude does; that of NaN is the largest.
__device__ inline uint32_t magnitude_bits(float v) { return __float_as_uint(v) & 0x7FFFFFFF; }

struct TwoBytes {
  uint32_t upper, lower;
};

// Four floats times `inverse`, at most kLargestInteger then, as four upper and four lower bytes.
__device__ inline TwoBytes to_two_bytes(const float (&v)[4], float inverse) {
  constexpr float kOne = 12582912.f;  // 1.5 * 2^23: a sum with it has the integer in its low bits
  uint32_t n[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) n[i] = __float_as_uint(fmaf(v[i], inverse, kOne));
  const auto bytes = [&n](uint32_t two) {
    return __byte_perm(__byte_perm(n[0], n[1], two), __byte_perm(n[2], n[3], two), 0x5410);
  };
  const uint32_t lower = bytes(0x0040);
#pragma unroll
  for (int i = 0; i < 4; ++i) n[i] += 128;
  return {bytes(0x0051), lower};
}

}  // namespace ternary::sm90
