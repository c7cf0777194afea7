// y = x W^T for some rows of x: latency decides, so everything a block needs is asked for at once.
//
// A cluster of blocks has some units of 64 rows of the weight. Each block takes its boxes of 512 columns of
// them, and of x those columns alone, so that x leaves the L2 cache once a cluster; each of its warpgroups
// takes one unit on wgmma, as in tile.cuh. Of every eight rows of x one block is the owner: all send it their
// sums, straight into its shared memory, and it adds them in their order.
#pragma once

#include <cuda.h>

#include "kernels/gemm.h"
#include "kernels/sm90/common/types.cuh"
#include "kernels/sm90/common/wgmma.cuh"
#include "kernels/sm90/gemm/config.h"
#include "kernels/sm90/gemm/operands.cuh"

namespace ternary::sm90 {

template <class Element_, int kSpan_, int kRowsOfX_>
struct SplitConfig : Split {
  using Element = Element_;
  static constexpr int kSpan = kSpan_;        // weights of a row that share a scale
  static constexpr int kRowsOfX = kRowsOfX_;  // the n of the instruction
  static constexpr int kEights = kRowsOfX / 8;
  static constexpr int kThreads = 128 * kMaxUnits;
};

struct SplitArgs {
  GemmArgs gemm;
  CUtensorMap map_x, map_codes;
  int units, boxes;       // of a block
  int blocks;             // of a cluster
  const float* x_scales;  // [m], or null
  ScaleIndex index;
};

// The shared memory of a block.
template <class Config>
struct SplitShared {
  uint8_t* x;        // [boxes * 8, kRowsOfX, 128], pieces of 16 bytes at (piece ^ row % 8)
  uint8_t* codes;    // [units, boxes, 64, 128], swizzled like x
  float4* sums;      // [eights that the block owns, blocks, units * 128]
  uint32_t* scales;  // [units, 64, scales_pitch], pairs

  __device__ SplitShared(uint8_t* smem, const SplitArgs& a)
      : x(smem),
        codes(x + Config::x_bytes(Config::kRowsOfX, a.boxes)),
        sums(reinterpret_cast<float4*>(codes + a.units * Config::unit_bytes(a.boxes))),
        scales(reinterpret_cast<uint32_t*>(sums + Config::owned(Config::kRowsOfX, a.blocks) * a.blocks *
                                                      a.units * 128)) {}
};

struct SplitBarriers {
  uint64_t x[Split::kMaxBoxes * Split::kBox / 64], codes[Split::kMaxUnits], sums;
};

// Asks for the codes of a warpgroup: one thread.
template <class Config>
__device__ void load_codes(uint8_t* smem_codes, uint64_t* full, const SplitArgs& a, int row, int column) {
  set_expected_bytes(full, Config::unit_bytes(a.boxes));
  for (int box = 0; box < a.boxes; ++box)
    copy_tile_async(smem_codes + box * Config::unit_bytes(1), a.map_codes, (column + box * Config::kBox) / 4,
                    row, full);
}

// Asks for x, once the kernels before this one are done: one thread.
template <class Config>
__device__ void load_x(uint8_t* smem_x, uint64_t* full, const SplitArgs& a, int column, int pieces) {
  wait_for_prerequisites();
  for (int i = 0; i < pieces; ++i) {
    set_expected_bytes(&full[i], Config::kRowsOfX * 128);
    copy_tile_async(smem_x + i * Config::kRowsOfX * 128, a.map_x, column + i * 64, 0, &full[i]);
  }
}

// The scales of a warpgroup's rows for the block's columns. While they are on their way, `meanwhile` runs.
template <class Config, class Function>
__device__ void load_scales(uint32_t* smem_scales, const SplitArgs& a, int row, int column,
                            Function meanwhile) {
  constexpr int kTogether = 4;  // of a thread
  const int spans = a.boxes * Config::kBox / Config::kSpan, pitch = spans + 1;
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < Config::kUnitRows * spans; i += kTogether * 128) {
    uint32_t bits[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int at = i + j * 128;
      bits[j] = load_scale(a.gemm, a.index, row + at / spans, column / Config::kSpan + at % spans);
    }
    if (i < 128) meanwhile();
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int at = i + j * 128;
      smem_scales[at / spans * pitch + at % spans] =
          scale_pair<typename Config::Element>(bits[j], a.gemm.scale_type);
    }
  }
}

