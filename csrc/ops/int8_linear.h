#pragma once

#include "kernels/int8_linear.h"
#include "ops/tensor.h"

namespace ternary {

// ternary::int8_linear: checks the tensors, allocates y and hands both to the device's kernel.
template <void (*run)(const Int8LinearArgs&, const Tensor& y)>
Tensor int8_linear(const Tensor& x, const Tensor& table, const Tensor& scale) {
  const DType type = float_type(x, "x"), scale_type = float_type(scale, "scale");
  check_type(table, ScalarType::Char, "table");
  check_dim(table, 2, "table");
  const int64_t n = table.size(0), k = table.size(1);
  for (const auto& [t, name] : {std::pair{&table, "table"}, {&scale, "scale"}}) {
    check_device(*t, x, name);
    check_contiguous(*t, name);
  }
  check_shape(scale, {n, 1}, "scale");
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least 1 dimension, not 0");
  STD_TORCH_CHECK(x.size(-1) == k && k > 0, "x must have ", k, " columns, at least 1 (table ", shape(table),
                  "), not ", x.size(-1));

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  const Tensor rows = torch::stable::contiguous(x);
  run({.x = rows.const_data_ptr(),
       .table = table.const_data_ptr<int8_t>(),
       .scale = scale.const_data_ptr(),
       .y = y.mutable_data_ptr(),
       .type = type,
       .scale_type = scale_type,
       .m = y.numel() / n,
       .n = n,
       .k = k},
      y);
  return y;
}

}  // namespace ternary
