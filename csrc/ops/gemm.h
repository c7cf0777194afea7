#pragma once

#include "kernels/gemm.h"
#include "ops/tensor.h"
#include "ops/weight.h"

namespace ternary {

// ternary::gemm on any device: checks the tensors, allocates y and hands both to the device's kernel. kGpu:
// its other kind of activations is fp8, else a8.
template <void (*run)(const GemmArgs&, const Tensor& y), bool kGpu>
Tensor gemm(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& bias,
            std::string activations) {
  STD_TORCH_CHECK(activations == "a16" || activations == (kGpu ? "fp8" : "a8"), "activations must be ",
                  kGpu ? "a16 or fp8 on a GPU" : "a16 or a8 on a CPU", ", not ", activations);
  const DType type = float_type(x, "x");
  const PackedShape w = check_packed(codes, scales);
  check_device(codes, x, "codes");
  check_device(scales, x, "scales");
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least 1 dimension, not 0");
  STD_TORCH_CHECK(x.size(-1) == w.k, "x must have ", w.k, " columns (codes ", shape(codes), "), not ",
                  x.size(-1));
  if (bias) {
    check_shape(*bias, {w.n}, "bias");
    check_device(*bias, x, "bias");
    check_contiguous(*bias, "bias");
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type() || bias->scalar_type() == ScalarType::Float,
                    "bias must be ", toString(x.scalar_type()), " as x is, or Float, not ",
                    toString(bias->scalar_type()));
  }

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = w.n;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  const Tensor rows = torch::stable::contiguous(x);
  run({.x = rows.const_data_ptr(),
       .codes = codes.const_data_ptr<uint8_t>(),
       .scales = scales.const_data_ptr(),
       .bias = bias ? bias->const_data_ptr() : nullptr,
       .y = y.mutable_data_ptr(),
       .type = type,
       .scale_type = float_type(scales, "scales"),
       .bias_type = bias ? float_type(*bias, "bias") : DType::f32,
       .m = y.numel() / w.n,
       .n = w.n,
       .k = w.k,
       .group = w.group,
       .one_scale = w.one_scale,
       .a8 = activations == "a8",
       .fp8 = activations == "fp8"},
      y);
  return y;
}

}  // namespace ternary
