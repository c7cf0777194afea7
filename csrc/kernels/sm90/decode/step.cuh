// The decode step: one persistent block a multiprocessor, all layers, the blocks exchanging values.
//
// Per layer and block, each warp with its span of x and spans of y:
//   1. x arrives. Rows of in_proj times x; the warps' partial sums meet in shared memory. The norm's factor
//      1 / rms is one number a sequence, so it multiplies the products. The blocks that have rows of B, C or
//      dt take these first, convolve and send them; the rows of z and x are for the block itself.
//   2. B, C and dt arrive. Each half of a warp updates the state of a channel and sends y silu(z).
//   3. y arrives. Rows of out_proj times y, with the gated norm's factor; the block keeps its part of the
//      residual stream, adds and sends it.
// Everything between the blocks is fp32. A layer has time for few instructions: what a warp needs for its
// channel or row is read before it waits for others, and sizes are compiled in.
#pragma once

#include "kernels/sm90/common/math.cuh"
#include "kernels/sm90/common/types.cuh"
#include "kernels/sm90/decode/load.cuh"
#include "kernels/sm90/decode/product.cuh"

namespace ternary::sm90 {

// Known to be the same in all lanes, so that branches on it keep the warp together.
__device__ inline int warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

// A bf16 or fp16 from its bits, and back.
__device__ inline float widen(uint32_t bits, bool is_half) {
  return is_half ? __half2float(__ushort_as_half(static_cast<uint16_t>(bits))) : __uint_as_float(bits << 16);
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

// B, C and the steps have arrived.
template <class Config>
__device__ void sync_received() {
  __syncwarp();
  sync_threads(2, 32 * (Config::kWarps + 1));
}

template <class Config>
class Step {
 public:
  __device__ explicit Step(const StepArgs& a)
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
      in_group_[i] = a.in_groups ? min(column / d_.in_group, a.in_groups - 1) : 0;
      for (int part = 0; part < Decode::kExpand; ++part)
        out_group_[part][i] =
            a.out_groups ? min((part * Config::kModel + column) / d_.out_group, a.out_groups - 1) : 0;
    }
  }

