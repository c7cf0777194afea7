// The scan for any dtype, size and alignment: right, not fast. A warp has a channel of a sequence, its lanes
// the states. 32 tokens at a time, lane i reads and writes what belongs to token i alone.
#pragma once

#include "kernels/sm90/selective_scan/tile.cuh"

namespace ternary::sm90 {

// dt_weight[channel, k]
template <class Element>
__device__ float projection_weight(const SelectiveScanArgs& a, int64_t channel, int64_t k) {
  if (!a.dt_scales) return to_float(static_cast<const Element*>(a.dt_weight)[channel * a.dt_rank + k]);
  const auto* codes = static_cast<const uint8_t*>(a.dt_weight) + channel * (a.dt_rank / kWeightsPerByte);
  const int64_t group = a.dt_one_scale ? 0 : channel * (a.dt_rank / a.dt_group) + k / a.dt_group;
  return static_cast<float>(weight_at(codes, k)) * load_float(a.dt_scales, a.dt_scale_type, group);
}

template <class Element>
__device__ float given_step(const SelectiveScanArgs& a, int64_t token, int64_t channel) {
  const auto* dt = static_cast<const Element*>(a.dt) + token * a.dt_stride;
  if (!a.dt_weight) return to_float(dt[channel]);
  float sum = 0;
  for (int64_t k = 0; k < a.dt_rank; ++k)
    sum = fmaf(to_float(dt[k]), projection_weight<Element>(a, channel, k), sum);
  return sum;
}

template <class Element>
__global__ void __launch_bounds__(32 * PlainScan::kWarps)
    scan_plain_kernel(const __grid_constant__ SelectiveScanArgs a) {
  constexpr unsigned kWarp = 0xffffffff;
  constexpr int kStates = PlainScan::kLaneStates;
  const int64_t item = int64_t{blockIdx.x} * PlainScan::kWarps + threadIdx.x / 32;
  if (item >= a.sequences * a.channels) return;
  const int64_t sequence = item / a.channels, channel = item % a.channels;
  const int lane = threadIdx.x % 32, states = static_cast<int>(a.state_size);
  int64_t first, tokens;
  find_tokens(a, sequence, first, tokens);

  float A[kStates] = {}, h[kStates] = {};
#pragma unroll
  for (int j = 0; j < kStates; ++j) {
    if (lane + 32 * j >= states) continue;
    A[j] = a.A[channel * states + lane + 32 * j];
    if (a.initial_state) h[j] = load_float(a.initial_state, a.state_type, item * states + lane + 32 * j);
  }
  const float D = a.D ? a.D[channel] : 0.0f, bias = a.dt_bias ? a.dt_bias[channel] : 0.0f;
  for (int64_t begin = first; begin < first + tokens; begin += 32) {
    const int count = static_cast<int>(min(int64_t{32}, first + tokens - begin));
    const int64_t mine = begin + min(lane, count - 1);
    const float x = to_float(static_cast<const Element*>(a.x)[mine * a.x_stride + channel]);
    const float dt = step_size<false>(given_step<Element>(a, mine, channel) + bias, a.dt_softplus);
    float y = 0;
    for (int i = 0; i < count; ++i) {
      const auto* B = static_cast<const Element*>(a.B) + (begin + i) * a.B_stride;
      const auto* C = static_cast<const Element*>(a.C) + (begin + i) * a.C_stride;
      const float step = __shfl_sync(kWarp, dt, i), dt_x = __shfl_sync(kWarp, dt * x, i);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kStates; ++j) {
        if (lane + 32 * j >= states) continue;
        const float exponent = step * A[j];
        h[j] = fmaf(exp_exact(exponent > 0 ? 0.0f : exponent), h[j], dt_x * to_float(B[lane + 32 * j]));
        sum = fmaf(h[j], to_float(C[lane + 32 * j]), sum);
      }
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWarp, sum, lanes);
      if (lane == i) y = sum;
    }
    if (lane >= count) continue;
    y = fmaf(D, x, y);
    if (a.z) y *= silu(to_float(static_cast<const Element*>(a.z)[mine * a.z_stride + channel]));
    static_cast<Element*>(a.y)[mine * a.channels + channel] = from_float<Element>(y);
  }
#pragma unroll
  for (int j = 0; j < kStates; ++j)
    if (lane + 32 * j < states) store_float(h[j], a.final_state, a.state_type, item * states + lane + 32 * j);
}

}  // namespace ternary::sm90
