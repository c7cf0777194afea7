// y = x W^T for many rows of x: tiles of 128 rows of the weight by kRowsOfX rows of x on wgmma.
//
// D^T = W X^T: the weight is the A operand, unpacked in registers, x the B operand as it lies in memory, in
// rows of 64 columns that TMA swizzles. A lane's place among the four that share a row of A says which two of
// every eight columns are its own, so it takes a nibble of each 16 bits of codes (see unpack).
//
// One block an SM. All tiles' steps of kDepth columns make one line that the blocks cut into equal runs: a
// tile on a cut is summed by several, each leaving its part in the workspace for the one that has the tile's
// end. A block takes its run from the end, so what others need of it comes first; it waits for blocks before
// it alone. The order of the sums is fixed.
#pragma once

#include <cuda.h>

#include "kernels/gemm.h"
#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/common/types.cuh"
#include "kernels/sm90/gemm/config.h"

namespace ternary::sm90 {

template <class Element_, int kSpan_, int kRowsOfX_>
struct TileConfig : Tile {
  using Element = Element_;
  static constexpr int kSpan = kSpan_;        // weights of a row that share a scale and an accumulator
  static constexpr int kRowsOfX = kRowsOfX_;  // the n of the instruction
  static constexpr int kSums = kRowsOfX / 2;  // of a thread: 64 x kRowsOfX over a warpgroup
};

// One step's data. x in two halves of 64 columns: 128 bytes a row, pieces of 16 at (piece ^ row % 8).
template <class Config>
struct alignas(1024) TileStage {
  uint8_t x[2][Config::kRowsOfX][128];
  uint4 codes[Config::kRows][2];
};

template <class Config>
struct TileShared {
  static constexpr int kPitch = 64 + 8;  // of y: the eight rows of a matrix in different banks
  TileStage<Config> stages[Config::kStages];
  typename Config::Element y[Config::kGroups][Config::kRowsOfX][kPitch];
  uint64_t full[Config::kStages], empty[Config::kStages];
};

struct TileArgs {
  GemmArgs gemm;
  CUtensorMap map_x, map_codes;
  int row_tiles;            // of the weight
  int steps;                // of a tile
  int run, longer;          // steps of a block; the first blocks, which have one more
  uint64_t token;           // of this launch: a flag that has it is set
  float4* parts;            // [blocks, kGroups, kSums / 4, 128]
  uint64_t* flags;          // [blocks, kGroups]
  int groups;               // of a row; 0 with one scale for all
  int last_span;            // of a row
  uint32_t spans_to_group;  // see StreamArgs
};

// Steps begin .. end of a tile.
struct TileSegment {
  int tile, begin, end;
};

// Where a block's run begins, counted over the steps of all tiles.
__device__ inline int first_step(const TileArgs& a, int block) {
  return block * a.run + min(block, a.longer);
}

// Calls f with what the block has of each tile, from the last to the first.
template <class Function>
__device__ void for_each_segment(const TileArgs& a, Function f) {
  const int begin = first_step(a, blockIdx.x);
  for (int end = first_step(a, blockIdx.x + 1); end > begin;) {
    const int tile = (end - 1) / a.steps, origin = tile * a.steps;
    f(TileSegment{tile, max(begin - origin, 0), end - origin});
    end = origin;
  }
}

// Feeds the stages: one thread. The codes are constants and need not wait for the kernels before this one.
template <class Config>
__device__ void produce(const TileArgs& a, TileShared<Config>& smem) {
  constexpr uint32_t kBytes = sizeof(TileStage<Config>);
  const auto load_codes = [&](int stage, const TileSegment& s, int step) {
    set_expected_bytes(&smem.full[stage], kBytes);
    copy_tile_async(smem.stages[stage].codes, a.map_codes, step * Config::kDepth / 4,
                    s.tile % a.row_tiles * Config::kRows, &smem.full[stage]);
  };
  int early = 0;
  for_each_segment(a, [&](const TileSegment& s) {
    for (int step = s.begin; step < s.end && early < Config::kStages; ++step) load_codes(early++, s, step);
  });
  wait_for_prerequisites();
  int count = 0;
  for_each_segment(a, [&](const TileSegment& s) {
    for (int step = s.begin; step < s.end; ++step, ++count) {
      const int stage = count % Config::kStages, round = count / Config::kStages;
      if (round > 0) {
        wait_for_phase(&smem.empty[stage], (round - 1) % 2);
        load_codes(stage, s, step);
      }
      for (int half = 0; half < 2; ++half)
        copy_tile_async(smem.stages[stage].x[half], a.map_x, step * Config::kDepth + half * 64,
                        s.tile / a.row_tiles * Config::kRowsOfX, &smem.full[stage]);
    }
  });
}

// 64 codes of a row -> this lane's halves of A for four steps of the instruction, [step][columns
// 0..7, 8..15]. Of the 16 bits of a piece of eight columns the lane takes nibble `quad`. Bytes with nibble j
// and 4 + j of the eight, then the even codes in the low halves of two words and the odd ones in the high:
// from there as in stream.cuh a shift and a mask make a pair of neighbours.
__device__ inline void unpack(uint32_t (&frag)[4][2], uint4 codes, int quad) {
  constexpr uint32_t kTopCodes = 0xC000C000, kLowNibbles = 0x0F0F0F0F;
  const uint32_t bytes = quad / 2 ? 0x7531 : 0x6420, shift = quad % 2 * 4;
  const uint32_t low = __byte_perm(codes.x, codes.y, bytes) >> shift;
  const uint32_t high = __byte_perm(codes.z, codes.w, bytes) << (4 - shift);
  const uint32_t mine = (low & kLowNibbles) | (high & ~kLowNibbles), evens = mine << 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t pairs = __byte_perm(evens, mine, i ? 0x7632 : 0x5410);  // of pieces 2 i, 4 + 2 i, 1 + ..
    frag[i][0] = (pairs << 12) & kTopCodes;
    frag[i][1] = (pairs << 4) & kTopCodes;
    frag[2 + i][0] = (pairs << 8) & kTopCodes;
    frag[2 + i][1] = pairs & kTopCodes;
  }
}

