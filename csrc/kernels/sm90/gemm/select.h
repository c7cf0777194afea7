// Which gemm kernel runs, and how it is cut: pure host code, sizes in, numbers out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/sm90/gemm/config.h"

namespace ternary::sm90 {

enum class GemmKernel { plain, stream, split, tile };

struct GemmPlan {
  GemmKernel kernel = GemmKernel::plain;
  bool fp8 = false;       // x is rounded to e4m3 first,
  int64_t pitch = 0;      // with rows of so many bytes
  int span = 0;           // weights of a row that share a scale, 128, 64 or 32; divides the group
  int rows_of_x = 0;      // of a block at a time
  int blocks = 0;         // of the grid
  int cluster = 1;        // split: blocks that work together
  int tiles = 0;          // stream: of 16 rows of the weight, the most that a block gets; tile: of y
  int chunk = 0;          // stream: weights of a row that a warp takes
  int warps = 0;          // stream: of a block
  int units = 0;          // split: of 64 rows of the weight, of a block
  int boxes = 0;          // split: of 512 columns, of a block
  int steps = 0;          // tile: of one, over k; the blocks share the steps of all tiles
  int64_t parts = 0;      // bytes of workspace for sums that blocks leave for each other,
  int64_t workspace = 0;  // and with the rounded x and its scales
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns of x in e4m3.
constexpr int64_t fp8_pitch(int64_t k) { return divide_up(k, 128) * 128; }

inline bool plan_stream(GemmPlan& plan, int64_t m, int64_t n, int64_t k, int sms) {
  const bool few = m <= Stream::kColumns;
  plan.chunk = few && k > Stream::kChunk * Stream::kMaxWarps ? Stream::kLongChunk : Stream::kChunk;
  const int64_t warps = divide_up(k, plan.chunk), tiles = divide_up(n, Stream::kTileRows);
  if (m > 2 * Stream::kColumns || warps > (few ? Stream::kMaxWarps : Stream::kMaxWarps2)) return false;
  plan.kernel = GemmKernel::stream;
  plan.rows_of_x = few ? Stream::kColumns : 2 * Stream::kColumns;
  plan.warps = static_cast<int>(warps);
  const int64_t wanted = sms * std::max(1, Stream::kWarpsPerSm / plan.warps);
  const int free_bytes = kSharedBytes / plan.warps - Stream::x_bytes(plan.rows_of_x, plan.chunk);
  const int most =
      std::min(Stream::kMaxTiles, free_bytes / Stream::unit_bytes(plan.rows_of_x, plan.chunk, plan.span));
  plan.blocks = static_cast<int>(std::max(std::min(tiles, wanted), divide_up(tiles, most)));
  plan.tiles = static_cast<int>(divide_up(tiles, plan.blocks));
  return true;
}

// Small blocks that fit two to a multiprocessor where x is small, else large ones that leave some free: there
// the next kernel starts early, and clusters find multiprocessors beside each other.
inline bool plan_split(GemmPlan& plan, int64_t m, int64_t n, int64_t k, int sms) {
  if (m > Split::kMaxRowsOfX) return false;
  const int64_t units = divide_up(n, Split::kUnitRows), most = m <= 32 ? 2 * sms : sms * 7 / 8;
  const int rows_of_x = m <= 16 ? 16 : m <= 32 ? 32 : 64, span = std::min(plan.span, 64);
  for (int boxes = 1; boxes <= Split::kMaxBoxes; ++boxes) {
    const int64_t cluster = divide_up(k, Split::kBox * boxes);
    if (cluster > std::min<int64_t>(Split::kMaxBlocks, most)) continue;
    const int64_t of_block = divide_up(units, most / cluster);
    if (of_block > Split::kMaxUnits) continue;
    plan.units = static_cast<int>(of_block);
    plan.cluster = static_cast<int>(cluster);
    if (Split::shared_bytes(rows_of_x, boxes, plan.units, plan.cluster, span) > kSharedBytes - 1024) continue;
    plan.kernel = GemmKernel::split;
    plan.boxes = boxes;
    plan.rows_of_x = rows_of_x;
    plan.span = span;
    plan.blocks = static_cast<int>(divide_up(units, of_block)) * plan.cluster;
    return true;
  }
  plan.units = 0;
  plan.cluster = 1;
  return false;
}

inline bool plan_tile(GemmPlan& plan, int64_t m, int64_t n, int64_t k, int sms) {
  if (plan.fp8 && plan.span < 64) return false;
  const int64_t row_tiles = divide_up(n, Tile::kRows);
  if (!plan.fp8) plan.span = std::min(plan.span, 64);
  // 256 rows of x are faster where the tiles are so many that few of them are shared, and take the registers
  // of all but two scales a row and step
  const bool wide = !plan.fp8 && plan.span == 64 && 4 * row_tiles * divide_up(m, 256) >= int64_t{3} * sms;
  // 64 where each tile would else be cut in many parts, which are slow to add
  const bool narrow = !plan.fp8 && (m <= 64 || 6 * row_tiles * divide_up(m, 128) <= sms);
  plan.rows_of_x = wide ? 256 : narrow ? 64 : 128;
  const int64_t tiles = row_tiles * divide_up(m, plan.rows_of_x);
  const int64_t steps = divide_up(k, Tile::depth(plan.fp8));
  if (tiles * steps > std::numeric_limits<int>::max()) return false;
  plan.kernel = GemmKernel::tile;
  plan.tiles = static_cast<int>(tiles);
  plan.steps = static_cast<int>(steps);
  // as many blocks as multiprocessors, or nearly as many if each then has an equal part of one tile
  const int64_t whole = tiles < sms ? sms / tiles * tiles : 0;
  plan.blocks = static_cast<int>(
      std::min<int64_t>(10 * whole >= 9 * sms ? whole : sms, divide_up(tiles * steps, Tile::kMinSteps)));
  const int64_t part = int64_t{Tile::kRows} * plan.rows_of_x * 4 + Tile::kGroups * 8;  // sums and flags
  plan.parts = plan.blocks * part;
  return true;
}

// `aligned`: x and codes start at multiples of 16 bytes and x is of 16 bits. `fp8`: the products are of x
// rounded to e4m3; the kernels for few rows of x take these numbers in x's type.
inline GemmPlan plan_gemm(int64_t m, int64_t n, int64_t k, int64_t group, bool one_scale, bool aligned,
                          int sms, bool fp8) {
  GemmPlan none, plan;
  none.fp8 = plan.fp8 = fp8;
  plan.span = one_scale || group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : group % 32 == 0 ? 32 : 0;
  const bool fits = aligned && n * k <= kMaxWeights && k <= std::numeric_limits<int>::max() &&
                    plan.span >= 32 && k % kAlignment == 0;
  const bool planned = fits && (plan_stream(plan, m, n, k, sms) || plan_split(plan, m, n, k, sms) ||
                                plan_tile(plan, m, n, k, sms));
  if (!planned) plan = none;
  const bool few = plan.kernel == GemmKernel::stream || plan.kernel == GemmKernel::split;
  plan.pitch = !fp8 ? 0 : few ? 2 * k : fp8_pitch(k);
  plan.workspace = plan.parts + (fp8 ? m * (plan.pitch + 4) : 0);
  return plan;
}

}  // namespace ternary::sm90
