// The decode step by launches, four or five a layer: for what the persistent kernel does not serve.
#pragma once

#include "kernels/decode.h"

namespace ternary::sm90 {

// What the tensors lack, or null.
const char* sequence_expects(const DecodeArgs& args);

// Bytes for what the kernels hand on to each other.
int sequence_buffers(const DecodeArgs& args, int64_t* bytes);

// With these bytes, aligned to 16, in place of the workspace. Both return a cudaError_t.
int decode_sequence(const DecodeArgs& args, CUstream_st* stream);

}  // namespace ternary::sm90