// The codes of half a stage -> A of four steps.
template <class Config>
__device__ void load_weights(uint32_t (&frag)[4][4], const TileStage<Config>& stage, int row, int half) {
  uint32_t upper[4][2], lower[4][2];
  unpack(upper, stage.codes[row][half], threadIdx.x % 4);
  unpack(lower, stage.codes[row + 8][half], threadIdx.x % 4);
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) frag[step][i] = i % 2 ? lower[step][i / 2] : upper[step][i / 2];
}

// The scales of this thread's two rows, for the span that begins at a column.
template <class Config>
__device__ void load_scales(float (&scales)[2], const TileArgs& a, int row, int column) {
  const int span = min(column / Config::kSpan, a.last_span);
  const int group = a.groups ? __umulhi(2 * span + 1, a.spans_to_group) : 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t of = min(int64_t{row} + 8 * i, a.gemm.n - 1);
    scales[i] = load_float(a.gemm.scales, a.gemm.scale_type, of * a.groups + group);
  }
}

// Twice the sums of a segment. `count` counts the block's steps, and with them the stages. The weights of the
// next 64 columns are unpacked beside the products of these; while a warpgroup scales the sums of a span, the
// other one keeps the tensor cores busy.
template <class Config>
__device__ void multiply(float (&sums)[Config::kSums], const TileArgs& a, TileShared<Config>& smem,
                         const TileSegment& s, int first_row, int& count) {
  constexpr int kBatch = Config::kSpan == 32 ? 2 : 4;            // products, of 16 columns, in a group
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;  // of the tile
  float part[Config::kSums], scales[2];
  uint32_t frag[2][4][4];
#pragma unroll
  for (int i = 0; i < Config::kSums; ++i) sums[i] = part[i] = 0;

  wait_for_phase(&smem.full[count % Config::kStages], count / Config::kStages % 2);
  load_weights(frag[0], smem.stages[count % Config::kStages], row, 0);
#pragma unroll 1
  for (int step = s.begin; step < s.end; ++step) {
    const TileStage<Config>& stage = smem.stages[count % Config::kStages];
    uint64_t* empty = &smem.empty[count % Config::kStages];
    const int column = step * Config::kDepth;
    ++count;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < 4; k += kBatch) {
        const int first = half * 64 + k * 16, end = first + kBatch * 16;
        if (first % Config::kSpan == 0) load_scales<Config>(scales, a, first_row + row, column + first);
        keep(part);
        keep(frag[half]);
        begin_products();
#pragma unroll
        for (int i = k; i < k + kBatch; ++i)
          wgmma_m64k16<typename Config::Element>(part, frag[half][i],
                                                 swizzled_matrix(stage.x[half][0] + i * 32),
                                                 (half * 64 + i * 16) % Config::kSpan != 0);
        commit_products();
        if (k + kBatch == 4) {
          wait_for_products<1>();  // those of the other fragment, whose place is taken now
          keep(frag[1 - half]);
          if (half == 0) {
            load_weights(frag[1], stage, row, 1);
          } else if (step + 1 < s.end) {
            wait_for_phase(&smem.full[count % Config::kStages], count / Config::kStages % 2);
            load_weights(frag[0], smem.stages[count % Config::kStages], row, 0);
          }
        }
        if (end % Config::kSpan == 0) {
          wait_for_products<0>();
          keep(part);
          if (end == Config::kDepth) release(empty);
#pragma unroll
          for (int i = 0; i < Config::kSums; ++i) sums[i] += scales[i / 2 % 2] * part[i];
        }
      }
    }
  }
}

