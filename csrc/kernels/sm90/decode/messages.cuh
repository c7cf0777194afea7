// The warp that exchanges values for the block: it finishes what all blocks wait for, sends what the block
// has for others, all of a kind at once (the fewer stores, the sooner the last of them has arrived), and
// waits for B, C and the steps of the block's heads.
#pragma once

#include "kernels/sm90/decode/worker.cuh"

namespace ternary::sm90 {

// Where the compute warps meet the one that exchanges values for the block.
enum class Meeting { received = 2, y, x, shared };

// `warps` compute warps and the exchanging one wait for each other.
__device__ inline void meet(Meeting at, int warps) {
  __syncwarp();
  sync_threads(static_cast<int>(at), 32 * (warps + 1));
}
// A compute warp has put its part where the exchanging one finds it, and goes on.
__device__ inline void hand_over(Meeting at, int warps) {
  __syncwarp();
  arrive_threads(static_cast<int>(at), 32 * (warps + 1));
}

template <class Config>
class Messenger : Worker<Config> {
  using Base = Worker<Config>;

 public:
  __device__ explicit Messenger(const StepArgs& a) : Base(a), row_(lane_ / 2), part_(lane_ % 2) {
#pragma unroll
    for (int i = 0; i < kSpansOfLane; ++i) {
      group_[i] = Base::group_of((2 * i + part_) * Decode::kSpan, d_.in_group, a.in_groups);
    }
  }

  __device__ void run() {
    const uint32_t done = *a_.exchange.counter;
    const int first = work_.units.first * Decode::kUnit, channels = work_.units.count * Decode::kUnit;
    const int y_place = place(first + lane_), x_place = place(work_.out_row(sixteenth_));
    for (int layer = 0; layer < d_.layers; ++layer) {
      const Region here = a_.exchange.region(done + layer, 0);
      if (work_.shared_tile >= 0) send_shared(layer, here);
      params_.done();
      if (work_.in_tiles()) in_.done();
      if (channels) {
        receive_shared(first, channels, a_.exchange.region(done + layer));
        meet(Meeting::received, Config::kWarps);
        // Where they go is found before they are there.
        const float* y = this->template shared<float>(p_.sent_y) + lane_;
        uint32_t* to = here.y + y_place;
        meet(Meeting::y, Config::kWarps);
#pragma unroll
        for (int b = 0; b < kBatch; ++b, to += Config::kInner, y += channels) {
          if (b >= d_.batch) break;
#pragma unroll
          for (int i = 0; i < Decode::kUnit * kMaxUnits; i += 32)
            if (i + lane_ < channels) send(a_.exchange, to + i, y[i], here.epoch);
        }
      }
      if (work_.outs) {
        const float* x = this->template shared<float>(p_.residual) + sixteenth_ * kBatch;
        uint32_t* to = here.x + x_place;
        meet(Meeting::x, Config::kWarps);
        for (int i = 0; i < work_.outs; ++i) {
#pragma unroll
          for (int b = 0; b < kBatch; ++b)
            if (b < d_.batch) send<2>(a_.exchange, to + b * Config::kModel, x[b], here.epoch, half_);
          x += Decode::kTileRows * kBatch;
          to += gridDim.x * Decode::kTileRows;
        }
      }
      __syncwarp();
    }
  }

 private:
  using Base::a_, Base::d_, Base::p_, Base::work_, Base::lane_, Base::half_, Base::sixteenth_;
  using Base::factor, Base::in_scales, Base::in_sums, Base::convolve;
  using Base::is_half_, Base::half_scales_, Base::params_, Base::in_, Base::kBatch, Base::kMaxUnits;
  using typename Base::Convolution;
  static_assert(Config::kSpans % 2 == 0);
  static constexpr int kSpansOfLane = Config::kSpans / 2;

