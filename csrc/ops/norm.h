#pragma once

#include "kernels/norm.h"
#include "ops/tokens.h"

namespace ternary {

// The rows of x, [rows, dim] or [b, l, dim]: all dimensions but the last.
inline Sizes leading_sizes(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, name, " must have 2 or 3 dimensions, not ", x.dim());
  Sizes lead(x.sizes().begin(), x.sizes().end());
  lead.pop_back();
  return lead;
}

inline int64_t count(const Sizes& sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}

template <void (*run)(const RmsNormGatedArgs&, const Tensor& out)>
Tensor rms_norm_gated(const Tensor& y, const Tensor& z, const Tensor& weight, int64_t groups, double eps,
                      bool norm_before_gate) {
  const DType type = float_type(y, "y"), weight_type = float_type(weight, "weight");
  const Sizes lead = leading_sizes(y, "y");
  const int64_t dim = y.size(y.dim() - 1);
  const Rows y_rows = rows(y, y, lead, {dim}, "y"), z_rows = rows(z, y, lead, {dim}, "z");
  const Tensor scale = parameter(weight, y, weight.scalar_type(), {dim}, "weight");
  STD_TORCH_CHECK(groups > 0 && dim % groups == 0, "groups must divide the ", dim, " columns of y, not be ",
                  groups);
  Tensor out = torch::stable::new_empty(y, join(lead, {dim}));
  run({.y = y_rows.tensor.const_data_ptr(),
       .z = z_rows.tensor.const_data_ptr(),
       .weight = scale.const_data_ptr(),
       .out = out.mutable_data_ptr(),
       .type = type,
       .weight_type = weight_type,
       .y_stride = y_rows.stride,
       .z_stride = z_rows.stride,
       .rows = count(lead),
       .dim = dim,
       .groups = groups,
       .eps = static_cast<float>(eps),
       .norm_before_gate = norm_before_gate},
      out);
  return out;
}

template <void (*run)(const AddRmsNormArgs&, const Tensor& y)>
Tensor add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const DType type = float_type(x, "x"), weight_type = float_type(weight, "weight");
  const Sizes lead = leading_sizes(x, "x");
  const int64_t dim = x.size(x.dim() - 1);
  const Rows x_rows = rows(x, x, lead, {dim}, "x");
  check_device(residual, x, "residual");
  check_shape(residual, join(lead, {dim}), "residual");
  check_contiguous(residual, "residual");
  const Tensor scale = parameter(weight, x, weight.scalar_type(), {dim}, "weight");
  Tensor y = torch::stable::new_empty(x, join(lead, {dim}), weight.scalar_type());
  run({.x = x_rows.tensor.const_data_ptr(),
       .residual = residual.mutable_data_ptr(),
       .weight = scale.const_data_ptr(),
       .y = y.mutable_data_ptr(),
       .type = type,
       .residual_type = float_type(residual, "residual"),
       .weight_type = weight_type,
       .x_stride = x_rows.stride,
       .rows = count(lead),
       .dim = dim,
       .eps = static_cast<float>(eps)},
      y);
  return y;
}

}  // namespace ternary
