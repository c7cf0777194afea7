// What the operators over time share: rows of tokens, packed sequences, states, fixed parameters.
#pragma once

#include "ops/tensor.h"

namespace ternary {

using Sizes = std::vector<int64_t>;

inline Sizes join(Sizes left, const Sizes& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

// An activation or state. Lives as long as the kernel runs: `tensor` may be a copy that nothing else holds.
struct Rows {
  Tensor tensor;
  int64_t stride;  // elements from one token to the next
};

// The activation `t` [lead..., size...], lead one or two dimensions of tokens. Slices of one projection
// [b, l, sum] are taken as they lie; a tensor whose tokens are not dense and evenly spaced is copied.
inline Rows rows(const Tensor& t, const Tensor& x, const Sizes& lead, const Sizes& size, const char* name) {
  check_device(t, x, name);
  check_type(t, x.scalar_type(), name);
  check_shape(t, join(lead, size), name);
  const int64_t tokens = static_cast<int64_t>(lead.size());
  bool regular = true;
  int64_t dense = 1;
  for (int64_t i = t.dim() - 1; i >= tokens; --i) {
    regular = regular && (t.size(i) == 1 || t.stride(i) == dense);
    dense *= t.size(i);
  }
  if (tokens == 2 && t.size(0) > 1 && t.size(1) > 1)
    regular = regular && t.stride(0) == t.size(1) * t.stride(1);
  if (!regular) return {torch::stable::contiguous(t), dense};
  return {t, t.stride(tokens == 2 && t.size(1) > 1 ? 1 : 0)};
}

// Weights and other fixed tensors; kernels want them dense.
inline Tensor parameter(const Tensor& t, const Tensor& x, ScalarType dtype, const Sizes& size,
                        const char* name) {
  check_device(t, x, name);
  check_type(t, dtype, name);
  check_shape(t, size, name);
  return torch::stable::contiguous(t);
}

inline const float* floats(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}

inline std::optional<Tensor> parameter(const std::optional<Tensor>& t, const Tensor& x, ScalarType dtype,
                                       const Sizes& size, const char* name) {
  if (!t) return std::nullopt;
  return parameter(*t, x, dtype, size, name);
}

// int32 [q + 1] where the sequences of x [1, l, ...] begin and end. Its values are checked where reading them
// does not wait for a device.
inline std::optional<Tensor> sequence_bounds(const std::optional<Tensor>& cu_seqlens, const Tensor& x) {
  if (!cu_seqlens) return std::nullopt;
  check_dim(*cu_seqlens, 1, "cu_seqlens");
  const int64_t q = cu_seqlens->size(0) - 1;
  STD_TORCH_CHECK(q >= 1, "cu_seqlens must have at least 2 elements, not ", q + 1);
  STD_TORCH_CHECK(x.size(0) == 1, "x must have a batch of 1 beside cu_seqlens, not ", x.size(0));
  const Tensor bounds = parameter(*cu_seqlens, x, ScalarType::Int, {q + 1}, "cu_seqlens");
  if (!bounds.is_cpu()) return bounds;
  const int32_t* at = bounds.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(at[0] == 0, "cu_seqlens must start at 0, not ", at[0]);
  for (int64_t i = 0; i < q; ++i)
    STD_TORCH_CHECK(at[i] <= at[i + 1], "cu_seqlens must not decrease, but goes from ", at[i], " to ",
                    at[i + 1]);
  STD_TORCH_CHECK(at[q] == x.size(1), "cu_seqlens must end at x's length ", x.size(1), ", not ", at[q]);
  return bounds;
}

inline int64_t count_sequences(const std::optional<Tensor>& bounds, const Tensor& x) {
  return bounds ? bounds->size(0) - 1 : x.size(0);
}

// The state an operator ends with: of initial_state's dtype, or `dtype` where there is none.
inline Tensor new_state(const Tensor& x, const std::optional<Tensor>& initial_state, const Sizes& size,
                        ScalarType dtype) {
  if (initial_state) {
    check_shape(*initial_state, size, "initial_state");
    dtype = initial_state->scalar_type();
    float_type(dtype, "initial_state");
  }
  return torch::stable::new_empty(x, size, dtype);
}

// The state that an update reads and writes where it lies.
inline void check_state(const Tensor& state, const Tensor& x, const Sizes& size) {
  check_device(state, x, "state");
  check_shape(state, size, "state");
  check_contiguous(state, "state");
}

}  // namespace ternary
