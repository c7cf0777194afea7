// logits[m, v] = scale[v] * sum_d table[v, d] * u[m, d], u = RMSNorm(hidden) rounded to the logits' type
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

struct CUstream_st;

namespace ternary {

struct HeadArgs {
  const float* hidden;  // [m, d]
  const void* norm;     // [d]
  const void* table;    // [v, d], of `type`, or int8 where there are scales
  const void* scale;    // [v], or null
  void* logits;         // [m, v]
  DType type;           // of norm and logits, 16 bits
  DType scale_type;
  int64_t m, v;
  int d;  // a multiple of kStep
  float eps;

  static constexpr int kTokens = 8;  // read the table once
  static constexpr int kStep = 32;
  static constexpr int kTileRows = 16;  // of the table, that a block reads at once: every gridDim.x-th tile
  static constexpr int kMaxDim = 4416;  // for which a tile of 16 bits finds room in shared memory
  static constexpr int64_t kMaxRows = 1 << 19;  // for whose scales there is room too
};

int head_sm90(const HeadArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace ternary
