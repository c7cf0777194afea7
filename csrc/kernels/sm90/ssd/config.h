// The compile-time numbers of the ssd kernels, and how a prefill is cut.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ternary::sm90 {

// The kernels for prefill. A block walks a segment of a sequence chunk by chunk; each of its warpgroups but
// the last keeps the state of a unit in registers: 64 rows (of the head dimension) of one head.
struct Chunked {
  static constexpr int kTokens = 64;       // of a chunk: the m, and half the k, of the products
  static constexpr int kRows = 64;         // of a unit
  static constexpr int kColumns = 64;      // of a panel: rows of 128 bytes, the widest swizzle
  static constexpr int kMaxStates = 256;   // what the registers hold
  static constexpr int kAlignment = 8;     // of head dimension, state size and strides: 16 bytes
  static constexpr int kMaxSegments = 16;  // of a sequence: a block reads what all before it added
  static constexpr float kLeast = -126;    // log2 of a token's decay: less is zero in fp32, and would cost
                                           // the sums over a chunk their last places
  static constexpr int units(int panels) { return panels > 2 ? 1 : 2; }   // of a block; they share B and C
  static constexpr int stages(int panels) { return panels > 2 ? 2 : 3; }  // 48 KiB each at two panels
};

struct Update {
  static constexpr int kThreads = 128;
  static constexpr int kLanes = 8;    // that share a row of the state: 128 bytes at once
  static constexpr int kVectors = 8;  // of 16 bytes that a thread has under way
};

struct Plain {
  static constexpr int kWarps = 4;   // of a block
  static constexpr int kRows = 4;    // of the state, a warp: they share reads of B and C
  static constexpr int kTokens = 8;  // that a column is taken through at once
};

// Tokens of a segment. Sequences are cut so that few multiprocessors idle; all but the last segment of each
// are then read twice, which costs about a third of a whole pass. `teams`: blocks of units, in all heads.
inline int64_t segment_tokens(int64_t sequences, int64_t longest, int64_t teams, int sms) {
  const int64_t chunks = std::max<int64_t>(1, (longest + Chunked::kTokens - 1) / Chunked::kTokens);
  int64_t best = chunks, least = INT64_MAX;
  for (int64_t segments = 1; segments <= std::min<int64_t>(Chunked::kMaxSegments, chunks); ++segments) {
    const int64_t each = (chunks + segments - 1) / segments;
    const int64_t waves = (sequences * teams * segments + sms - 1) / sms;
    const int64_t cost = waves * (each + 2) * (segments == 1 ? 3 : 4);  // 2: to start and end one
    if (cost >= least) continue;
    least = cost;
    best = each;
  }
  return best * Chunked::kTokens;
}

}  // namespace ternary::sm90
