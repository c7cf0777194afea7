// The compile-time numbers of the gemm kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/codes.h"
#include "kernels/sm90/common/limits.h"

namespace ternary::sm90 {

// What the kernels for tensor cores ask of the weight.
constexpr int kAlignment = 64;  // of K: 16 bytes of codes, the grain of the copies
constexpr int64_t kMaxWeights = int64_t{1} << 34;

// The streaming kernel for few rows of x: a warp holds its columns of x in registers as the B operand of
// mma.m16n8k16 and takes the codes of tiles of kTileRows rows of the weight through shared memory as its A.
struct Stream {
  static constexpr int kTileRows = 16;    // of the weight: the m of the instruction
  static constexpr int kColumns = 8;      // rows of x: the n of the instruction
  static constexpr int kChunk = 256;      // weights of a row that a warp takes,
  static constexpr int kLongChunk = 512;  // or of long rows
  static constexpr int kMaxWarps = 10;    // of a block
  static constexpr int kMaxWarps2 = 16;   // with 16 rows of x
  static constexpr int kMaxTiles = 8;     // of a block: 8 KiB of codes in flight a warp
  static constexpr int kWarpsPerSm = 8;   // at least, where there are tiles enough

  // Shared memory of a warp: its columns of x, and per tile the scales and the codes or their sums.
  static constexpr int x_bytes(int rows_of_x, int chunk) { return rows_of_x * chunk * 2; }
  static constexpr int unit_bytes(int rows_of_x, int chunk, int span) {
    const int codes = kTileRows * chunk / 4, sums = rows_of_x * (kTileRows + 4) * 4;
    return kTileRows * (chunk / span) * 4 + (codes > sums ? codes : sums);
  }
};

// The split kernel for some rows of x: a cluster of blocks shares rows of the weight and cuts their columns
// into boxes of kBox; a warpgroup of a block has a unit of kUnitRows rows.
struct Split {
  static constexpr int kUnitRows = 64;  // the m of wgmma
  static constexpr int kBox = 512;      // columns: 128 bytes of codes, the widest swizzle of TMA
  static constexpr int kMaxUnits = 5;   // of a block: 96 registers a thread
  static constexpr int kMaxBoxes = 2;   // of a block
  static constexpr int kMaxBlocks = 8;  // of a cluster, for any kernel
  static constexpr int kMaxRowsOfX = 64;

  // Eights of rows of x that a block owns, at most.
  TERNARY_INLINE constexpr int owned(int rows_of_x, int blocks) {
    return (rows_of_x / 8 + blocks - 1) / blocks;
  }
  // Scales of a row, as pairs of halves; odd, so that rows lie in different banks.
  TERNARY_INLINE constexpr int scales_pitch(int boxes, int span) { return boxes * kBox / span + 1; }
  TERNARY_INLINE constexpr int x_bytes(int rows_of_x, int boxes) { return rows_of_x * boxes * kBox * 2; }
  TERNARY_INLINE constexpr int unit_bytes(int boxes) { return boxes * kUnitRows * kBox / 4; }
  TERNARY_INLINE constexpr int shared_bytes(int rows_of_x, int boxes, int units, int blocks, int span) {
    const int sums = owned(rows_of_x, blocks) * blocks * 128 * 16;
    const int of_unit = unit_bytes(boxes) + sums + kUnitRows * scales_pitch(boxes, span) * 4;
    return x_bytes(rows_of_x, boxes) + units * of_unit;
  }
};

// The tile kernel for many rows of x.
struct Tile {
  static constexpr int kGroups = 2;           // warpgroups that multiply, each 64 rows of the weight
  static constexpr int kRows = 64 * kGroups;  // of the weight
  static constexpr int kThreads = 128 * (kGroups + 1);  // and one warpgroup that loads
  static constexpr int kMinSteps = 2;                   // of a block, on average
  static constexpr int kStored = 32;                    // rows of x that a warpgroup stores at a time
  static constexpr int depth(bool fp8) { return fp8 ? 256 : 128; }  // columns of a step: 256 bytes of x
};

}  // namespace ternary::sm90
