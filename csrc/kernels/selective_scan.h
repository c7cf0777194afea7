// h_t = exp(min(dt_t A, 0)) h_{t-1} + dt_t x_t B_t;  y_t = (h_t C_t + D x_t) silu(z_t);
// dt_t = max(softplus(dt_t + dt_bias), 0).
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace ternary {

// Serves selective_scan and its update: one token a sequence, initial_state = final_state.
// Strides are elements between consecutive tokens; what follows the token is dense.
struct SelectiveScanArgs {
  const void* x;              // [b, l, d]
  const void* dt;             // [b, l, d]
  const float* A;             // [d, n]
  const void* B;              // [b, l, n]
  const void* C;              // [b, l, n]
  const float* D;             // [d] or null
  const void* z;              // [b, l, d] or null
  const float* dt_bias;       // [d] or null
  const void* initial_state;  // [sequences, d, n] or null (zeros)
  const int32_t* cu_seqlens;  // [sequences + 1] or null: a sequence is a row of the batch
  void* y;                    // [b, l, d]
  void* final_state;          // [sequences, d, n]
  DType type, state_type;     // of x, dt, B, C, z and y; of both states
  int64_t x_stride, dt_stride, B_stride, C_stride, z_stride;
  int64_t sequences, length, channels, state_size;
  bool dt_softplus;
};

constexpr int64_t kScanBlock =
    64;  // channels of one work item: 4 KiB of state at n = 16, 64 items at d = 4096

// Work items are (sequence, block of channels), block fastest.
void selective_scan_cpu(const SelectiveScanArgs& args, int64_t begin, int64_t end);

}  // namespace ternary
