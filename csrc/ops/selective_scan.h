#pragma once

#include <tuple>

#include "kernels/selective_scan.h"
#include "ops/tokens.h"
#include "ops/weight.h"

namespace ternary {

// dt_weight of selective_scan_fused, which projects dt [..., rank] to the d channels; none where dt has d
// columns.
struct Projection {
  std::optional<Tensor> weight, scales;
  int64_t rank;
  PackedShape packed;
};

inline Projection check_projection(const Tensor& x, const Tensor& weight,
                                   const std::optional<Tensor>& scales) {
  const int64_t d = x.size(x.dim() - 1);
  check_dim(weight, 2, "dt_weight");
  if (!scales) {
    const int64_t rank = weight.size(1);
    STD_TORCH_CHECK(rank > 0, "dt_weight must have at least one column, not ", shape(weight));
    return {.weight = parameter(weight, x, x.scalar_type(), {d, rank}, "dt_weight"),
            .scales = std::nullopt,
            .rank = rank,
            .packed = {.n = d, .k = rank, .group = rank, .one_scale = false}};
  }
  check_device(weight, x, "dt_weight");
  const PackedShape packed = check_packed(weight, *scales, "dt_weight", "dt_scales");
  check_shape(weight, {d, packed.k / kWeightsPerByte}, "dt_weight");
  return {.weight = weight, .scales = scales, .rank = packed.k, .packed = packed};
}

// What the operators do alike: checks, allocates y [lead..., d] and runs the device's kernel.
template <void (*run)(const SelectiveScanArgs&, const Tensor& y)>
Tensor scan(const Sizes& lead, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
            const Tensor& C, const std::optional<Tensor>& D, const std::optional<Tensor>& z,
            const std::optional<Tensor>& dt_bias, bool dt_softplus,
            const std::optional<Tensor>& initial_state, const Tensor& final_state,
            const std::optional<Tensor>& bounds, const Projection& projection = {}) {
  const int64_t d = x.size(x.dim() - 1), n = A.size(1);
  STD_TORCH_CHECK(x.is_cpu() || n <= kMaxStatesSm90, "A must have at most ", kMaxStatesSm90,
                  " columns on a GPU, not ", n);
  const Rows x_rows = rows(x, x, lead, {d}, "x");
  const Rows dt_rows = rows(dt, x, lead, {projection.weight ? projection.rank : d}, "dt");
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
       .dt_softplus = dt_softplus,
       .dt_weight = projection.weight ? projection.weight->const_data_ptr() : nullptr,
       .dt_scales = projection.scales ? projection.scales->const_data_ptr() : nullptr,
       .dt_scale_type = projection.scales ? float_type(*projection.scales, "dt_scales") : DType::f32,
       .dt_rank = projection.rank,
       .dt_group = projection.packed.group,
       .dt_one_scale = projection.packed.one_scale},
      y);
  return y;
}

template <void (*run)(const SelectiveScanArgs&, const Tensor& y)>
std::tuple<Tensor, Tensor> scan_sequences(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                          const Tensor& C, const std::optional<Tensor>& D,
                                          const std::optional<Tensor>& z,
                                          const std::optional<Tensor>& dt_bias, bool dt_softplus,
                                          const std::optional<Tensor>& initial_state,
                                          const std::optional<Tensor>& cu_seqlens,
                                          const Projection& projection = {}) {
  check_dim(A, 2, "A");
  const auto bounds = sequence_bounds(cu_seqlens, x);
  const Sizes state = {count_sequences(bounds, x), x.size(2), A.size(1)};
  const Tensor final_state = new_state(x, initial_state, state, ScalarType::Float);
  return {scan<run>({x.size(0), x.size(1)}, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state,
                    final_state, bounds, projection),
          final_state};
}

template <void (*run)(const SelectiveScanArgs&, const Tensor& y)>
std::tuple<Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                          const Tensor& C, const std::optional<Tensor>& D,
                                          const std::optional<Tensor>& z,
                                          const std::optional<Tensor>& dt_bias, bool dt_softplus,
                                          const std::optional<Tensor>& initial_state,
                                          const std::optional<Tensor>& cu_seqlens) {
  check_dim(x, 3, "x");
  float_type(x, "x");
  return scan_sequences<run>(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens);
}

template <void (*run)(const SelectiveScanArgs&, const Tensor& y)>
std::tuple<Tensor, Tensor> selective_scan_fused(
    const Tensor& x, const Tensor& dt, const Tensor& dt_weight, const std::optional<Tensor>& dt_scales,
    const Tensor& A, const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
    const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens) {
  check_dim(x, 3, "x");
  float_type(x, "x");
  return scan_sequences<run>(x, dt, A, B, C, D, z, dt_bias, true, initial_state, cu_seqlens,
                             check_projection(x, dt_weight, dt_scales));
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
