#pragma once

#include <tuple>

#include "kernels/selective_scan.h"
#include "ops/tokens.h"

namespace ternary {

// What selective_scan and its update do alike: checks, allocates y [lead..., d] and runs the device's kernel.
template <void (*run)(const SelectiveScanArgs&, const Tensor& y)>
Tensor scan(const Sizes& lead, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
            const Tensor& C, const std::optional<Tensor>& D, const std::optional<Tensor>& z,
            const std::optional<Tensor>& dt_bias, bool dt_softplus,
            const std::optional<Tensor>& initial_state, const Tensor& final_state,
            const std::optional<Tensor>& bounds) {
  const int64_t d = x.size(x.dim() - 1), n = A.size(1);
  const Rows x_rows = rows(x, x, lead, {d}, "x"), dt_rows = rows(dt, x, lead, {d}, "dt");
  const Rows B_rows = rows(B, x, lead, {n}, "B"), C_rows = rows(C, x, lead, {n}, "C");
  const Rows z_rows = z ? rows(*z, x, lead, {d}, "z") : x_rows;
  const Tensor decay = parameter(A, x, ScalarType::Float, {d, n}, "A");
  const auto skip = parameter(D, x, ScalarType::Float, {d}, "D");
  const auto bias = parameter(dt_bias, x, ScalarType::Float, {d}, "dt_bias");
  const auto initial =
      parameter(initial_state, x, final_state.scalar_type(), {final_state.size(0), d, n}, "initial_state");

  Tensor y = torch::stable::new_empty(x, join(lead, {d}));
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
       .channels = d,
       .state_size = n,
       .dt_softplus = dt_softplus},
      y);
  return y;
}

template <void (*run)(const SelectiveScanArgs&, const Tensor& y)>
std::tuple<Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                          const Tensor& C, const std::optional<Tensor>& D,
                                          const std::optional<Tensor>& z,
                                          const std::optional<Tensor>& dt_bias, bool dt_softplus,
                                          const std::optional<Tensor>& initial_state,
                                          const std::optional<Tensor>& cu_seqlens) {
  check_dim(x, 3, "x");
  check_dim(A, 2, "A");
  float_type(x, "x");
  const auto bounds = sequence_bounds(cu_seqlens, x);
  const Sizes state = {count_sequences(bounds, x), x.size(2), A.size(1)};
  const Tensor final_state = new_state(x, initial_state, state, ScalarType::Float);
  return {scan<run>({x.size(0), x.size(1)}, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state,
                    final_state, bounds),
          final_state};
}

template <void (*run)(const SelectiveScanArgs&, const Tensor& y)>
Tensor selective_scan_update(const Tensor& x, const Tensor& state, const Tensor& dt, const Tensor& A,
                             const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
                             const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
                             bool dt_softplus) {
  check_dim(x, 2, "x");
  check_dim(A, 2, "A");
  float_type(x, "x");
  check_state(state, x, {x.size(0), x.size(1), A.size(1)});
  return scan<run>({x.size(0)}, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, state, std::nullopt);
}

}  // namespace ternary
