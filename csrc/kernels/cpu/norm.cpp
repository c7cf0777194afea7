#include "kernels/norm.h"

#include <cmath>

#include "kernels/cpu/recurrence.h"

namespace ternary::TERNARY_ISA {
namespace {

// 1 / sqrt(mean of squares + eps) of n floats, padded with zeros to whole vectors.
float scale_of(const float* v, int64_t n, float eps) {
  Vec squares{};
  for (int64_t i = 0; i < n; i += kLanes) squares += load(v + i) * load(v + i);
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps);
}

}  // namespace

void rms_norm_gated(const RmsNormGatedArgs& a, int64_t begin, int64_t end) {
  const int64_t n = a.dim / a.groups;
  Scratch h(round_up(n)), z(round_up(n)), weight(round_up(n));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / a.groups, first = item % a.groups * n;
    load_floats(a.y, a.type, row * a.y_stride + first, n, h);
    load_floats(a.z, a.type, row * a.z_stride + first, n, z);
    load_floats(a.weight, a.weight_type, first, n, weight);
    if (!a.norm_before_gate)
      for (int64_t i = 0; i < n; i += kLanes) store(h + i, load(h + i) * silu(load(z + i)));
    const float scale = scale_of(h, n, a.eps);
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec normed = load(h + i) * scale * load(weight + i);
      store(h + i, a.norm_before_gate ? normed * silu(load(z + i)) : normed);
    }
    store_floats(h, n, a.out, a.type, row * a.dim + first);
  }
}

void add_rms_norm(const AddRmsNormArgs& a, int64_t begin, int64_t end) {
  const int64_t n = a.dim;
  Scratch h(round_up(n)), x(round_up(n)), weight(round_up(n));
  load_floats(a.weight, a.weight_type, 0, n, weight);
  for (int64_t row = begin; row < end; ++row) {
    load_floats(a.x, a.type, row * a.x_stride, n, x);
    load_floats(a.residual, a.residual_type, row * n, n, h);
    for (int64_t i = 0; i < n; i += kLanes) store(h + i, load(h + i) + load(x + i));
    store_floats(h, n, a.residual, a.residual_type, row * n);
    load_floats(a.residual, a.residual_type, row * n, n, h);
    const float scale = scale_of(h, n, a.eps);
    for (int64_t i = 0; i < n; i += kLanes) store(h + i, load(h + i) * scale * load(weight + i));
    store_floats(h, n, a.y, a.weight_type, row * n);
  }
}

}  // namespace ternary::TERNARY_ISA
