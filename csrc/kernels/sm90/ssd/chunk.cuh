// ssd of 16-bit activations in its chunked form (arXiv 2405.21060, section 6), on the tensor cores.
//
// A chunk is 64 tokens, a unit 64 rows of one head's state. A warpgroup takes its unit through the chunks of
// a segment, S in registers as the sums of the products that advance it:
//   y = e^a (C S^T) + M x,  M[i, j] = e^(a_i - a_j) dt_j (C B^T)[i, j] for j <= i,  a = cumsum(min(dt A, 0))
//   S = e^a_last S + (e^(a_last - a) dt x)^T B
// Decays are powers of two, their logarithms sums over a chunk. The weighted x, M and the copy of S that is
// an operand are rounded to the activations' dtype; all sums are fp32.
//
// Two kernels. Where sequences are cut into segments, `added` finds what each segment adds to the state, all
// at once, the last chunk first so that nothing need decay. `outputs` starts each segment from those before
// it.
#pragma once

#include <cuda.h>

#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/common/sequences.cuh"
#include "kernels/sm90/ssd/config.h"
#include "kernels/sm90/ssd/step.cuh"

namespace ternary::sm90 {

struct ChunkArgs {
  SsdArgs ssd;
  CUtensorMap map_x, map_B, map_C;  // [tokens, h, p], [tokens, g, n]
  int64_t segment;                  // tokens, whole chunks
  int64_t cuts;                     // at most so many segments are not the last of their sequence
  int row_tiles, units, teams;      // units of a head, of a group; blocks of a group and segment
  // What every segment but the last of its sequence adds to the state, as the threads hold it, and log2 of
  // the state's decay over it.
  float4* parts;  // [parts, groups * units, 8 kPanels, 128]
  float* decays;  // [parts, groups * units]
};

template <class Element_, int kPanels_, bool kOutputs_>
struct ChunkConfig : Chunked {
  using Element = Element_;
  static constexpr int kPanels = kPanels_;     // of a row of the state
  static constexpr bool kOutputs = kOutputs_;  // else what segments add
  static constexpr int kUnits = units(kPanels), kStages = stages(kPanels);
  static constexpr int kThreads = 128 * (kUnits + 1);
  static constexpr bool kGivesRegisters = kOutputs && kUnits > 1;  // else each thread has enough
};

// 64 rows and columns of an operand. A row is 128 bytes, eight pieces of 16; piece i of row r lies at place
// i ^ (r % 8), as the copy engine and the tensor cores have it:
//   row 0   0 1 2 3 4 5 6 7
//   row 1   1 0 3 2 5 4 7 6
//   row 2   2 3 0 1 6 7 4 5   ...
struct Panel {
  uint4 pieces[Chunked::kTokens][8];

  __device__ uint4* at(int row, int piece) { return &pieces[row][piece ^ row % 8]; }
};

// Of the tokens of a chunk, for one unit.
struct ChunkDecays {
  float4 tokens[Chunked::kTokens / 2];     // log2 of the decay through each of two neighbours, and their dt
  float2 weights[Chunked::kTokens / 2];    // dt and the decay to the chunk's end, or the segment's
  float2 across[3][Chunked::kTokens / 2];  // dt and the decay through token 15, 31, 47, of those up to it
  float whole;                             // the decay over the chunk
};

template <class Config>
struct alignas(1024) ChunkShared {
  struct Stage {
    Panel B[Config::kPanels], C[Config::kPanels], x[Config::kUnits];
  } stages[Config::kStages];
  Panel state[Config::kUnits][Config::kPanels];
  ChunkDecays decays[Config::kStages][Config::kUnits];
  uint64_t full[Config::kStages], empty[Config::kStages];
};

struct Segment {
  int64_t sequence, begin, end;  // tokens
  int64_t part;                  // of the sequence's first segment
  int64_t index;                 // in the sequence
  bool last;

