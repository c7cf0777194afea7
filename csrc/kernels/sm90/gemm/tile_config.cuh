// What the tile kernel is made of: its sizes, its shared memory, and how its blocks share the work.
#pragma once

#include <cuda.h>

#include "kernels/gemm.h"
#include "kernels/sm90/gemm/config.h"
#include "kernels/sm90/gemm/operands.cuh"

namespace ternary::sm90 {

template <class Element_, class Output_, int kSpan_, int kRowsOfX_>
struct TileConfig : Tile {
  using Element = Element_;  // of the products: that of x, or e4m3
  using Output = Output_;
  static constexpr bool kFp8 = sizeof(Element) == 1;
  static constexpr int kSpan = kSpan_;        // weights of a row that share a scale
  static constexpr int kRowsOfX = kRowsOfX_;  // the n of the instruction
  static constexpr int kDepth = depth(kFp8);
  static constexpr int kPieces = kDepth / 64;  // of 16 bytes of codes, of a row
  static constexpr int kSpans = kDepth / kSpan;
  static constexpr int kSums = kRowsOfX / 2;  // of a thread: 64 x kRowsOfX over a warpgroup
  static constexpr int kRowsToStore = kRowsOfX < kStored ? kRowsOfX : kStored;
  static constexpr int kPitch = 64 + 8;  // of y: the eight rows of a matrix in different banks
  static constexpr int kStages =
      std::min<int>(6, (kSharedBytes - 1024 - kGroups * kRowsToStore * kPitch * 2) /
                           (kRowsOfX * 256 + kRows * (kPieces * 16 + kSpans * 4)));
  static_assert(!kFp8 || kSpan >= 64);
};

// One step's data. x in two halves: 128 bytes a row, pieces of 16 at (piece ^ row % 8).
template <class Config>
struct alignas(1024) TileStage {
  uint8_t x[2][Config::kRowsOfX][128];
  uint4 codes[Config::kRows][Config::kPieces];     // swizzled too, see codes_slot
  uint32_t scales[Config::kSpans][Config::kRows];  // pairs of Element; a float each for e4m3
  static constexpr uint32_t kCopied = sizeof(x) + sizeof(codes);
};

template <class Config>
struct TileShared {
  TileStage<Config> stages[Config::kStages];
  typename Config::Output y[Config::kGroups][Config::kRowsToStore][Config::kPitch];
  uint64_t full[Config::kStages], empty[Config::kStages];
};

struct TileArgs {
  GemmArgs gemm;
  CUtensorMap map_x, map_codes;
  const float* x_scales;  // [m], of x in e4m3
  int row_tiles;          // of the weight
  int steps;              // of a tile
  int run, longer;        // steps of a block; the first blocks, which have one more
  uint64_t token;         // of this launch: a flag that has it is set
  float4* parts;          // [blocks, kGroups, kSums / 4, 128]
  uint64_t* flags;        // [blocks, kGroups]
  ScaleIndex index;
};

// Steps begin .. end of a tile.
struct TileSegment {
  int tile, begin, end;
};

// Where a block's run begins, counted over the steps of all tiles.
__device__ inline int first_step(const TileArgs& a, int block) {
  return block * a.run + min(block, a.longer);
}

// Calls f with what the block has of each tile, from the last to the first.
template <class Function>
__device__ void for_each_segment(const TileArgs& a, Function f) {
  const int begin = first_step(a, blockIdx.x);
  for (int end = first_step(a, blockIdx.x + 1); end > begin;) {
    const int tile = (end - 1) / a.steps, origin = tile * a.steps;
    f(TileSegment{tile, max(begin - origin, 0), end - origin});
    end = origin;
  }
}

}  // namespace ternary::sm90
