// One pass over the tokens, in tiles of 32. While four warps scan tile i, eight help: four start to copy tile
// i + 3 to shared memory and finish tile i - 1, four prepare tile i + 1. One barrier a tile; a copy has two
// tiles' time.
//   prepare  dt = softplus(dt + bias), dt x                  a lane a token, 8 channels
//   advance  h = exp2(dt A) h + dt x B, sums = h C           a lane four states of a channel
//   finish   y = (sums + D x) silu(z)                        a lane a token, 8 channels
// With one sequence of a usual model there is one warp to scan a scheduler: what it does not do is what
// counts.
#pragma once

#include <type_traits>

#include "kernels/codes.h"
#include "kernels/selective_scan.h"
#include "kernels/sm90/common/math.cuh"
#include "kernels/sm90/common/types.cuh"
#include "kernels/sm90/selective_scan/config.h"

namespace ternary::sm90 {

// Tile i lies in stage i modulo the number of stages: as many as tiles go by, the first and the last counted
// in, from when a part starts to be written to when it is read last.
template <class Config>
struct ScanShared {
  using Element = typename Config::Element;
  using Piece = Run<Element, 8, true>;  // 16 bytes

  struct alignas(16) LaneInputs {  // in pairs, as they came
    uint32_t B[2], C[2];
  };
  struct Given {
    Piece dt[Config::kWarps][Config::kPieces];
  };
  struct Projected {
    alignas(16) Element dt[Config::kTokens][Config::kPitch];  // zeros past dt_rank
  };

  Piece x[5][Config::kWarps][Config::kPieces], z[5][Config::kWarps][Config::kPieces];
  LaneInputs BC[4][Config::kTokens][Config::kLanes];
  std::conditional_t<Config::kRank == 0, Given, Projected> source[3];
  alignas(16) float2 steps[2][Config::kChannels][Config::kTokens + 2];  // dt, dt x; channels in other banks
  alignas(16) float y[2][Config::kChannels][Config::kLanes][Config::kTokens + 4];  // h C of a lane's states
};

// Tokens of a sequence. Bounds of packed sequences that lie outside x are moved to its ends.
__device__ inline void find_tokens(const SelectiveScanArgs& a, int64_t sequence, int64_t& first,
                                   int64_t& tokens) {
  first = sequence * a.length;
  tokens = a.length;
  if (!a.cu_seqlens) return;
  first = min(max(int64_t{a.cu_seqlens[sequence]}, int64_t{0}), a.length);
  tokens = min(max(int64_t{a.cu_seqlens[sequence + 1]}, first), a.length) - first;
}

// Where a block works: `tokens` from `first` on, in the batch seen as one row.
struct ScanPlace {
  int64_t first, channel;
  int tokens;
};

// What a helper's thread has: of its warp's 8 channels, all or none of which there are, a token of a tile.
template <class Config>
struct ScanHelper {
  using Element = typename Config::Element;
  using Shared = ScanShared<Config>;
  using Piece = typename Shared::Piece;

  __device__ ScanHelper(Shared& shared, const SelectiveScanArgs& args, const ScanPlace& place)
      : s(shared), a(args), at(place) {}

  // The warp's channels' elements of a vector that need not be there.
  __device__ void load_channels(float (&to)[Config::kWarpChannels], const float* from) const {
#pragma unroll
    for (int j = 0; j < Config::kWarpChannels; ++j) to[j] = from && has_channels ? from[channel + j] : 0.0f;
  }

  Shared& s;
  const SelectiveScanArgs& a;
  const ScanPlace at;
  const int thread = threadIdx.x % Config::kKind, warp = thread / 32, lane = thread % 32;
  const int64_t channel = at.channel + warp * Config::kWarpChannels;  // the warp's first
  const bool has_channels = channel < a.channels;
};

// The helper that copies and finishes.
template <class Config>
class ScanFinisher : ScanHelper<Config> {
  using Base = ScanHelper<Config>;
  using Base::s, Base::a, Base::at, Base::thread, Base::warp, Base::lane, Base::channel, Base::has_channels;
  using typename Base::Element, typename Base::Piece, typename Base::Shared;

 public:
  __device__ ScanFinisher(Shared& shared, const SelectiveScanArgs& args, const ScanPlace& place)
      : Base(shared, args, place) {
    this->load_channels(D, a.D);
  }

