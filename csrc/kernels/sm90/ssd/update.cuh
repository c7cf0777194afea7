// One token a sequence: one pass over the state, at the speed of the memory that holds it.
#pragma once

#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/ssd/config.h"
#include "kernels/sm90/ssd/step.cuh"

namespace ternary::sm90 {

// Eight lanes share a row of the state, each with kVectors pieces of 16 bytes of it, and of kRows rows.
template <class State_, int kVectors_>
struct UpdateConfig : Update {
  using State = State_;
  static constexpr int kPieces = kVectors_;  // of a row, a lane
  static constexpr int kRows = kVectors / kPieces;
  // In fp32 64 registers, for 1,056 blocks at once on 132; in 16 bits a block has twice the rows.
  static constexpr int kBlocksPerSm = sizeof(State) == 4 && (kPieces == 2 || kPieces == 4) ? 8 : 1;
  static constexpr int kWidth = 16 / sizeof(State);        // elements of a piece
  static constexpr int kRowsOfWarp = kRows * 32 / kLanes;  // row r of a lane: 4 r + lane / 8
  static constexpr int kRowsOfBlock = kRowsOfWarp * (kThreads / 32);
};

// A block has rows of one (sequence, head); a sequence is a token.
template <class Element, class Config>
__global__ void __launch_bounds__(Update::kThreads, Config::kBlocksPerSm)
    update_kernel(const __grid_constant__ SsdArgs a) {
  using State = typename Config::State;
  using Piece = Words<State, Config::kWidth>;
  const int64_t blocks = (a.head_dim + Config::kRowsOfBlock - 1) / Config::kRowsOfBlock;
  const int64_t item = blockIdx.x / blocks, first = blockIdx.x % blocks * Config::kRowsOfBlock;
  const int64_t token = item / a.heads, head = item % a.heads, n = a.state_size;
  const int lane = threadIdx.x % Update::kLanes;
  const int64_t row = first + threadIdx.x / 32 * Config::kRowsOfWarp + threadIdx.x % 32 / Update::kLanes;
  auto* states = static_cast<State*>(a.final_state) + item * a.head_dim * n;

  // To L2, where writes of the kernels before still reach it; registers only after them.
  if (threadIdx.x == 0)
    prefetch_to_l2(states + first * n,
                   min(a.head_dim - first, int64_t{Config::kRowsOfBlock}) * n * sizeof(State));
  launch_dependents();
  wait_for_prerequisites();

  // Everything is asked for before anything is used.
  Piece state[Config::kRows][Config::kPieces];
  Words<Element, Config::kWidth> B[Config::kPieces], C[Config::kPieces];
  float x[Config::kRows];
  const int64_t group = head / (a.heads / a.groups) * n, channel = head * a.head_dim + row;
  const auto* B_row = static_cast<const Element*>(a.B) + token * a.B_stride + group;
  const auto* C_row = static_cast<const Element*>(a.C) + token * a.C_stride + group;
#pragma unroll
  for (int i = 0; i < Config::kPieces; ++i) {
    const int64_t column = (i * Update::kLanes + lane) * Config::kWidth;
#pragma unroll
    for (int r = 0; r < Config::kRows; ++r)
      if (row + 4 * r < a.head_dim && column < n)
        state[r][i] = load_words<State, Config::kWidth>(states + (row + 4 * r) * n + column);
  }
#pragma unroll
  for (int r = 0; r < Config::kRows; ++r)
    x[r] = row + 4 * r < a.head_dim
               ? to_float(static_cast<const Element*>(a.x)[token * a.x_stride + channel + 4 * r])
               : 0.0f;
  const float bias = a.dt_bias ? a.dt_bias[head] : 0.0f, A = a.A[head];
  const float read = to_float(static_cast<const Element*>(a.dt)[token * a.dt_stride + head]);
#pragma unroll
  for (int i = 0; i < Config::kPieces; ++i) {
    const int64_t column = (i * Update::kLanes + lane) * Config::kWidth;
    if (column >= n) continue;
    B[i] = load_words<Element, Config::kWidth>(B_row + column);
    C[i] = load_words<Element, Config::kWidth>(C_row + column);
  }

  const float dt = step_size<Element>(a, read + bias), decay = exp_exact(not_above_zero(dt * A));
  float y[Config::kRows] = {};
#pragma unroll
  for (int i = 0; i < Config::kPieces; ++i) {
    const int64_t column = (i * Update::kLanes + lane) * Config::kWidth;
    if (column >= n) continue;
    float b[Config::kWidth], c[Config::kWidth], s[Config::kWidth];
    to_floats(b, B[i]);
    to_floats(c, C[i]);
#pragma unroll
    for (int r = 0; r < Config::kRows; ++r) {
      if (row + 4 * r >= a.head_dim) continue;
      to_floats(s, state[r][i]);
#pragma unroll
      for (int j = 0; j < Config::kWidth; ++j) {
        s[j] = fmaf(decay, s[j], x[r] * dt * b[j]);
        y[r] = fmaf(s[j], c[j], y[r]);
      }
      store_words(states + (row + 4 * r) * n + column, to_words<State>(s));
    }
  }
  float own_y = 0.0f, own_x = 0.0f;  // of row `lane` of the lane's
#pragma unroll
  for (int r = 0; r < Config::kRows; ++r) {
#pragma unroll
    for (int lanes = Update::kLanes / 2; lanes > 0; lanes /= 2)
      y[r] += __shfl_xor_sync(0xffffffff, y[r], lanes);
    if (lane == r) own_y = y[r], own_x = x[r];
  }
  const int64_t own = row + 4 * lane;
  if (lane < Config::kRows && own < a.head_dim)
    static_cast<Element*>(a.y)[(token * a.heads + head) * a.head_dim + own] =
        skip_and_gate<Element>(a, own_y, own_x, token, head, own);
}

}  // namespace ternary::sm90
