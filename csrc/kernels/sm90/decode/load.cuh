// What a block reads from memory in the course of a step. One warp starts the copies to shared memory, as far
// ahead as there is room: weights and states depend on nothing that the step computes.
#pragma once

#include "kernels/decode.h"
#include "kernels/head.h"
#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/decode/exchange.cuh"
#include "kernels/sm90/decode/select.h"

namespace ternary::sm90 {

struct StepArgs {
  DecodeArgs d;
  DecodePlan plan;
  ExchangeArgs exchange;
  int in_rows;                // of in_proj
  int in_groups, out_groups;  // scales of a row: 0 with one for the whole matrix
  int state_bytes;            // of an element
};

// What a block has to do in each layer.
struct Work {
  int shared_tile;  // of the rows of in_proj behind those of z and x; -1: none
  Share units;
  int first_out, outs;  // tiles of out_proj: first_out + i * gridDim.x

  __device__ explicit Work(const StepArgs& a) {
    const DecodePlan& p = a.plan;
    const int block = blockIdx.x, others = gridDim.x - p.shared_tiles;
    shared_tile = block < p.shared_tiles ? block : -1;
    if (shared_tile >= 0) {
      units = share(p.shared_blocks_units, p.shared_tiles, block);
      units.first += p.other_units;
    } else {
      units = share(p.other_units, others, block - p.shared_tiles);
    }
    const int tiles = a.exchange.d_model / Decode::kTileRows;
    first_out = block;
    outs = block < tiles ? (tiles - block + gridDim.x - 1) / gridDim.x : 0;
  }

  __device__ int in_tiles() const { return units.count + (shared_tile >= 0); }
  // Of out_proj, of the block's row `row`.
  __device__ int out_row(int row) const {
    const int tile = first_out + row / Decode::kTileRows * static_cast<int>(gridDim.x);
    return tile * Decode::kTileRows + row % Decode::kTileRows;
  }
};

__device__ inline uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t smem[];
  return smem;
}

// One end of a queue. `kind`: 0 parameters, 1 in_proj, 2 states, 3 out_proj.
class QueueEnd {
 public:
  __device__ QueueEnd(const DecodePlan& plan, int kind, const QueuePlan& queue) : queue_(queue) {
    full_ = reinterpret_cast<uint64_t*>(shared_memory() + plan.barriers) + kind * 2 * Decode::kMaxDepth;
  }

  __device__ void init(int readers) const {
    for (int i = 0; i < queue_.depth; ++i) {
      init_barrier(full_ + i, 1);
      init_barrier(full_ + Decode::kMaxDepth + i, readers);
    }
  }

  __device__ uint8_t* item() const { return shared_memory() + queue_.at + index_ * queue_.bytes; }

  // The warp waits for the item's bytes; it has read them.
  __device__ const uint8_t* acquire() const {
    wait_for_phase(full_ + index_, round_);
    __syncwarp();
    return item();
  }
  __device__ void done() {
    release(full_ + Decode::kMaxDepth + index_);
    next();
  }

  // The loader's side: waits until the item may be overwritten; says how many bytes will come. Returns where
  // they arrive.
  __device__ uint64_t* begin(uint32_t bytes) const {
    if (threadIdx.x % 32 == 0) {
      wait_for_phase(full_ + Decode::kMaxDepth + index_, round_ ^ 1);
      set_expected_bytes(full_ + index_, bytes);
    }
    __syncwarp();
    return full_ + index_;
  }
  __device__ void next() {
    if (++index_ == queue_.depth) {
      index_ = 0;
      round_ ^= 1;
    }
  }

 private:
  const QueuePlan& queue_;
  uint64_t* full_;
  int index_ = 0;
  uint32_t round_ = 0;
};

// The warp that loads.
template <class Config>
class Loader {
 public:
  __device__ explicit Loader(const StepArgs& a)
      : a_(a),
        d_(a.d),
        p_(a.plan),
        work_(a),
        lane_(threadIdx.x % 32),
        params_(p_, 0, p_.params),
        in_(p_, 1, p_.in),
        states_(p_, 2, p_.states),
        out_(p_, 3, p_.out) {}