  // Starts to copy a tile; zeros where it has no tokens or channels, but nothing where it has no token at
  // all.
  __device__ void copy(int tile) {
    const int first = tile * Config::kTokens, count = at.tokens - first;
    if (count <= 0) return commit_copies();
    const int token = thread / Config::kWarps, part = thread % Config::kWarps;
    const int64_t row = at.first + first + token, column = at.channel + part * 8;
    const bool valid = token < count && column < a.channels;
    const auto from = [&](const void* rows, int64_t stride, int64_t i) {
      return static_cast<const Element*>(rows) + row * stride + i;
    };
    copy_16_async(&s.x[tile % 5][part][token], from(a.x, a.x_stride, column), valid);
    if (a.z) copy_16_async(&s.z[tile % 5][part][token], from(a.z, a.z_stride, column), valid);
    const bool is_B = part < 2;
    auto* inputs = &s.BC[tile % 4][token][part % 2 * 2];  // of two lanes
    const auto* states = from(is_B ? a.B : a.C, is_B ? a.B_stride : a.C_stride, part % 2 * 8);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      copy_8_async(is_B ? inputs[i].B : inputs[i].C, states + i * Config::kLaneStates, token < count);
    if constexpr (Config::kRank == 0) {
      copy_16_async(&s.source[tile % 3].dt[part][token], from(a.dt, a.dt_stride, column), valid);
    } else {
      constexpr int kPieces = Config::kRank / 8, kRows = Config::kKind / kPieces;  // copied at once
      const int token = thread / kPieces, column = thread % kPieces * 8;
      const auto* dt = static_cast<const Element*>(a.dt) + (at.first + first + token) * a.dt_stride + column;
#pragma unroll 4
      for (int i = token; i < Config::kTokens; i += kRows, dt += kRows * a.dt_stride)
        copy_16_async(&s.source[tile % 3].dt[i][column], dt, i < count && column < a.dt_rank);
    }
    commit_copies();
  }

  __device__ void finish(int tile) {
    const int token = tile * Config::kTokens + lane;
    const Piece x = s.x[tile % 5][warp][lane], z = s.z[tile % 5][warp][lane];
    float y[Config::kWarpChannels];
#pragma unroll
    for (int j = 0; j < Config::kWarpChannels; ++j) {
      y[j] = D[j] * to_float(x.at[j]);
      const auto& parts = s.y[tile % 2][warp * Config::kWarpChannels + j];
#pragma unroll
      for (int i = 0; i < Config::kLanes; ++i) y[j] += parts[i][lane];
    }
    if (a.z)
#pragma unroll
      for (int j = 0; j < Config::kWarpChannels; ++j) y[j] *= silu_fast(to_float(z.at[j]));
    Piece out;
#pragma unroll
    for (int j = 0; j < Config::kWarpChannels; ++j) out.at[j] = from_float<Element>(y[j]);
    auto* to = static_cast<Element*>(a.y) + (at.first + token) * a.channels + channel;
    if (token < at.tokens && has_channels) *reinterpret_cast<Piece*>(to) = out;
  }

 private:
  float D[Config::kWarpChannels];
};

// The helper that prepares.
template <class Config>
class ScanPreparer : ScanHelper<Config> {
  using Base = ScanHelper<Config>;
  using Base::s, Base::a, Base::at, Base::warp, Base::lane, Base::channel, Base::has_channels;
  using typename Base::Element, typename Base::Piece, typename Base::Shared;

 public:
  __device__ ScanPreparer(Shared& shared, const SelectiveScanArgs& args, const ScanPlace& place)
      : Base(shared, args, place) {
    if constexpr (Config::kRank > 0)
      load_weight();
    else
      this->load_channels(bias, a.dt_bias);
  }

  // Tokens past the sequence's end get dt = 0 and change nothing.
  __device__ void prepare(int tile) {
    if constexpr (Config::kRank > 0) project(tile);
    auto* steps = s.steps[tile % 2] + warp * Config::kWarpChannels;
    const Piece x = s.x[tile % 5][warp][lane];
    const bool valid = tile * Config::kTokens + lane < at.tokens;
    // All are read before one is written, or the compiler would take the channels one after the other.
    float dt[Config::kWarpChannels];
    if constexpr (Config::kRank > 0) {
#pragma unroll
      for (int j = 0; j < Config::kWarpChannels; ++j) dt[j] = steps[j][lane].x;
    } else {
      const Piece given = s.source[tile % 3].dt[warp][lane];
#pragma unroll
      for (int j = 0; j < Config::kWarpChannels; ++j) dt[j] = to_float(given.at[j]) + bias[j];
    }
#pragma unroll
    for (int j = 0; j < Config::kWarpChannels; ++j) {
      const float step = step_size<true>(dt[j], a.dt_softplus);
      dt[j] = valid ? step : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < Config::kWarpChannels; ++j)
      steps[j][lane] = make_float2(dt[j], dt[j] * to_float(x.at[j]));
  }

