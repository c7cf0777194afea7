// The compile-time numbers of the gemm kernels.
#pragma once

#include <cstdint>

namespace ternary::sm90 {

// What both kernels for tensor cores ask of the weight.
constexpr int kAlignment = 64;            // of K: 16 bytes of codes, the grain of the copies
constexpr int kSharedBytes = 227 * 1024;  // of a block, at most
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

// The tile kernel for many rows of x.
struct Tile {
  static constexpr int kGroups = 2;           // warpgroups that multiply, each 64 rows of the weight
  static constexpr int kRows = 64 * kGroups;  // of the weight
  static constexpr int kThreads = 128 * (kGroups + 1);  // and one warpgroup that loads
  static constexpr int kDepth = 128;                    // weights of a row, a step
  static constexpr int kStages = 4;                     // steps under way
  static constexpr int kMinSteps = 2;                   // of a block, on average
};

}  // namespace ternary::sm90
