// y = x W^T for many rows of x: tiles of 128 rows of the weight by kRowsOfX rows of x on wgmma.
//
// D^T = W X^T: the weight is the A operand, unpacked in registers (see operands.cuh), x the B operand as it
// lies in memory, in rows of 128 bytes that TMA swizzles. A step is two halves of 128 bytes of x.
//
// One block an SM. All tiles' steps make one line that the blocks cut into equal runs: a tile on a cut is
// summed by several, each leaving its part in the workspace for the one that has the tile's end. A block
// takes its run from the end, so what others need of it comes first; it waits for blocks before it alone. The
// order of the sums is fixed.
#pragma once

#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/common/types.cuh"
#include "kernels/sm90/gemm/operands.cuh"
#include "kernels/sm90/gemm/tile_config.cuh"

namespace ternary::sm90 {

// Feeds the stages: one thread. The codes are constants and need not wait for the kernels before this one.
template <class Config>
__device__ void produce(const TileArgs& a, TileShared<Config>& smem) {
  const auto load_codes = [&](int stage, const TileSegment& s, int step) {
    set_expected_bytes(&smem.full[stage], TileStage<Config>::kCopied);
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
        copy_tile_async(smem.stages[stage].x[half], a.map_x, (2 * step + half) * Config::kDepth / 2,
                        s.tile / a.row_tiles * Config::kRowsOfX, &smem.full[stage]);
    }
  });
}

// Feeds the scales of the stages, as the products take them: one warp, so that those that multiply need not.
template <class Config>
__device__ void produce_scales(const TileArgs& a, TileShared<Config>& smem) {
  constexpr int kRows = Config::kRows / 32;  // of a lane
  const int lane = threadIdx.x % 32;
  const DType type = a.gemm.scale_type;
  int count = 0;
  for_each_segment(a, [&](const TileSegment& s) {
    const int first_row = s.tile % a.row_tiles * Config::kRows + lane;
    for (int step = s.begin; step < s.end; ++step, ++count) {
      uint32_t bits[kRows][Config::kSpans];
#pragma unroll
      for (int i = 0; i < kRows * Config::kSpans; ++i) {
        const int row = i / Config::kSpans, span = i % Config::kSpans;
        bits[row][span] = load_scale(a.gemm, a.index, first_row + row * 32, step * Config::kSpans + span);
      }
      const int stage = count % Config::kStages, round = count / Config::kStages;
      if (round > 0) wait_for_phase(&smem.empty[stage], (round - 1) % 2);
#pragma unroll
      for (int i = 0; i < kRows * Config::kSpans; ++i) {
        const int row = i / Config::kSpans, span = i % Config::kSpans;
        uint32_t& to = smem.stages[stage].scales[span][row * 32 + lane];
        if constexpr (Config::kFp8) {
          to = __float_as_uint(scale_of(bits[row][span], type));
        } else {
          to = scale_pair<typename Config::Element>(bits[row][span], type);
        }
      }
      release(&smem.full[stage]);
    }
  });
}

// Where 16 bytes of codes lie: as TMA swizzles rows of 32 or 64 bytes.
template <class Config>
__device__ int codes_slot(int row, int piece) {
  return piece ^ (Config::kFp8 ? row >> 1 & 3 : row >> 2 & 1);
}

// This thread's upper row of the tile; the lower is eight on.
__device__ inline int row_of_thread() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }

template <class Config>
__device__ void release_stage(TileShared<Config>& smem, int count) {
  release(&smem.empty[count % Config::kStages]);
}

template <class Config>
__device__ void wait_for_stage(TileShared<Config>& smem, int count) {
  wait_for_phase(&smem.full[count % Config::kStages], count / Config::kStages % 2);
}

