// Values on their way between the blocks of a running kernel.
//
// A value is an fp32 word in global memory whose last bit tells its epoch: whoever waits for it reads the
// word itself until the bit is right, one way through L2, with no flag and no barrier. A word belongs to one
// of two regions that the layers use in turn, so the bit of a word flips each time it is written. By then
// every reader of its old value is done: the writer has since waited for values that they sent later.
#pragma once

#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/decode/config.h"

namespace ternary::sm90 {

// The words of one layer: x [b][d], B and C [b][2 n], (dt, decay, 0, 0) [b][h][4], gated y [b][e]; x and y in
// the order of `place`.
struct Region {
  uint32_t *x, *shared, *steps, *y;
  uint32_t epoch;
};

// Where column i of x or y lies: of 16, every fourth are neighbours, as the codes of a word need them.
__device__ inline int place(int i) { return (i & ~15) | (i & 3) << 2 | (i >> 2 & 3); }

struct ExchangeArgs {
  static constexpr int kHeader = 4;  // words of the workspace before the regions
  uint32_t* counter;                 // layers done since the workspace was new
  uint32_t* words;
  int batch, d_model, heads, d_inner;

  __host__ __device__ int region_words() const {
    return batch * (d_model + 2 * Decode::kStateSize + 4 * heads + d_inner);
  }
  int64_t words_in_all() const { return kHeader + int64_t{Decode::kRegions} * region_words(); }
  __device__ Region region(uint32_t use) const {
    uint32_t* x = words + use % Decode::kRegions * region_words();
    uint32_t* shared = x + batch * d_model;
    uint32_t* steps = shared + batch * 2 * Decode::kStateSize;
    return {x, shared, steps, steps + batch * 4 * heads, (use / Decode::kRegions & 1) ^ 1};
  }
};

__device__ inline void send(uint32_t* to, float value, uint32_t epoch) {
  store_word(to, (__float_as_uint(value) & ~1u) | epoch);
}

// The warp waits for n times four words a lane, and stays together. One lane looks until its word is there,
// then all that have not theirs: all words of all blocks again and again would take all of L2's bandwidth.
template <int n>
__device__ void receive(float4 (&values)[n], const uint32_t* const (&from)[n], uint32_t epoch) {
  uint4 words[n];
  const uint32_t looks = threadIdx.x / 32 * 5 % 32;
  uint32_t wrong;
  do {
    wrong = threadIdx.x % 32 == looks ? load_word(from[n - 1]) ^ epoch : 0;
  } while (__any_sync(~0u, wrong & 1));
  wrong = 1;
  do {
    if (wrong & 1) {
      wrong = 0;
#pragma unroll
      for (int i = 0; i < n; ++i) words[i] = load_words(from[i]);
#pragma unroll
      for (int i = 0; i < n; ++i)
        wrong |= (words[i].x ^ epoch) | (words[i].y ^ epoch) | (words[i].z ^ epoch) | (words[i].w ^ epoch);
    }
  } while (__any_sync(~0u, wrong & 1));
#pragma unroll
  for (int i = 0; i < n; ++i)
    values[i] = {__uint_as_float(words[i].x), __uint_as_float(words[i].y), __uint_as_float(words[i].z),
                 __uint_as_float(words[i].w)};
}

}  // namespace ternary::sm90
