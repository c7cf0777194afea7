#pragma once

#include "kernels/codes.h"
#include "ops/tensor.h"

namespace ternary {

struct PackedShape {
  int64_t n, k;
  int64_t group;   // weights that share a scale; k where one_scale
  bool one_scale;  // one for the whole matrix
};

// The packed weight that gemm and dequantize take: codes [n, k / 4], scales [n, groups] or [1, 1].
inline PackedShape check_packed(const Tensor& codes, const Tensor& scales, const char* codes_name = "codes",
                                const char* scales_name = "scales") {
  check_type(codes, ScalarType::Byte, codes_name);
  check_dim(codes, 2, codes_name);
  check_contiguous(codes, codes_name);
  float_type(scales, scales_name);
  check_dim(scales, 2, scales_name);
  check_contiguous(scales, scales_name);
  check_device(scales, codes, scales_name);

  const int64_t n = codes.size(0), k = codes.size(1) * kWeightsPerByte, groups = scales.size(1);
  const bool one_scale = n != 1 && scales.size(0) == 1 && groups == 1;
  STD_TORCH_CHECK(k > 0, codes_name, " must have at least one column, not ", shape(codes));
  STD_TORCH_CHECK(scales.size(0) == n || one_scale, scales_name, " must be [", n, ", groups] or [1, 1], not ",
                  shape(scales));
  STD_TORCH_CHECK(groups > 0 && k % groups == 0 && k / groups % kWeightsPerByte == 0, scales_name, " ",
                  shape(scales), " must cut the ", k,
                  " weights of a row into equal groups of a multiple of 4");
  return {n, k, k / groups, one_scale};
}

}  // namespace ternary
