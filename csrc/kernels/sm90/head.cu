// The norm and the head of a few tokens, as fast as the table comes from memory. A block an SM has tiles of
// 16 rows of the table, which the copy engine brings to a ring in shared memory: as many bytes under way as
// there is room for, the first of them before the kernel before this one is done. Each warp multiplies every
// 16th 32 columns of a tile on the tensor cores; their sums meet in shared memory and are added in a fixed
// order.
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/head.h"
#include "kernels/sm90/common/integers.cuh"
#include "kernels/sm90/common/launch.cuh"
#include "kernels/sm90/common/limits.h"
#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/common/types.cuh"

namespace ternary {
namespace sm90 {

struct Head {
  static constexpr int kWarps = 16;                  // that multiply; one more loads
  static constexpr int kRows = HeadArgs::kTileRows;  // of a tile
  static constexpr int kMaxStages = 6;
  static constexpr int kTokens = HeadArgs::kTokens, kStep = HeadArgs::kStep;
};

struct HeadLaunch {
  HeadArgs args;
  int stages, tiles;  // of a block, at most
};

// In shared memory before the scales of the block's tiles, x and the stages.
struct HeadShared {
  uint64_t full[Head::kMaxStages], empty[Head::kMaxStages];
  float x_scales[Head::kTokens];  // of int8
  float sums[2][Head::kWarps][Head::kRows][Head::kTokens];
};

// Bytes of a row: an access of a quarter or half of a warp, of two or four rows, meets each bank once.
template <class Weight>
__host__ __device__ constexpr int pitch_of(int d) {
  return (d + Head::kStep) * static_cast<int>(sizeof(Weight));
}

// Bytes of the scales of a block's tiles.
template <class Weight>
__host__ __device__ constexpr int scale_bytes(int tiles) {
  return sizeof(Weight) == 1 ? tiles * Head::kRows * static_cast<int>(sizeof(float)) : 0;
}

// RMSNorm of the tokens, a warp each, as the products take them; zeros for those that are not there.
//   16 bits: rows of Element.
//   int8: integers of 16 bits as a row of their upper and one of their lower bytes, 256 upper + lower, and
//         what they are to be multiplied by. They err by 2^-16 of the token's largest, less than bf16 does.
template <class Element, class Weight>
__device__ void normalize(const HeadArgs& a, int64_t first, uint8_t* smem_x, float* x_scales) {
  constexpr bool kIntegers = sizeof(Weight) == 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pitch = pitch_of<Weight>(a.d);
  const int64_t token = first + warp;
  if (warp >= Head::kTokens) return;
  auto* to = reinterpret_cast<uint2*>(smem_x + warp * pitch);
  auto* upper = reinterpret_cast<uint32_t*>(smem_x + 2 * warp * pitch);
  uint32_t* lower = upper + pitch / 4;
  if (token >= a.m) {
    for (int i = lane; i < a.d / 4; i += 32) {
      if constexpr (kIntegers)
        upper[i] = lower[i] = 0;
      else
        to[i] = {};
    }
    return;
  }
  const auto* x = reinterpret_cast<const float4*>(a.hidden + token * a.d);
  const auto read = [&](float (&v)[4], int i) {
    const float4 of_x = x[i];
    float w[4];
    to_floats(w, load_words<Element, 4>(static_cast<const Element*>(a.norm) + 4 * i));
    v[0] = of_x.x * w[0], v[1] = of_x.y * w[1], v[2] = of_x.z * w[2], v[3] = of_x.w * w[3];
    return of_x.x * of_x.x + of_x.y * of_x.y + of_x.z * of_x.z + of_x.w * of_x.w;
  };
  float squares = 0, v[4];
  uint32_t most = 0;
#pragma unroll 8
  for (int i = lane; i < a.d / 4; i += 32) {
    squares += read(v, i);
#pragma unroll
    for (int j = 0; j < 4; ++j) most = max(most, magnitude_bits(v[j]));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
  const float factor = rsqrtf(squares / static_cast<float>(a.d) + a.eps);
  const float largest = __uint_as_float(__reduce_max_sync(~0u, most));
  const float inverse = largest > 0 ? kLargestInteger / largest : largest;
  if (lane == 0) x_scales[warp] = factor * largest / kLargestInteger;
#pragma unroll 8
  for (int i = lane; i < a.d / 4; i += 32) {
    read(v, i);
    if constexpr (kIntegers) {
      const TwoBytes bytes = to_two_bytes(v, inverse);
      lower[i] = bytes.lower;
      upper[i] = bytes.upper;
    } else {
      to[i] = {pack_floats<Element>(v[0] * factor, v[1] * factor),
               pack_floats<Element>(v[2] * factor, v[3] * factor)};
    }
  }
}

// A warp's part of a tile's products, [kRows][kTokens], given to the others. w, x: the lane's first columns.
template <class Element>
__device__ void multiply(float (&sums)[Head::kRows][Head::kTokens], const uint8_t* w, const uint8_t* x,
                         int pitch, int begin, int steps, Element) {
  float d[2][4] = {};
#pragma unroll 4
  for (int step = begin; step < steps; step += Head::kWarps) {
    const int at = step * Head::kStep * sizeof(Element);
    const uint4 upper = *reinterpret_cast<const uint4*>(w + at);
    const uint4 lower = *reinterpret_cast<const uint4*>(w + 8 * pitch + at);
    const uint4 b = *reinterpret_cast<const uint4*>(x + at);
    mma_m16n8k16<Element>(d[0], {upper.x, lower.x, upper.y, lower.y}, b.x, b.y);
    mma_m16n8k16<Element>(d[1], {upper.z, lower.z, upper.w, lower.w}, b.z, b.w);
  }
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    *reinterpret_cast<float2*>(&sums[group + 8 * i][2 * quad]) = {d[0][2 * i] + d[1][2 * i],
                                                                  d[0][2 * i + 1] + d[1][2 * i + 1]};
}
// The columns of x are (token, byte), four tokens at a time. Integer sums are exact, and those of a warp in
// fp32.
__device__ inline void multiply(float (&sums)[Head::kRows][Head::kTokens], const uint8_t* w, const uint8_t* x,
                                int pitch, int begin, int steps, int8_t) {
  int32_t d[2][4] = {};
#pragma unroll 4
  for (int step = begin; step < steps; step += Head::kWarps) {
    const int at = step * Head::kStep;
    const uint2 upper = *reinterpret_cast<const uint2*>(w + at);
    const uint2 lower = *reinterpret_cast<const uint2*>(w + 8 * pitch + at);
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      const uint2 b = *reinterpret_cast<const uint2*>(x + four * 8 * pitch + at);
      mma_m16n8k32(d[four], {upper.x, lower.x, upper.y, lower.y}, b.x, b.y);
    }
  }
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
  for (int four = 0; four < 2; ++four)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      sums[group + 8 * i][4 * four + quad] =
          fmaf(256.0f, static_cast<float>(d[four][2 * i]), static_cast<float>(d[four][2 * i + 1]));
}

template <class Element, class Weight>
__global__ void __launch_bounds__(32 * (Head::kWarps + 1), 1)
    head_kernel(const __grid_constant__ HeadLaunch launch) {
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  const HeadArgs& a = launch.args;
  auto& smem = *reinterpret_cast<HeadShared*>(smem_bytes);
  const int pitch = pitch_of<Weight>(a.d);
  float* const smem_scales = reinterpret_cast<float*>(smem_bytes + sizeof(HeadShared));
  uint8_t* const smem_x = smem_bytes + sizeof(HeadShared) + scale_bytes<Weight>(launch.tiles);
  uint8_t* const stages = smem_x + Head::kTokens * pitch_of<Element>(a.d);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tiles = (a.v + Head::kRows - 1) / Head::kRows;
  if (threadIdx.x == 0) {
    for (int i = 0; i < launch.stages; ++i) {
      init_barrier(&smem.full[i], 1);
      init_barrier(&smem.empty[i], Head::kWarps);
    }
    fence_barriers();
  }
  __syncthreads();
  launch_dependents();

  if (warp == Head::kWarps) {
    int64_t count = 0;
    for (int64_t first = 0; first < a.m; first += Head::kTokens)
      for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++count) {
        const int stage = static_cast<int>(count % launch.stages);
        const int64_t row = tile * Head::kRows, round = count / launch.stages;
        const int rows = static_cast<int>(min(int64_t{Head::kRows}, a.v - row));
        const int bytes = a.d * static_cast<int>(sizeof(Weight));
        if (lane == 0) {
          if (round > 0) wait_for_phase(&smem.empty[stage], (round - 1) % 2);
          set_expected_bytes(&smem.full[stage], rows * bytes);
        }
        __syncwarp();
        if (lane < rows)
          copy_run_async(stages + (stage * Head::kRows + lane) * pitch,
                         static_cast<const uint8_t*>(a.table) + (row + lane) * bytes, bytes,
                         &smem.full[stage]);
      }
    return;
  }

