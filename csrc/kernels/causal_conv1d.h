// y[t, c] = silu(bias[c] + sum_i weight[c, i] x[t - (w - 1) + i, c]), x before a sequence taken from its
// state.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

struct CUstream_st;

namespace ternary {

// Serves causal_conv1d and its update: one token a sequence, initial_state = final_state.
struct CausalConv1dArgs {
  const void* x;                        // [b, l, c]
  const void* weight;                   // [c, w]
  const void* bias;                     // [c] or null
  const void* initial_state;            // [sequences, w - 1, c] or null (zeros)
  const int32_t* cu_seqlens;            // [sequences + 1] or null: a sequence is a row of the batch
  void* y;                              // [b, l, c]
  void* final_state;                    // [sequences, w - 1, c]
  DType type, weight_type, state_type;  // of x and y; of weight and bias; of both states
  int64_t x_stride;                     // elements between consecutive tokens; channels are dense
  int64_t sequences, length, channels, width;
  bool silu;
};

constexpr int64_t kConvBlock = 64;  // channels of one work item: 68 items in the 1.3B Mamba-2, a few KiB each

// Work items are (sequence, block of channels), block fastest.
void causal_conv1d_cpu(const CausalConv1dArgs& args, int64_t begin, int64_t end);

// Each returns a cudaError_t.
int causal_conv1d_sm90(const CausalConv1dArgs& args, CUstream_st* stream);
int causal_conv1d_update_sm90(const CausalConv1dArgs& args, CUstream_st* stream);

}  // namespace ternary
