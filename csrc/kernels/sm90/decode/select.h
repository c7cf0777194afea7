// How decode runs, and how its persistent kernel is cut: pure host code, sizes in, numbers out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>

#include "kernels/codes.h"
#include "kernels/sm90/common/limits.h"
#include "kernels/sm90/decode/config.h"

namespace ternary::sm90 {

// Part i of `total` things shared evenly by `parts`.
struct Share {
  int first, count;
};

TERNARY_INLINE Share share(int total, int parts, int i) {
  const int each = total / parts, longer = total % parts;
  return {i * each + (i < longer ? i : longer), each + (i < longer)};
}

struct DecodeShape {
  int batch, d_model, heads, head_dim;
  int in_groups, out_groups;  // scales of a row; 0 with one for the whole matrix
  int state_bytes;            // of an element
};

// Where in shared memory what comes from memory waits for the warps: `depth` items, used in turn.
struct QueuePlan {
  int at = 0, bytes = 0, depth = 0;
};

// Where a layer's small parameters lie in an item of their queue: those that all blocks need, those of the
// block's channels, and those of its row of B, C or dt.
struct ParamsPlan {
  int norm = 0, gate_norm = 0, D = 0;                         // [d], [e], [h]
  int weight = 0, bias = 0, inputs = 0;                       // [channels][4], [channels], [b][3][channels]
  int shared_weight = 0, shared_bias = 0, shared_inputs = 0;  // the same of kTileRows channels
  int dt_bias = 0, A = 0;                                     // [h]
};

enum class DecodeKernel { persistent, sequence };

// The persistent kernel runs where it can, and else the sequence of launches.
//
// Every block has some units of kUnit channels, whose z, x and state it alone handles, and some tiles of 16
// rows of out_proj. The first `shared_tiles` blocks have a tile of B, C and dt too, which all blocks wait
// for.
struct DecodePlan {
  DecodeKernel kernel = DecodeKernel::sequence;
  const char* persistent_expects = nullptr;  // what it lacks: of the rest only `buffers` is then set
  const char* expected = nullptr;            // what the sequence lacks, too: nothing serves
  int rows = 0;                              // kBatch of the kernel
  int blocks = 0, warps = 0, spans = 0;
  int shared_tiles = 0, shared_blocks_units = 0,
      other_units = 0;  // units of the two kinds of blocks together
  int max_units = 0, out_tiles = 0;
  int in_rows = 0, out_rows = 0;  // of a block, at most
  // A layer's in_proj: rows of B, C or dt, then those of z and x of each unit; the scales behind, z's before
  // x's before the others'. The states of a sequence. A layer's out_proj, the scales behind.
  QueuePlan params, in, states, out;
  ParamsPlan at;
  int barriers = 0;               // of the queues, full and empty, [4][kMaxDepth] each
  int staging = 0;                // [warps][1 or kExpand][rows][2][kSpan] bytes of x
  int in_sums = 0, out_sums = 0;  // [in_rows][spans][rows] and [out_rows][2][spans][rows] integers
  int x_stats = 0, y_stats = 0;   // [3][warps][rows]: sums of squares, scales of the spans
  int shared = 0, steps = 0;      // [rows][2][kStateSize] floats, [rows][kMaxHeads][2] floats
  int residual = 0;               // [out_rows][rows] floats: the block's part of x
  // On their way out: gated y [rows][channels], and of the rows of B, C or dt [rows][kTileRows][2] (value, or
  // dt and its decay).
  int sent_y = 0, sent_shared = 0;
  int shared_bytes = 0;
  int64_t workspace = 0;  // words of 4 bytes that the caller keeps,
  int64_t buffers = 0;    // or bytes for the sequence
};

// Lays out shared memory.
inline void place_decode(DecodePlan& p) {
  int end = 0;
  const auto take = [&end](int bytes) { return std::exchange(end, (end + bytes + 15) / 16 * 16); };
  for (QueuePlan* queue : {&p.params, &p.in, &p.states, &p.out})
    queue->at = take(queue->bytes * queue->depth);
  p.barriers = take(2 * 4 * Decode::kMaxDepth * 8);
  p.staging = take(p.warps * Decode::kExpand * p.rows * 2 * Decode::kSpan);
  const int pitch = p.spans * p.rows | 1;
  p.in_sums = take(p.in_rows * pitch * 4);
  p.out_sums = take(p.out_rows * Decode::kExpand * pitch * 4);
  p.x_stats = take(3 * p.warps * p.rows * 4);
  p.y_stats = take(3 * p.warps * p.rows * 4);
  p.shared = take(p.rows * 2 * Decode::kStateSize * 4);
  p.steps = take(p.rows * Decode::kMaxHeads * 2 * 4);
  p.residual = take(p.out_rows * p.rows * 4);
  p.sent_y = take(p.rows * p.max_units * Decode::kUnit * 4);
  p.sent_shared = take(p.rows * Decode::kTileRows * 2 * 4);
  p.shared_bytes = end;
}

inline void place_params(DecodePlan& p, const DecodeShape& s) {
  int end = 0;
  const auto take = [&end](int bytes) { return std::exchange(end, (end + bytes + 15) / 16 * 16); };
  const int channels = p.max_units * Decode::kUnit, inputs = s.batch * (Decode::kConvWidth - 1);
  p.at.norm = take(s.d_model * 2);
  p.at.gate_norm = take(Decode::kExpand * s.d_model * 2);
  p.at.D = take(s.heads * 4);
  p.at.weight = take(channels * Decode::kConvWidth * 2);
  p.at.bias = take(channels * 2);
  p.at.inputs = take(inputs * channels * 2);
  p.at.shared_weight = take(Decode::kTileRows * Decode::kConvWidth * 2);
  p.at.shared_bias = take(Decode::kTileRows * 2);
  p.at.shared_inputs = take(inputs * Decode::kTileRows * 2);
  p.at.dt_bias = take(s.heads * 4);
  p.at.A = take(s.heads * 4);
  p.params.bytes = end;
}

inline DecodePlan plan_decode(const DecodeShape& s, int sms) {
  const auto divide_up = [](int a, int b) { return (a + b - 1) / b; };
  const auto refuse = [](const char* why) {
    DecodePlan refused;
    refused.persistent_expects = why;
    return refused;
  };
  if (s.batch < 1 || s.batch > Decode::kMaxBatch) return refuse("a batch of 1 or 2");
  const int spans = s.d_model / Decode::kSpan;
  const int compiled[] = {2, 4, 6, 8, 12, 16, 20};
  if (s.d_model % Decode::kSpan ||
      std::find(std::begin(compiled), std::end(compiled), spans) == std::end(compiled))
    return refuse("d_model 256, 512, 768, 1024, 1536, 2048 or 2560");
  if (s.head_dim % Decode::kUnit || s.heads % 8) return refuse("head_dim and heads multiples of 8");
  if (s.heads * s.head_dim != Decode::kExpand * s.d_model) return refuse("d_inner = 2 d_model");

  DecodePlan p;
  p.kernel = DecodeKernel::persistent;
  p.rows = s.batch;
  p.spans = spans;
  p.warps = std::max(Decode::kMinWarps, spans);
  p.blocks = sms;
  const int units = s.heads * s.head_dim / Decode::kUnit;
  p.shared_tiles = divide_up(2 * Decode::kStateSize + s.heads, Decode::kTileRows);
  if (p.shared_tiles >= sms) return refuse("more multiprocessors than tiles of B, C and dt");
  // The blocks without such a tile get one unit more.
  const int most = divide_up(units, sms);
  p.other_units = std::min(units, (sms - p.shared_tiles) * most);
  p.shared_blocks_units = units - p.other_units;
  p.max_units = std::max(divide_up(p.other_units, sms - p.shared_tiles),
                         divide_up(p.shared_blocks_units, p.shared_tiles));
  if (p.max_units * Decode::kUnit > 2 * p.warps || p.max_units > Decode::kMaxHeads)
    return refuse("fewer channels a multiprocessor");
  p.out_tiles = divide_up(s.d_model / Decode::kTileRows, sms);
  const int in_tiles = p.max_units + 1;
  p.in_rows = in_tiles * Decode::kTileRows;
  p.out_rows = p.out_tiles * Decode::kTileRows;

  p.in.bytes = p.in_rows * (s.d_model / 4 + Decode::kPad + s.in_groups * 2);
  p.out.bytes = p.out_rows * (Decode::kExpand * s.d_model / 4 + Decode::kPad + s.out_groups * 2);
  p.states.bytes = p.max_units * Decode::kUnit * Decode::kStateSize * s.state_bytes;
  place_params(p, s);
  // Two layers ahead if they fit, and as many states as do.
  const auto fits = [&](int in, int states, int out) {
    p.params.depth = 2;  // the loader comes to the next layer by way of them
    p.in.depth = in;
    p.states.depth = states;
    p.out.depth = out;
    place_decode(p);
    return p.shared_bytes <= kSharedBytes;
  };
  const int states = std::min(2 * s.batch, Decode::kMaxDepth);
  for (const auto& [in, out] : {std::pair{2, 2}, {2, 1}, {1, 1}})
    for (int depth = states; depth >= std::min(2, in); --depth)
      if (fits(in, depth, out)) return p;
  return refuse("less shared memory");
}

}  // namespace ternary::sm90
