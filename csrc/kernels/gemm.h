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
  bool a8 = false;            // cpu: a row of x is first rounded to int8 with the scale max |x| / 127
  bool fp8 = false;           // sm90: a row of x is first rounded to e4m3 with the scale max |x| / 448
  void* workspace = nullptr;  // sm90: of the plan's size
};

// How the CPU kernel cuts y, in tiles counted along a row of tiles first.
struct GemmTiles {
  static constexpr int kRows = 144, kColumns = 64;  // at most; kColumns is a multiple of every vector
  static constexpr int kStep = 6;                   // rows that are computed at once
  int64_t rows;                                     // of a tile, a multiple of kStep; fewer at the edge
  int64_t down, across;
};

// Tiles of even height, so that threads with as many tiles have as much to do.
TERNARY_INLINE GemmTiles gemm_tiles(const GemmArgs& a) {
  const int64_t most = (a.m + GemmTiles::kRows - 1) / GemmTiles::kRows;
  const int64_t rows = (a.m + most * GemmTiles::kStep - 1) / (most * GemmTiles::kStep) * GemmTiles::kStep;
  return {rows, (a.m + rows - 1) / rows, (a.n + GemmTiles::kColumns - 1) / GemmTiles::kColumns};
}

void gemm_cpu(const GemmArgs& args, int64_t begin, int64_t end);  // tiles begin .. end of down * across

// The same of the CPU kernel where x is rounded: tokens (rows of x) by rows of the weight.
struct GemmInt8Tiles {
  static constexpr int kTokens = 24, kRows = 16;  // at most; fewer at the edges
  int64_t tokens, down, across;
};

// Tiles of tokens as even as can be.
TERNARY_INLINE GemmInt8Tiles gemm_int8_tiles(const GemmArgs& a) {
  const int64_t most = (a.m + GemmInt8Tiles::kTokens - 1) / GemmInt8Tiles::kTokens;
  const int64_t tokens = (a.m + most - 1) / most;
  return {tokens, (a.m + tokens - 1) / tokens, (a.n + GemmInt8Tiles::kRows - 1) / GemmInt8Tiles::kRows};
}

void gemm_int8_cpu(const GemmArgs& args, int64_t begin, int64_t end);  // for a8

// How gemm runs on a GPU, and then gemm; both return a cudaError_t.
namespace sm90 {
struct GemmPlan;  // kernels/sm90/gemm/select.h
}
int plan_gemm_sm90(const GemmArgs& args, sm90::GemmPlan* plan);
int gemm_sm90(const GemmArgs& args, const sm90::GemmPlan& plan, CUstream_st* stream);

}  // namespace ternary