 private:
  // The bias of channel lane / 4, one register where `prepare` would have eight, and of its dt_weight columns
  // 4 q .. 4 q + 3 of each 16, q = lane % 4; codes as -1, 0, +1, their scales aside.
  __device__ void load_weight() {
    const int64_t rank = a.dt_rank, groups = rank / a.dt_group, row = channel + lane / 4;
    bias[0] = a.dt_bias && has_channels ? a.dt_bias[row] : 0.0f;
#pragma unroll
    for (int i = 0; i < Config::kProducts; ++i) {
      const int64_t k = 16 * i + lane % 4 * 4;
      const int64_t scale = a.dt_one_scale ? 0 : row * groups + 16 * i / a.dt_group;
      const bool scaled = a.dt_scales && has_channels && 16 * i < rank;
      scales[i] = scaled ? load_float(a.dt_scales, a.dt_scale_type, scale) : 1.0f;
      Run<Element, 4, true> w;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        w.at[j] = from_float<Element>(0);
        if (!has_channels || k >= rank) continue;
        const auto* codes = static_cast<const uint8_t*>(a.dt_weight) + (row * rank + k) / kWeightsPerByte;
        w.at[j] = a.dt_scales ? from_float<Element>(static_cast<float>(weight_at(codes, j)))
                              : static_cast<const Element*>(a.dt_weight)[row * rank + k + j];
      }
      weight[i] = *reinterpret_cast<const uint2*>(&w);
    }
  }

  // dt_weight dt + bias, left where the step sizes go. Lane 4 c + q gives the tensor cores columns 4 q .. 4 q
  // + 3 of 16 as theirs 2 q, 2 q + 1, 2 q + 8 and 2 q + 9, of both operands, and zeros for eight channels
  // more; it gets channel c and tokens 2 q, 2 q + 1.
  __device__ void project(int tile) {
    const int c = lane / 4, q = lane % 4;
#pragma unroll(Config::kBlocksPerSm == 1 ? 4 : 1)  // as registers allow
    for (int first = 0; first < Config::kTokens; first += 8) {
      const auto& row = s.source[tile % 3].dt[first + c];
      float dt[2] = {};
#pragma unroll
      for (int i = 0; i < Config::kProducts; ++i) {
        const uint2 frag_dt = *reinterpret_cast<const uint2*>(&row[16 * i + 4 * q]);
        const uint32_t frag_w[4] = {weight[i].x, 0, weight[i].y, 0};
        float sums[4] = {};
        mma_m16n8k16<Element>(sums, frag_w, frag_dt.x, frag_dt.y);
        dt[0] = fmaf(sums[0], scales[i], dt[0]);
        dt[1] = fmaf(sums[1], scales[i], dt[1]);
      }
      auto* steps = s.steps[tile % 2][warp * Config::kWarpChannels + c] + first + 2 * q;
      steps[0].x = dt[0] + bias[0];
      steps[1].x = dt[1] + bias[0];
    }
    __syncwarp();
  }

  float bias[Config::kRank > 0 ? 1 : Config::kWarpChannels];
  uint2 weight[Config::kProducts + 1];
  float scales[Config::kProducts + 1];
};

// What a scanning lane reads of a few tokens.
template <class Config>
struct ScanInputs {
  float4 steps[Config::kGroup / 2];
  typename ScanShared<Config>::LaneInputs BC[Config::kGroup];

  __device__ void load(const ScanShared<Config>& s, int tile, int first) {
    const int channel = threadIdx.x / Config::kLanes, q = threadIdx.x % Config::kLanes;
    const auto* from = reinterpret_cast<const float4*>(&s.steps[tile % 2][channel][first]);
#pragma unroll
    for (int i = 0; i < Config::kGroup / 2; ++i) steps[i] = from[i];
#pragma unroll
    for (int i = 0; i < Config::kGroup; ++i) BC[i] = s.BC[tile % 4][first + i][q];
  }
};

