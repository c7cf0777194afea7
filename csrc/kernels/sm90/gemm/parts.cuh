// How blocks of the tile kernel that share a tile add their sums: each leaves its part in the workspace for
// the block that has the tile's end, which brings the parts through its stages and adds them in the order of
// the blocks.
#pragma once

#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/gemm/tile_config.cuh"

namespace ternary::sm90 {

// Where a block leaves the sums of a warpgroup.
template <class Config>
__device__ float4* part_of_block(const TileArgs& a, int block, int group) {
  return a.parts + (int64_t{block} * Config::kGroups + group) * Config::kSums / 4 * 128;
}

// Asks for a warpgroup's part of what a block leaves, once that is announced.
template <class Config>
__device__ void copy_part(TileStage<Config>& stage, const TileArgs& a, int block, int group, uint64_t* full) {
  static_assert(sizeof(stage.x) == Config::kSums * 128 * sizeof(float));
  uint64_t* flag = a.flags + block * Config::kGroups + group;
  while (load_acquire(flag) != a.token) {
  }
  *flag = 0;  // for the next launch with this token, of a CUDA graph
  fence_copies();
  set_expected_bytes(full, sizeof(stage.x));
  copy_run_async(stage.x, part_of_block<Config>(a, block, group), sizeof(stage.x), full);
}

// Leaves the sums for the block that has the tile's end.
template <class Config>
__device__ void hand_over(const float (&sums)[Config::kSums], const TileArgs& a, int group) {
  float4* to = part_of_block<Config>(a, blockIdx.x, group) + threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < Config::kSums; i += 4)
    __stcg(to + i * 32, float4{sums[i], sums[i + 1], sums[i + 2], sums[i + 3]});
  tell_warp(group);
}

// Announces what a warpgroup left, once it can be seen: a warp of the loading warpgroup, so that the other
// goes on. A block leaves something if its run ends within a tile.
template <class Config>
__device__ void announce(const TileArgs& a, int group) {
  if (first_step(a, blockIdx.x + 1) % a.steps == 0) return;
  wait_for_warpgroup(group);
  __threadfence();
  if (threadIdx.x % 32 == 0) store_release(a.flags + blockIdx.x * Config::kGroups + group, a.token);
}

// Adds what the blocks before this one left of a tile, in their order; each warpgroup's parts pass through
// stages of their own.
template <class Config>
__device__ void take_over(float (&sums)[Config::kSums], const TileArgs& a, TileShared<Config>& smem,
                          const TileSegment& s, StagePlace<Config>& place, int group) {
#pragma unroll 1
  for (int i = first_block_of(a, s) * Config::kGroups; i < blockIdx.x * Config::kGroups; ++i) {
    wait_for_stage(smem, place);
    if (i % Config::kGroups == group) {
      const auto* part = reinterpret_cast<const float4*>(smem.stages[place.at].x) + threadIdx.x % 128;
#pragma unroll
      for (int j = 0; j < Config::kSums; j += 4) {
        const float4 v = part[j * 32];
        sums[j] += v.x;
        sums[j + 1] += v.y;
        sums[j + 2] += v.z;
        sums[j + 3] += v.w;
      }
    }
    release_stage(smem, place);
    place = place.next();
  }
}

}  // namespace ternary::sm90
