// The compile-time numbers of the decode kernel.
#pragma once

namespace ternary::sm90 {

struct Decode {
  static constexpr int kMaxBatch = 2;     // more are faster by the sequence of launches
  static constexpr int kSpan = 128;       // columns of a weight that a warp multiplies at once
  static constexpr int kTileRows = 16;    // of a weight: the m of the instruction
  static constexpr int kUnit = 8;         // channels whose rows of z and x make a tile of in_proj
  static constexpr int kStateSize = 128;  // per channel
  static constexpr int kConvWidth = 4;
  static constexpr int kExpand = 2;     // d_inner / d_model: spans of a warp in a row of out_proj
  static constexpr int kMinWarps = 8;   // that compute; two more load and exchange
  static constexpr int kPad = 32;       // bytes after a row of codes: four rows lie in different banks
  static constexpr int kMaxHeads = 8;   // that have channels in one block
  static constexpr int kMaxDepth = 8;   // of a queue
  static constexpr int kRegions = 2;    // of values on their way between blocks: layers take turns
  static constexpr int kHeadTiles = 2;  // of a block, that are brought to L2 for the head
  static constexpr int kCopies = 4;     // of a region: a quarter of the blocks read each
};

// The sizes that a kernel is compiled for.
template <int kBatch_, int kSpans_>
struct DecodeConfig : Decode {
  static constexpr int kBatch = kBatch_;  // at most
  static constexpr int kSpans = kSpans_;
  static constexpr int kWarps = kSpans > kMinWarps ? kSpans : kMinWarps;
  static constexpr int kModel = kSpans * kSpan, kInner = kExpand * kModel;
  static constexpr int kChannels = kInner + 2 * kStateSize;  // of the convolution
  static constexpr int kInPitch = kModel / 4 + kPad, kOutPitch = kInner / 4 + kPad;
  static constexpr int kSumsPitch = kSpans * kBatch | 1;  // words of the partial sums of a row
};

}  // namespace ternary::sm90
