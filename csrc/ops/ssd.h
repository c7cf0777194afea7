#pragma once

#include <limits>
#include <tuple>

#include "kernels/ssd.h"
#include "ops/tokens.h"

namespace ternary {

// What ssd and its update do alike: checks, allocates y [lead..., h, p] and runs the device's kernel.
template <void (*run)(const SsdArgs&, const Tensor& y)>
Tensor ssd_heads(const Sizes& lead, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                 const Tensor& C, const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                 const std::optional<Tensor>& dt_bias, bool dt_softplus, double dt_min,
                 std::optional<double> dt_max, const std::optional<Tensor>& initial_state,
                 const Tensor& final_state, const std::optional<Tensor>& bounds) {
  const int64_t h = x.size(x.dim() - 2), p = x.size(x.dim() - 1);
  const int64_t g = B.size(B.dim() - 2), n = B.size(B.dim() - 1);
  STD_TORCH_CHECK(g > 0 && h % g == 0, "x has ", h, " heads, not a multiple of B's ", g, " groups");
  const Rows x_rows = rows(x, x, lead, {h, p}, "x"), dt_rows = rows(dt, x, lead, {h}, "dt");
  const Rows B_rows = rows(B, x, lead, {g, n}, "B"), C_rows = rows(C, x, lead, {g, n}, "C");
  const Rows z_rows = z ? rows(*z, x, lead, {h, p}, "z") : x_rows;
  const Tensor decay = parameter(A, x, ScalarType::Float, {h}, "A");
  const Sizes skip_size = D && D->dim() == 2 ? Sizes{h, p} : Sizes{h};
  const auto skip = parameter(D, x, ScalarType::Float, skip_size, "D");
  const auto bias = parameter(dt_bias, x, ScalarType::Float, {h}, "dt_bias");
  const auto initial =
      parameter(initial_state, x, final_state.scalar_type(), {final_state.size(0), h, p, n}, "initial_state");

  Tensor y = torch::stable::new_empty(x, join(lead, {h, p}));
  run({.x = x_rows.tensor.const_data_ptr(),
       .dt = dt_rows.tensor.const_data_ptr(),
       .A = decay.const_data_ptr<float>(),
       .B = B_rows.tensor.const_data_ptr(),
       .C = C_rows.tensor.const_data_ptr(),
       .D = floats(skip),
       .z = z ? z_rows.tensor.const_data_ptr() : nullptr,
       .dt_bias = floats(bias),
       .initial_state = initial ? initial->const_data_ptr() : nullptr,
       .cu_seqlens = bounds ? bounds->const_data_ptr<int32_t>() : nullptr,
       .y = y.mutable_data_ptr(),
       .final_state = final_state.mutable_data_ptr(),
       .type = float_type(x, "x"),
       .state_type = float_type(final_state, "state"),
       .x_stride = x_rows.stride,
       .dt_stride = dt_rows.stride,
       .B_stride = B_rows.stride,
       .C_stride = C_rows.stride,
       .z_stride = z_rows.stride,
       .sequences = final_state.size(0),
       .length = lead.size() == 2 ? lead[1] : 1,
       .heads = h,
       .head_dim = p,
       .groups = g,
       .state_size = n,
       .D_size = skip_size.size() == 2 ? p : 1,
       .dt_min = static_cast<float>(dt_min),
       .dt_max = static_cast<float>(dt_max.value_or(std::numeric_limits<double>::infinity())),
       .dt_softplus = dt_softplus},
      y);
  return y;
}

template <void (*run)(const SsdArgs&, const Tensor& y)>
std::tuple<Tensor, Tensor> ssd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                               const Tensor& C, const std::optional<Tensor>& D,
                               const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
                               bool dt_softplus, double dt_min, std::optional<double> dt_max,
                               const std::optional<Tensor>& initial_state,
                               const std::optional<Tensor>& cu_seqlens) {
  check_dim(x, 4, "x");
  check_dim(B, 4, "B");
  float_type(x, "x");
  const auto bounds = sequence_bounds(cu_seqlens, x);
  const Sizes state = {count_sequences(bounds, x), x.size(2), x.size(3), B.size(3)};
  const Tensor final_state = new_state(x, initial_state, state, ScalarType::Float);
  return {ssd_heads<run>({x.size(0), x.size(1)}, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max,
                         initial_state, final_state, bounds),
          final_state};
}

template <void (*run)(const SsdArgs&, const Tensor& y)>
Tensor ssd_update(const Tensor& x, const Tensor& state, const Tensor& dt, const Tensor& A, const Tensor& B,
                  const Tensor& C, const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                  const std::optional<Tensor>& dt_bias, bool dt_softplus, double dt_min,
                  std::optional<double> dt_max) {
  check_dim(x, 3, "x");
  check_dim(B, 3, "B");
  float_type(x, "x");
  check_state(state, x, {x.size(0), x.size(1), x.size(2), B.size(2)});
  return ssd_heads<run>({x.size(0)}, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, state, state,
                        std::nullopt);
}

}  // namespace ternary
