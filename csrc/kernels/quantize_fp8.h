// scale = max |x| / 448 of a row, at least 2^-100;  q = x * (1 / scale) in e4m3;  x ~ q * scale.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

struct CUstream_st;

namespace ternary {

struct QuantizeFp8Args {
  const void* x;  // [m, k]
  DType type;
  uint8_t* q;    // [m, k]
  float* scale;  // [m]
  int64_t m, k;
};

// Returns a cudaError_t.
int quantize_fp8_sm90(const QuantizeFp8Args& args, CUstream_st* stream);

}  // namespace ternary
