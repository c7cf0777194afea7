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

#include "kernels/sm90/decode/messages.cuh"

namespace ternary::sm90 {

template <class Config>
class Step : Worker<Config> {
  using Base = Worker<Config>;

 public:
  using Base::Base;

  __device__ void run() {
    const uint32_t done = *a_.exchange.counter;
    begin();
    for (int layer = 0; layer < d_.layers; ++layer) {
      const Region here = a_.exchange.region(done + layer);
      params_.acquire();
      if (work_.in_tiles()) {
        project_in(layer, a_.exchange.region(done + layer - 1));
        if (work_.units.count)
          update(layer);
        else
          in_.done();
      }
      project_out(layer, here);
      params_.done();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *a_.exchange.counter = done + d_.layers;
  }

 private:
  using Base::a_, Base::d_, Base::p_, Base::work_, Base::warp_, Base::lane_, Base::half_, Base::sixteenth_;
  using Base::channel_, Base::first_head_, Base::head_, Base::has_channel_, Base::in_group_, Base::out_group_;
  using Base::embedding, Base::column, Base::weights, Base::squares, Base::factor, Base::total;
  using Base::in_scales, Base::in_sums, Base::out_sums;
  using Base::is_half_, Base::half_scales_, Base::params_, Base::in_, Base::states_, Base::out_, Base::own_;
  using Base::kBatch, Base::staging, Base::has_span, Base::sync;
  using Base::one_scale_, Base::kMaxUnits, Base::put, Base::put_stats;
  using Base::own_convolution, Base::convolve;
  using typename Base::Convolution, typename Base::X;

  // The residual stream starts as the tokens' embedding.
  __device__ void begin() {
    for (int i = threadIdx.x; i < work_.outs * Decode::kTileRows * kBatch; i += Config::kWarps * 32)
      if (i % kBatch < d_.batch)
        this->template shared<float>(p_.residual)[i] = embedding(i % kBatch, work_.out_row(i / kBatch));
    __syncwarp();
  }

  __device__ void project_in(int layer, const Region& last) {
    float4 norm = {};
    if (has_span()) norm = weights(p_.at.norm);
    if (d_.in_one_scale) one_scale_ = widen(static_cast<const uint16_t*>(d_.in_scales)[layer], half_scales_);
    const uint8_t* codes =
        in_.acquire() + lane_ / 4 * Config::kInPitch + warp_ * (Decode::kSpan / 4) + lane_ % 4 * 8;
    constexpr int kTileBytes = Decode::kTileRows * Config::kInPitch;
    CodesOfTile next = {};
    if (has_span()) next.load<Config::kInPitch>(codes);
    uint16_t inputs[kBatch][3] = {};
    if (work_.units.count) this->read_convolution(own_convolution(), inputs, older_);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) kept_[b][0] = inputs[b][1], kept_[b][1] = inputs[b][2];

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
      lane_sums<32>(squares);
      X::template set<1>(&span, x, scales, staging());
      put_stats(p_.x_stats, squares, scales);
    }

