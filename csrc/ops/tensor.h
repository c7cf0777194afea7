// The names of torch's stable ABI that the operators use, and the checks they share.
// A check says which argument, what was expected and what was found, one line each; dim() before any size(i).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels/dtype.h"

namespace ternary {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline void check_shape(const Tensor& t, const std::vector<int64_t>& expected, const char* name) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  std::string text;
  for (size_t i = 0; i < expected.size(); ++i) {
    same = same && t.size(i) == expected[i];
    text += (i ? ", " : "") + std::to_string(expected[i]);
  }
  STD_TORCH_CHECK(same, name, " must be [", text, "], not ", shape(t));
}

inline void check_dim(const Tensor& t, int64_t dim, const char* name) {
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, not ", t.dim());
}

inline void check_type(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", toString(dtype), ", not ",
                  toString(t.scalar_type()));
}

inline void check_device(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the first argument's device");
}

inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// An activation, weight or scale dtype: fp32, bf16 or fp16.
inline DType float_type(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  name, " must be Float, BFloat16 or Half, not ", toString(dtype));
  return dtype == ScalarType::Float ? DType::f32 : dtype == ScalarType::Half ? DType::f16 : DType::bf16;
}

inline DType float_type(const Tensor& t, const char* name) { return float_type(t.scalar_type(), name); }

}  // namespace ternary
