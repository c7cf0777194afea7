#pragma once

#include <tuple>

#include "kernels/quantize_fp8.h"
#include "ops/tensor.h"

namespace ternary {

template <void (*run)(const QuantizeFp8Args&, const Tensor& x)>
std::tuple<Tensor, Tensor> quantize_fp8(const Tensor& x) {
  const DType type = float_type(x, "x");
  check_dim(x, 2, "x");
  STD_TORCH_CHECK(x.size(1) > 0, "x must have at least one column, not ", shape(x));
  const Tensor rows = torch::stable::contiguous(x);
  Tensor q = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float8_e4m3fn);
  Tensor scale = torch::stable::new_empty(x, {x.size(0), 1}, ScalarType::Float);
  if (x.size(0) == 0) return {q, scale};
  run({.x = rows.const_data_ptr(),
       .type = type,
       .q = static_cast<uint8_t*>(q.mutable_data_ptr()),
       .scale = scale.mutable_data_ptr<float>(),
       .m = x.size(0),
       .k = x.size(1)},
      x);
  return {q, scale};
}

}  // namespace ternary
