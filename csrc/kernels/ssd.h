// S_t = exp(min(dt_t A, 0)) S_{t-1} + dt_t x_t B_t^T;  y_t = (S_t C_t + D x_t) silu(z_t)  for each head;
// dt_t = clamp(softplus(dt_t + dt_bias), dt_min, dt_max).
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

struct CUstream_st;

namespace ternary {

// Serves ssd and its update: one token a sequence, initial_state = final_state.
// Strides are elements between consecutive tokens; what follows the token is dense.
struct SsdArgs {
  const void* x;              // [b, l, h, p]
  const void* dt;             // [b, l, h]
  const float* A;             // [h]
  const void* B;              // [b, l, g, n]; head i reads group i / (h / g)
  const void* C;              // [b, l, g, n]
  const float* D;             // [h, D_size] or null
  const void* z;              // [b, l, h, p] or null
  const float* dt_bias;       // [h] or null
  const void* initial_state;  // [sequences, h, p, n] or null (zeros)
  const int32_t* cu_seqlens;  // [sequences + 1] or null: a sequence is a row of the batch
  void* y;                    // [b, l, h, p]
  void* final_state;          // [sequences, h, p, n]
  DType type, state_type;     // of x, dt, B, C, z and y; of both states
  int64_t x_stride, dt_stride, B_stride, C_stride, z_stride;
  int64_t sequences, length, heads, head_dim, groups, state_size;
  int64_t D_size;        // 1 or p
  float dt_min, dt_max;  // dt_max infinity: no limit
  bool dt_softplus;
  void* workspace = nullptr;  // of ssd on sm90
  // Of ssd on sm90, where ssd_gates_sm90 is not 0: y leaves as y silu(z) gate_norm, beside sums of squares of
  // y silu(z). That is a gated norm but for its 1 / rms.
  const void* gate_norm = nullptr;  // [h, p], of `type`
  float* squares = nullptr;         // [b, l, ssd_gates_sm90]
};

// Work items are (sequence, head), head fastest.
void ssd_cpu(const SsdArgs& args, int64_t begin, int64_t end);

// Each returns a cudaError_t.
int ssd_sm90(const SsdArgs& args, CUstream_st* stream);
int ssd_workspace_sm90(const SsdArgs& args, int64_t* bytes);  // that ssd_sm90 needs
int ssd_update_sm90(const SsdArgs& args, CUstream_st* stream);

// Sums of squares of a token where ssd_sm90 takes a gate_norm for these tensors, else 0.
int64_t ssd_gates_sm90(const SsdArgs& args);

}  // namespace ternary
