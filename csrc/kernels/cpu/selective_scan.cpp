#include "kernels/selective_scan.h"

#include <cmath>

#include "kernels/codes.h"
#include "kernels/cpu/recurrence.h"

namespace ternary::TERNARY_ISA {
namespace {

constexpr int64_t kBlock = kScanBlock;

// One channel, one token: advances its state row by dt, returns h C. Rows of n floats, whole vectors.
inline float advance(float* h, const float* A, const float* B, const float* C, float dt, float xdt,
                     int64_t n) {
  Vec y{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec next = decay(dt * load(A + i)) * load(h + i) + xdt * load(B + i);
    store(h + i, next);
    y += next * load(C + i);
  }
  return sum(y);
}

// dt_weight^T of channels first .. first + channels as floats, [rank, kBlock].
void load_weight(const SelectiveScanArgs& a, int64_t first, int64_t channels, float* weight) {
  const int64_t rank = a.dt_rank, groups = rank / a.dt_group;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t row = first + c;
    for (int64_t k = 0; k < rank; ++k) {
      float w;
      if (a.dt_scales)
        w = weight_at(static_cast<const uint8_t*>(a.dt_weight) + row * (rank / kWeightsPerByte), k) *
            load_float(a.dt_scales, a.dt_scale_type, a.dt_one_scale ? 0 : row * groups + k / a.dt_group);
      else
        w = load_float(a.dt_weight, a.type, row * rank + k);
      weight[k * kBlock + c] = w;
    }
  }
}

// dt[kBlock] = low[rank] weight
inline void project(const float* low, const float* weight, int64_t rank, float* dt) {
  Vec sums[kBlock / kLanes] = {};
  for (int64_t k = 0; k < rank; ++k)
    for (int64_t c = 0; c < kBlock; c += kLanes) sums[c / kLanes] += low[k] * load(weight + k * kBlock + c);
  __builtin_memcpy(dt, sums, sizeof sums);
}

}  // namespace

void selective_scan(const SelectiveScanArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.channels + kBlock - 1) / kBlock, n = a.state_size;
  alignas(64) float x[kBlock] = {}, dt[kBlock] = {}, z[kBlock] = {}, y[kBlock] = {}, D[kBlock] = {},
                    bias[kBlock] = {};
  Scratch B(round_up(n)), C(round_up(n)), padded_A(n == round_up(n) ? 0 : kBlock * round_up(n));
  Scratch low(a.dt_rank), weight(a.dt_rank * kBlock);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t sequence = item / blocks, channel = item % blocks * kBlock;
    const int64_t channels = a.channels - channel < kBlock ? a.channels - channel : kBlock;
    const auto [first, last] = tokens_of(a, sequence);
    if (a.D) load_floats(a.D, DType::f32, channel, channels, D);
    if (a.dt_bias) load_floats(a.dt_bias, DType::f32, channel, channels, bias);
    if (a.dt_weight) load_weight(a, channel, channels, weight);
    State state(a, (sequence * a.channels + channel) * n, channels, n);
    const float* A = a.A + channel * n;
    if (n != state.stride) {
      for (int64_t c = 0; c < channels; ++c)
        load_floats(A, DType::f32, c * n, n, padded_A + c * state.stride);
      A = padded_A;
    }

    for (int64_t t = first; t < last; ++t) {
      load_floats(a.x, a.type, t * a.x_stride + channel, channels, x);
      if (a.dt_weight) {
        load_floats(a.dt, a.type, t * a.dt_stride, a.dt_rank, low);
        project(low, weight, a.dt_rank, dt);
      } else {
        load_floats(a.dt, a.type, t * a.dt_stride + channel, channels, dt);
      }
      load_floats(a.B, a.type, t * a.B_stride, n, B);
      load_floats(a.C, a.type, t * a.C_stride, n, C);
      for (int64_t c = 0; c < kBlock; c += kLanes)
        store(dt + c, step_size(load(dt + c) + load(bias + c), a.dt_softplus, 0.0f, INFINITY));
      for (int64_t c = 0; c < channels; ++c)
        y[c] = advance(state.data + c * state.stride, A + c * state.stride, B, C, dt[c], dt[c] * x[c],
                       state.stride);
      for (int64_t c = 0; c < kBlock; c += kLanes) store(y + c, load(y + c) + load(D + c) * load(x + c));
      if (a.z) {
        load_floats(a.z, a.type, t * a.z_stride + channel, channels, z);
        for (int64_t c = 0; c < kBlock; c += kLanes) store(y + c, load(y + c) * silu(load(z + c)));
      }
      store_floats(y, channels, a.y, a.type, t * a.channels + channel);
    }
    state.close();
  }
}

}  // namespace ternary::TERNARY_ISA