// Leaves the sums for the block that has the tile's end.
template <class Config>
__device__ void hand_over(const float (&sums)[Config::kSums], const TileArgs& a, int group) {
  float4* to = a.parts + (int64_t{blockIdx.x} * Config::kGroups + group) * Config::kSums / 4 * 128;
#pragma unroll
  for (int i = 0; i < Config::kSums / 4; ++i)
    __stcg(to + i * 128 + threadIdx.x % 128,
           float4{sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]});
  __threadfence();
  sync_warpgroup(group);
  if (threadIdx.x % 128 == 0) store_release(a.flags + blockIdx.x * Config::kGroups + group, a.token);
}

// Adds what the blocks before this one left of a tile.
template <class Config>
__device__ void take_over(float (&sums)[Config::kSums], const TileArgs& a, const TileSegment& s, int group) {
  int first = blockIdx.x - 1;
  while (first_step(a, first) > s.tile * a.steps) --first;
  for (int block = first + threadIdx.x % 128; block < blockIdx.x; block += 128) {
    uint64_t* flag = a.flags + block * Config::kGroups + group;
    while (load_acquire(flag) != a.token) {
    }
    *flag = 0;  // for the next launch with this token, of a CUDA graph
  }
  sync_warpgroup(group);
#pragma unroll(64 / Config::kSums)
  for (int block = first; block < blockIdx.x; ++block) {
    const float4* from = a.parts + (int64_t{block} * Config::kGroups + group) * Config::kSums / 4 * 128;
#pragma unroll
    for (int i = 0; i < Config::kSums / 4; ++i) {
      const float4 part = __ldcg(from + i * 128 + threadIdx.x % 128);
      sums[4 * i] += part.x;
      sums[4 * i + 1] += part.y;
      sums[4 * i + 2] += part.z;
      sums[4 * i + 3] += part.w;
    }
  }
}

// y of a warpgroup's tile, by way of shared memory to write it in rows.
template <class Config>
__device__ void store_y(const float (&sums)[Config::kSums], const TileArgs& a, TileShared<Config>& smem,
                        int first_row, int64_t first_x, int group) {
  using Element = typename Config::Element;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  auto& smem_y = smem.y[group];
  float bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = min(int64_t{first_row} + warp * 16 + lane / 4 + 8 * i, a.gemm.n - 1);
    bias[i] = a.gemm.bias ? load_float(a.gemm.bias, a.gemm.bias_type, row) : 0;
  }
  sync_warpgroup(group);  // the tile before is read
#pragma unroll
  for (int i = 0; i < Config::kSums; i += 8) {
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)  // a code reads as twice its weight
      pairs[j] = pack(from_float<Element>(0.5f * sums[i + 2 * j] + bias[j % 2]),
                      from_float<Element>(0.5f * sums[i + 2 * j + 1] + bias[j % 2]));
    store_matrices_transposed(&smem_y[i * 2 + lane / 16 * 8 + lane % 8][warp * 16 + lane / 8 % 2 * 8], pairs);
  }
  sync_warpgroup(group);
  const bool whole = a.gemm.n % 8 == 0;
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < Config::kRowsOfX * 8; i += 128) {
    const int x = i / 8, row = first_row + i % 8 * 8;
    if (first_x + x >= a.gemm.m || row >= a.gemm.n) continue;
    Element* to = static_cast<Element*>(a.gemm.y) + (first_x + x) * a.gemm.n + row;
    const Element* from = &smem_y[x][i % 8 * 8];
    if (whole) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < 8 && row + j < a.gemm.n; ++j) to[j] = from[j];
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) tile_kernel(const __grid_constant__ TileArgs a) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<TileShared<Config>*>(smem_bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      init_barrier(&smem.full[i], 1);
      init_barrier(&smem.empty[i], Config::kGroups * 4);
    }
    fence_barriers();
  }
  __syncthreads();
  launch_dependents();
  if (threadIdx.x >= Config::kGroups * 128) {
    give_registers<40>();
    if (threadIdx.x == Config::kGroups * 128) produce(a, smem);
    return;
  }
  take_registers<232>();
  wait_for_prerequisites();
  const int group = threadIdx.x / 128;
  int count = 0;
  for_each_segment(a, [&](const TileSegment& s) {
    const int tile_row = s.tile % a.row_tiles * Config::kRows;
    float sums[Config::kSums];
    multiply<Config>(sums, a, smem, s, tile_row, count);
    if (s.end != a.steps) {
      hand_over<Config>(sums, a, group);
    } else {
      if (s.begin != 0) take_over<Config>(sums, a, s, group);
      store_y<Config>(sums, a, smem, tile_row + group * 64, int64_t{s.tile / a.row_tiles} * Config::kRowsOfX,
                      group);
    }
  });
}

}  // namespace ternary::sm90