// Twice the sums of a segment, 16 bits: the scales go into the weights, so that one set of sums serves all of
// K. Beside the products of 64 columns the weights of the next 64 are unpacked. `count` counts the block's
// steps.
template <class Config>
__device__ void multiply(float (&sums)[Config::kSums], TileShared<Config>& smem, const TileSegment& s,
                         int& count) {
  using Element = typename Config::Element;
  const int row = row_of_thread();
  uint32_t frag[2][4][4];
  const auto codes_of = [&](const TileStage<Config>& stage, int half, int at) {
    return stage.codes[at][codes_slot<Config>(at, half)];
  };
  const auto unpack_half = [&](const TileStage<Config>& stage, int half, uint4 upper, uint4 lower) {
    scaled_weights<Element>(frag[half], upper, lower, [&](int i, int k) {
      return stage.scales[(half * 64 + k * 16) / Config::kSpan][row + i * 8];
    });
  };
  wait_for_stage(smem, count);
  const TileStage<Config>& begin = smem.stages[count % Config::kStages];
  unpack_half(begin, 0, codes_of(begin, 0, row), codes_of(begin, 0, row + 8));
#pragma unroll 1
  for (int step = s.begin; step < s.end; ++step, ++count) {
    const TileStage<Config>& stage = smem.stages[count % Config::kStages];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      keep(frag[half]);
      keep(sums);
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma_m64k16<Element>(sums, frag[half][k], swizzled_matrix(stage.x[half][0] + k * 32), true);
      commit_products();
      if (half == 1 && step + 1 == s.end) break;
      if (half == 1) wait_for_stage(smem, count + 1);
      const TileStage<Config>& next = smem.stages[(count + half) % Config::kStages];
      const uint4 upper = codes_of(next, 1 - half, row), lower = codes_of(next, 1 - half, row + 8);
      wait_for_products<1>();  // those of the other fragment, whose place is taken now
      keep(frag[1 - half]);
      if (half == 0 && step > s.begin) release_stage(smem, count - 1);
      unpack_half(next, 1 - half, upper, lower);
    }
  }
  wait_for_products<0>();
  keep(sums);
  release_stage(smem, count - 1);
}

// The same in e4m3, whose sums on the tensor cores are short: those of a span are scaled into sums in fp32.
template <class Config>
__device__ void multiply_fp8(float (&sums)[Config::kSums], TileShared<Config>& smem, const TileSegment& s,
                             int& count) {
  constexpr int kSpansOfHalf = Config::kSpans / 2, kProducts = 4 / kSpansOfHalf;
  const int row = row_of_thread();
  float part[Config::kSums];
  uint32_t frag[2][4][4];
  const auto load_weights = [&](int of, const TileStage<Config>& stage) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto word = [&](int at) {
        return reinterpret_cast<const uint32_t*>(
            &stage.codes[at][codes_slot<Config>(at, 2 * of + i)])[threadIdx.x % 4];
      };
      fp8_weights(frag[of][2 * i], frag[of][2 * i + 1], word(row), word(row + 8));
    }
  };
#pragma unroll
  for (int i = 0; i < Config::kSums; ++i) part[i] = 0;
  wait_for_stage(smem, count);
  load_weights(0, smem.stages[count % Config::kStages]);
#pragma unroll 1
  for (int step = s.begin; step < s.end; ++step) {
    const TileStage<Config>& stage = smem.stages[count % Config::kStages];
    ++count;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int span = 0; span < kSpansOfHalf; ++span) {
        keep(sums);
        keep(frag[half]);
        keep(part);
        begin_products();
#pragma unroll
        for (int k = 0; k < kProducts; ++k)
          wgmma_m64k32(part, frag[half][span * kProducts + k],
                       swizzled_matrix(stage.x[half][0] + (span * kProducts + k) * 32), k > 0);
        commit_products();
        float scale[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          scale[i] = __uint_as_float(stage.scales[half * kSpansOfHalf + span][row + i * 8]);
        if (span + 1 == kSpansOfHalf) {  // the other fragment's products are over
          if (half == 0) {
            load_weights(1, stage);
          } else if (step + 1 < s.end) {
            wait_for_stage(smem, count);
            load_weights(0, smem.stages[count % Config::kStages]);
          }
        }
        wait_for_products<0>();
        keep(part);
        if (half == 1 && span + 1 == kSpansOfHalf) release_stage(smem, count - 1);
#pragma unroll
        for (int i = 0; i < Config::kSums; ++i) sums[i] += scale[i / 2 % 2] * part[i];
      }
    }
  }
}

template <class Config>
__device__ float4* part_of_block(const TileArgs& a, int block, int group) {
  return a.parts + (int64_t{block} * Config::kGroups + group) * Config::kSums / 4 * 128 + threadIdx.x % 128;
}

// Leaves the sums for the block that has the tile's end.
template <class Config>
__device__ void hand_over(const float (&sums)[Config::kSums], const TileArgs& a, int group) {
  float4* to = part_of_block<Config>(a, blockIdx.x, group);
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
#pragma unroll 1
  for (int block = first; block < blockIdx.x; ++block) {
    const float4* part = part_of_block<Config>(a, block, group);
#pragma unroll
    for (int i = 0; i < Config::kSums; i += 4) {
      const float4 v = __ldcg(part + i * 32);
      sums[i] += v.x;
      sums[i + 1] += v.y;
      sums[i + 2] += v.z;
      sums[i + 3] += v.w;
    }
  }
}

