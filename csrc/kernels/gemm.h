// y[m, n] = sum_k x[m, k] * w[n, k] * scales[n, k / group] + bias[n],  w in {-1, 0, +1}.
#pragma once

#include <cstdint>

#include "kernels/codes.h"
#include "kernels/dtype.h"

struct CUstream_st;

namespace ternary {

struct GemmArgs {
  const void* x;         // [m, k]
  const uint8_t* codes;  // [n, k / 4], see codes.h
  const void* scales;    // [n, k / group], or [1] where one_scale
  const void* bias;      // [n], or null
  void* y;               // [m, n]
  DType type;            // of x and y
  DType scale_type;
  DType bias_type;
  int64_t m, n, k;
  int64_t group;              // weights that share a scale, a multiple of 4; k where one_scale
  bool one_scale;             // one for the whole matrix
  bool a8 = false;            // cpu: x is first rounded to int8, otherwise to 16 bits (docs/operators.md)
  bool fp8 = false;           // sm90: a row of x is first rounded to e4m3 with the scale max |x| / 448
  void* workspace = nullptr;  // sm90: of the plan's size
};

// How the CPU kernel cuts y: tokens (rows of x) by rows of the weight, tiles counted along the latter first.
struct GemmTiles {
  static constexpr int kTokens = 128, kRows = 32;  // at most; fewer at the edges
  int64_t tokens, down, across;
};

// Tiles of tokens as even as can be, so that threads with as many tiles have as much to do.
TERNARY_INLINE GemmTiles gemm_tiles(const GemmArgs& a) {
  const int64_t most = (a.m + GemmTiles::kTokens - 1) / GemmTiles::kTokens;
  const int64_t tokens = (a.m + most - 1) / most;
  return {tokens, (a.m + tokens - 1) / tokens, (a.n + GemmTiles::kRows - 1) / GemmTiles::kRows};
}

void gemm_cpu(const GemmArgs& args, int64_t begin, int64_t end);  // tiles begin .. end of down * across

// How gemm runs on a GPU, and then gemm; both return a cudaError_t.
namespace sm90 {
struct GemmPlan;  // kernels/sm90/gemm/select.h
}
int plan_gemm_sm90(const GemmArgs& args, sm90::GemmPlan* plan);
int gemm_sm90(const GemmArgs& args, const sm90::GemmPlan& plan, CUstream_st* stream);

}  // namespace ternary