  __device__ int chunks() const {
    return static_cast<int>((end - begin + Chunked::kTokens - 1) / Chunked::kTokens);
  }
};

// Segments are counted through the sequences; every sequence has one. False beyond the last.
__device__ inline bool find_segment(const ChunkArgs& a, int64_t number, Segment& found) {
  const auto count = [&](int64_t sequence) {
    const Tokens tokens = tokens_of(a.ssd, sequence);
    return max((tokens.end - tokens.begin + a.segment - 1) / a.segment, int64_t{1});
  };
  found.sequence = a.ssd.sequences;
  if (!a.ssd.cu_seqlens) {
    const int64_t each = count(0);
    found.sequence = number / each;
    number %= each;
  } else {
    const int lane = threadIdx.x % 32;
    for (int64_t first = 0; first < a.ssd.sequences; first += 32) {
      const int64_t own = first + lane < a.ssd.sequences ? count(first + lane) : 0;
      int64_t through = own;
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int64_t before = __shfl_up_sync(0xffffffff, through, lanes);
        if (lane >= lanes) through += before;
      }
      const int at = __ffs(__ballot_sync(0xffffffff, number < through)) - 1;
      number -= __shfl_sync(0xffffffff, at < 0 ? through : through - own, at < 0 ? 31 : at);
      if (at < 0) continue;
      found.sequence = first + at;
      break;
    }
  }
  if (found.sequence >= a.ssd.sequences) return false;
  const Tokens tokens = tokens_of(a.ssd, found.sequence);
  found.begin = tokens.begin + number * a.segment;
  found.end = min(found.begin + a.segment, tokens.end);
  found.part = tokens.begin / a.segment;  // distinct: a sequence has at most tokens / segment parts
  found.index = number;
  found.last = number + 1 == count(found.sequence);
  return true;
}

// One of a block's units. Beyond its group's last one a unit works on zeros, and stores nothing.
struct Unit {
  int group;
  int64_t head, first_row;
  int64_t index;  // among all units
  bool active;

  __device__ Unit(const ChunkArgs& args, int units_of_block, int team, int unit) {
    const int number = team % args.teams * units_of_block + unit;
    group = team / args.teams;
    head = group * (args.ssd.heads / args.ssd.groups) + number / args.row_tiles;
    first_row = number % args.row_tiles * int64_t{Chunked::kRows};
    index = group * int64_t{args.units} + number;
    active = number < args.units;
  }

  // Where in the workspace what a segment adds is.
  __device__ int64_t part(const ChunkArgs& args, int64_t part) const {
    return part * args.ssd.groups * args.units + index;
  }
};

// The chunk that a block takes at its step `i`, by its first token.
template <class Config>
__device__ int64_t first_of_chunk(const Segment& segment, int i) {
  return segment.begin + int64_t{Config::kOutputs ? i : segment.chunks() - 1 - i} * Chunked::kTokens;
}

// One thread: B, C and x of every chunk to shared memory. Zeros lie around the tensors.
template <class Config>
__device__ void copy_chunks(const ChunkArgs& a, ChunkShared<Config>& smem, const Segment& segment, int team) {
  constexpr int kCopies = Config::kPanels * (Config::kOutputs ? 2 : 1) + Config::kUnits;
  for (int i = 0; i < segment.chunks(); ++i) {
    const int stage = i % Config::kStages, token = static_cast<int>(first_of_chunk<Config>(segment, i));
    auto& to = smem.stages[stage];
    uint64_t* full = &smem.full[stage];
    if (i >= Config::kStages) wait_for_phase(&smem.empty[stage], (i / Config::kStages - 1) % 2);
    set_expected_bytes(full, kCopies * sizeof(Panel));
    const int group = team / a.teams;
    for (int j = 0; j < Config::kPanels; ++j) {
      copy_box_async(&to.B[j], a.map_B, j * Chunked::kColumns, group, token, full);
      if (Config::kOutputs) copy_box_async(&to.C[j], a.map_C, j * Chunked::kColumns, group, token, full);
    }
    for (int j = 0; j < Config::kUnits; ++j) {
      const Unit unit(a, Config::kUnits, team, j);  // an inactive one's head is the next group's, or none
      copy_box_async(&to.x[j], a.map_x, static_cast<int>(unit.first_row), static_cast<int>(unit.head), token,
                     full);
    }
  }
}