  // Finishes the block's rows of B, C or dt, two lanes a row, and sends them. What does not wait for the sums
  // is read before.
  __device__ void send_shared(int layer, const Region& here) {
    params_.acquire();
    in_.acquire();
    const int index = work_.shared_tile * Decode::kTileRows + row_, head = index - 2 * Decode::kStateSize;
    const bool mixes = head < 0;  // all rows of a tile, or none
    const Convolution c = {.weight = p_.at.shared_weight,
                           .bias = p_.at.shared_bias,
                           .inputs = p_.at.shared_inputs,
                           .channel = row_,
                           .channels = Decode::kTileRows};
    float scales[kSpansOfLane], older[kBatch] = {}, dt_bias = 0, A = 0;
    const uint16_t* from = in_scales(2 * work_.units.count * Decode::kUnit + row_);
    if (d_.in_one_scale) from = static_cast<const uint16_t*>(d_.in_scales) + layer;
#pragma unroll
    for (int i = 0; i < kSpansOfLane; ++i) scales[i] = widen(from[group_[i]], half_scales_);
    uint16_t inputs[kBatch][3] = {};
    if (mixes) {
      this->read_convolution(c, inputs, older);
    } else if (head < d_.heads) {
      dt_bias = this->template param<float>(p_.at.dt_bias)[head];
      A = this->template param<float>(p_.at.A)[head];
    }

    meet(Meeting::shared, Config::kWarps);
    const int32_t* sums = in_sums(row_);
    const float* stats = this->template shared<float>(p_.x_stats);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (b >= d_.batch) break;
      float v[2] = {};
#pragma unroll
      for (int i = 0; i < kSpansOfLane; ++i) {
        const int at = (2 * i + part_) * kBatch + b;
        v[0] += static_cast<float>(sums[at]) * (scales[i] * stats[Config::kWarps * kBatch + at]);
        v[1] += stats[at];
      }
      lane_sums<2>(v);
      const float value = v[0] * factor(v[1], Config::kModel);
      if (mixes) {
        send<2>(a_.exchange, here.shared + b * 2 * Decode::kStateSize + index, convolve(c, older[b], value),
                here.epoch, part_);
        if (part_ == 0)
#pragma unroll
          for (int i = 0; i < 3; ++i)
            this->input_in_memory(layer, b, i, Config::kInner + index) =
                i < 2 ? inputs[b][i + 1] : static_cast<uint16_t>(narrow(value, is_half_));
      } else if (head < d_.heads) {
        const float dt = fminf(fmaxf(softplus_fast(value + dt_bias), d_.dt_min), d_.dt_max);
        send(a_.exchange, here.steps + (b * d_.heads + head) * 2 + part_,
             part_ == 0 ? dt : __expf(fminf(dt * A, 0)), here.epoch);
      }
    }
    __syncwarp();
  }

  // Puts B and C in shared memory, [b][2][kStateSize], and [b][heads] (dt, decay).
  __device__ void receive_shared(int first, int channels, const Region& here) const {
    const int first_head = first / d_.head_dim;
    const int heads = (first + channels - 1) / d_.head_dim - first_head + 1;
    // A lane's four words are the steps of two heads.
    const int pairs = (first_head + heads - 1) / 2 - first_head / 2 + 1;
    for (int b = 0; b < d_.batch; ++b) {
      const uint32_t* words = here.shared + b * 2 * Decode::kStateSize + 4 * lane_;
      const int pair = first_head / 2 + min(lane_, pairs - 1);
      const uint32_t* const from[3] = {words, words + Decode::kStateSize,
                                       here.steps + (b * d_.heads + 2 * pair) * 2};
      float4 in[3];
      receive(in, from, here.epoch);
      float4* to = this->template shared<float4>(p_.shared) + b * (Decode::kStateSize / 2) + lane_;
      to[0] = in[0];
      to[Decode::kStateSize / 4] = in[1];
      if (lane_ < pairs) {
        float2* steps = this->template shared<float2>(p_.steps) + b * Decode::kMaxHeads;
        const int head = 2 * pair - first_head;
        if (head >= 0) steps[head] = {in[2].x, in[2].y};
        if (head + 1 < heads) steps[head + 1] = {in[2].z, in[2].w};
      }
    }
    __syncwarp();
  }

  const int row_, part_;     // of the rows of B, C or dt
  int group_[kSpansOfLane];  // of the scales, of a lane's spans
};

}  // namespace ternary::sm90
