// Which gemm kernel runs, and how it is cut: pure host code, sizes in, numbers out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/sm90/gemm/config.h"

namespace ternary::sm90 {

enum class GemmKernel { plain, stream, tile };

struct GemmPlan {
  GemmKernel kernel = GemmKernel::plain;
  int span = 0;       // weights of a row that share an accumulator, 128, 64 or 32; divides the group
  int rows_of_x = 0;  // of a block at a time
  int chunk = 0;      // stream: weights of a row that a warp takes
  int warps = 0;      // stream: of a block
  int blocks = 0;     // stream: over the n rows of the weight, each with its share of the tiles of 16 rows
  int tiles = 0;      // stream: the most that a block gets; tile: over y
  int steps = 0;      // tile: of one, over k; the blocks share the steps of all tiles
};

// `aligned`: x and codes start at multiples of 16 bytes and x is of 16 bits.
inline GemmPlan plan_gemm(int64_t m, int64_t n, int64_t k, int64_t group, bool one_scale, bool aligned,
                          int sms) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  GemmPlan plan;
  plan.span = one_scale || group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : group % 32 == 0 ? 32 : 0;
  if (!aligned || n * k > kMaxWeights || plan.span == 0 || k % kAlignment != 0) return {};

  const bool few = m <= Stream::kColumns;
  plan.chunk = few && k > Stream::kChunk * Stream::kMaxWarps ? Stream::kLongChunk : Stream::kChunk;
  const int64_t warps = divide_up(k, plan.chunk);
  if (m <= 2 * Stream::kColumns && warps <= (few ? Stream::kMaxWarps : Stream::kMaxWarps2)) {
    plan.kernel = GemmKernel::stream;
    plan.rows_of_x = few ? Stream::kColumns : 2 * Stream::kColumns;
    plan.warps = static_cast<int>(warps);
    const int64_t tiles = divide_up(n, Stream::kTileRows);
    const int64_t wanted = sms * std::max(1, Stream::kWarpsPerSm / plan.warps);
    const int free_bytes = kSharedBytes / plan.warps - Stream::x_bytes(plan.rows_of_x, plan.chunk);
    const int most =
        std::min(Stream::kMaxTiles, free_bytes / Stream::unit_bytes(plan.rows_of_x, plan.chunk, plan.span));
    plan.blocks = static_cast<int>(std::max(std::min(tiles, wanted), divide_up(tiles, most)));
    plan.tiles = static_cast<int>(divide_up(tiles, plan.blocks));
    return plan;
  }
  plan.chunk = 0;
  plan.kernel = GemmKernel::tile;
  plan.rows_of_x = m <= 32 ? 32 : m <= 64 ? 64 : 128;
  const int64_t tiles = divide_up(n, Tile::kRows) * divide_up(m, plan.rows_of_x);
  const int64_t steps = divide_up(k, Tile::kDepth);
  if (tiles * steps > std::numeric_limits<int>::max()) return {};
  plan.tiles = static_cast<int>(tiles);
  plan.steps = static_cast<int>(steps);
  plan.blocks = static_cast<int>(std::min<int64_t>(sms, divide_up(tiles * steps, Tile::kMinSteps)));
  return plan;
}

}  // namespace ternary::sm90