    int32_t* to = in_sums(0) + warp_ * kBatch;
    const auto tile = [&](int row, bool last) {
      const CodesOfTile now = next;
      if (!last) next.load<Config::kInPitch>(codes += kTileBytes);
      int32_t sums[2];
      span.multiply(sums, now);
      this->template put<Config::kSumsPitch>(to + row * Config::kSumsPitch, sums);
    };
    if (work_.shared_tile >= 0) {
      if (has_span()) tile(0, work_.units.count == 0);
      hand_over(Meeting::shared, Config::kWarps);
    }
    if (has_span()) {
#pragma unroll
      for (int unit = 0; unit < kMaxUnits; ++unit) {
        if (unit >= work_.units.count) break;
        tile((unit + 1) * Decode::kTileRows, unit + 1 == work_.units.count);
      }
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

  __device__ void update(int layer) {
    const bool works = 2 * warp_ < work_.units.count * Decode::kUnit;
    const int local = has_channel_ ? own_ : 0;
    const int row = (local / Decode::kUnit + 1) * Decode::kTileRows + local % Decode::kUnit;
    const float* stats = this->template shared<float>(p_.x_stats) + Config::kWarps * kBatch;
    const uint16_t* z_scales = in_scales(local);
    const uint16_t* x_scales = in_scales(work_.units.count * Decode::kUnit + local);
    const Convolution c = own_convolution();
    float gate[kBatch], x[kBatch];
    if (works) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (b >= d_.batch) break;
        float v[3] = {
            total(in_sums(row), stats, z_scales, d_.in_one_scale, one_scale_, in_group_, b),
            total(in_sums(row + Decode::kUnit), stats, x_scales, d_.in_one_scale, one_scale_, in_group_, b),
            squares(p_.x_stats, b)};
        lane_sums<16>(v);
        const float scale = factor(v[2], Config::kModel);
        gate[b] = silu_fast(v[0] * scale);
        x[b] = convolve(c, older_[b], v[1] * scale);
        newest_[b] = v[1] * scale;
      }
    }
    in_.done();
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (b >= d_.batch) break;
      const uint8_t* states = states_.acquire();
      if (works) load_state(state_[b], states, local);
      states_.done();
    }
    const float skip = this->template param<float>(p_.at.D)[first_head_ + head_];
    meet(Meeting::received, Config::kWarps);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (b >= d_.batch || !works) break;
      const float y = advance(state_[b], b, x[b]);
      if (has_channel_ && sixteenth_ == 0)
        this->template shared<float>(p_.sent_y)[b * work_.units.count * Decode::kUnit + own_] =
            (y + skip * x[b]) * gate[b];
    }
    hand_over(Meeting::y, Config::kWarps);
  }

  // What a channel keeps of a layer, while the next one waits for x: 2 MB of stores from all blocks at once
  // are ahead of everything behind them.
  __device__ void store_kept(int layer) const {
    if (!has_channel_) return;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (b >= d_.batch) break;
      store_state(state_[b], layer, b);
      if (sixteenth_ < 3)
        this->input_in_memory(layer, b, sixteenth_, channel_) =
            sixteenth_ == 0   ? kept_[b][0]
            : sixteenth_ == 1 ? kept_[b][1]
                              : static_cast<uint16_t>(narrow(newest_[b], is_half_));
    }
  }

  // A lane's columns of a channel's state, and those 64 further.
  __device__ void load_state(float4 (&h)[2], const uint8_t* states, int local) const {
    const int from = local * Decode::kStateSize + 4 * sixteenth_;
    const bool is_half = d_.state_type == DType::f16;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (d_.state_type == DType::f32) {
        h[part] = reinterpret_cast<const float4*>(states)[from / 4 + 16 * part];
      } else {
        const uint2 bits = reinterpret_cast<const uint2*>(states)[from / 4 + 16 * part];
        h[part] = {widen(bits.x & 0xFFFF, is_half), widen(bits.x >> 16, is_half),
                   widen(bits.y & 0xFFFF, is_half), widen(bits.y >> 16, is_half)};
      }
    }
  }

  // h = decay h + dt x B; returns h C.
  __device__ float advance(float4 (&h)[2], int b, float x) const {
    const float2 step = this->template shared<float2>(p_.steps)[b * Decode::kMaxHeads + head_];
    const float4* in = this->template shared<float4>(p_.shared) + b * (Decode::kStateSize / 2) + sixteenth_;
    const float decay = step.y, input = step.x * x;
    float y[1] = {};
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const float4 v = h[part], B = in[16 * part], C = in[Decode::kStateSize / 4 + 16 * part];
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

  __device__ void project_out(int layer, const Region& here) {
    if (!work_.outs) return store_kept(layer);
    float one_scale = 0;
    if (d_.out_one_scale) one_scale = widen(static_cast<const uint16_t*>(d_.out_scales)[layer], half_scales_);
    const uint8_t* item = out_.acquire();
    if (has_span()) {
      const uint8_t* codes =
          item + lane_ / 4 * Config::kOutPitch + warp_ * (Decode::kSpan / 4) + lane_ % 4 * 8;
      CodesOfTile next[Decode::kExpand];
      const auto load = [&] {
#pragma unroll
        for (int part = 0; part < Decode::kExpand; ++part)
          next[part].load<Config::kOutPitch>(codes + part * (Config::kModel / 4));
      };
      load();
      X spans[Decode::kExpand];
      receive_y(here, spans);
      for (int i = 0; i < work_.outs; ++i) {
        if (i > 0) {
          codes += Decode::kTileRows * Config::kOutPitch;
          load();
        }
#pragma unroll
        for (int part = 0; part < Decode::kExpand; ++part) {
          int32_t sums[2];
          spans[part].multiply(sums, next[part]);
          this->template put<Decode::kExpand * Config::kSumsPitch>(
              out_sums(i * Decode::kTileRows, part) + warp_ * kBatch, sums);
        }
      }
    }
    sync();
    const float* stats = this->template shared<float>(p_.y_stats) + Config::kWarps * kBatch;
    for (int pair = warp_; 2 * pair < work_.outs * Decode::kTileRows; pair += Config::kWarps) {
      const int row = 2 * pair + half_;
      const auto* scales =
          reinterpret_cast<const uint16_t*>(item + p_.out_rows * Config::kOutPitch) + row * a_.out_groups;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (b >= d_.batch) break;
        float v[2] = {0, squares(p_.y_stats, b)};
#pragma unroll
        for (int part = 0; part < Decode::kExpand; ++part)
          v[0] += total(out_sums(row, part), stats + part * Config::kWarps * kBatch, scales, d_.out_one_scale,
                        one_scale, out_group_[part], b);
        lane_sums<16>(v);
        if (sixteenth_ == 0) {
          float& residual = this->template shared<float>(p_.residual)[row * kBatch + b];
          residual += v[0] * factor(v[1], Config::kInner);
          if (layer + 1 == d_.layers) d_.hidden[b * Config::kModel + work_.out_row(row)] = residual;
        }
        __syncwarp();
      }
    }
    hand_over(Meeting::x, Config::kWarps);
    out_.done();
    store_kept(layer);
  }

  // y times the gated norm's weights.
  __device__ void receive_y(const Region& here, X (&spans)[Decode::kExpand]) const {
    constexpr int kRows = Decode::kExpand * kBatch;
    float squares[kBatch] = {}, scales[kRows];
    const uint32_t* from[kRows];
    float4 y[kRows], norm[Decode::kExpand];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      from[i] = here.y + min(i % kBatch, d_.batch - 1) * Config::kInner + i / kBatch * Config::kModel +
                warp_ * Decode::kSpan + 4 * lane_;
#pragma unroll
    for (int i = 0; i < Decode::kExpand; ++i) norm[i] = weights(p_.at.gate_norm + i * Config::kModel * 2);
    receive(y, from, here.epoch);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      squares[i % kBatch] += dot(y[i], y[i]);
      y[i] = y[i] * norm[i / kBatch];
    }
    lane_sums<32>(squares);
    X::template set<Decode::kExpand>(spans, y, scales, staging());
    put_stats(p_.y_stats, squares, scales);
  }

  float older_[kBatch];       // of the channel's convolution, without the newest input
  float newest_[kBatch];      // the newest input,
  uint16_t kept_[kBatch][2];  // and those before that are kept
  float4 state_[kBatch][2];   // the channel's, as it is to be stored
};

template <class Config>
__global__ void __launch_bounds__(32 * (Config::kWarps + 2), 1)
    decode_kernel(const __grid_constant__ StepArgs a) {
  if (threadIdx.x == 0) {
    QueueEnd(a.plan, 0, a.plan.params).init(Config::kWarps + 1);
    QueueEnd(a.plan, 1, a.plan.in).init(Config::kWarps + 1);
    QueueEnd(a.plan, 2, a.plan.states).init(Config::kWarps);
    QueueEnd(a.plan, 3, a.plan.out).init(Config::kWarps);
    fence_barriers();
  }
  __syncthreads();
  launch_dependents();  // they find room when this block is done
  if (warp_index() == Config::kWarps) {
    Loader<Config>(a).run();
  } else if (warp_index() == Config::kWarps + 1) {
    Messenger<Config>(a).run();
  } else {
    Step<Config>(a).run();
  }
}

}  // namespace ternary::sm90
