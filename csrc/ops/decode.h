#pragma once

#include <limits>

#include "kernels/codes.h"
#include "kernels/decode.h"
#include "ops/tokens.h"

namespace ternary {

// A packed weight of every layer: codes [L, n, k / 4], scales [L, n, groups] or [L, 1, 1].
struct PackedLayers {
  int64_t group;
  bool one_scale;
};

inline PackedLayers check_layers(const Tensor& codes, const Tensor& scales, const Sizes& size,
                                 const Tensor& like, const std::string& name) {
  const std::string scales_name = name + "_scales", codes_name = name + "_codes";
  const int64_t layers = size[0], n = size[1], k = size[2];
  STD_TORCH_CHECK(k % kWeightsPerByte == 0, codes_name, " must have rows of a multiple of 4 weights, not ",
                  k);
  check_type(codes, ScalarType::Byte, codes_name.c_str());
  check_device(codes, like, codes_name.c_str());
  check_contiguous(codes, codes_name.c_str());
  check_shape(codes, {layers, n, k / kWeightsPerByte}, codes_name.c_str());
  check_device(scales, like, scales_name.c_str());
  check_contiguous(scales, scales_name.c_str());
  check_dim(scales, 3, scales_name.c_str());
  const int64_t groups = scales.size(2);
  const bool one_scale = n != 1 && scales.size(1) == 1 && groups == 1;
  STD_TORCH_CHECK(scales.size(0) == layers && (scales.size(1) == n || one_scale) && groups > 0 &&
                      k % groups == 0 && k / groups % kWeightsPerByte == 0,
                  scales_name, " must be [", layers, ", ", n, ", groups] or [", layers,
                  ", 1, 1], the groups of ", k, " weights equal and of a multiple of 4, not ", shape(scales));
  return {k / groups, one_scale};
}

// ternary::decode: checks the tensors, allocates the result and hands them to the device's kernel.
template <void (*run)(const DecodeArgs&, const Tensor& workspace), bool kGpu>
Tensor decode(const Tensor& tokens, const Tensor& embedding, const std::optional<Tensor>& embedding_scale,
              const Tensor& norm, const Tensor& in_codes, const Tensor& in_scales, const Tensor& conv_weight,
              const std::optional<Tensor>& conv_bias, const Tensor& conv_state, const Tensor& dt_bias,
              const Tensor& A, const Tensor& D, const Tensor& ssm_state, const Tensor& gate_norm,
              const Tensor& out_codes, const Tensor& out_scales, const Tensor& workspace, double eps,
              double dt_min, std::optional<double> dt_max, std::string activations) {
  STD_TORCH_CHECK(activations == "a16" || (!kGpu && activations == "a8"), "activations must be a16",
                  kGpu ? " on a GPU" : " or a8 on a CPU", ", not ", activations);
  check_dim(tokens, 1, "tokens");
  check_dim(norm, 2, "norm");
  check_dim(ssm_state, 5, "ssm_state");
  check_dim(embedding, 2, "embedding");
  const int64_t layers = norm.size(0), d = norm.size(1), b = tokens.size(0);
  const int64_t h = ssm_state.size(2), p = ssm_state.size(3), n = ssm_state.size(4);
  const int64_t e = h * p, c = e + 2 * n;
  STD_TORCH_CHECK(layers > 0 && d > 0 && b > 0 && e > 0 && n > 0, "decode: an empty tensor among norm ",
                  shape(norm), ", tokens ", shape(tokens), ", ssm_state ", shape(ssm_state));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(layers < kMost && d < kMost / 4 && b < kMost && c < kMost / 4,
                  "decode: sizes beyond 32 bits: norm ", shape(norm), ", ssm_state ", shape(ssm_state));
  const ScalarType dtype = norm.scalar_type();
  const auto check = [&](const Tensor& t, ScalarType type, const Sizes& size, const char* name) {
    check_device(t, tokens, name);
    check_type(t, type, name);
    check_contiguous(t, name);
    check_shape(t, size, name);
  };
  check(tokens, ScalarType::Long, {b}, "tokens");
  check(embedding, embedding_scale ? ScalarType::Char : dtype, {embedding.size(0), d}, "embedding");
  if (embedding_scale)
    check(*embedding_scale, in_scales.scalar_type(), {embedding.size(0), 1}, "embedding_scale");
  check(norm, dtype, {layers, d}, "norm");
  const PackedLayers in = check_layers(in_codes, in_scales, {layers, e + c + h, d}, tokens, "in");
  check(conv_weight, dtype, {layers, c, 4}, "conv_weight");
  if (conv_bias) check(*conv_bias, dtype, {layers, c}, "conv_bias");
  check(conv_state, dtype, {layers, b, 3, c}, "conv_state");
  for (const auto& [t, name] : {std::pair{&dt_bias, "dt_bias"}, {&A, "A"}, {&D, "D"}})
    check(*t, ScalarType::Float, {layers, h}, name);
  check(ssm_state, ssm_state.scalar_type(), {layers, b, h, p, n}, "ssm_state");
  check(gate_norm, dtype, {layers, e}, "gate_norm");
  const PackedLayers out = check_layers(out_codes, out_scales, {layers, d, e}, tokens, "out");
  check_type(out_scales, in_scales.scalar_type(), "out_scales");
  check(workspace, ScalarType::Int, {workspace.numel()}, "workspace");

  Tensor hidden = torch::stable::new_empty(tokens, {b, d}, ScalarType::Float);
  run({.tokens = tokens.const_data_ptr<int64_t>(),
       .embedding = embedding.const_data_ptr(),
       .embedding_scale = embedding_scale ? embedding_scale->const_data_ptr() : nullptr,
       .norm = norm.const_data_ptr(),
       .in_codes = in_codes.const_data_ptr<uint8_t>(),
       .in_scales = in_scales.const_data_ptr(),
       .conv_weight = conv_weight.const_data_ptr(),
       .conv_bias = conv_bias ? conv_bias->const_data_ptr() : nullptr,
       .conv_state = conv_state.mutable_data_ptr(),
       .dt_bias = dt_bias.const_data_ptr<float>(),
       .A = A.const_data_ptr<float>(),
       .D = D.const_data_ptr<float>(),
       .ssm_state = ssm_state.mutable_data_ptr(),
       .gate_norm = gate_norm.const_data_ptr(),
       .out_codes = out_codes.const_data_ptr<uint8_t>(),
       .out_scales = out_scales.const_data_ptr(),
       .hidden = hidden.mutable_data_ptr<float>(),
       .workspace = workspace.mutable_data_ptr(),
       .type = float_type(norm, "norm"),
       .scale_type = float_type(in_scales, "in_scales"),
       .state_type = float_type(ssm_state, "ssm_state"),
       .a8 = activations == "a8",
       .in_one_scale = in.one_scale,
       .out_one_scale = out.one_scale,
       .layers = static_cast<int>(layers),
       .batch = static_cast<int>(b),
       .d_model = static_cast<int>(d),
       .heads = static_cast<int>(h),
       .head_dim = static_cast<int>(p),
       .state_size = static_cast<int>(n),
       .vocab = embedding.size(0),
       .in_group = static_cast<int>(in.group),
       .out_group = static_cast<int>(out.group),
       .eps = static_cast<float>(eps),
       .dt_min = static_cast<float>(dt_min),
       .dt_max = static_cast<float>(dt_max.value_or(std::numeric_limits<double>::infinity()))},
      workspace);
  return hidden;
}

}  // namespace ternary