  __device__ void run() {
    for (int layer = 0; layer < d_.layers; ++layer) {
      load_params(layer);
      if (work_.in_tiles()) load_in(layer);
      if (work_.units.count)
        for (int sequence = 0; sequence < d_.batch; ++sequence) load_states(layer, sequence);
      if (work_.outs) load_out(layer);
    }
    prefetch_head();
  }

 private:
  __device__ static const uint8_t* bytes(const void* from) { return static_cast<const uint8_t*>(from); }

  // What follows is the head, whose table is that of the embedding in all published models. While the last
  // layer waits for other blocks the memory has time to bring the tiles that `head` begins with to L2.
  __device__ void prefetch_head() {
    const int64_t row_bytes = int64_t{Config::kModel} * (d_.embedding_scale ? 1 : 2);
    const int64_t row = (blockIdx.x + int64_t{lane_} * gridDim.x) * HeadArgs::kTileRows;
    const int64_t rows = min(int64_t{HeadArgs::kTileRows}, d_.vocab - row);
    if (lane_ < Decode::kHeadTiles && rows > 0)
      prefetch_to_l2(bytes(d_.embedding) + row * row_bytes, rows * row_bytes);
  }

  __device__ void load_params(int layer) {
    const ParamsPlan& at = p_.at;
    const int channels = work_.units.count * Decode::kUnit, first = work_.units.first * Decode::kUnit;
    const int row = work_.shared_tile * Decode::kTileRows, inputs = d_.batch * (Decode::kConvWidth - 1);
    const bool mixes = work_.shared_tile >= 0 && row < 2 * Decode::kStateSize;
    const int heads = work_.shared_tile >= 0 && !mixes ? d_.heads : 0, rows = mixes ? Decode::kTileRows : 0;
    const int norm = work_.in_tiles() ? Config::kModel : 0, gate = work_.outs ? Config::kInner : 0;
    const int bias = d_.conv_bias != nullptr;
    const int bytes = 2 * (norm + gate + (channels + rows) * (Decode::kConvWidth + bias + inputs)) +
                      4 * (2 * heads + (channels ? d_.heads : 0));
    uint64_t* full = params_.begin(bytes);
    uint8_t* to = params_.item();
    const auto copy = [&](int i, int at, const void* from, int64_t offset, int count, int size) {
      if (lane_ == i && count && from)
        copy_run_async(to + at, this->bytes(from) + offset * size, count * size, full);
    };
    const int64_t mixed = int64_t{layer} * Config::kChannels, shared = Config::kInner + row;
    copy(0, at.norm, d_.norm, int64_t{layer} * Config::kModel, norm, 2);
    copy(1, at.gate_norm, d_.gate_norm, int64_t{layer} * Config::kInner, gate, 2);
    copy(2, at.D, d_.D, int64_t{layer} * d_.heads, channels ? d_.heads : 0, 4);
    copy(3, at.weight, d_.conv_weight, (mixed + first) * Decode::kConvWidth, channels * Decode::kConvWidth,
         2);
    copy(4, at.bias, d_.conv_bias, mixed + first, channels, 2);
    copy(5, at.shared_weight, d_.conv_weight, (mixed + shared) * Decode::kConvWidth,
         rows * Decode::kConvWidth, 2);
    copy(6, at.shared_bias, d_.conv_bias, mixed + shared, rows, 2);
    copy(7, at.dt_bias, d_.dt_bias, int64_t{layer} * d_.heads, heads, 4);
    copy(8, at.A, d_.A, int64_t{layer} * d_.heads, heads, 4);
    if (lane_ < inputs) {
      const int64_t from = (int64_t{layer} * inputs + lane_) * Config::kChannels;
      copy(lane_, at.inputs + lane_ * channels * 2, d_.conv_state, from + first, channels, 2);
      copy(lane_, at.shared_inputs + lane_ * rows * 2, d_.conv_state, from + shared, rows, 2);
    }
    params_.next();
  }

