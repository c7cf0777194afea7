// Elementary functions of the recurrences. Those called fast cost two or three instructions of the special
// function unit or less and err by some units of the last place; the others err by one or two.
#pragma once

#include <cfloat>

#include "kernels/sm90/common/ptx.cuh"

namespace ternary::sm90 {

constexpr float kLog2E = 1.44269504f;

// e^x. x = k ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r + r^2 q(r), q a minimax polynomial (3e-9).
__device__ inline float exp_exact(float x) {
  x = x < -88.02f ? -88.02f : x > 89.0f ? 89.0f : x;  // k in [-127, 128]: 2^k is 0 ... infinity; NaN stays
  const float shifted = fmaf(x, kLog2E, 0x1.8p23f);   // its low bits are k
  const float k = shifted - 0x1.8p23f;
  const float r = fmaf(k, 2.12194440e-4f, fmaf(k, -0x1.63p-1f, x));  // ln 2 in two parts
  float q = fmaf(r, 1.381453825e-3f, 8.368745446e-3f);
  q = fmaf(q, r, 4.166838899e-2f);
  q = fmaf(q, r, 1.666652113e-1f);
  q = fmaf(q, r, 4.999999404e-1f);
  return (fmaf(r * r, q, r) + 1.0f) * __int_as_float((__float_as_int(shifted) + 127) << 23);
}

// ln(1 + e) for e in [0, 1] = 2 atanh(s), s = e / (2 + e) <= 1/3.
__device__ inline float log1p_of(float s) {
  const float u = s * s;
  float q = fmaf(u, 1.401564632e-1f, 1.399893136e-1f);
  q = fmaf(q, u, 2.001088560e-1f);
  q = fmaf(q, u, 3.333320618e-1f);
  return 2.0f * fmaf(s * u, q, s);
}

// ln(1 + e^x) = max(x, 0) + log1p(e^-|x|)
__device__ inline float softplus(float x) {
  const float e = exp_exact(-fabsf(x));
  return (x < 0.0f ? 0.0f : x) + log1p_of(e / (e + 2.0f));
}
// Here log1p(e) = e p(e), p a minimax polynomial (6e-8): as long, but without a reciprocal.
__device__ inline float softplus_fast(float x) {
  const float size = fminf(fabsf(x), 120.0f);  // e^-120 is 0
  const float product = kLog2E * size, rest = fmaf(-kLog2E, size, product);
  float e = exp2_approximate(-product);
  e = fmaf(e, fmaf(-1.92596299e-8f, size, rest) * 0.693147181f, e);  // log2 e in two parts
  float p = fmaf(e, 5.232629366e-3f, -2.950498648e-2f);
  p = fmaf(p, e, 7.822556049e-2f);
  p = fmaf(p, e, -1.366321445e-1f);
  p = fmaf(p, e, 1.910599321e-1f);
  p = fmaf(p, e, -2.484297901e-1f);
  p = fmaf(p, e, 3.331909776e-1f);
  p = fmaf(p, e, -4.999949336e-1f);
  p = fmaf(p, e, 9.999999404e-1f);
  return fmaf(e, p, x < 0.0f ? 0.0f : x);
}

__device__ inline float silu(float x) { return x / (1.0f + exp_exact(-x)); }
__device__ inline float silu_fast(float x) {
  return x * reciprocal_approximate(1.0f + exp2_approximate(-kLog2E * x));
}

// The step size of dt with its bias added; a NaN stays one. Both ways are gone: branches would keep the steps
// of several tokens apart.
template <bool kFast>
__device__ float step_size(float dt, bool use_softplus) {
  const float soft = kFast ? softplus_fast(dt) : softplus(dt), hard = dt < 0.0f ? 0.0f : dt;
  return use_softplus ? soft : hard;
}

}  // namespace ternary::sm90
