// h_t = exp(min(dt_t A, 0)) h_{t-1} + dt_t x_t B_t;  y_t = (h_t C_t + D x_t) silu(z_t);
// dt_t = max(softplus(dt_t + dt_bias), 0), where dt_weight with dt_t dt_weight^T in the place of dt_t.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

struct CUstream_st;

namespace ternary {

// Serves selective_scan, selective_scan_fused and the update: one token a sequence, initial_state =
// final_state. Strides are elements between consecutive tokens; what follows the token is dense.
struct SelectiveScanArgs {
  const void* x;              // [b, l, d]
  const void* dt;             // [b, l, d], or [b, l, rank] where dt_weight
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
  DType type, state_type;     // of x, dt, B, C, z, y and a dense dt_weight; of both states
  int64_t x_stride, dt_stride, B_stride, C_stride, z_stride;
  int64_t sequences, length, channels, state_size;
  bool dt_softplus;

  const void* dt_weight = nullptr;  // [d, rank], or codes [d, rank / 4] where dt_scales, or null
  const void* dt_scales = nullptr;  // [d, rank / dt_group], [1] where dt_one_scale, or null
  DType dt_scale_type = DType::f32;
  int64_t dt_rank = 0, dt_group = 0;  // columns of dt_weight, and of them those that share a scale
  bool dt_one_scale = false;
};

constexpr int64_t kScanBlock =
    64;  // channels of one work item: 4 KiB of state at n = 16, 64 items at d = 4096
constexpr int64_t kMaxStatesSm90 = 256;  // n, on sm90

// Work items are (sequence, block of channels), block fastest.
void selective_scan_cpu(const SelectiveScanArgs& args, int64_t begin, int64_t end);

// Each returns a cudaError_t.
int selective_scan_sm90(const SelectiveScanArgs& args, CUstream_st* stream);
int selective_scan_update_sm90(const SelectiveScanArgs& args, CUstream_st* stream);

}  // namespace ternary