  // The scales are asked for with the first weights: later ones would wait behind all that is under way.
  if (sizeof(Weight) == 1)
    for (int i = threadIdx.x; i < launch.tiles * Head::kRows; i += 32 * Head::kWarps) {
      const int64_t row = (blockIdx.x + int64_t{i / Head::kRows} * gridDim.x) * Head::kRows + i % Head::kRows;
      smem_scales[i] = row < a.v ? load_float(a.scale, a.scale_type, row) : 0;
    }
  wait_for_prerequisites();
  const int group = lane / 4, quad = lane % 4;
  // Of the sums: two threads add up a logit, of every second warp each.
  static_assert(2 * Head::kRows * Head::kTokens == 32 * Head::kWarps / 2);
  const int part = threadIdx.x % 2, of_tokens = threadIdx.x / 2 % Head::kTokens;
  const int of_tile = threadIdx.x / (2 * Head::kTokens) % Head::kRows;
  auto* logits = static_cast<Element*>(a.logits);
  int64_t count = 0;
  for (int64_t first = 0; first < a.m; first += Head::kTokens) {
    if (first > 0) sync_threads(1, 32 * Head::kWarps);  // x of the tokens before is read
    normalize<Element, Weight>(a, first, smem_x, smem.x_scales);
    sync_threads(1, 32 * Head::kWarps);
    int at_tile = 0;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++at_tile, ++count) {
      const int stage = static_cast<int>(count % launch.stages);
      const int64_t row = tile * Head::kRows + of_tile;
      wait_for_phase(&smem.full[stage], count / launch.stages % 2);
      const uint8_t* w = stages + (stage * Head::kRows + group) * pitch + quad * 8 * sizeof(Weight);
      const uint8_t* x = smem_x + group * pitch + quad * 8 * sizeof(Weight);
      auto& sums = smem.sums[count % 2];
      multiply(sums[warp], w, x, pitch, warp, a.d / Head::kStep, Weight{});
      release(&smem.empty[stage]);
      sync_threads(1, 32 * Head::kWarps);
      if (warp >= Head::kWarps / 2) continue;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < Head::kWarps; i += 2) sum += sums[i + part][of_tile][of_tokens];
      sum += __shfl_xor_sync(~0u, sum, 1);
      const int64_t token = first + of_tokens;
      if (sizeof(Weight) == 1) sum *= smem_scales[at_tile * Head::kRows + of_tile] * smem.x_scales[of_tokens];
      if (part == 0 && row < a.v && token < a.m) logits[token * a.v + row] = from_float<Element>(sum);
    }
  }
}

