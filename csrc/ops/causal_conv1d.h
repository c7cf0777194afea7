#pragma once

#include <tuple>

#include "kernels/causal_conv1d.h"
#include "ops/tokens.h"

namespace ternary {

// What causal_conv1d and its update do alike: checks, allocates y [lead..., c] and runs the device's kernel.
template <void (*run)(const CausalConv1dArgs&, const Tensor& y)>
Tensor convolve(const Sizes& lead, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& initial_state, const Tensor& final_state,
                const std::optional<Tensor>& bounds, bool silu) {
  const int64_t channels = x.size(x.dim() - 1), width = weight.size(1);
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == x.scalar_type(), "weight must be Float or x's ",
                  toString(x.scalar_type()), ", not ", toString(dtype));
  const Rows x_rows = rows(x, x, lead, {channels}, "x");
  const Tensor taps = parameter(weight, x, dtype, {channels, width}, "weight");
  const auto offset = parameter(bias, x, dtype, {channels}, "bias");
  const auto initial = parameter(initial_state, x, final_state.scalar_type(),
                                 {final_state.size(0), width - 1, channels}, "initial_state");

  Tensor y = torch::stable::new_empty(x, join(lead, {channels}));
  run({.x = x_rows.tensor.const_data_ptr(),
       .weight = taps.const_data_ptr(),
       .bias = offset ? offset->const_data_ptr() : nullptr,
       .initial_state = initial ? initial->const_data_ptr() : nullptr,
       .cu_seqlens = bounds ? bounds->const_data_ptr<int32_t>() : nullptr,
       .y = y.mutable_data_ptr(),
       .final_state = final_state.mutable_data_ptr(),
       .type = float_type(x, "x"),
       .weight_type = float_type(weight, "weight"),
       .state_type = float_type(final_state, "state"),
       .x_stride = x_rows.stride,
       .sequences = final_state.size(0),
       .length = lead.size() == 2 ? lead[1] : 1,
       .channels = channels,
       .width = width,
       .silu = silu},
      y);
  return y;
}

inline void check_taps(const Tensor& weight) {
  check_dim(weight, 2, "weight");
  STD_TORCH_CHECK(weight.size(1) >= 1, "weight must be [channels, width] with a width of at least 1, not ",
                  shape(weight));
}

template <void (*run)(const CausalConv1dArgs&, const Tensor& y)>
std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight,
                                         const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& initial_state,
                                         const std::optional<Tensor>& cu_seqlens, bool silu) {
  check_dim(x, 3, "x");
  check_taps(weight);
  float_type(x, "x");
  const auto bounds = sequence_bounds(cu_seqlens, x);
  const Sizes state = {count_sequences(bounds, x), weight.size(1) - 1, x.size(2)};
  const Tensor final_state = new_state(x, initial_state, state, x.scalar_type());
  return {convolve<run>({x.size(0), x.size(1)}, x, weight, bias, initial_state, final_state, bounds, silu),
          final_state};
}

template <void (*run)(const CausalConv1dArgs&, const Tensor& y)>
Tensor causal_conv1d_update(const Tensor& x, const Tensor& state, const Tensor& weight,
                            const std::optional<Tensor>& bias, bool silu) {
  check_dim(x, 2, "x");
  check_taps(weight);
  float_type(x, "x");
  check_state(state, x, {x.size(0), weight.size(1) - 1, x.size(1)});
  return convolve<run>({x.size(0)}, x, weight, bias, state, state, std::nullopt, silu);
}

}  // namespace ternary