  __device__ void load_in(int layer) {
    const int row_bytes = Config::kModel / 4, scale_bytes = a_.in_groups * 2,
              z = work_.units.first * Decode::kUnit;
    const int of_z = work_.units.count * Decode::kUnit,
              shared = 2 * Config::kInner + work_.shared_tile * Decode::kTileRows;
    const int of_shared = work_.shared_tile >= 0 ? min(Decode::kTileRows, a_.in_rows - shared) : 0;
    uint64_t* full = in_.begin((2 * of_z + of_shared) * (row_bytes + scale_bytes));
    uint8_t* to = in_.item();
    const uint8_t* codes = d_.in_codes + int64_t{layer} * a_.in_rows * row_bytes;
    const int skipped = work_.shared_tile >= 0 ? Decode::kTileRows : 0;
    const int rows = skipped + 2 * of_z;
    for (int row = lane_; row < rows; row += 32) {
      const int unit_row = row - skipped, in_tile = unit_row % Decode::kTileRows;
      int from = shared + row;
      if (unit_row >= 0)
        from = z + unit_row / Decode::kTileRows * Decode::kUnit + in_tile % Decode::kUnit +
               (in_tile < Decode::kUnit ? 0 : Config::kInner);
      if (from < a_.in_rows)
        copy_run_async(to + row * Config::kInPitch, codes + int64_t{from} * row_bytes, row_bytes, full);
    }
    if (scale_bytes && lane_ < 3) {
      const int first = lane_ == 0   ? z
                        : lane_ == 1 ? Config::kInner + z
                                     : shared,
                count = lane_ == 2 ? of_shared : of_z;
      const uint8_t* scales = bytes(d_.in_scales) + (int64_t{layer} * a_.in_rows + first) * scale_bytes;
      if (count)
        copy_run_async(to + p_.in_rows * Config::kInPitch + lane_ * of_z * scale_bytes, scales,
                       count * scale_bytes, full);
    }
    in_.next();
  }

  __device__ void load_states(int layer, int sequence) {
    const int unit_bytes = Decode::kUnit * Decode::kStateSize * a_.state_bytes;
    const uint8_t* from = bytes(d_.ssm_state) + (int64_t{layer} * d_.batch + sequence) * Config::kInner *
                                                    Decode::kStateSize * a_.state_bytes;
    uint64_t* full = states_.begin(work_.units.count * unit_bytes);
    if (lane_ == 0)
      copy_run_async(states_.item(), from + int64_t{work_.units.first} * unit_bytes,
                     work_.units.count * unit_bytes, full);
    states_.next();
  }

  __device__ void load_out(int layer) {
    const int row_bytes = Config::kInner / 4, scale_bytes = a_.out_groups * 2;
    uint64_t* full = out_.begin(work_.outs * Decode::kTileRows * (row_bytes + scale_bytes));
    uint8_t* to = out_.item();
    const int rows = work_.outs * Decode::kTileRows;
    for (int row = lane_; row < rows; row += 32) {
      const int64_t from = int64_t{layer} * Config::kModel + work_.out_row(row);
      copy_run_async(to + row * Config::kOutPitch, d_.out_codes + from * row_bytes, row_bytes, full);
    }
    if (scale_bytes && lane_ < work_.outs)
      copy_run_async(
          to + p_.out_rows * Config::kOutPitch + lane_ * Decode::kTileRows * scale_bytes,
          bytes(d_.out_scales) +
              (int64_t{layer} * Config::kModel + work_.out_row(lane_ * Decode::kTileRows)) * scale_bytes,
          Decode::kTileRows * scale_bytes, full);
    out_.next();
  }

  const StepArgs& a_;
  const DecodeArgs& d_;
  const DecodePlan& p_;
  const Work work_;
  const int lane_;
  QueueEnd params_, in_, states_, out_;
};

}  // namespace ternary::sm90
