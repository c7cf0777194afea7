// Codes and scales -> the A operand of wgmma in registers, with the scales or without.
//
// 16 bits: wgmma gives a lane two neighbours of every eight columns, so of the 16 bits of codes of eight
// columns a lane takes nibble `quad`. Moved to the top of a half, a code reads as {0, +2, -2}; the product
// with a scale in the activation's type is then twice the weight that torch would dequantize to, bit by bit.
// e4m3: x is quantized here and may lie in any order (see fp8.cuh), so a lane takes words of codes as they
// are: (word << 2 i) & 0xC0C0C0C0 are four weights.
#pragma once

#include "kernels/gemm.h"
#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/common/types.cuh"

namespace ternary::sm90 {

// How to find a scale: `groups` of a row (0 with one scale for all), the last span of a row, and 2^32 / (2
// spans a group), rounded up. The high half of its product with 2 span + 1 is the span's group: exactly, both
// being under 2^15 and the quotient never a whole number.
struct ScaleIndex {
  int groups, last_span;
  uint32_t spans_to_group;

  // Columns past the last are only ever multiplied by zero: there the last span's scale does.
  __device__ int group(int span) const {
    return groups ? __umulhi(2 * min(span, last_span) + 1, spans_to_group) : 0;
  }
};

// The scale of a row's span as it lies in memory: nothing waits for it until it is read as a number.
__device__ inline uint32_t load_scale(const GemmArgs& a, const ScaleIndex& index, int row, int span) {
  const int at = min(row, static_cast<int>(a.n) - 1) * index.groups + index.group(span);
  return a.scale_type == DType::f32 ? static_cast<const uint32_t*>(a.scales)[at]
                                    : static_cast<const uint16_t*>(a.scales)[at];
}

__device__ inline float scale_of(uint32_t bits, DType type) {
  const float f16 = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  return type == DType::f16 ? f16 : __uint_as_float(type == DType::bf16 ? bits << 16 : bits);
}

// The scale twice, rounded to Element.
template <class Element>
__device__ uint32_t scale_pair(uint32_t bits, DType type) {
  const Element scale = from_float<Element>(scale_of(bits, type));
  return pack(scale, scale);
}

__device__ inline uint32_t multiply_pairs(uint32_t a, uint32_t b, __half) {
  const __half2 product = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&product);
}
__device__ inline uint32_t multiply_pairs(uint32_t a, uint32_t b, __nv_bfloat16) {
  const __nv_bfloat162 product =
      __hmul2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&product);
}

// 64 codes of a row -> this lane's halves of A for four steps of the instruction, [step][columns
// 0..7, 8..15]: bytes with nibble j and 4 + j of the eight that are this lane's, then the even codes in the
// low halves of two words and the odd ones in the high; from there a shift and a mask make a pair.
__device__ inline void unpack(uint32_t (&frag)[4][2], uint4 codes, int quad) {
  constexpr uint32_t kTopCodes = 0xC000C000, kLowNibbles = 0x0F0F0F0F;
  const uint32_t bytes = quad / 2 ? 0x7531 : 0x6420, shift = quad % 2 * 4;
  const uint32_t low = __byte_perm(codes.x, codes.y, bytes) >> shift;
  const uint32_t high = __byte_perm(codes.z, codes.w, bytes) << (4 - shift);
  const uint32_t mine = (low & kLowNibbles) | (high & ~kLowNibbles), evens = mine << 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t pairs = __byte_perm(evens, mine, i ? 0x7632 : 0x5410);  // of pieces 2 i, 4 + 2 i, 1 + ..
    frag[i][0] = (pairs << 12) & kTopCodes;
    frag[i][1] = (pairs << 4) & kTopCodes;
    frag[2 + i][0] = (pairs << 8) & kTopCodes;
    frag[2 + i][1] = pairs & kTopCodes;
  }
}

// What `unpack` gives of rows lane / 4 and 8 on -> A of four steps, scaled: scale(i, step) is a pair for row
// i.
template <class Element, class Scale>
__device__ void scaled_weights(uint32_t (&frag)[4][4], const uint32_t (&rows)[2][4][2], Scale scale) {
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      frag[step][i] = multiply_pairs(rows[i % 2][step][i / 2], scale(i % 2, step), Element{});
}

// A word of codes each of rows lane / 4 and 8 on -> A of two steps in e4m3.
__device__ inline void fp8_weights(uint32_t (&first)[4], uint32_t (&second)[4], uint32_t upper,
                                   uint32_t lower) {
  constexpr uint32_t kTopCodes = 0xC0C0C0C0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = i % 2 ? lower : upper;
    first[i] = (word << i / 2 * 2) & kTopCodes;
    second[i] = (word << (4 + i / 2 * 2)) & kTopCodes;
  }
}

}  // namespace ternary::sm90
