// What the tile kernel is made of: its sizes, its shared memory, and how its blocks share the work.
#pragma once

#include <cuda.h>

#include "kernels/gemm.h"
#include "kernels/sm90/common/ptx.cuh"
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
  static constexpr int kStages = std::min<int>(6, (kSharedBytes - 2048 - 2 * kStored * kRows * 2) /
                                                      (kRowsOfX * 256 + kRows * (kPieces * 16 + kSpans * 4)));
  static_assert(!kFp8 || (kSpan >= 64 && kRowsOfX == 128));
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
  uint8_t y[Config::kGroups][2][Config::kStored][128];  // swizzled like x
  float x_scales[Config::kGroups][128];                 // of x in e4m3, halved
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

// The stage of a step; the phases of its barriers alternate.
template <class Config>
struct StagePlace {
  int at = 0, parity = 0;
  __device__ StagePlace next() const {
    return at + 1 < Config::kStages ? StagePlace{at + 1, parity} : StagePlace{0, parity ^ 1};
  }
};

template <class Config>
__device__ void release_stage(TileShared<Config>& smem, const StagePlace<Config>& place) {
  release(&smem.empty[place.at]);
}

template <class Config>
__device__ void wait_for_stage(TileShared<Config>& smem, const StagePlace<Config>& place) {
  wait_for_phase(&smem.full[place.at], place.parity);
}

// Steps begin .. end of a tile.
struct TileSegment {
  int tile, begin, end;
};

// Where a block's run begins, counted over the steps of all tiles.
__device__ inline int first_step(const TileArgs& a, int block) {
  return block * a.run + min(block, a.longer);
}

// The first block that has steps of a segment's tile, or this one if the tile's end is another's.
__device__ inline int first_block_of(const TileArgs& a, const TileSegment& s) {
  int block = blockIdx.x;
  if (s.end == a.steps)
    while (first_step(a, block) > s.tile * a.steps) --block;
  return block;
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
