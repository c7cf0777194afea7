// ssd and its update for any dtype, size and alignment, a token after another in fp32: right, not fast.
#pragma once

#include "kernels/sm90/common/sequences.cuh"
#include "kernels/sm90/ssd/config.h"
#include "kernels/sm90/ssd/step.cuh"

namespace ternary::sm90 {

// Adds up v[i] over the lanes: lane i gets the sum of the v[i].
__device__ inline float transpose_sum(float (&v)[32]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < 5; ++step)
#pragma unroll
    for (int i = 0; i < 16 >> step; ++i) {
      const int half = 16 >> step;
      const bool upper = lane & half;
      const float sent = __shfl_xor_sync(0xffffffff, upper ? v[i] : v[i + half], half);
      v[i] = (upper ? v[i + half] : v[i]) + sent;
    }
  return v[0];
}

// A warp has four rows of the state, as floats in shared memory: lane i columns i, i + 32, ... It takes each
// column through eight tokens at once; of these lane i has token i % 8 for row i / 8. The blocks of one
// (sequence, head) are neighbours.
template <class Element>
__global__ void plain_ssd_kernel(const __grid_constant__ SsdArgs a) {
  constexpr int kTokens = Plain::kTokens, kRows = Plain::kRows;
  static_assert(kTokens * kRows == 32);
  extern __shared__ float states[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = blockDim.x / 32 * kRows;
  const int64_t blocks = (a.head_dim + rows - 1) / rows, item = blockIdx.x / blocks;
  const int64_t row = blockIdx.x % blocks * rows + warp * kRows, n = a.state_size;
  const int64_t sequence = item / a.heads, head = item % a.heads, place = (item * a.head_dim + row) * n;
  if (row >= a.head_dim) return;

  float* state = states + warp * kRows * n;
  const int64_t elements = min(a.head_dim - row, int64_t{kRows}) * n;  // rows beyond the last stay zeros
  for (int64_t i = lane; i < kRows * n; i += 32)
    state[i] = a.initial_state && i < elements ? load_float(a.initial_state, a.state_type, place + i) : 0.0f;
  __syncwarp();

  const int64_t group = head / (a.heads / a.groups) * n, own_row = row + lane / kTokens;
  const auto* B = static_cast<const Element*>(a.B) + group;
  const auto* C = static_cast<const Element*>(a.C) + group;
  const float bias = a.dt_bias ? a.dt_bias[head] : 0.0f;
  const Tokens tokens = tokens_of(a, sequence);
  for (int64_t first = tokens.begin; first < tokens.end; first += kTokens) {
    const int64_t own = first + lane % kTokens;
    float x = 0.0f, dt = 0.0f;  // tokens behind the end take no time
    if (own < tokens.end && own_row < a.head_dim)
      x = to_float(static_cast<const Element*>(a.x)[own * a.x_stride + head * a.head_dim + own_row]);
    if (own < tokens.end)
      dt =
          step_size<Element>(a, to_float(static_cast<const Element*>(a.dt)[own * a.dt_stride + head]) + bias);
    const float decay = exp_exact(not_above_zero(dt * a.A[head])), xdt = x * dt;
    float y[kTokens * kRows] = {};
    for (int64_t j = lane; j - lane < n; j += 32) {  // all lanes together
      float s[kRows], b[kTokens], c[kTokens];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const bool valid = j < n && first + t < tokens.end;
        b[t] = valid ? to_float(B[(first + t) * a.B_stride + j]) : 0.0f;
        c[t] = valid ? to_float(C[(first + t) * a.C_stride + j]) : 0.0f;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) s[r] = j < n ? state[r * n + j] : 0.0f;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float decays = __shfl_sync(0xffffffff, decay, t);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          s[r] = fmaf(decays, s[r], __shfl_sync(0xffffffff, xdt, kTokens * r + t) * b[t]);
          y[kTokens * r + t] = fmaf(s[r], c[t], y[kTokens * r + t]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (j < n) state[r * n + j] = s[r];
    }
    const float own_y = transpose_sum(y);
    if (own < tokens.end && own_row < a.head_dim)
      static_cast<Element*>(a.y)[(own * a.heads + head) * a.head_dim + own_row] =
          skip_and_gate<Element>(a, own_y, x, own, head, own_row);
  }
  __syncwarp();
  for (int64_t i = lane; i < elements; i += 32) store_float(state[i], a.final_state, a.state_type, place + i);
}

}  // namespace ternary::sm90
