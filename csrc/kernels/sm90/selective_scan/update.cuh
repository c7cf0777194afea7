// One token of every sequence, bound by reading and writing the states. A few lanes have a channel.
#pragma once

#include "kernels/selective_scan.h"
#include "kernels/sm90/common/math.cuh"
#include "kernels/sm90/common/types.cuh"
#include "kernels/sm90/selective_scan/config.h"

namespace ternary::sm90 {

// kRun states are read and written at once.
template <class Element, class State, int kRun>
__device__ void update_channel(const SelectiveScanArgs& a, int64_t sequence, int64_t channel, bool writes) {
  using States = Run<State, kRun, true>;
  using Inputs = Run<Element, kRun, true>;
  using Decays = Run<float, kRun, true>;
  constexpr bool kFast = sizeof(Element) == 2;
  const auto load = [&](const void* from, int64_t stride) {
    return to_float(static_cast<const Element*>(from)[sequence * stride + channel]);
  };
  const float x = load(a.x, a.x_stride), bias = a.dt_bias ? a.dt_bias[channel] : 0.0f;
  const float z = a.z ? load(a.z, a.z_stride) : 0.0f, D = a.D ? a.D[channel] : 0.0f;
  const float dt = step_size<kFast>(load(a.dt, a.dt_stride) + bias, a.dt_softplus), dt_x = dt * x;
  const auto* B = static_cast<const Element*>(a.B) + sequence * a.B_stride;
  const auto* C = static_cast<const Element*>(a.C) + sequence * a.C_stride;
  const int64_t row = sequence * a.channels + channel;
  auto* states = static_cast<State*>(a.final_state) + row * a.state_size;
  const float* A = a.A + channel * a.state_size;
  const int size = static_cast<int>(a.state_size);

  float y = 0;
  for (int n = threadIdx.x % ScanUpdate::kLanes * kRun; n < size; n += ScanUpdate::kLanes * kRun) {
    auto h = *reinterpret_cast<const States*>(states + n);
    const auto decays = *reinterpret_cast<const Decays*>(A + n);
    const auto b = *reinterpret_cast<const Inputs*>(B + n), c = *reinterpret_cast<const Inputs*>(C + n);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      float exponent = dt * decays.at[j];
      exponent = exponent > 0 ? 0.0f : exponent;
      const float decay = kFast ? exp2_approximate(kLog2E * exponent) : exp_exact(exponent);
      const float next = fmaf(decay, to_float(h.at[j]), dt_x * to_float(b.at[j]));
      y = fmaf(next, to_float(c.at[j]), y);
      h.at[j] = from_float<State>(next);
    }
    if (writes) *reinterpret_cast<States*>(states + n) = h;
  }
  for (int lanes = ScanUpdate::kLanes / 2; lanes > 0; lanes /= 2) y += __shfl_xor_sync(0xffffffff, y, lanes);
  if (threadIdx.x % ScanUpdate::kLanes != 0 || !writes) return;
  y = fmaf(D, x, y);
  if (a.z) y *= kFast ? silu_fast(z) : silu(z);
  static_cast<Element*>(a.y)[row] = from_float<Element>(y);
}

template <class Element, class State, int kRun>
__global__ void __launch_bounds__(ScanUpdate::kThreads)
    scan_update_kernel(const __grid_constant__ SelectiveScanArgs a) {
  launch_dependents();
  wait_for_prerequisites();
  // Lanes past the last channel repeat it up to the writes, so that all take part in the shuffles.
  const int64_t item = (int64_t{blockIdx.x} * ScanUpdate::kThreads + threadIdx.x) / ScanUpdate::kLanes;
  const int64_t channel = min(item, a.channels - 1);
  for (int64_t sequence = blockIdx.y; sequence < a.sequences; sequence += gridDim.y)
    update_channel<Element, State, kRun>(a, sequence, channel, item < a.channels);
}

}  // namespace ternary::sm90
