// A unit's way through the chunks of a segment: one warpgroup.
#pragma once

#include "kernels/sm90/common/wgmma.cuh"
#include "kernels/sm90/ssd/chunk.cuh"
#include "kernels/sm90/ssd/mask.cuh"

namespace ternary::sm90 {

// Warp w of the four has rows 16 w .. of every [64, 64] of sums. Lane l has rows l / 4 and l / 4 + 8 of
// these, columns 2 (l % 4) and the next of every eight: sums 4 i, 4 i + 1 of the first row, 4 i + 2, 4 i + 3.
template <class Config>
class UnitWorker {
 public:
  using Element = typename Config::Element;
  using Stage = typename ChunkShared<Config>::Stage;
  static constexpr int kPanels = Config::kPanels;

  __device__ UnitWorker(const ChunkArgs& args, ChunkShared<Config>& smem, const Segment& segment, int team,
                        int number)
      : args(args),
        a(args.ssd),
        smem(smem),
        segment(segment),
        unit(args, Config::kUnits, team, number),
        number(number),
        warp(threadIdx.x % 128 / 32),
        lane(threadIdx.x % 32),
        skip(Config::kOutputs && unit.active && a.D && a.D_size == 1 ? a.D[unit.head] : 0.0f) {}

  // What the segment adds to the state.
  __device__ void add() {
    for (int i = 0; i < segment.chunks(); ++i, next_stage()) {
      wait_for_phase(&smem.full[stage], phase);
      uint32_t frag_x[4][4];
      load_x(frag_x);
      weigh(frag_x);
      advance_state(frag_x);
      wait_for_products<0>();
      keep(frag_x);
      keep_state();
      release(&smem.empty[stage]);
    }
    if (!unit.active) return;
    float4* to = part(segment.index);
#pragma unroll
    for (int i = 0; i < kPanels * 8; ++i) {
      const float* s = &state[i / 8][i % 8 * 4];
      to[i * 128] = {s[0], s[1], s[2], s[3]};
    }
  }

  // y, and the final state.
  __device__ void run() {
    start_state();
    publish_state();
    fence_shared();
    for (int64_t first = segment.begin; first < segment.end; first += Chunked::kTokens, next_stage()) {
      Panel& x = smem.stages[stage].x[number];
      float y[32];
      uint4 gates[4];
      wait_for_chunk(first);
      multiply(y);
      if (a.gate_norm) load_gates(gates, first);
      if (a.D && a.D_size > 1) add_skip(y, x);
      if (a.z && !a.gate_norm) gate(y, first);
      sync_warpgroup(number);  // all four warps' products are done with the state's copy and x
      publish_state();
      store_panel(x, y);
      write_outputs(x, first, gates);
      release(&smem.empty[stage]);
    }
    if (segment.last)
      with_type_on_device(a.state_type, [&](auto element) { store_state<decltype(element)>(); });
  }

 private:
  const ChunkArgs& args;
  const SsdArgs& a;
  ChunkShared<Config>& smem;
  const Segment& segment;
  const Unit unit;
  const int number, warp, lane;  // of the block; of the warpgroup; of the warp
  const float skip;              // D, where there is one a head
  int stage = 0, phase = 0;      // of the chunk at hand
  float state[kPanels][32] = {};

  // Where the pair i of the sums is: its row, and the column of its first.
  __device__ int row_of(int i) const { return 16 * warp + lane / 4 + i % 2 * 8; }
  __device__ int column_of(int i) const { return i / 2 * 8 + lane % 4 * 2; }

  __device__ void next_stage() {
    if (++stage < Config::kStages) return;
    stage = 0;
    phase ^= 1;
  }

  __device__ float4* part(int64_t index) const {
    return args.parts + unit.part(args, segment.part + index) * (kPanels * 8 * 128) + threadIdx.x % 128;
  }

  __device__ void keep_state() {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) keep(state[i]);
  }

