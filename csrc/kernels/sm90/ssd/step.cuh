// What the ssd kernels share: a token's step size and decay, the gate.
#pragma once

#include "kernels/sm90/common/math.cuh"
#include "kernels/sm90/common/types.cuh"
#include "kernels/ssd.h"

namespace ternary::sm90 {

// Fast functions serve activations of 16 bits.
template <class Element>
constexpr bool kFastMath = sizeof(Element) == 2;

// Of dt with its bias added. A NaN stays one.
template <class Element>
__device__ float step_size(const SsdArgs& a, float dt) {
  if (a.dt_softplus) dt = kFastMath<Element> ? softplus_fast(dt) : softplus(dt);
  dt = dt < a.dt_min ? a.dt_min : dt;
  return dt > a.dt_max ? a.dt_max : dt;
}

__device__ inline float not_above_zero(float log_decay) { return log_decay > 0.0f ? 0.0f : log_decay; }

// (y + D x) silu(z) of channel `row` of a head.
template <class Element>
__device__ Element skip_and_gate(const SsdArgs& a, float y, float x, int64_t token, int64_t head,
                                 int64_t row) {
  if (a.D) y = fmaf(a.D[head * a.D_size + (a.D_size == 1 ? 0 : row)], x, y);
  if (a.z) {
    const float z = to_float(static_cast<const Element*>(a.z)[token * a.z_stride + head * a.head_dim + row]);
    y *= kFastMath<Element> ? silu_fast(z) : silu(z);
  }
  return from_float<Element>(y);
}

}  // namespace ternary::sm90
