// The warp that sends what the block has for others, all of a kind at once: the fewer stores, the sooner the
// last of them has arrived. It waits for B, C and the steps of the block's heads, too.
#pragma once

#include "kernels/sm90/decode/load.cuh"

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

// The rows of B, C or dt from `index` on, which the compute warps have finished.
__device__ inline void send_shared(const StepArgs& a, int index, const Region& here) {
  meet(Meeting::shared, Decode::kTileRows / 2);
  const float2* values = reinterpret_cast<const float2*>(shared_memory() + a.plan.sent_shared);
  for (int i = threadIdx.x % 32; i < a.d.batch * Decode::kTileRows; i += 32) {
    const int row = index + i % Decode::kTileRows, head = row - 2 * Decode::kStateSize;
    const int sequence = i / Decode::kTileRows;
    if (head < 0) {
      send(a.exchange, here.shared + sequence * 2 * Decode::kStateSize + row, values[i].x, here.epoch);
    } else if (head < a.d.heads) {
      uint32_t* to = here.steps + (sequence * a.d.heads + head) * 2;
      send(a.exchange, to, values[i].x, here.epoch);
      send(a.exchange, to + 1, values[i].y, here.epoch);
    }
  }
  __syncwarp();
}

// Puts B and C in shared memory, [b][2][kStateSize], and [b][heads] (dt, decay).
template <class Config>
__device__ void receive_shared(const StepArgs& a, int first, int channels, const Region& here) {
  const int lane = threadIdx.x % 32, first_head = first / a.d.head_dim;
  const int heads = (first + channels - 1) / a.d.head_dim - first_head + 1;
  // A lane's four words are the steps of two heads.
  const int pairs = (first_head + heads - 1) / 2 - first_head / 2 + 1;
  for (int b = 0; b < a.d.batch; ++b) {
    const uint32_t* words = here.shared + b * 2 * Decode::kStateSize + 4 * lane;
    const int pair = first_head / 2 + min(lane, pairs - 1);
    const uint32_t* const from[3] = {words, words + Decode::kStateSize,
                                     here.steps + (b * a.d.heads + 2 * pair) * 2};
    float4 in[3];
    receive(in, from, here.epoch);
    float4* to =
        reinterpret_cast<float4*>(shared_memory() + a.plan.shared) + b * (Decode::kStateSize / 2) + lane;
    to[0] = in[0];
    to[Decode::kStateSize / 4] = in[1];
    if (lane < pairs) {
      float2* steps = reinterpret_cast<float2*>(shared_memory() + a.plan.steps) + b * Decode::kMaxHeads;
      const int head = 2 * pair - first_head;
      if (head >= 0) steps[head] = {in[2].x, in[2].y};
      if (head + 1 < heads) steps[head + 1] = {in[2].z, in[2].w};
    }
  }
  __syncwarp();
}

template <class Config>
__device__ void run_exchange(const StepArgs& a) {
  const Work work(a);
  const int lane = threadIdx.x % 32, first = work.units.first * Decode::kUnit;
  const int channels = work.units.count * Decode::kUnit;
  const uint32_t done = *a.exchange.counter;
  for (int layer = 0; layer < a.d.layers; ++layer) {
    const Region here = a.exchange.region(done + layer, 0);
    if (work.shared_tile >= 0) send_shared(a, work.shared_tile * Decode::kTileRows, here);
    if (channels) {
      receive_shared<Config>(a, first, channels, a.exchange.region(done + layer));
      meet(Meeting::received, Config::kWarps);
      meet(Meeting::y, Config::kWarps);
      const float* y = reinterpret_cast<const float*>(shared_memory() + a.plan.sent_y);
      for (int i = lane; i < a.d.batch * channels; i += 32)
        send(a.exchange, here.y + i / channels * Config::kInner + place(first + i % channels), y[i],
             here.epoch);
    }
    if (work.outs) {
      meet(Meeting::x, Config::kWarps);
      const float* x = reinterpret_cast<const float*>(shared_memory() + a.plan.residual);
      const int rows = work.outs * Decode::kTileRows;
      for (int i = lane; i < a.d.batch * rows; i += 32) {
        const int row = i % rows, sequence = i / rows;
        send(a.exchange, here.x + sequence * Config::kModel + place(work.out_row(row)),
             x[row * Config::kBatch + sequence], here.epoch);
      }
    }
    __syncwarp();
  }
}

}  // namespace ternary::sm90
