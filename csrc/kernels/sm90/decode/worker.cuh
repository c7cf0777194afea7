// What a warp of the decode step has and knows, and the sums that it makes with the others.
#pragma once

#include "kernels/sm90/common/math.cuh"
#include "kernels/sm90/common/types.cuh"
#include "kernels/sm90/decode/load.cuh"
#include "kernels/sm90/decode/product.cuh"

namespace ternary::sm90 {

// Known to be the same in all lanes, so that branches on it keep the warp together.
__device__ inline int warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

// A bf16 or fp16 from its bits, without a branch, and back.
__device__ inline float widen(uint32_t bits, bool is_half) {
  const float as_half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  return is_half ? as_half : __uint_as_float(bits << 16);
}
__device__ inline uint32_t narrow(float v, bool is_half) {
  return is_half ? __half_as_ushort(__float2half_rn(v)) : __bfloat16_as_ushort(__float2bfloat16_rn(v));
}

__device__ inline float4 operator*(float4 a, float4 b) {
  return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
}
__device__ inline float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// Sums over neighbouring lanes, several side by side.
template <int kLanes, int n>
__device__ void lane_sums(float (&v)[n]) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes; lanes /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] += __shfl_xor_sync(~0u, v[i], lanes);
}

template <class Config>
class Worker {
 public:
  __device__ explicit Worker(const StepArgs& a)
      : a_(a),
        d_(a.d),
        p_(a.plan),
        work_(a),
        warp_(warp_index()),
        lane_(threadIdx.x % 32),
        half_(lane_ / 16),
        sixteenth_(lane_ % 16),
        is_half_(a.d.type == DType::f16),
        half_scales_(a.d.scale_type == DType::f16),
        params_(p_, 0, p_.params),
        in_(p_, 1, p_.in),
        states_(p_, 2, p_.states),
        out_(p_, 3, p_.out) {
    own_ = 2 * warp_ + half_;
    has_channel_ = own_ < work_.units.count * Decode::kUnit;
    channel_ = work_.units.first * Decode::kUnit + (has_channel_ ? own_ : 0);
    first_head_ = work_.units.first * Decode::kUnit / d_.head_dim;
    head_ = channel_ / d_.head_dim - first_head_;
    for (int i = 0; i < kRounds; ++i) {
      const int column = (sixteenth_ + 16 * i) * Decode::kSpan;
      in_group_[i] = group_of(column, d_.in_group, a.in_groups);
      for (int part = 0; part < Decode::kExpand; ++part)
        out_group_[part][i] = group_of(part * Config::kModel + column, d_.out_group, a.out_groups);
    }
  }

 protected:
  static constexpr int kBatch = Config::kBatch;
  static constexpr int kMaxUnits = 2 * Config::kWarps / Decode::kUnit;  // of a block: a half warp a channel
  static constexpr int kRounds = (Config::kSpans + 15) / 16;            // of a half warp over the spans
  using X = SpanOfX<kBatch>;

  // Which of a row's scales a column has; groups: 0 with one for the whole matrix.
  __device__ static int group_of(int column, int group, int groups) {
    return groups ? min(column / group, groups - 1) : 0;
  }

  // The convolution of a channel: `channel` of `channels` whose parameters lie at these places.
  struct Convolution {
    int weight, bias, inputs, channel, channels;
  };

  template <class T>
  __device__ T* shared(int offset) const {
    return reinterpret_cast<T*>(shared_memory() + offset);
  }
  // A parameter of the layer, see ParamsPlan.
  template <class T>
  __device__ const T* param(int at) const {
    return reinterpret_cast<const T*>(params_.item() + at);
  }
  __device__ uint8_t* staging() const {
    return shared_memory() + p_.staging + warp_ * Decode::kExpand * kBatch * 2 * Decode::kSpan;
  }
  __device__ bool has_span() const { return Config::kWarps == Config::kSpans || warp_ < Config::kSpans; }
  __device__ void sync() const {
    __syncwarp();  // a warp that is apart would count more than once
    sync_threads(1, Config::kWarps * 32);
  }

  __device__ float embedding(int sequence, int column) const {
    const int64_t token = d_.tokens[sequence];
    if (token < 0 || token >= d_.vocab) return __int_as_float(0x7FC00000);
    const int64_t at = token * Config::kModel + column;
    if (d_.embedding_scale)
      return static_cast<const int8_t*>(d_.embedding)[at] *
             widen(static_cast<const uint16_t*>(d_.embedding_scale)[token], half_scales_);
    return widen(static_cast<const uint16_t*>(d_.embedding)[at], is_half_);
  }

  // A lane's first column of the warp's span; the others are 4, 8 and 12 further.
  __device__ int column() const { return warp_ * Decode::kSpan + lane_ / 4 * 16 + lane_ % 4; }

  // A norm's weights of a lane's columns.
  __device__ float4 weights(int at) const {
    const uint16_t* bits = param<uint16_t>(at) + column();
    return {widen(bits[0], is_half_), widen(bits[4], is_half_), widen(bits[8], is_half_),
            widen(bits[12], is_half_)};
  }

