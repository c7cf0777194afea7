// All layers by launches: prefill, seven or eight a layer, and the decode steps that the persistent kernel
// does not serve, four or five.
#pragma once

#include "kernels/decode.h"

namespace ternary::sm90 {

// What the tensors lack, or null.
const char* sequence_expects(const DecodeArgs& args);

// Bytes for what the kernels hand on to each other.
int sequence_buffers(const DecodeArgs& args, int64_t* bytes);

// With these bytes, aligned to 16, in place of the workspace. Both return a cudaError_t.
int launch_sequence(const DecodeArgs& args, CUstream_st* stream);

}  // namespace ternary::sm90