// decay holds A log2 e. A group is read beside the steps of the one before; past the last the first again,
// for nothing.
template <class Config>
__device__ void advance(ScanShared<Config>& s, int tile, const float (&decay)[Config::kLaneStates],
                        float (&h)[Config::kLaneStates]) {
  using Element = typename Config::Element;
  const int channel = threadIdx.x / Config::kLanes, q = threadIdx.x % Config::kLanes;
  float* y = s.y[tile % 2][channel][q];
  ScanInputs<Config> next;
  next.load(s, tile, 0);
#pragma unroll 2
  for (int first = 0; first < Config::kTokens; first += Config::kGroup) {
    const ScanInputs<Config> now = next;
    next.load(s, tile, (first + Config::kGroup) % Config::kTokens);
    float sums[Config::kGroup];
#pragma unroll
    for (int i = 0; i < Config::kGroup; ++i) {
      const float4 steps = now.steps[i / 2];
      const float dt = i % 2 ? steps.z : steps.x, dt_x = i % 2 ? steps.w : steps.y;
#pragma unroll
      for (int j = 0; j < Config::kLaneStates; j += 2) {
        const float2 B = widen_pair<Element>(now.BC[i].B[j / 2]), C = widen_pair<Element>(now.BC[i].C[j / 2]);
        h[j] = fmaf(exp2_approximate(dt * decay[j]), h[j], dt_x * B.x);
        h[j + 1] = fmaf(exp2_approximate(dt * decay[j + 1]), h[j + 1], dt_x * B.y);
        sums[i] = fmaf(h[j + 1], C.y, j == 0 ? h[j] * C.x : fmaf(h[j], C.x, sums[i]));
      }
    }
    *reinterpret_cast<float4*>(y + first) = make_float4(sums[0], sums[1], sums[2], sums[3]);
  }
}

template <class Config>
__device__ void copy_and_finish(ScanShared<Config>& s, const SelectiveScanArgs& a, const ScanPlace& at,
                                int tiles) {
  ScanFinisher<Config> helper(s, a, at);
  helper.copy(0);
  helper.copy(1);
  wait_for_copies<1>();
  __syncthreads();
  for (int tile = -1; tile <= tiles; ++tile) {
    helper.copy(tile + 3);
    if (tile > 0) helper.finish(tile - 1);
    wait_for_copies<1>();  // but for the newest
    __syncthreads();
  }
  wait_for_copies<0>();
}

template <class Config>
__device__ void prepare(ScanShared<Config>& s, const SelectiveScanArgs& a, const ScanPlace& at, int tiles) {
  ScanPreparer<Config> helper(s, a, at);
  __syncthreads();
  for (int tile = -1; tile <= tiles; ++tile) {
    if (tile + 1 < tiles) helper.prepare(tile + 1);
    __syncthreads();
  }
}

template <class Config>
__device__ void scan(ScanShared<Config>& s, const SelectiveScanArgs& a, const ScanPlace& at, int tiles,
                     int64_t sequence) {
  const int64_t channel = at.channel + threadIdx.x / Config::kLanes;
  const int64_t state = threadIdx.x % Config::kLanes * Config::kLaneStates;
  const int64_t first_state = (sequence * a.channels + channel) * Config::kStates + state;
  const bool valid = channel < a.channels;
  float decay[Config::kLaneStates], h[Config::kLaneStates];
#pragma unroll
  for (int j = 0; j < Config::kLaneStates; ++j) {
    // dt is not negative: min(dt A, 0) = dt min(A, 0). Infinity would make a NaN of dt = 0.
    const float A = valid ? a.A[channel * Config::kStates + state + j] : 0.0f;
    decay[j] = A > 0 ? 0.0f : A < -FLT_MAX / kLog2E ? -FLT_MAX : A * kLog2E;
    h[j] = a.initial_state && valid ? load_float(a.initial_state, a.state_type, first_state + j) : 0.0f;
  }
  __syncthreads();
  for (int tile = -1; tile <= tiles; ++tile) {
    if (tile >= 0 && tile < tiles) advance(s, tile, decay, h);
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < Config::kLaneStates; ++j)
    if (valid) store_float(h[j], a.final_state, a.state_type, first_state + j);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    scan_tile_kernel(const __grid_constant__ SelectiveScanArgs a) {
  extern __shared__ __align__(16) char smem[];
  auto& s = *reinterpret_cast<ScanShared<Config>*>(smem);
  const int64_t blocks = (a.channels + Config::kChannels - 1) / Config::kChannels;
  const int64_t sequence = blockIdx.x / blocks;
  int64_t first, tokens;
  find_tokens(a, sequence, first, tokens);
  const ScanPlace at = {first, blockIdx.x % blocks * Config::kChannels, static_cast<int>(tokens)};
  const int tiles = (at.tokens + Config::kTokens - 1) / Config::kTokens;
  const int kind = threadIdx.x / Config::kKind;
  if (kind == 0)
    scan(s, a, at, tiles, sequence);
  else if (kind == 1)
    copy_and_finish(s, a, at, tiles);
  else
    prepare(s, a, at, tiles);
}

}  // namespace ternary::sm90
