// The compile-time numbers of the gemm kernels.
#pragma once

#include <cstdint>

namespace ternary::sm90 {

// The streaming kernel for few rows of x: a warp holds kChunk columns of x in registers as the B operand of
// mma.m16n8k16 and takes the codes of tiles of kTileRows rows of the weight through shared memory as its A.
struct Stream {
  static constexpr int kTileRows = 16;   // of the weight: the m of the instruction
  static constexpr int kColumns = 8;     // rows of x: the n of the instruction
  static constexpr int kChunk = 256;     // weights of a row that a warp takes: 4 lanes x 16 bytes of codes
  static constexpr int kMaxWarps = 20;   // of a block, with 96 registers a thread; with kChunk, K up to 5120
  static constexpr int kMaxWarps2 = 16;  // with 16 rows of x, which take 128 registers
  static constexpr int kMaxTiles = 8;    // of a block: 8 KiB of codes in flight a warp
  static constexpr int kWarpsPerSm = 8;  // at least, where there are tiles enough
  static constexpr int kAlignment = 64;  // of K: 16 bytes of codes, the grain of the copies

  static constexpr int64_t kMaxWeights = int64_t{1} << 34;  // whose scales lie within 32 bits of bytes

  static_assert(kChunk == 4 * kAlignment, "the four lanes of a row take 16 bytes each");
};

}  // namespace ternary::sm90
