#pragma once

#include <limits>

#include "kernels/choose.h"
#include "ops/tensor.h"

namespace ternary {

// ternary::choose: checks the tensors and hands them to the device's kernel.
template <void (*run)(const ChooseArgs&, const Tensor& tokens)>
void choose(const Tensor& logits, int64_t vocab_size, const Tensor& tokens, const Tensor& chosen,
            const Tensor& step) {
  check_dim(logits, 2, "logits");
  const int64_t rows = logits.size(0);
  STD_TORCH_CHECK(logits.stride(1) == 1 || logits.size(1) == 1, "logits must have contiguous rows");
  STD_TORCH_CHECK(
      vocab_size > 0 && vocab_size <= logits.size(1) && vocab_size <= std::numeric_limits<int32_t>::max(),
      "vocab_size must be from 1 to the ", logits.size(1), " columns of logits, not ", vocab_size);
  check_dim(chosen, 2, "chosen");
  STD_TORCH_CHECK(chosen.size(0) > 0, "chosen must have at least one row");
  const auto check = [&](const Tensor& t, const std::vector<int64_t>& size, const char* name) {
    check_device(t, logits, name);
    check_type(t, ScalarType::Long, name);
    check_shape(t, size, name);
    check_contiguous(t, name);
  };
  check(tokens, {rows}, "tokens");
  check(chosen, {chosen.size(0), rows}, "chosen");
  check(step, {2}, "step");
  STD_TORCH_CHECK(rows <= 65535, "logits must have at most 65535 rows, not ", rows);
  const Tensor workspace = torch::stable::new_empty(tokens, {rows, ChooseArgs::kParts});
  run({.logits = logits.const_data_ptr(),
       .tokens = tokens.mutable_data_ptr<int64_t>(),
       .chosen = chosen.mutable_data_ptr<int64_t>(),
       .step = step.mutable_data_ptr<int64_t>(),
       .workspace = workspace.mutable_data_ptr(),
       .type = float_type(logits, "logits"),
       .stride = logits.stride(0),
       .rows = rows,
       .vocab = vocab_size,
       .slots = chosen.size(0)},
      tokens);
}

}  // namespace ternary