  __device__ void run() {
    const uint32_t done = *a_.exchange.counter;
    begin();
    for (int layer = 0; layer < d_.layers; ++layer) {
      const Region here = a_.exchange.region(done + layer);
      params_.acquire();
      if (work_.in_tiles()) {
        project_in(layer, here, a_.exchange.region(done + layer - 1));
        if (work_.units.count) update(layer, here);
        in_.done();
      }
      project_out(layer, here);
      params_.done();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *a_.exchange.counter = done + d_.layers;
  }

 private:
  static constexpr int kBatch = Config::kBatch;
  static constexpr bool kEarly = kBatch <= Decode::kFewRows;  // there are registers for sums made ahead
  static constexpr int kRounds = (Config::kSpans + 15) / 16;  // of a half warp over the spans
  using X = SpanOfX<kBatch>;

  // The convolution of a half warp's channel: `channel` of `channels` whose parameters lie at these places,
  // `row` of all. Lane i < 3 has input i, the oldest first; lane 3 the bias.
  struct Convolution {
    int weight, bias, inputs, channel, channels, row;
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
    return shared_memory() + p_.staging + warp_ * Config::kStagedSpans * kBatch * 2 * Decode::kSpan;
  }
  __device__ bool has_span() const { return Config::kWarps == Config::kSpans || warp_ < Config::kSpans; }
  __device__ void sync() const {
    __syncwarp();  // a warp that is apart would count more than once
    sync_threads(1, Config::kWarps * 32);
  }

  // The residual stream starts as the tokens' embedding.
  __device__ void begin() {
    for (int i = threadIdx.x; i < work_.outs * Decode::kTileRows * kBatch; i += Config::kWarps * 32)
      if (i % kBatch < d_.batch) shared<float>(p_.residual)[i] = embedding(i % kBatch, out_row(i / kBatch));
    __syncwarp();
  }

  __device__ int out_row(int row) const {
    const int tile = work_.first_out + row / Decode::kTileRows * static_cast<int>(gridDim.x);
    return tile * Decode::kTileRows + row % Decode::kTileRows;
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
  // stats: scales of the spans of x. scales: of the row, or null: one.
  __device__ float total(const int32_t* sums, const float* stats, const uint16_t* scales, float one_scale,
                         const int (&groups)[kRounds], int sequence) const {
    float v = 0;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int span = sixteenth_ + 16 * i;
      const float scale = scales ? widen(scales[groups[i]], half_scales_) : one_scale;
      if (span < Config::kSpans)
        v += static_cast<float>(sums[span * kBatch + sequence]) * (scale * stats[span * kBatch + sequence]);
    }
    return v;
  }

  // A warp's sums of a tile, for the others to see. sums: of the tile's first row and the warp's span.
  __device__ void put(int32_t* sums, int pitch, const int32_t (&tile)[X::kTiles][2]) const {
#pragma unroll
    for (int i = 0; i < X::kTiles; ++i) {
      const int sequence = i * 4 + lane_ % 4;
      if (sequence < kBatch) {
        sums[lane_ / 4 * pitch + sequence] = tile[i][0];
        sums[(lane_ / 4 + 8) * pitch + sequence] = tile[i][1];
      }
    }
  }

  // What the others need to know of the warp's spans.
  template <int n>
  __device__ void put_stats(int stats, float (&squares)[kBatch], const float (&scales)[n]) const {
    lane_sums<32>(squares);
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
            .channels = work_.units.count * Decode::kUnit,
            .row = channel_};
  }
  // A lane's part of the sum, without the newest input.
  __device__ float convolve_older(const Convolution& c, int b) const {
    float v = 0;
    if (sixteenth_ < 3) v = widen(weight(c, sixteenth_), is_half_) * widen(input(c, b, sixteenth_), is_half_);
    if (sixteenth_ == 3 && d_.conv_bias) v = widen(param<uint16_t>(c.bias)[c.channel], is_half_);
    return v;
  }
  // The channel's new value.
  __device__ float convolve(const Convolution& c, float older, float x) const {
    return silu_fast(older + widen(weight(c, 3), is_half_) * x);
  }
  // Its inputs move up by one.
  __device__ void shift(const Convolution& c, int layer, int b, float x) const {
    if (sixteenth_ < 3)
      static_cast<uint16_t*>(
          d_.conv_state)[((int64_t{layer} * d_.batch + b) * 3 + sixteenth_) * Config::kChannels + c.row] =
          static_cast<uint16_t>(sixteenth_ < 2 ? input(c, b, sixteenth_ + 1) : narrow(x, is_half_));
  }
  __device__ uint32_t weight(const Convolution& c, int i) const {
    return param<uint16_t>(c.weight)[c.channel * Decode::kConvWidth + i];
  }
  __device__ uint32_t input(const Convolution& c, int b, int i) const {
    return param<uint16_t>(c.inputs)[(b * 3 + i) * c.channels + c.channel];
  }

  // The rows' scales of in_proj: of z, of x, of B, C and dt. Null: one for the matrix.
  __device__ const uint16_t* in_scales(int row) const {
    if (!a_.in_groups) return nullptr;
    return reinterpret_cast<const uint16_t*>(in_.item() + p_.in_rows * Config::kInPitch) + row * a_.in_groups;
  }
  __device__ int32_t* in_sums(int row) const {
    return shared<int32_t>(p_.in_sums) + row * Config::kSumsPitch;
  }

  // The half warp's row of B, C or dt, behind those of z and x.
  __device__ int shared_row() const { return work_.shared_tile * Decode::kTileRows + own_; }

  __device__ void project_in(int layer, const Region& here, const Region& last) {
    if constexpr (kEarly) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        older_[b] = work_.units.count ? convolve_older(own_convolution(), b) : 0;
      lane_sums<16>(older_);
    }
    float4 norm = {};
    if (has_span()) norm = weights(p_.at.norm);
    if (d_.in_one_scale) one_scale_ = widen(static_cast<const uint16_t*>(d_.in_scales)[layer], half_scales_);

