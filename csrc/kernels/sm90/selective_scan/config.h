// The compile-time numbers of the selective scan.
#pragma once

#include <cstdint>

namespace ternary::sm90 {

// The kernel for 16-bit activations and a state size of 16. A block has 32 channels of one sequence and
// twelve warps: four scan, four copy and finish, four prepare, 8 channels each. A scanning warp has four
// lanes a channel.
template <class Element_, int kRank_>
struct ScanConfig {
  using Element = Element_;
  static constexpr int kRank = kRank_;  // most columns of dt where it is projected here, or 0
  static constexpr int kStates = 16;    // of a channel
  static constexpr int kLanes = 4;      // that share them
  static constexpr int kLaneStates = kStates / kLanes;
  static constexpr int kWarps = 4;  // of a kind
  static constexpr int kWarpChannels = 32 / kLanes;
  static constexpr int kChannels = kWarpChannels * kWarps;  // 128 blocks at 4096 channels, one an SM
  static constexpr int kKind = 32 * kWarps;                 // threads of a kind
  static constexpr int kThreads = 3 * kKind;
  static constexpr int kTokens = 32;           // of a tile: a helper's lane each
  static constexpr int kPieces = kTokens + 2;  // of 8 channels, those of others in other banks
  static constexpr int kGroup = 4;             // tokens that a scanning lane reads at once
  static constexpr int kPitch = kRank + 16;  // of rows read by several lanes at once: 32 bytes past all banks
  static constexpr int kProducts = kRank / 16;              // of the tensor cores, for 8 tokens
  static constexpr int kBlocksPerSm = kRank > 128 ? 1 : 2;  // that shared memory has room for

  static_assert(kRank % 32 == 0, "or kPitch has bank conflicts");
  static_assert(kWarpChannels == 8, "a piece of 16 bytes a token; the columns of a product");
  static_assert(kLaneStates == 4, "8 bytes of B and of C a lane");
};

// The kernel for everything else: a warp a channel.
struct PlainScan {
  static constexpr int kWarps = 4;
  static constexpr int kLaneStates = 8;  // at most
};

// One step.
struct ScanUpdate {
  static constexpr int kLanes = 2;  // that share a channel, with 8 states at a time
  static constexpr int kThreads = 128;
  static constexpr int64_t kMaxSequences = 65535;  // of a grid's second dimension; blocks take more in turns
};

}  // namespace ternary::sm90
