// The packed weight: how 2-bit codes sit in a byte or word. The only file that knows.
//
//   bits of a byte  7 6 | 5 4 | 3 2 | 1 0      code 00 =  0    A code is the weight as a two-bit two's
//   weight of a row  3  |  2  |  1  |  0       code 01 = +1    complement number. The fourth, -2, is
//                                              code 11 = -1    invalid and reads as 0.
//
// Four consecutive weights of a row make a byte, low bits first, and sixteen a little-endian 32-bit word.
#pragma once

#include <cstdint>

// Static: the CPU kernels are compiled once per instruction set, and the linker must not merge the copies.
#ifdef __CUDACC__
#define TERNARY_INLINE static __host__ __device__ inline
#else
#define TERNARY_INLINE static inline
#endif

namespace ternary {

constexpr int kWeightsPerByte = 4;
constexpr int kWeightsPerWord = 16;

// The byte of four weights in {-1, 0, +1}.
TERNARY_INLINE uint8_t pack_byte(const int8_t* weights) {
  return static_cast<uint8_t>((weights[0] & 3) | (weights[1] & 3) << 2 | (weights[2] & 3) << 4 |
                              (weights[3] & 3) << 6);
}

// The same word with invalid codes turned into 0: a sign bit stays where its magnitude bit is set.
// Word is a 32-bit integer or a vector of them.
template <class Word>
TERNARY_INLINE Word valid_codes(Word word) {
  return word & ((word << 1) | 0x55555555);
}

// Weight i of a word of valid codes, an int32_t or a vector of them: the shifts extend the sign.
template <class Word>
TERNARY_INLINE Word code_at(Word word, int i) {
  return (word << (30 - 2 * i)) >> 30;
}

// Twice weight i of a word as the bits of a float: the code as its two highest bits is 0, +2 or -2, the
// invalid one -0.
template <class Word>
TERNARY_INLINE Word twice_weight_at(Word word, int i) {
  return word << (30 - 2 * i) & static_cast<int32_t>(0xc0000000);
}

// Weight i of a row of codes.
TERNARY_INLINE int weight_at(const uint8_t* row, int64_t i) {
  const int code = row[i / kWeightsPerByte] >> (i % kWeightsPerByte * 2) & 3;
  return (code & 1) * (1 - (code & 2));
}

}  // namespace ternary
