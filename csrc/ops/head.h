#pragma once

#include "kernels/head.h"
#include "ops/tensor.h"

namespace ternary {

// ternary::head: checks the tensors, allocates the logits and hands all to the device's kernel.
template <void (*run)(const HeadArgs&, const Tensor& logits)>
Tensor head(const Tensor& hidden, const Tensor& norm, const Tensor& table, const std::optional<Tensor>& scale,
            double eps) {
  check_type(hidden, ScalarType::Float, "hidden");
  check_dim(norm, 1, "norm");
  const DType type = float_type(norm, "norm");
  STD_TORCH_CHECK(type != DType::f32, "norm must be BFloat16 or Half on this device, not Float");
  check_type(table, scale ? ScalarType::Char : norm.scalar_type(), "table");
  check_dim(table, 2, "table");
  const int64_t v = table.size(0), d = norm.size(0);
  check_shape(table, {v, d}, "table");
  STD_TORCH_CHECK(hidden.dim() > 0 && hidden.size(-1) == d, "hidden must have ", d, " columns, as norm, not ",
                  shape(hidden));
  STD_TORCH_CHECK(d > 0 && d % HeadArgs::kStep == 0 && d <= HeadArgs::kMaxDim,
                  "head on this device serves rows of a multiple of ", HeadArgs::kStep, " up to ",
                  HeadArgs::kMaxDim, "; found ", d);
  STD_TORCH_CHECK(v <= HeadArgs::kMaxRows, "head on this device serves tables of up to ", HeadArgs::kMaxRows,
                  " rows; found ", v);
  const auto check = [&](const Tensor& t, const char* name) {
    check_device(t, hidden, name);
    check_contiguous(t, name);
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
                    " must start at a multiple of 16 bytes");
  };
  check(norm, "norm");
  check(table, "table");
  if (scale) {
    check_shape(*scale, {v, 1}, "scale");
    check_device(*scale, hidden, "scale");
    check_contiguous(*scale, "scale");
  }

  std::vector<int64_t> sizes(hidden.sizes().begin(), hidden.sizes().end());
  sizes.back() = v;
  Tensor logits = torch::stable::new_empty(hidden, sizes, norm.scalar_type());
  if (logits.numel() == 0) return logits;
  const Tensor rows = torch::stable::contiguous(hidden);
  check(rows, "hidden");
  run({.hidden = rows.const_data_ptr<float>(),
       .norm = norm.const_data_ptr(),
       .table = table.const_data_ptr(),
       .scale = scale ? scale->const_data_ptr() : nullptr,
       .logits = logits.mutable_data_ptr(),
       .type = type,
       .scale_type = scale ? float_type(*scale, "scale") : DType::f32,
       .m = logits.numel() / v,
       .v = v,
       .d = static_cast<int>(d),
       .eps = static_cast<float>(eps)},
      logits);
  return logits;
}

}  // namespace ternary
