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

// The words of one layer: x [b][d], B and C [b][2 n], (dt, decay) [b][h][2], gated y [b][e]; x and y in
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
    return batch * (d_model + 2 * Decode::kStateSize + 2 * heads + d_inner);
  }
  // The copy that this block reads.
  __device__ Region region(uint32_t use) const { return region(use, blockIdx.x % Decode::kCopies); }
  int64_t words_in_all() const {
    return kHeader + int64_t{Decode::kRegions} * Decode::kCopies * region_words();
  }
  __device__ Region region(uint32_t use, int copy) const {
    uint32_t* x = words + (use % Decode::kRegions * Decode::kCopies + copy) * region_words();
    uint32_t* shared = x + batch * d_model;
    uint32_t* steps = shared + batch * 2 * Decode::kStateSize;
    return {x, shared, steps, steps + batch * 2 * heads, (use / Decode::kRegions & 1) ^ 1};
  }
};

// To all copies, or to those that are this one of kParts; `to` is in the first.
template <int kParts = 1>
__device__ void send(const ExchangeArgs& a, uint32_t* to, float value, uint32_t epoch, int part = 0) {
#pragma unroll
  for (int copy = part; copy < part + Decode::kCopies - kParts + 1; copy += kParts)
    store_word(to + copy * a.region_words(), (__float_as_uint(value) & ~1u) | epoch);
}

// The warp waits for n times four words a lane, and stays together. Lanes that have theirs look no more.
template <int n>
__device__ void receive(float4 (&values)[n], const uint32_t* const (&from)[n], uint32_t epoch) {
  uint4 words[n];
  uint32_t wrong = 1;
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
