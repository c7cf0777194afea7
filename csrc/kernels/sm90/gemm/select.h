// Which gemm kernel runs, and how it is cut: pure host code, sizes in, numbers out.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/sm90/gemm/config.h"

namespace ternary::sm90 {

enum class GemmKernel { plain, stream };

struct GemmPlan {
  GemmKernel kernel = GemmKernel::plain;
  int span = 0;  // stream: weights of a row that share an accumulator, 128, 64 or 32; divides the group
  int column_tiles = 0;  // stream: of 8 rows of x
  int warps = 0;         // of a block
  int blocks = 0;  // over the n rows of the weight; stream: each takes blocks' share of the tiles of 16 rows
  int tiles = 0;   // stream: the most that a block gets
};

// `aligned`: x and codes start at multiples of 16 bytes and x is of 16 bits.
inline GemmPlan plan_gemm(int64_t m, int64_t n, int64_t k, int64_t group, bool one_scale, bool aligned,
                          int sms) {
  const auto divide_up = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  GemmPlan plan;
  plan.span = one_scale || group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : group % 32 == 0 ? 32 : 0;
  plan.warps = divide_up(k, Stream::kChunk);
  const bool small = n * k <= Stream::kMaxWeights;
  if (!aligned || !small || plan.span == 0 || k % Stream::kAlignment != 0 || plan.warps > Stream::kMaxWarps)
    return {};

  plan.kernel = GemmKernel::stream;
  plan.column_tiles = m <= Stream::kColumns || plan.warps > Stream::kMaxWarps2 ? 1 : 2;
  const int tiles = divide_up(n, Stream::kTileRows);
  const int wanted = sms * std::max(1, Stream::kWarpsPerSm / plan.warps);
  plan.blocks = std::max(std::min(tiles, wanted), divide_up(tiles, Stream::kMaxTiles));
  plan.tiles = divide_up(tiles, plan.blocks);
  return plan;
}

}  // namespace ternary::sm90
