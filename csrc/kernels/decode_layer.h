// What a layer of decode or prefill gives other operators' kernels to do between its products.
#pragma once

#include <type_traits>

#include "kernels/causal_conv1d.h"
#include "kernels/decode.h"
#include "kernels/norm.h"
#include "kernels/ssd.h"

namespace ternary {

// Element i of an array of `type`, or null of none. Void: void or const void.
template <class Void>
Void* at(Void* data, DType type, int64_t i) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  return data ? static_cast<Byte*>(data) + i * (type == DType::f32 ? 4 : 2) : nullptr;
}

// Sizes as in DecodeArgs, and what lies between the kernels: [tokens, r], [tokens, c], [tokens, e].
struct DecodeBuffers {
  int64_t e, c, r;
  void *zxBCdt, *xBC, *y;
};

inline void* conv_state_of(const DecodeArgs& a, const DecodeBuffers& b, int64_t layer) {
  return at(a.conv_state, a.type, layer * a.batch * 3 * b.c);
}
inline void* ssm_state_of(const DecodeArgs& a, const DecodeBuffers& b, int64_t layer) {
  return at(a.ssm_state, a.state_type, layer * a.batch * b.e * a.state_size);
}

inline CausalConv1dArgs conv_of(const DecodeArgs& a, const DecodeBuffers& b, int64_t layer) {
  void* const state = conv_state_of(a, b, layer);
  return {.x = at(b.zxBCdt, a.type, b.e),
          .weight = at(a.conv_weight, a.type, layer * b.c * 4),
          .bias = at(a.conv_bias, a.type, layer * b.c),
          .initial_state = a.prefill ? nullptr : state,
          .cu_seqlens = a.cu_seqlens,
          .y = b.xBC,
          .final_state = state,
          .type = a.type,
          .weight_type = a.type,
          .state_type = a.type,
          .x_stride = b.r,
          .sequences = a.batch,
          .length = a.length,
          .channels = b.c,
          .width = 4,
          .silu = true};
}

inline SsdArgs ssd_of(const DecodeArgs& a, const DecodeBuffers& b, int64_t layer) {
  void* const state = ssm_state_of(a, b, layer);
  return {.x = b.xBC,
          .dt = at(b.zxBCdt, a.type, b.e + b.c),
          .A = a.A + layer * a.heads,
          .B = at(b.xBC, a.type, b.e),
          .C = at(b.xBC, a.type, b.e + a.state_size),
          .D = a.D + layer * a.heads,
          .z = nullptr,
          .dt_bias = a.dt_bias + layer * a.heads,
          .initial_state = a.prefill ? nullptr : state,
          .cu_seqlens = a.cu_seqlens,
          .y = b.y,
          .final_state = state,
          .type = a.type,
          .state_type = a.state_type,
          .x_stride = b.c,
          .dt_stride = b.r,
          .B_stride = b.c,
          .C_stride = b.c,
          .z_stride = b.r,
          .sequences = a.batch,
          .length = a.length,
          .heads = a.heads,
          .head_dim = a.head_dim,
          .groups = 1,
          .state_size = a.state_size,
          .D_size = 1,
          .dt_min = a.dt_min,
          .dt_max = a.dt_max,
          .dt_softplus = true};
}

// In place: what is written has been read.
inline RmsNormGatedArgs gated_norm_of(const DecodeArgs& a, const DecodeBuffers& b, int64_t layer) {
  return {.y = b.y,
          .z = b.zxBCdt,
          .weight = at(a.gate_norm, a.type, layer * b.e),
          .out = b.y,
          .type = a.type,
          .weight_type = a.type,
          .y_stride = b.e,
          .z_stride = b.r,
          .rows = a.rows(),
          .dim = b.e,
          .groups = 1,
          .eps = a.eps,
          .norm_before_gate = false};
}

}  // namespace ternary