  // The warps' sums of squares, not yet summed over the lanes of a half warp; then 1 / rms.
  __device__ float squares(int stats, int sequence) const {
    float v = 0;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int span = sixteenth_ + 16 * i;
      if (span < Config::kSpans) v += shared<float>(stats)[span * kBatch + sequence];
    }
    return v;
  }
  __device__ float factor(float squares, int columns) const {
    return rsqrtf(squares * (1.f / columns) + d_.eps);
  }

  // The sum over the spans of one row's integers, with their scales, not yet over the lanes of a half warp.
  // stats: scales of the spans of x. scales: of the row, read but not used where there is one for all.
  __device__ float total(const int32_t* sums, const float* stats, const uint16_t* scales,
                         bool one_scale_alone, float one_scale, const int (&groups)[kRounds],
                         int sequence) const {
    float v = 0;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int span = sixteenth_ + 16 * i;
      const float own = widen(scales[groups[i]], half_scales_), scale = one_scale_alone ? one_scale : own;
      if (span < Config::kSpans)
        v += static_cast<float>(sums[span * kBatch + sequence]) * (scale * stats[span * kBatch + sequence]);
    }
    return v;
  }

  // A warp's sums of a tile, for the others to see. sums: of the tile's first row and the warp's span.
  template <int kPitch>
  __device__ void put(int32_t* sums, const int32_t (&tile)[2]) const {
    static_assert(kBatch <= 4);
    if (lane_ % 4 >= kBatch) return;
    sums += lane_ / 4 * kPitch + lane_ % 4;
    sums[0] = tile[0];
    sums[8 * kPitch] = tile[1];
  }

  // What the others need to know of the warp's spans.
  template <int n>
  __device__ void put_stats(int stats, const float (&squares)[kBatch], const float (&scales)[n]) const {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (lane_ == 0) {
        shared<float>(stats)[warp_ * kBatch + b] = squares[b];
#pragma unroll
        for (int i = 0; i < n / kBatch; ++i)
          shared<float>(stats)[((i + 1) * Config::kWarps + warp_) * kBatch + b] = scales[i * kBatch + b];
      }
    }
    __syncwarp();
  }

  __device__ Convolution own_convolution() const {
    return {.weight = p_.at.weight,
            .bias = p_.at.bias,
            .inputs = p_.at.inputs,
            .channel = has_channel_ ? own_ : 0,
            .channels = work_.units.count * Decode::kUnit};
  }
  // Its sum without the newest input. inputs: as they are kept, the oldest first.
  __device__ float convolve_older(const Convolution& c, const uint16_t (&inputs)[3]) const {
    float v = d_.conv_bias ? widen(param<uint16_t>(c.bias)[c.channel], is_half_) : 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) v += widen(weight(c, i), is_half_) * widen(inputs[i], is_half_);
    return v;
  }
  // A channel's past in each sequence: its inputs as they are kept, and their sums.
  __device__ void read_convolution(const Convolution& c, uint16_t (&inputs)[kBatch][3],
                                   float (&older)[kBatch]) const {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (b >= d_.batch) break;
#pragma unroll
      for (int i = 0; i < 3; ++i) inputs[b][i] = input(c, b, i);
      older[b] = convolve_older(c, inputs[b]);
    }
  }
  // The channel's new value.
  __device__ float convolve(const Convolution& c, float older, float x) const {
    return silu_fast(older + widen(weight(c, 3), is_half_) * x);
  }
  // Input i of a channel of all, the oldest first.
  __device__ uint16_t& input_in_memory(int layer, int b, int i, int row) const {
    return static_cast<uint16_t*>(
        d_.conv_state)[((int64_t{layer} * d_.batch + b) * 3 + i) * Config::kChannels + row];
  }
  __device__ uint32_t weight(const Convolution& c, int i) const {
    return param<uint16_t>(c.weight)[c.channel * Decode::kConvWidth + i];
  }
  __device__ uint16_t input(const Convolution& c, int b, int i) const {
    return param<uint16_t>(c.inputs)[(b * 3 + i) * c.channels + c.channel];
  }

  // The rows' scales of in_proj, unless it has one: of z, of x, of B, C and dt.
  __device__ const uint16_t* in_scales(int row) const {
    return reinterpret_cast<const uint16_t*>(in_.item() + p_.in_rows * Config::kInPitch) + row * a_.in_groups;
  }
  __device__ int32_t* in_sums(int row) const {
    return shared<int32_t>(p_.in_sums) + row * Config::kSumsPitch;
  }

  __device__ int32_t* out_sums(int row, int part) const {
    return shared<int32_t>(p_.out_sums) + (row * Decode::kExpand + part) * Config::kSumsPitch;
  }

  const StepArgs& a_;
  const DecodeArgs& d_;
  const DecodePlan& p_;
  const Work work_;
  const int warp_, lane_, half_, sixteenth_;  // of the half warp
  const bool is_half_, half_scales_;
  QueueEnd params_, in_, states_, out_;
  int own_, channel_;      // the half warp's channel, counted in the block and in all
  int first_head_, head_;  // of the block; of the channel, from there
  bool has_channel_;
  int in_group_[kRounds], out_group_[Decode::kExpand][kRounds];  // of the scales, of a lane's spans
  float one_scale_ = 0;
};

}  // namespace ternary::sm90