// y of 64 rows of the weight, by way of shared memory to write it in rows.
template <class Config>
__device__ void store_y(const float (&sums)[Config::kSums], const TileArgs& a, TileShared<Config>& smem,
                        int first_row, int64_t first_x, int group) {
  using Output = typename Config::Output;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  auto& smem_y = smem.y[group];
  float bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = min(int64_t{first_row} + warp * 16 + lane / 4 + 8 * i, a.gemm.n - 1);
    bias[i] = a.gemm.bias ? load_float(a.gemm.bias, a.gemm.bias_type, row) : 0;
  }
  // of a column of D, a code reading as twice its weight
  const auto scale_of_x = [&](int x) {
    return Config::kFp8 && first_x + x < a.gemm.m ? 0.5f * a.x_scales[first_x + x] : 0.5f;
  };
  const bool whole = a.gemm.n % 8 == 0;
#pragma unroll
  for (int begin = 0; begin < Config::kRowsOfX; begin += Config::kRowsToStore) {
    sync_warpgroup(group);  // what was there is read
#pragma unroll
    for (int x = 0; x < Config::kRowsToStore; x += 16) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int of = begin + x + j / 2 * 8 + lane % 4 * 2, i = (begin + x) / 2 + 2 * j;
        pairs[j] = pack(from_float<Output>(scale_of_x(of) * sums[i] + bias[j % 2]),
                        from_float<Output>(scale_of_x(of + 1) * sums[i + 1] + bias[j % 2]));
      }
      store_matrices_transposed(&smem_y[x + lane / 16 * 8 + lane % 8][warp * 16 + lane / 8 % 2 * 8], pairs);
    }
    sync_warpgroup(group);
#pragma unroll 4
    for (int i = threadIdx.x % 128; i < Config::kRowsToStore * 8; i += 128) {
      const int x = i / 8, row = first_row + i % 8 * 8;
      if (first_x + begin + x >= a.gemm.m || row >= a.gemm.n) continue;
      Output* to = static_cast<Output*>(a.gemm.y) + (first_x + begin + x) * a.gemm.n + row;
      const Output* from = &smem_y[x][i % 8 * 8];
      if (whole) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int j = 0; j < 8 && row + j < a.gemm.n; ++j) to[j] = from[j];
      }
    }
  }
}

template <class Config>
__device__ void consume(const TileArgs& a, TileShared<Config>& smem) {
  const int group = threadIdx.x / 128;
  int count = 0;
  for_each_segment(a, [&](const TileSegment& s) {
    float sums[Config::kSums];
#pragma unroll
    for (int i = 0; i < Config::kSums; ++i) sums[i] = 0;
    if constexpr (Config::kFp8) {
      multiply_fp8<Config>(sums, smem, s, count);
    } else {
      multiply<Config>(sums, smem, s, count);
    }
    if (s.end != a.steps) {
      hand_over<Config>(sums, a, group);
      return;
    }
    if (s.begin != 0) take_over<Config>(sums, a, s, group);
    store_y<Config>(sums, a, smem, s.tile % a.row_tiles * Config::kRows + group * 64,
                    int64_t{s.tile / a.row_tiles} * Config::kRowsOfX, group);
  });
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) tile_kernel(const __grid_constant__ TileArgs a) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<TileShared<Config>*>(smem_bytes);
  if (threadIdx.x == 0) {
    prefetch_map(a.map_codes);
    prefetch_map(a.map_x);
    for (int i = 0; i < Config::kStages; ++i) {
      init_barrier(&smem.full[i], 2);  // x with the codes, and the scales
      init_barrier(&smem.empty[i], Config::kGroups * 4);
    }
    fence_barriers();
  }
  __syncthreads();
  launch_dependents();
  if (threadIdx.x >= Config::kGroups * 128) {
    give_registers<40>();
    const int warp = threadIdx.x / 32 - Config::kGroups * 4;
    if (warp < Config::kGroups) {
      announce<Config>(a, warp);
    } else if (warp == Config::kGroups) {
      produce_scales(a, smem);
    } else if (threadIdx.x % 32 == 0) {
      produce(a, smem);
    }
  } else {
    take_registers<232>();
    wait_for_prerequisites();
    consume(a, smem);
  }
}

}  // namespace ternary::sm90