// Twice the sums of a warpgroup's unit over the block's columns.
template <class Config>
__device__ void multiply_unit(float (&sums)[Config::kRowsOfX / 2], const SplitArgs& a, const uint8_t* smem_x,
                              uint64_t* x_full, const uint8_t* smem_codes, const uint32_t* smem_scales,
                              int pieces) {
  using Element = typename Config::Element;
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;  // of the unit
  const int pitch = Config::scales_pitch(a.boxes, Config::kSpan);
  constexpr int kScales = 64 / Config::kSpan;  // of a row
  uint32_t frag[2][4][4], rows[2][4][2], scales[2][kScales];
#pragma unroll
  for (int i = 0; i < Config::kRowsOfX / 2; ++i) sums[i] = 0;
  const auto read = [&](int piece) {
    const uint8_t* codes = smem_codes + (piece / 8 * Config::kUnitRows + row) * 128;
    const int slot = (piece % 8 ^ row % 8) * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unpack(rows[i], *reinterpret_cast<const uint4*>(codes + i * 8 * 128 + slot), threadIdx.x % 4);
#pragma unroll
      for (int j = 0; j < kScales; ++j)
        scales[i][j] = smem_scales[(row + i * 8) * pitch + piece * kScales + j];
    }
  };
  const auto scale = [&](int i, int k) { return scales[i][k * 16 / Config::kSpan]; };
  read(0);
  scaled_weights<Element>(frag[0], rows, scale);
#pragma unroll 1
  for (int pair = 0; pair < pieces; pair += 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int piece = pair + i;
      wait_for_phase(&x_full[piece], 0);
      const auto multiply_pair = [&](int k) {
        const uint8_t* x = smem_x + piece * Config::kRowsOfX * 128 + k * 32;
        begin_products();
        wgmma_m64k16<Element>(sums, frag[i][k], swizzled_matrix(x), true);
        wgmma_m64k16<Element>(sums, frag[i][k + 1], swizzled_matrix(x + 32), true);
        commit_products();
      };
      keep(sums);
      keep(frag[i]);
      multiply_pair(0);
      read(min(piece + 1, pieces - 1));
      wait_for_products<1>();  // those of the other fragment, whose place is taken now
      keep(frag[1 - i]);
      scaled_weights<Element>(frag[1 - i], rows, scale);
      multiply_pair(2);
    }
  }
  wait_for_products<0>();
  keep(sums);
}

// Two rows of the weight for a row of x.
template <class Element>
__device__ void store_pair(const SplitArgs& a, uint32_t pair, int x, int row) {
  if (x >= a.gemm.m || row >= a.gemm.n) return;
  Element* to = static_cast<Element*>(a.gemm.y) + int64_t{x} * a.gemm.n + row;
  if (a.gemm.n % 2 == 0) {
    *reinterpret_cast<uint32_t*>(to) = pair;
  } else {
    const auto* halves = reinterpret_cast<const Element*>(&pair);
    for (int i = 0; i < 2 && row + i < a.gemm.n; ++i) to[i] = halves[i];
  }
}

