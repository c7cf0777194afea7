#pragma once

#include <tuple>

#include "kernels/quantize.h"
#include "ops/weight.h"

namespace ternary {

// "[3, 17]": element `index` of a matrix of k columns, counted through it.
inline std::string place(int64_t index, int64_t k) {
  std::string text = "[";
  return text.append(std::to_string(index / k)).append(", ").append(std::to_string(index % k)).append("]");
}

// A matrix whose rows fill whole bytes of codes.
inline void check_rows(const Tensor& t, const char* name) {
  check_dim(t, 2, name);
  STD_TORCH_CHECK(t.size(1) > 0 && t.size(1) % kWeightsPerByte == 0, name,
                  " must have a positive multiple of 4 columns, not ", t.size(1));
}

// What rounds a weight, its outputs not yet filled in.
inline QuantizeArgs check_rounding(const Tensor& weight, int64_t group_size, ScalarType scale_dtype,
                                   const char* name) {
  const DType weight_type = float_type(weight, name), scale_type = float_type(scale_dtype, "scale_dtype");
  check_rows(weight, name);
  const int64_t n = weight.size(0), k = weight.size(1);
  const bool one_scale = group_size == 0;
  STD_TORCH_CHECK(
      one_scale || group_size == k || (group_size > 0 && group_size % 32 == 0 && k % group_size == 0),
      "group_size must be a multiple of 32 that divides the ", k, " columns of ", name, ", or ", k,
      " (one scale a row), or 0 (one for all), not ", group_size);
  STD_TORCH_CHECK(n > 0 || !one_scale, name, " must have a row to take the scale from, not ", shape(weight));
  return {.weight = nullptr,
          .weight_type = weight_type,
          .codes = nullptr,
          .rounded = nullptr,
          .rounded_type = weight_type,
          .scales = nullptr,
          .scale_type = scale_type,
          .sums = nullptr,
          .refused = nullptr,
          .n = n,
          .k = k,
          .group = one_scale ? k : group_size,
          .one_scale = one_scale};
}

// Hands the weight to run, and says what it refused.
template <void (*run)(const QuantizeArgs&, const Tensor& weight)>
void run_rounding(QuantizeArgs& args, const Tensor& weight, ScalarType scale_dtype, const char* name) {
  const Tensor rows = torch::stable::contiguous(weight);
  Tensor sums = torch::stable::new_empty(weight, {args.n, args.k / args.group}, ScalarType::Double);
  int64_t refused[2] = {kNothingRefused, kNothingRefused};
  args.weight = rows.const_data_ptr();
  args.sums = sums.mutable_data_ptr<double>();
  args.refused = refused;
  run(args, weight);
  STD_TORCH_CHECK(refused[0] == kNothingRefused, name, place(refused[0], args.k), " is not finite");
  STD_TORCH_CHECK(refused[1] == kNothingRefused, "the scale of the group of ",
                  args.one_scale ? args.n * args.k : args.group, " that starts at ", name,
                  place(refused[1] * args.group, args.k), " is too large for ", toString(scale_dtype));
}

// The operators on any device; where there is `refused`, run has filled it, here on the host, when it
// returns.
template <void (*run)(const QuantizeArgs&, const Tensor& weight)>
std::tuple<Tensor, Tensor> quantize(const Tensor& weight, int64_t group_size, ScalarType scale_dtype) {
  QuantizeArgs args = check_rounding(weight, group_size, scale_dtype, "weight");
  Tensor codes = torch::stable::new_empty(weight, {args.n, args.k / kWeightsPerByte}, ScalarType::Byte);
  Tensor scales =
      torch::stable::new_empty(weight, {args.one_scale ? 1 : args.n, args.k / args.group}, scale_dtype);
  if (args.n == 0) return {codes, scales};
  args.codes = codes.mutable_data_ptr<uint8_t>();
  args.scales = scales.mutable_data_ptr();
  run_rounding<run>(args, weight, scale_dtype, "weight");
  return {codes, scales};
}

template <void (*run)(const QuantizeArgs&, const Tensor& latent)>
Tensor fake_quantize(const Tensor& latent, int64_t group_size, ScalarType scale_dtype, ScalarType dtype) {
  check_type(latent, ScalarType::Float, "latent");
  QuantizeArgs args = check_rounding(latent, group_size, scale_dtype, "latent");
  args.rounded_type = float_type(dtype, "dtype");
  Tensor weight = torch::stable::new_empty(latent, {args.n, args.k}, dtype);
  if (args.n == 0) return weight;
  args.rounded = weight.mutable_data_ptr();
  // Between the kernels of one scale for the whole matrix.
  Tensor scale = torch::stable::new_empty(latent, {1}, scale_dtype);
  if (args.one_scale) args.scales = scale.mutable_data_ptr();
  run_rounding<run>(args, latent, scale_dtype, "latent");
  return weight;
}

template <void (*run)(const PackArgs&, const Tensor& ternary)>
Tensor pack(const Tensor& ternary) {
  check_type(ternary, ScalarType::Char, "ternary");
  check_rows(ternary, "ternary");
  const int64_t n = ternary.size(0), k = ternary.size(1);
  Tensor codes = torch::stable::new_empty(ternary, {n, k / kWeightsPerByte}, ScalarType::Byte);
  if (n == 0) return codes;
  const Tensor rows = torch::stable::contiguous(ternary);
  int64_t refused = kNothingRefused;
  run({.ternary = rows.const_data_ptr<int8_t>(),
       .codes = codes.mutable_data_ptr<uint8_t>(),
       .refused = &refused,
       .n = n,
       .k = k},
      ternary);
  STD_TORCH_CHECK(refused == kNothingRefused, "ternary", place(refused >> 8, k), " must be -1, 0 or 1, not ",
                  static_cast<int>(static_cast<int8_t>(refused)));
  return codes;
}

template <void (*run)(const UnpackArgs&, const Tensor& codes)>
Tensor unpack(const Tensor& codes) {
  check_type(codes, ScalarType::Byte, "codes");
  check_dim(codes, 2, "codes");
  check_contiguous(codes, "codes");
  const int64_t n = codes.size(0), k = codes.size(1) * kWeightsPerByte;
  Tensor ternary = torch::stable::new_empty(codes, {n, k}, ScalarType::Char);
  if (ternary.numel() == 0) return ternary;
  run({.codes = codes.const_data_ptr<uint8_t>(),
       .ternary = ternary.mutable_data_ptr<int8_t>(),
       .n = n,
       .k = k},
      codes);
  return ternary;
}

template <void (*run)(const FirstInvalidArgs&, const Tensor& codes)>
int64_t first_invalid(const Tensor& codes) {
  check_type(codes, ScalarType::Byte, "codes");
  check_contiguous(codes, "codes");
  int64_t first = kNothingRefused;
  run({.codes = codes.const_data_ptr<uint8_t>(), .first = &first}, codes);
  return first == kNothingRefused ? -1 : first;
}

template <void (*run)(const DequantizeArgs&, const Tensor& codes)>
Tensor dequantize(const Tensor& codes, const Tensor& scales, ScalarType dtype) {
  const DType weight_type = float_type(dtype, "dtype");
  const PackedShape w = check_packed(codes, scales);
  Tensor weight = torch::stable::new_empty(codes, {w.n, w.k}, dtype);
  if (w.n == 0) return weight;
  run({.codes = codes.const_data_ptr<uint8_t>(),
       .scales = scales.const_data_ptr(),
       .scale_type = float_type(scales, "scales"),
       .weight = weight.mutable_data_ptr(),
       .weight_type = weight_type,
       .n = w.n,
       .k = w.k,
       .group = w.group,
       .one_scale = w.one_scale},
      codes);
  return weight;
}

}  // namespace ternary
