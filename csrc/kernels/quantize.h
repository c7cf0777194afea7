// scale = mean |w| of a group, ternary = round(clip(w / scale, -1, 1)) in {-1, 0, +1};  w ~ ternary * scale.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

struct CUstream_st;

namespace ternary {

constexpr int64_t kNothingRefused = INT64_MAX;

struct QuantizeArgs {
  const void* weight;  // [n, k]
  DType weight_type;
  uint8_t* codes;  // [n, k / 4], see codes.h; null where ternary * scale is wanted instead
  void* rounded;   // [n, k], that product
  DType rounded_type;
  void* scales;  // [n, k / group], or [1] where one_scale; null where nobody reads them
  DType scale_type;
  double* sums;  // [n, k / group]: of |w|, from absolute_sums to quantize
  // The first weight that is not finite, counted through the matrix, and the first scale that is beyond
  // scale_type; kNothingRefused where there is none, and before the call.
  int64_t* refused;  // [2]
  int64_t n, k;
  int64_t group;   // weights that share a scale; k where one_scale
  bool one_scale;  // one for the whole matrix
};

struct PackArgs {
  const int8_t* ternary;  // [n, k]
  uint8_t* codes;         // [n, k / 4]
  // The first value outside {-1, 0, +1}: its place counted through the matrix << 8 | its byte;
  // kNothingRefused where there is none, and before the call.
  int64_t* refused;  // [1]
  int64_t n, k;
};

struct UnpackArgs {
  const uint8_t* codes;  // [n, k / 4]
  int8_t* ternary;       // [n, k]
  int64_t n, k;
};

struct FirstInvalidArgs {
  const uint8_t* codes;  // [bytes]
  int64_t* first;        // the first weight whose code is invalid, or what it was
};

struct DequantizeArgs {
  const uint8_t* codes;  // [n, k / 4]
  const void* scales;    // [n, k / group], or [1] where one_scale
  DType scale_type;
  void* weight;  // [n, k]
  DType weight_type;
  int64_t n, k;
  int64_t group;  // weights that share a scale; k where one_scale
  bool one_scale;
};

// Rows begin .. end. quantize needs what absolute_sums left.
void absolute_sums_cpu(const QuantizeArgs& args, int64_t begin, int64_t end);
void quantize_cpu(const QuantizeArgs& args, int64_t begin, int64_t end);
void pack_cpu(const PackArgs& args, int64_t begin, int64_t end);
void unpack_cpu(const UnpackArgs& args, int64_t begin, int64_t end);
void first_invalid_cpu(const FirstInvalidArgs& args, int64_t begin, int64_t end);  // bytes
void dequantize_cpu(const DequantizeArgs& args, int64_t begin, int64_t end);

// Each returns a cudaError_t.
int quantize_sm90(const QuantizeArgs& args, CUstream_st* stream);
int pack_sm90(const PackArgs& args, CUstream_st* stream);
int unpack_sm90(const UnpackArgs& args, CUstream_st* stream);
int dequantize_sm90(const DequantizeArgs& args, CUstream_st* stream);

}  // namespace ternary