// y of the eights of rows of x that the block owns; a thread has the same places of D as in the products.
template <class Config>
__device__ void add_blocks(const float4* smem_sums, const SplitArgs& a, int rank, int unit_row) {
  using Element = typename Config::Element;
  const int lane = threadIdx.x % 32, row = unit_row + threadIdx.x / 32 % 4 * 16;
  float bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t of = min(int64_t{row} + lane / 4 + 8 * i, a.gemm.n - 1);
    bias[i] = a.gemm.bias ? load_float(a.gemm.bias, a.gemm.bias_type, of) : 0;
  }
  const float4* from = smem_sums + threadIdx.x;
  for (int eight = rank; eight < Config::kEights; eight += a.blocks) {
    float4 sum = {};
    for (int block = 0; block < a.blocks; ++block, from += a.units * 128) {
      const float4 part = *from;
      sum.x += part.x;
      sum.y += part.y;
      sum.z += part.z;
      sum.w += part.w;
    }
    float scale[2] = {0.5f, 0.5f};  // a code reads as twice its weight
    if (a.x_scales)
      for (int i = 0; i < 2; ++i)
        scale[i] *= a.x_scales[min(int64_t{eight} * 8 + lane % 4 * 2 + i, a.gemm.m - 1)];
    const auto pair = [&](float first, float second, float b) {
      return transpose(
          pack(from_float<Element>(scale[0] * first + b), from_float<Element>(scale[1] * second + b)));
    };
    const int x = eight * 8 + lane / 4, at = row + lane % 4 * 2;
    store_pair<Element>(a, pair(sum.x, sum.y, bias[0]), x, at);
    store_pair<Element>(a, pair(sum.z, sum.w, bias[1]), x, at + 8);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) split_kernel(const __grid_constant__ SplitArgs a) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  __shared__ SplitBarriers full;
  const SplitShared<Config> smem(smem_bytes, a);
  const int unit = threadIdx.x / 128, rank = blockIdx.x % a.blocks;
  const int first_row = blockIdx.x / a.blocks * a.units * Config::kUnitRows;
  const int first_column = rank * a.boxes * Config::kBox;
  // of 64 columns that x has, and one more where they are odd; past the edge are zeros
  const int pieces = min(a.boxes * 8, (static_cast<int>(a.gemm.k) - first_column + 127) / 128 * 2);
  const int owned = (Config::kEights - rank + a.blocks - 1) / a.blocks;

  if (threadIdx.x == 0) {
    prefetch_map(a.map_codes);
    prefetch_map(a.map_x);
    for (int i = 0; i < pieces; ++i) init_barrier(&full.x[i], 1);
    for (int i = 0; i < a.units; ++i) init_barrier(&full.codes[i], 1);
    init_barrier(&full.sums, 1);
    fence_barriers();
    if (owned > 0) set_expected_bytes(&full.sums, owned * (a.blocks - 1) * a.units * 128 * sizeof(float4));
  }
  __syncthreads();
  arrive_at_cluster();
  launch_dependents();
  const int unit_row = first_row + unit * Config::kUnitRows;
  uint8_t* codes = smem.codes + unit * Config::unit_bytes(a.boxes);
  uint32_t* scales = smem.scales + unit * Config::kUnitRows * Config::scales_pitch(a.boxes, Config::kSpan);
  if (threadIdx.x % 128 == 0) load_codes<Config>(codes, &full.codes[unit], a, unit_row, first_column);
  load_scales<Config>(scales, a, unit_row, first_column, [&] {
    if (threadIdx.x == 0) load_x<Config>(smem.x, full.x, a, first_column, pieces);
  });
  sync_warpgroup(unit);
  wait_for_phase(&full.codes[unit], 0);
  float sums[Config::kRowsOfX / 2];
  multiply_unit<Config>(sums, a, smem.x, full.x, codes, scales, pieces);

  wait_for_cluster();  // the barriers of all are set up
#pragma unroll
  for (int eight = 0; eight < Config::kEights; ++eight) {
    const float4 four = {sums[4 * eight], sums[4 * eight + 1], sums[4 * eight + 2], sums[4 * eight + 3]};
    float4* to = smem.sums + (eight / a.blocks * a.blocks + rank) * a.units * 128 + threadIdx.x;
    if (eight % a.blocks == rank) {
      *to = four;  // this thread reads it again
    } else {
      store_to_block(to, four, &full.sums, eight % a.blocks);
    }
  }
  if (owned <= 0) return;
  wait_for_phase(&full.sums, 0);
  wait_for_prerequisites();
  add_blocks<Config>(smem.sums, a, rank, unit_row);
}

}  // namespace ternary::sm90