    X span;
    if (has_span()) {
      float4 x[kBatch];
      float squares[kBatch], scales[kBatch];
      receive_x(x, layer, last);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        squares[b] = dot(x[b], x[b]);
        x[b] = x[b] * norm;
      }
      X::template set<1>(&span, x, scales, staging());
      put_stats(p_.x_stats, squares, scales);
    }

    const uint8_t* codes =
        in_.acquire() + lane_ / 4 * Config::kInPitch + warp_ * (Decode::kSpan / 4) + lane_ % 4 * 8;
    const auto tile = [&](const uint8_t* codes, int row) {
      int32_t sums[X::kTiles][2];
      span.template multiply<Config::kInPitch>(sums, codes);
      put(in_sums(row) + warp_ * kBatch, Config::kSumsPitch, sums);
    };
    constexpr int kTileBytes = Decode::kTileRows * Config::kInPitch;
    if (work_.shared_tile >= 0) {
      if (has_span()) tile(codes, 0);
      codes += kTileBytes;
      sync();
      if (2 * warp_ < Decode::kTileRows) send_shared(layer, here);
    }
    if (has_span()) {
#pragma unroll 2
      for (int unit = 0; unit < work_.units.count; ++unit, codes += kTileBytes)
        tile(codes, (unit + 1) * Decode::kTileRows);
    }
    sync();
  }

  __device__ void receive_x(float4 (&x)[kBatch], int layer, const Region& last) const {
    if (layer == 0) {
      const int at = column();
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        x[b] = {};
        if (b < d_.batch)
          x[b] = {embedding(b, at), embedding(b, at + 4), embedding(b, at + 8), embedding(b, at + 12)};
      }
      __syncwarp();
      return;
    }
    const uint32_t* from[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      from[b] = last.x + min(b, d_.batch - 1) * Config::kModel + warp_ * Decode::kSpan + 4 * lane_;
    receive(x, from, last.epoch);
  }

  // Finishes a row of B, C or dt a half warp and sends it to all blocks.
  __device__ void send_shared(int layer, const Region& here) const {
    const int index = shared_row(), head = index - 2 * Decode::kStateSize;
    const uint16_t* scales = in_scales(2 * work_.units.count * Decode::kUnit + own_);
    const float* stats = shared<float>(p_.x_stats) + Config::kWarps * kBatch;
    const Convolution c = {.weight = p_.at.shared_weight,
                           .bias = p_.at.shared_bias,
                           .inputs = p_.at.shared_inputs,
                           .channel = own_,
                           .channels = Decode::kTileRows,
                           .row = Config::kInner + index};
    const int at = min(max(head, 0), d_.heads - 1);
    const float dt_bias = param<float>(p_.at.dt_bias)[at], A = param<float>(p_.at.A)[at];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (b >= d_.batch) break;
      float v[3] = {total(in_sums(own_), stats, scales, one_scale_, in_group_, b), squares(p_.x_stats, b),
                    convolve_older(c, b)};
      lane_sums<16>(v);
      const float value = v[0] * factor(v[1], Config::kModel);
      const float mixed = convolve(c, v[2], value);
      float dt = value + dt_bias;
      dt = softplus_fast(dt);
      dt = fminf(fmaxf(dt, d_.dt_min), d_.dt_max);
      const float decay = __expf(fminf(dt * A, 0));
      if (head < 0 && sixteenth_ == 0)
        send(here.shared + b * 2 * Decode::kStateSize + index, mixed, here.epoch);
      if (head >= 0 && head < d_.heads && sixteenth_ < 4)
        send(here.steps + (b * d_.heads + head) * 4 + sixteenth_,
             sixteenth_ == 0   ? dt
             : sixteenth_ == 1 ? decay
                               : 0,
             here.epoch);
      __syncwarp();
      if (head < 0) shift(c, layer, b, value);
    }
  }

  __device__ void update(int layer, const Region& here) {
    const bool works = 2 * warp_ < work_.units.count * Decode::kUnit;
    const int local = has_channel_ ? own_ : 0;
    const int row = (local / Decode::kUnit + 1) * Decode::kTileRows + local % Decode::kUnit;
    const float* stats = shared<float>(p_.x_stats) + Config::kWarps * kBatch;
    const uint16_t* z_scales = in_scales(local);
    const uint16_t* x_scales = in_scales(work_.units.count * Decode::kUnit + local);
    const Convolution c = own_convolution();
    float z[kBatch], x[kBatch], newest[kBatch];
    if (works) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (b >= d_.batch) break;
        float v[4] = {total(in_sums(row), stats, z_scales, one_scale_, in_group_, b),
                      total(in_sums(row + Decode::kUnit), stats, x_scales, one_scale_, in_group_, b),
                      squares(p_.x_stats, b), kEarly ? 0 : convolve_older(c, b)};
        lane_sums<16>(v);
        if constexpr (kEarly) v[3] = older_[b];
        const float scale = factor(v[2], Config::kModel);
        z[b] = v[0] * scale;
        x[b] = convolve(c, v[3], v[1] * scale);
        newest[b] = v[1] * scale;
      }
    }
    const float skip = param<float>(p_.at.D)[first_head_ + head_];
    sync_received<Config>();
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (b >= d_.batch) break;
      const uint8_t* states = states_.acquire();
      if (works) {
        float4 h[2];
        const float y = advance(h, states, local, b, x[b]);
        if (has_channel_ && sixteenth_ == 0)
          send(here.y + b * Config::kInner + place(channel_), (y + skip * x[b]) * silu_fast(z[b]),
               here.epoch);
        __syncwarp();
        if (has_channel_) {  // behind y, which others wait for
          store_state(h, layer, b);
          shift(c, layer, b, newest[b]);
        }
      }
      states_.done();
    }
  }

  // One channel's state: h = decay h + dt x B, this lane's columns and those 64 further; returns h C.
  __device__ float advance(float4 (&h)[2], const uint8_t* states, int local, int b, float x) const {
    const int from = local * Decode::kStateSize + 4 * sixteenth_;
    const float2 step = shared<float2>(p_.steps)[b * Decode::kMaxHeads + head_];
    const float4* in = shared<float4>(p_.shared) + b * (Decode::kStateSize / 2) + sixteenth_;
    const float decay = step.y, input = step.x * x;
    float y[1] = {};
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const float4 B = in[16 * part], C = in[Decode::kStateSize / 4 + 16 * part];
      float4 v;
      if (d_.state_type == DType::f32) {
        v = reinterpret_cast<const float4*>(states)[from / 4 + 16 * part];
      } else {
        const bool is_half = d_.state_type == DType::f16;
        const uint2 bits = reinterpret_cast<const uint2*>(states)[from / 4 + 16 * part];
        v = {widen(bits.x & 0xFFFF, is_half), widen(bits.x >> 16, is_half), widen(bits.y & 0xFFFF, is_half),
             widen(bits.y >> 16, is_half)};
      }
      h[part] = {decay * v.x + input * B.x, decay * v.y + input * B.y, decay * v.z + input * B.z,
                 decay * v.w + input * B.w};
      y[0] += dot(h[part], C);
    }
    lane_sums<16>(y);
    return y[0];
  }

  __device__ void store_state(const float4 (&h)[2], int layer, int b) const {
    const int64_t to =
        ((int64_t{layer} * d_.batch + b) * Config::kInner + channel_) * Decode::kStateSize + 4 * sixteenth_;
    const bool is_half = d_.state_type == DType::f16;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const float4 v = h[part];
      if (d_.state_type == DType::f32) {
        reinterpret_cast<float4*>(d_.ssm_state)[to / 4 + 16 * part] = v;
      } else {
        reinterpret_cast<uint2*>(d_.ssm_state)[to / 4 + 16 * part] = {
            narrow(v.x, is_half) | narrow(v.y, is_half) << 16, narrow(v.z, is_half) | narrow(v.w, is_half)
                                                                                          << 16};
      }
    }
  }

  __device__ int32_t* out_sums(int row, int part) const {
    return shared<int32_t>(p_.out_sums) + (row * Decode::kExpand + part) * Config::kSumsPitch;
  }

  __device__ void project_out(int layer, const Region& here) {
    if (!work_.outs) return;
    float one_scale = 0;
    if (d_.out_one_scale) one_scale = widen(static_cast<const uint16_t*>(d_.out_scales)[layer], half_scales_);
    X spans[Decode::kExpand];
    if (has_span()) receive_y(here, spans);
    const uint8_t* item = out_.acquire();
    if (has_span()) {
      const uint8_t* codes =
          item + lane_ / 4 * Config::kOutPitch + warp_ * (Decode::kSpan / 4) + lane_ % 4 * 8;
      for (int i = 0; i < work_.outs; ++i, codes += Decode::kTileRows * Config::kOutPitch) {
#pragma unroll
        for (int part = 0; part < Decode::kExpand; ++part) {
          int32_t sums[X::kTiles][2];
          spans[part].template multiply<Config::kOutPitch>(sums, codes + part * (Config::kModel / 4));
          put(out_sums(i * Decode::kTileRows, part) + warp_ * kBatch, Decode::kExpand * Config::kSumsPitch,
              sums);
        }
      }
    }
    sync();
    const float* stats = shared<float>(p_.y_stats) + Config::kWarps * kBatch;
    for (int pair = warp_; 2 * pair < work_.outs * Decode::kTileRows; pair += Config::kWarps) {
      const int row = 2 * pair + half_;
      const uint16_t* scales = nullptr;
      if (a_.out_groups)
        scales =
            reinterpret_cast<const uint16_t*>(item + p_.out_rows * Config::kOutPitch) + row * a_.out_groups;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (b >= d_.batch) break;
        float v[2] = {0, squares(p_.y_stats, b)};
#pragma unroll
        for (int part = 0; part < Decode::kExpand; ++part)
          v[0] += total(out_sums(row, part), stats + part * Config::kWarps * kBatch, scales, one_scale,
                        out_group_[part], b);
        lane_sums<16>(v);
        if (sixteenth_ == 0) {
          float& residual = shared<float>(p_.residual)[row * kBatch + b];
          residual += v[0] * factor(v[1], Config::kInner);
          const int column = out_row(row);
          send(here.x + b * Config::kModel + place(column), residual, here.epoch);
          if (layer + 1 == d_.layers) d_.hidden[b * Config::kModel + column] = residual;
        }
        __syncwarp();
      }
    }
    out_.done();
  }

  // y times the gated norm's weights, as many of the spans at once as registers allow.
  __device__ void receive_y(const Region& here, X (&spans)[Decode::kExpand]) const {
    constexpr int kAtOnce = Config::kStagedSpans, kRows = kAtOnce * kBatch;
    float squares[kBatch] = {}, scales[Decode::kExpand * kBatch];
#pragma unroll
    for (int first = 0; first < Decode::kExpand; first += kAtOnce) {
      const uint32_t* from[kRows];
      float4 y[kRows];
      float row_scales[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        from[i] = here.y + min(i % kBatch, d_.batch - 1) * Config::kInner +
                  (first + i / kBatch) * Config::kModel + warp_ * Decode::kSpan + 4 * lane_;
      receive(y, from, here.epoch);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float4 norm = weights(p_.at.gate_norm + (first + i) * Config::kModel * 2);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          float4& v = y[i * kBatch + b];
          squares[b] += dot(v, v);
          v = v * norm;
        }
      }
      X::template set<kAtOnce>(spans + first, y, row_scales, staging());
#pragma unroll
      for (int i = 0; i < kRows; ++i) scales[first * kBatch + i] = row_scales[i];
    }
    put_stats(p_.y_stats, squares, scales);
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
  float older_[kBatch];  // of the channel's convolution, without the newest input
};

