// A span of 128 columns of a ternary weight times the same span of x, on the integer tensor cores.
//
// (word << 2 i) & 0xC0C0C0C0 puts weights 3 - i, 7 - i, 11 - i, 15 - i of a word of codes where they read as
// {0, +64, -64} in int8: the A operand. x becomes 16-bit integers with one scale a span (an error of at most
// 2^-16 of the span's largest value), as two bytes in two columns of B: 256 high + low. Sums are exact.
#pragma once

#include "kernels/sm90/common/integers.cuh"
#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/decode/config.h"

namespace ternary::sm90 {

// A lane's codes of a tile, of one span.
struct CodesOfTile {
  uint2 row[2];

  template <int kPitch>
  __device__ void load(const uint8_t* first) {
    row[0] = *reinterpret_cast<const uint2*>(first);
    row[1] = *reinterpret_cast<const uint2*>(first + 8 * kPitch);
  }
};

// A span of x of kBatch rows as B. The columns are (row, byte); a lane's sums are those of row lane % 4.
template <int kBatch>
struct SpanOfX {
  static_assert(kBatch <= 4);
  uint32_t b[8];  // words 0 and 1 of a lane's codes, weights 3 - i, 7 - i, ... of each

  // Sets n spans and the scales of their sums. values: of each row columns lane % 4 + {0, 4, 8, 12} of word
  // lane / 4. staging: n * kBatch * 256 bytes, the warp's own, which it last read before
  // a barrier.
  template <int n>
  __device__ static void set(SpanOfX* spans, const float4 (&values)[n * kBatch], float (&scales)[n * kBatch],
                             uint8_t* staging) {
    const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
    for (int row = 0; row < n * kBatch; ++row) {
      const float v[4] = {values[row].x, values[row].y, values[row].z, values[row].w};
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) most = max(most, magnitude_bits(v[i]));
      const float largest = __uint_as_float(__reduce_max_sync(~0u, most));
      const float inverse = largest > 1e-30f ? __fdividef(kLargestInteger, largest) : 0;
      scales[row] = largest * (1 / (kLargestInteger * 64));
      uint32_t* to = reinterpret_cast<uint32_t*>(staging + row * 2 * Decode::kSpan) + lane / 4 * 4 + 3 - quad;
      const TwoBytes bytes = to_two_bytes(v, inverse);
      to[Decode::kSpan / 4] = bytes.lower;
      to[0] = bytes.upper;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const int column = lane / 4;
      const uint4* from =
          reinterpret_cast<const uint4*>(staging + (i * 2 * kBatch + column) * Decode::kSpan + quad * 32);
      uint4 low = {}, high = {};
      if (column < 2 * kBatch) low = from[0], high = from[1];
      const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) spans[i].b[j] = words[j];
    }
  }

  // codes times x, times 64, for rows lane / 4 and lane / 4 + 8 of a tile.
  __device__ void multiply(int32_t (&sums)[2], const CodesOfTile& codes) const {
    int32_t d[4] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t first = step < 2 ? codes.row[0].x : codes.row[0].y;
      const uint32_t second = step < 2 ? codes.row[1].x : codes.row[1].y;
      const int i = step % 2 * 2;
      const auto weights = [](uint32_t word, int i) { return word << 2 * i & 0xC0C0C0C0; };
      const uint32_t a[4] = {weights(first, i), weights(second, i), weights(first, i + 1),
                             weights(second, i + 1)};
      mma_m16n8k32(d, a, b[step / 2 * 4 + i], b[step / 2 * 4 + i + 1]);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) sums[row] = d[2 * row] * 256 + d[2 * row + 1];
  }
};

}  // namespace ternary::sm90