// One warp: the decays of every chunk of a unit. A lane has two neighbouring tokens.
template <class Config>
class DecayWorker {
 public:
  __device__ DecayWorker(const ChunkArgs& args, ChunkShared<Config>& smem, const Segment& segment,
                         const Unit& unit, int number)
      : a(args.ssd), smem(smem), segment(segment), unit(unit), number(number), lane(threadIdx.x % 32) {
    A = unit.active ? a.A[unit.head] : 0.0f;
    bias = a.dt_bias && unit.active ? a.dt_bias[unit.head] : 0.0f;
  }

  // Returns log2 of the decay over the segment. The dt of some chunks are asked for together, before the ones
  // before them are used: a chunk takes less time than a read.
  __device__ float run() {
    uint32_t now[kAhead], next[kAhead];
    read(now, 0);
    for (int first = 0; first < segment.chunks(); first += kAhead) {
      read(next, first + kAhead);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i < segment.chunks()) find(first + i, now[i]);
        now[i] = next[i];
      }
    }
    return total;
  }

 private:
  using Element = typename Config::Element;
  static constexpr int kAhead = 4;

  const SsdArgs& a;
  ChunkShared<Config>& smem;
  const Segment& segment;
  const Unit& unit;
  const int number, lane;
  float A, bias;
  float total = 0.0f;  // log2 of the decay over the chunks so far

  __device__ int64_t token_of(int chunk) const { return first_of_chunk<Config>(segment, chunk) + 2 * lane; }

  __device__ void read(uint32_t (&dt)[kAhead], int first) const {
    const auto* from = static_cast<const Element*>(a.dt) + unit.head;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      Element pair[2] = {from_float<Element>(0.0f), from_float<Element>(0.0f)};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t token = token_of(first + i) + j;
        if (unit.active && first + i < segment.chunks() && token < segment.end)
          pair[j] = from[token * a.dt_stride];
      }
      dt[i] = pack(pair[0], pair[1]);
    }
  }

  __device__ void find(int chunk, uint32_t dt) {
    const int stage = chunk % Config::kStages;
    const float2 read = widen_pair<Element>(dt);
    float steps[2], logs[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const bool valid = unit.active && token_of(chunk) + j < segment.end;  // else a step of no time
      steps[j] = valid ? step_size<Element>(a, (j ? read.y : read.x) + bias) : 0.0f;
      logs[j] = not_above_zero(steps[j] * A) * kLog2E;
      if (logs[j] < Chunked::kLeast) logs[j] = Chunked::kLeast;
    }
    float through = logs[0] + logs[1];
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const float before = __shfl_up_sync(0xffffffff, through, lanes);
      if (lane >= lanes) through += before;
    }
    const float before = __shfl_up_sync(0xffffffff, through, 1);
    const float one = (lane == 0 ? 0.0f : before) + logs[0];
    const float last = __shfl_sync(0xffffffff, through, 31), end = last + (Config::kOutputs ? 0.0f : total);
    total += last;

    if (chunk >= Config::kStages) wait_for_phase(&smem.empty[stage], (chunk / Config::kStages - 1) % 2);
    ChunkDecays& to = smem.decays[stage][number];
    const auto steps_to = [&](float end) {
      return make_float2(exp2_approximate(end - one) * steps[0], exp2_approximate(end - through) * steps[1]);
    };
    to.weights[lane] = steps_to(end);
    if constexpr (Config::kOutputs) {
      to.tokens[lane] = {one, through, steps[0], steps[1]};
      if (lane == 0) to.whole = exp2_approximate(last);
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const float end_of_block = __shfl_sync(0xffffffff, through, 8 * j + 7);
        if (lane < 8 * (j + 1)) to.across[j][lane] = steps_to(end_of_block);
      }
    }
    release(&smem.full[stage]);
  }
};

}  // namespace ternary::sm90