  // The lane's part of the unit's state in memory: a pair of columns in every eight of two rows.
  template <class State>  // const or not
  class StatePairs {
   public:
    __device__ StatePairs(const UnitWorker& worker, State* states)
        : columns_(static_cast<int>(worker.a.state_size) - worker.column_of(0)) {
      const SsdArgs& a = worker.a;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = worker.unit.first_row + worker.row_of(i);
        const int64_t head = worker.segment.sequence * a.heads + worker.unit.head;
        inside_[i] = worker.unit.active && row < a.head_dim;
        rows_[i] = states + (head * a.head_dim + row) * a.state_size + worker.column_of(0);
      }
    }
    // Pair i of the sums, or null outside the unit.
    __device__ State* at(int i) const {
      const int column = i / 16 * Chunked::kColumns + i % 16 / 2 * 8;
      return inside_[i % 2] && column < columns_ ? rows_[i % 2] + column : nullptr;
    }

   private:
    int columns_;  // from the lane's first
    bool inside_[2];
    State* rows_[2];
  };

  template <class State>
  __device__ void load_state() {
    const StatePairs<const State> from(*this, static_cast<const State*>(a.initial_state));
    Run<State, 2, true> pairs[kPanels * 16];
#pragma unroll
    for (int i = 0; i < kPanels * 16; ++i) {
      pairs[i] = {};
      if (const State* at = from.at(i)) pairs[i] = *reinterpret_cast<const Run<State, 2, true>*>(at);
    }
#pragma unroll
    for (int i = 0; i < kPanels * 32; ++i) state[i / 32][i % 32] = to_float(pairs[i / 2].at[i % 2]);
  }

  template <class State>
  __device__ void store_state() const {
    const StatePairs<State> to(*this, static_cast<State*>(a.final_state));
#pragma unroll
    for (int i = 0; i < kPanels * 16; ++i) {
      const float* s = &state[i / 16][i % 16 * 2];
      const Run<State, 2, true> pair = {from_float<State>(s[0]), from_float<State>(s[1])};
      if (State* at = to.at(i)) *reinterpret_cast<Run<State, 2, true>*>(at) = pair;
    }
  }

  // The initial state, taken through the segments before this one.
  __device__ void start_state() {
    if (a.initial_state)
      with_type_on_device(a.state_type, [&](auto element) { load_state<decltype(element)>(); });
    if (segment.index > 0) wait_for_prerequisites();  // those segments' parts
    for (int64_t index = 0; unit.active && index < segment.index; ++index) {
      const float decay = exp2_approximate(__ldcg(args.decays + unit.part(args, segment.part + index)));
      const float4* from = part(index);
#pragma unroll
      for (int i = 0; i < kPanels * 8; ++i) {
        const float4 added = __ldcg(from + i * 128);
        float* s = &state[i / 8][i % 8 * 4];
        s[0] = fmaf(decay, s[0], added.x), s[1] = fmaf(decay, s[1], added.y);
        s[2] = fmaf(decay, s[2], added.z), s[3] = fmaf(decay, s[3], added.w);
      }
    }
  }

  // And for the state's copy.
  __device__ void wait_for_chunk(int64_t first) {
    wait_for_phase(&smem.full[stage], phase);
    if (segment.end - first < Chunked::kTokens) clear_tail(static_cast<int>(segment.end - first));
    sync_warpgroup(number);
  }

  // The rows behind the sequence's end are another's: zeros do not spread what is there.
  __device__ void clear_tail(int rows) {
    Stage& s = smem.stages[stage];
    for (int i = rows * 8 + threadIdx.x % 128; i < Chunked::kTokens * 8; i += 128) {
      s.x[number].pieces[i / 8][i % 8] = {};
      for (int j = 0; j < kPanels; ++j) s.B[j].pieces[i / 8][i % 8] = {};  // every unit the same
    }
    fence_shared();
  }

  // y without a skip per channel and the gate, and the state after the chunk.
  __device__ void multiply(float (&y)[32]) {
    const Stage& s = smem.stages[stage];
    float scores[32];
    uint32_t frag_x[4][4], frag_m[4][4];
    const float decay = smem.decays[stage][number].whole;
    load_x(frag_x);
    // Before the products: while any are under way the compiler lets nobody touch sums.
#pragma unroll
    for (int i = 0; i < kPanels * 32; ++i) state[i / 32][i % 32] *= decay;
    keep_state();
    begin_products();
    start_products(scores, s.C, s.B);
    start_products(y, s.C, smem.state[number]);
    weigh(frag_x);
    advance_state(frag_x);
    const Mask<Element> mask(smem.decays[stage][number], warp,
                             lane);  // before the wait: nothing of it depends on the scores
    const float2 decays = {exp2_approximate(mask.logs.x), exp2_approximate(mask.logs.y)};

    wait_for_products<2>();
    keep(scores);
    mask.apply(frag_m, scores, skip);
    wait_for_products<1>();
    keep(y);
#pragma unroll
    for (int i = 0; i < 32; ++i) y[i] *= i / 2 % 2 ? decays.y : decays.x;
    keep(y);
    keep(frag_m);
    begin_products();
    add_products(y, frag_m, s.x[number]);
    commit_products();
    wait_for_products<0>();
    keep(frag_x);
    keep(frag_m);
    keep(y);
    keep_state();
  }

  // sums = a b^T, under way. A step is 16 columns: 32 bytes.
  __device__ void start_products(float (&sums)[32], const Panel* a, const Panel* b) const {
    const uint32_t from_a = swizzled_address(a), from_b = swizzled_address(b);
#pragma unroll
    for (int i = 0; i < 4 * kPanels; ++i) {
      const uint32_t offset = i / 4 * sizeof(Panel) / 16 + i % 4 * 2;
      wgmma_64<Element>(sums, from_a + offset, from_b + offset, i > 0);
    }
    commit_products();
  }

  // sums += frag panel, under way. A step is 16 rows of the panel: 2 KiB.
  __device__ void add_products(float (&sums)[32], const uint32_t (&frag)[4][4], const Panel& panel) const {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma_64_transposed<Element>(sums, frag[k], swizzled_address(&panel) + 128 * k);
  }

  // What a chunk adds to the state, under way.
  __device__ void advance_state(uint32_t (&frag_x)[4][4]) {
    keep(frag_x);
    begin_products();
#pragma unroll
    for (int i = 0; i < kPanels; ++i) add_products(state[i], frag_x, smem.stages[stage].B[i]);
    commit_products();
  }

  // The chunk's x transposed, and weighted: the A operand of what it adds.
  __device__ void load_x(uint32_t (&frag)[4][4]) {
    const int token = lane / 16 * 8 + lane % 8, piece = warp * 2 + lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      load_matrices_transposed(frag[k], smem.stages[stage].x[number].at(16 * k + token, piece));
  }

  __device__ void weigh(uint32_t (&frag)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 weight = smem.decays[stage][number].weights[i / 2 * 4 + lane % 4];
      const float2 value = widen_pair<Element>(frag[i / 4][i % 4]);
      frag[i / 4][i % 4] = pack_floats<Element>(value.x * weight.x, value.y * weight.y);
    }
  }

  // y += D x, of a D per channel
  __device__ void add_skip(float (&y)[32], Panel& x) const {
    if (!unit.active) return;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int64_t column = unit.first_row + column_of(i);
      if (column >= a.head_dim) continue;
      const auto* pairs = reinterpret_cast<const uint32_t*>(x.at(row_of(i), i / 2));
      const float2 value = widen_pair<Element>(pairs[lane % 4]);
      const float* D = a.D + unit.head * a.D_size + column;
      y[2 * i] = fmaf(D[0], value.x, y[2 * i]);
      y[2 * i + 1] = fmaf(D[1], value.y, y[2 * i + 1]);
    }
  }

  // y *= silu(z)
  __device__ void gate(float (&y)[32], int64_t first) const {
    if (!unit.active) return;
    const auto* z = static_cast<const Element*>(a.z) + unit.head * a.head_dim + unit.first_row;
    uint32_t pairs[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int64_t token = first + row_of(i);
      const bool valid = token < segment.end && unit.first_row + column_of(i) < a.head_dim;
      pairs[i] = valid ? *reinterpret_cast<const uint32_t*>(z + token * a.z_stride + column_of(i)) : 0;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 value = widen_pair<Element>(pairs[i]);
      y[2 * i] *= silu_fast(value.x);
      y[2 * i + 1] *= silu_fast(value.y);
    }
  }

  // Sums [64, 64] rounded into a panel. Each warp writes its 16 rows.
  __device__ void store_panel(Panel& panel, const float (&sums)[32]) const {
    const int row = 16 * warp + lane % 16;
#pragma unroll
    for (int tile = 0; tile < 8; tile += 2) {
      const float* s = sums + 4 * tile;
      const uint32_t pairs[4] = {pack_floats<Element>(s[0], s[1]), pack_floats<Element>(s[2], s[3]),
                                 pack_floats<Element>(s[4], s[5]), pack_floats<Element>(s[6], s[7])};
      store_matrices(panel.at(row, tile + lane / 16), pairs);
    }
  }

  // The copy of the state that the next chunk's products read.
  __device__ void publish_state() {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) store_panel(smem.state[number][i], state[i]);
  }

  // The lane's tokens of the 16 of its warp, every fourth from this one on, and its eight channels of them.
  __device__ int token_of_lane() const { return 16 * warp + lane / 8; }
  __device__ int64_t channel_of_lane() const { return unit.first_row + lane % 8 * 8; }
  __device__ bool has_outputs(int64_t first, int i) const {
    return unit.active && channel_of_lane() < a.head_dim && first + token_of_lane() + 4 * i < segment.end;
  }

  __device__ void load_gates(uint4 (&gates)[4], int64_t first) const {
    const auto* z = static_cast<const Element*>(a.z) + (first + token_of_lane()) * a.z_stride +
                    unit.head * a.head_dim + channel_of_lane();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      gates[i] = {};
      if (has_outputs(first, i)) gates[i] = __ldcg(reinterpret_cast<const uint4*>(z + 4 * i * a.z_stride));
    }
  }

  // y silu(z) gate_norm in place of y, and the sum of squares before the weight.
  __device__ void gate_outputs(uint4 (&pieces)[4], const uint4 (&gates)[4], int64_t first) const {
    using Eight = Words<Element, 8>;
    const auto* weights = static_cast<const Element*>(a.gate_norm) + unit.head * a.head_dim;
    float w[8] = {};
    if (unit.active && channel_of_lane() < a.head_dim)
      to_floats(w, load_words<Element, 8>(weights + channel_of_lane()));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float y[8], z[8], sum = 0.0f;
      to_floats(y, reinterpret_cast<const Eight&>(pieces[i]));
      to_floats(z, reinterpret_cast<const Eight&>(gates[i]));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        y[j] *= silu_fast(z[j]);
        sum = fmaf(y[j], y[j], sum);
        y[j] *= w[j];
      }
      reinterpret_cast<Eight&>(pieces[i]) = to_words<Element>(y);
#pragma unroll
      for (int lanes = 1; lanes < 8; lanes *= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
      const int64_t token = first + token_of_lane() + 4 * i;
      if (lane % 8 == 0 && has_outputs(first, i)) a.squares[token * a.groups * args.units + unit.index] = sum;
    }
  }

  // The warp's 16 tokens of y, which lie where x was.
  __device__ void write_outputs(Panel& y, int64_t first, const uint4 (&gates)[4]) const {
    fence_shared();  // what was stored here and the state's copy, before the copy engine and products use
                     // them
    __syncwarp();
    const int64_t stride = a.heads * a.head_dim;
    uint4 pieces[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pieces[i] = *y.at(token_of_lane() + 4 * i, lane % 8);
    if (a.gate_norm) gate_outputs(pieces, gates, first);
    auto* to = static_cast<Element*>(a.y) + (first + token_of_lane()) * stride + unit.head * a.head_dim +
               channel_of_lane();
#pragma unroll
    for (int i = 0; i < 4; ++i, to += 4 * stride)
      if (has_outputs(first, i)) __stcg(reinterpret_cast<uint4*>(to), pieces[i]);
  }
};

}  // namespace ternary::sm90