// The warp that waits for B, C and the steps of the block's heads and puts them in shared memory:
// [b][2][kStateSize], and [b][heads] (dt, decay).
template <class Config>
__device__ void run_receiver(const StepArgs& a) {
  const Work work(a);
  if (!work.units.count) return;
  const int lane = threadIdx.x % 32, first = work.units.first * Decode::kUnit;
  const int first_head = first / a.d.head_dim;
  const int heads = (first + work.units.count * Decode::kUnit - 1) / a.d.head_dim - first_head + 1;
  const uint32_t done = *a.exchange.counter;
  for (int layer = 0; layer < a.d.layers; ++layer) {
    const Region here = a.exchange.region(done + layer);
    for (int b = 0; b < a.d.batch; ++b) {
      const uint32_t* words = here.shared + b * 2 * Decode::kStateSize + 4 * lane;
      const int head = first_head + min(lane, heads - 1);
      const uint32_t* const from[3] = {words, words + Decode::kStateSize,
                                       here.steps + (b * a.d.heads + head) * 4};
      float4 in[3];
      receive(in, from, here.epoch);
      float4* to =
          reinterpret_cast<float4*>(shared_memory() + a.plan.shared) + b * (Decode::kStateSize / 2) + lane;
      to[0] = in[0];
      to[Decode::kStateSize / 4] = in[1];
      if (lane < heads)
        reinterpret_cast<float2*>(shared_memory() + a.plan.steps)[b * Decode::kMaxHeads + lane] = {in[2].x,
                                                                                                   in[2].y};
    }
    sync_received<Config>();
  }
}

template <class Config>
__global__ void __launch_bounds__(32 * (Config::kWarps + 2), 1)
    decode_kernel(const __grid_constant__ StepArgs a) {
  if (threadIdx.x == 0) {
    QueueEnd(a.plan, 0, a.plan.params).init(Config::kWarps);
    QueueEnd(a.plan, 1, a.plan.in).init(Config::kWarps);
    QueueEnd(a.plan, 2, a.plan.states).init(Config::kWarps);
    QueueEnd(a.plan, 3, a.plan.out).init(Config::kWarps);
    fence_barriers();
  }
  __syncthreads();
  if (warp_index() == Config::kWarps) {
    Loader<Config>(a).run();
  } else if (warp_index() == Config::kWarps + 1) {
    run_receiver<Config>(a);
  } else {
    Step<Config>(a).run();
  }
}

}  // namespace ternary::sm90
