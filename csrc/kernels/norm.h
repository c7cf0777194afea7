// rms_norm_gated: out = norm(y silu(z)) weight, or norm(y) weight silu(z), norm over each of `groups` parts;
// add_rms_norm: residual += x, y = norm(residual) weight;  norm(v) = v / sqrt(mean v^2 + eps).
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

struct CUstream_st;

namespace ternary {

// Strides are elements between consecutive rows.
struct RmsNormGatedArgs {
  const void* y;            // [rows, dim]
  const void* z;            // [rows, dim]
  const void* weight;       // [dim]
  void* out;                // [rows, dim]
  DType type, weight_type;  // of y, z and out; of weight
  int64_t y_stride, z_stride;
  int64_t rows, dim, groups;
  float eps;
  bool norm_before_gate;
};

struct AddRmsNormArgs {
  const void* x;       // [rows, dim]
  void* residual;      // [rows, dim]; what is normed is the sum as it is stored here
  const void* weight;  // [dim]
  void* y;             // [rows, dim], of weight's type
  DType type, residual_type, weight_type;
  int64_t x_stride;
  int64_t rows, dim;
  float eps;
};

void rms_norm_gated_cpu(const RmsNormGatedArgs& args, int64_t begin, int64_t end);  // of rows * groups parts
void add_rms_norm_cpu(const AddRmsNormArgs& args, int64_t begin, int64_t end);      // of rows

// Each returns a cudaError_t.
int rms_norm_gated_sm90(const RmsNormGatedArgs& args, CUstream_st* stream);
int add_rms_norm_sm90(const AddRmsNormArgs& args, CUstream_st* stream);

}  // namespace ternary
