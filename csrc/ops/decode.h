#pragma once

#include <limits>

#include "kernels/codes.h"
#include "kernels/decode.h"
#include "ops/tokens.h"

namespace ternary {

using Tensors = std::vector<Tensor>;

// A packed weight of every layer: codes [n, k / 4], scales [n, groups] or [1, 1].
struct PackedLayers {
  int64_t group;
  bool one_scale;
};

// All as the first; the slices of one stack where a kernel asks for that.
inline void check_alike(const Tensors& of, const Tensor& like, bool stacked, const std::string& name) {
  const Tensor& first = of[0];
  check_dim(first, 2, name.c_str());
  const int64_t bytes = first.numel() * first.element_size();
  for (size_t i = 0; i < of.size(); ++i) {
    const Tensor& t = of[i];
    STD_TORCH_CHECK(
        t.is_contiguous() && t.device() == like.device() && t.scalar_type() == first.scalar_type() &&
            t.dim() == 2 && t.size(0) == first.size(0) && t.size(1) == first.size(1),
        name, "[", i, "] must be contiguous, on the first argument's device and ",
        toString(first.scalar_type()), " ", shape(first), ", not ", toString(t.scalar_type()), " ", shape(t));
    STD_TORCH_CHECK(
        !stacked || t.const_data_ptr() == static_cast<const char*>(first.const_data_ptr()) + bytes * i, name,
        "[", i, "] must follow the one before it in memory");
  }
}

inline PackedLayers check_layers(const Tensors& codes, const Tensors& scales, const Sizes& size, bool stacked,
                                 const Tensor& like, const std::string& name) {
  const std::string scales_name = name + "_scales", codes_name = name + "_codes";
  const int64_t layers = size[0], n = size[1], k = size[2];
  STD_TORCH_CHECK(k % kWeightsPerByte == 0, codes_name, " must have rows of a multiple of 4 weights, not ",
                  k);
  for (const auto& [of, which] : {std::pair{&codes, &codes_name}, {&scales, &scales_name}})
    STD_TORCH_CHECK(static_cast<int64_t>(of->size()) == layers, *which, " must have ", layers,
                    " tensors, one a layer, not ", of->size());
  check_type(codes[0], ScalarType::Byte, codes_name.c_str());
  check_shape(codes[0], {n, k / kWeightsPerByte}, codes_name.c_str());
  check_alike(codes, like, stacked, codes_name);
  check_alike(scales, like, stacked, scales_name);
  const int64_t rows = scales[0].size(0), groups = scales[0].size(1);
  const bool one_scale = n != 1 && rows == 1 && groups == 1;
  STD_TORCH_CHECK(
      (rows == n || one_scale) && groups > 0 && k % groups == 0 && k / groups % kWeightsPerByte == 0,
      scales_name, " must be [", n, ", groups] or [1, 1], the groups of ", k,
      " weights equal and of a multiple of 4, not ", shape(scales[0]));
  return {k / groups, one_scale};
}

// The tensors of both operators, under the schema's names.
struct ModelTensors {
  const Tensor &tokens, &embedding;
  const std::optional<Tensor>& embedding_scale;
  const Tensor& norm;
  const Tensors &in_codes, &in_scales;
  const Tensor& conv_weight;
  const std::optional<Tensor>& conv_bias;
  const Tensor &conv_state, &dt_bias, &A, &D, &ssm_state, &gate_norm;
  const Tensors &out_codes, &out_scales;
};

// Checks them; all but activations, workspace and the result. b: sequences; stacked: the layers' codes and
// scales must be slices of one tensor each; layer gets them one by one.
inline DecodeArgs model_args(const ModelTensors& t, int64_t b, bool stacked, double eps, double dt_min,
                             std::optional<double> dt_max, std::vector<DecodeLayer>& layer) {
  check_dim(t.norm, 2, "norm");
  check_dim(t.ssm_state, 5, "ssm_state");
  check_dim(t.embedding, 2, "embedding");
  const int64_t layers = t.norm.size(0), d = t.norm.size(1), tokens = t.tokens.numel();
  const int64_t h = t.ssm_state.size(2), p = t.ssm_state.size(3), n = t.ssm_state.size(4);
  const int64_t e = h * p, c = e + 2 * n;
  STD_TORCH_CHECK(layers > 0 && d > 0 && b > 0 && tokens > 0 && e > 0 && n > 0, "an empty tensor among norm ",
                  shape(t.norm), ", tokens ", shape(t.tokens), ", ssm_state ", shape(t.ssm_state));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(layers < kMost && d < kMost / 4 && tokens < kMost && c < kMost / 4,
                  "sizes beyond 32 bits: norm ", shape(t.norm), ", tokens ", shape(t.tokens), ", ssm_state ",
                  shape(t.ssm_state));
  const ScalarType dtype = t.norm.scalar_type();
  const auto check = [&](const Tensor& tensor, ScalarType type, const Sizes& size, const char* name) {
    check_device(tensor, t.tokens, name);
    check_type(tensor, type, name);
    check_contiguous(tensor, name);
    check_shape(tensor, size, name);
  };
  const Tensor& table = t.embedding;
  check(t.tokens, ScalarType::Long, {t.tokens.sizes().begin(), t.tokens.sizes().end()}, "tokens");
  check(table, t.embedding_scale ? ScalarType::Char : dtype, {table.size(0), d}, "embedding");
  check(t.norm, dtype, {layers, d}, "norm");
  const PackedLayers in =
      check_layers(t.in_codes, t.in_scales, {layers, e + c + h, d}, stacked, t.tokens, "in");
  const ScalarType scale_dtype = t.in_scales[0].scalar_type();
  if (t.embedding_scale) check(*t.embedding_scale, scale_dtype, {table.size(0), 1}, "embedding_scale");
  check(t.conv_weight, dtype, {layers, c, 4}, "conv_weight");
  if (t.conv_bias) check(*t.conv_bias, dtype, {layers, c}, "conv_bias");
  check(t.conv_state, dtype, {layers, b, 3, c}, "conv_state");
  for (const auto& [tensor, name] : {std::pair{&t.dt_bias, "dt_bias"}, {&t.A, "A"}, {&t.D, "D"}})
    check(*tensor, ScalarType::Float, {layers, h}, name);
  check(t.ssm_state, t.ssm_state.scalar_type(), {layers, b, h, p, n}, "ssm_state");
  check(t.gate_norm, dtype, {layers, e}, "gate_norm");
  const PackedLayers out = check_layers(t.out_codes, t.out_scales, {layers, d, e}, stacked, t.tokens, "out");
  check_type(t.out_scales[0], scale_dtype, "out_scales");
  for (int64_t i = 0; i < layers; ++i)
    layer.push_back({.in_codes = t.in_codes[i].const_data_ptr<uint8_t>(),
                     .out_codes = t.out_codes[i].const_data_ptr<uint8_t>(),
                     .in_scales = t.in_scales[i].const_data_ptr(),
                     .out_scales = t.out_scales[i].const_data_ptr()});
  return {.tokens = t.tokens.const_data_ptr<int64_t>(),
          .embedding = table.const_data_ptr(),
          .embedding_scale = t.embedding_scale ? t.embedding_scale->const_data_ptr() : nullptr,
          .norm = t.norm.const_data_ptr(),
          .in_codes = layer[0].in_codes,
          .in_scales = layer[0].in_scales,
          .conv_weight = t.conv_weight.const_data_ptr(),
          .conv_bias = t.conv_bias ? t.conv_bias->const_data_ptr() : nullptr,
          .conv_state = t.conv_state.mutable_data_ptr(),
          .dt_bias = t.dt_bias.const_data_ptr<float>(),
          .A = t.A.const_data_ptr<float>(),
          .D = t.D.const_data_ptr<float>(),
          .ssm_state = t.ssm_state.mutable_data_ptr(),
          .gate_norm = t.gate_norm.const_data_ptr(),
          .out_codes = layer[0].out_codes,
          .out_scales = layer[0].out_scales,
          .layer = layer.data(),
          .hidden = nullptr,
          .workspace = nullptr,
          .type = float_type(t.norm, "norm"),
          .scale_type = float_type(t.in_scales[0], "in_scales"),
          .state_type = float_type(t.ssm_state, "ssm_state"),
          .a8 = false,
          .fp8 = false,
          .in_one_scale = in.one_scale,
          .out_one_scale = out.one_scale,
          .layers = static_cast<int>(layers),
          .batch = static_cast<int>(b),
          .d_model = static_cast<int>(d),
          .heads = static_cast<int>(h),
          .head_dim = static_cast<int>(p),
          .state_size = static_cast<int>(n),
          .vocab = table.size(0),
          .in_group = static_cast<int>(in.group),
          .out_group = static_cast<int>(out.group),
          .eps = static_cast<float>(eps),
          .dt_min = static_cast<float>(dt_min),
          .dt_max = static_cast<float>(dt_max.value_or(std::numeric_limits<double>::infinity()))};
}

// ternary::decode: checks the tensors, allocates the result and hands them to the device's kernel.
template <void (*run)(const DecodeArgs&, const Tensor& workspace), bool kGpu>
Tensor decode(const Tensor& tokens, const Tensor& embedding, const std::optional<Tensor>& embedding_scale,
              const Tensor& norm, const Tensors& in_codes, const Tensors& in_scales,
              const Tensor& conv_weight, const std::optional<Tensor>& conv_bias, const Tensor& conv_state,
              const Tensor& dt_bias, const Tensor& A, const Tensor& D, const Tensor& ssm_state,
              const Tensor& gate_norm, const Tensors& out_codes, const Tensors& out_scales,
              const Tensor& workspace, double eps, double dt_min, std::optional<double> dt_max,
              std::string activations) {
  STD_TORCH_CHECK(activations == "a16" || (!kGpu && activations == "a8"), "activations must be a16",
                  kGpu ? " on a GPU" : " or a8 on a CPU", ", not ", activations);
  check_dim(tokens, 1, "tokens");
  const int64_t b = tokens.size(0);
  std::vector<DecodeLayer> layer;
  DecodeArgs args =
      model_args({tokens, embedding, embedding_scale, norm, in_codes, in_scales, conv_weight, conv_bias,
                  conv_state, dt_bias, A, D, ssm_state, gate_norm, out_codes, out_scales},
                 b, kGpu, eps, dt_min, dt_max, layer);
  check_device(workspace, tokens, "workspace");
  check_type(workspace, ScalarType::Int, "workspace");
  check_contiguous(workspace, "workspace");
  check_dim(workspace, 1, "workspace");
  Tensor hidden = torch::stable::new_empty(tokens, {b, norm.size(1)}, ScalarType::Float);
  args.hidden = hidden.mutable_data_ptr<float>();
  args.workspace = workspace.mutable_data_ptr();
  args.a8 = activations == "a8";
  run(args, workspace);
  return hidden;
}

// ternary::prefill, on a GPU.
template <void (*run)(DecodeArgs&, const Tensor& hidden)>
Tensor prefill(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, const Tensor& embedding,
               const std::optional<Tensor>& embedding_scale, const Tensor& norm, const Tensors& in_codes,
               const Tensors& in_scales, const Tensor& conv_weight, const std::optional<Tensor>& conv_bias,
               const Tensor& conv_state, const Tensor& dt_bias, const Tensor& A, const Tensor& D,
               const Tensor& ssm_state, const Tensor& gate_norm, const Tensors& out_codes,
               const Tensors& out_scales, double eps, double dt_min, std::optional<double> dt_max,
               std::string activations) {
  STD_TORCH_CHECK(activations == "a16" || activations == "fp8", "activations must be a16 or fp8, not ",
                  activations);
  check_dim(tokens, 2, "tokens");
  const auto bounds = sequence_bounds(cu_seqlens, tokens);
  std::vector<DecodeLayer> layer;
  DecodeArgs args =
      model_args({tokens, embedding, embedding_scale, norm, in_codes, in_scales, conv_weight, conv_bias,
                  conv_state, dt_bias, A, D, ssm_state, gate_norm, out_codes, out_scales},
                 count_sequences(bounds, tokens), true, eps, dt_min, dt_max, layer);
  const Sizes size = {tokens.size(0), tokens.size(1), norm.size(1)};
  Tensor hidden = torch::stable::new_empty(tokens, size, ScalarType::Float);
  args.hidden = hidden.mutable_data_ptr<float>();
  args.prefill = true;
  args.fp8 = activations == "fp8";
  args.length = tokens.size(1);
  args.cu_seqlens = bounds ? bounds->const_data_ptr<int32_t>() : nullptr;
  run(args, hidden);
  return hidden;
}

}  // namespace ternary