template <class Element, class Weight>
static cudaError_t launch_head(const HeadArgs& args, cudaStream_t stream) {
  int sms = 0;
  cudaError_t error = count_sms(&sms);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (args.v + Head::kRows - 1) / Head::kRows, blocks = std::min<int64_t>(tiles, sms);
  const int64_t of_block = (tiles + blocks - 1) / blocks;
  const int before = sizeof(HeadShared) + scale_bytes<Weight>(static_cast<int>(of_block)) +
                     Head::kTokens * pitch_of<Element>(args.d);
  const int stage = Head::kRows * pitch_of<Weight>(args.d);
  const int stages = std::min((kSharedBytes - before) / stage, Head::kMaxStages);
  if (stages < 1) return cudaErrorInvalidValue;
  const int bytes = before + stages * stage;
  error =
      cudaFuncSetAttribute(head_kernel<Element, Weight>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  return launch_overlapping(head_kernel<Element, Weight>,
                            HeadLaunch{args, stages, static_cast<int>(of_block)},
                            static_cast<unsigned>(blocks), 32 * (Head::kWarps + 1), stream, bytes);
}

template <class Element>
static cudaError_t launch_head_of(const HeadArgs& args, cudaStream_t stream) {
  return args.scale ? launch_head<Element, int8_t>(args, stream)
                    : launch_head<Element, Element>(args, stream);
}

}  // namespace sm90

int head_sm90(const HeadArgs& args, CUstream_st* stream) {
  if (args.m == 0 || args.v == 0) return cudaSuccess;
  return args.type == DType::f16 ? sm90::launch_head_of<__half>(args, stream)
                                 : sm90::launch_head_of<__nv_bfloat16>(args, stream);
}

}  // namespace ternary
