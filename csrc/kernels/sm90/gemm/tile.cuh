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

#include "kernels/sm90/common/types.cuh"
#include "kernels/sm90/common/wgmma.cuh"
#include "kernels/sm90/gemm/operands.cuh"
#include "kernels/sm90/gemm/parts.cuh"
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
    const int first = first_block_of(a, s);
    for (int i = first * Config::kGroups; i < blockIdx.x * Config::kGroups; ++i, ++count) {
      const int stage = count % Config::kStages, round = count / Config::kStages;
      if (round > 0) wait_for_phase(&smem.empty[stage], (round - 1) % 2);
      copy_part(smem.stages[stage], a, i / Config::kGroups, i % Config::kGroups, &smem.full[stage]);
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
    for (int i = first_block_of(a, s) * Config::kGroups; i < blockIdx.x * Config::kGroups; ++i, ++count) {
      const int stage = count % Config::kStages, round = count / Config::kStages;
      if (round > 0) wait_for_phase(&smem.empty[stage], (round - 1) % 2);
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

// Twice the sums of a segment, 16 bits: the scales go into the weights, so that one set of sums serves all of
// K. Half of the products of 64 columns run while the next 64 columns are unpacked to the registers of those
// before, and half keep the tensor cores busy from then on.
template <class Config>
__device__ void multiply(float (&sums)[Config::kSums], TileShared<Config>& smem, const TileSegment& s,
                         StagePlace<Config>& place) {
  using Element = typename Config::Element;
  constexpr int kScales = 64 / Config::kSpan;  // of a row
  const int row = row_of_thread();
  uint32_t frag[2][4][4], rows[2][4][2], scales[2][kScales];
  const auto read = [&](const TileStage<Config>& stage, int half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = row + i * 8;
      unpack(rows[i], stage.codes[at][codes_slot<Config>(at, half)], threadIdx.x % 4);
#pragma unroll
      for (int j = 0; j < kScales; ++j) scales[i][j] = stage.scales[half * kScales + j][at];
    }
  };
  const auto scale = [&](int i, int k) { return scales[i][k * 16 / Config::kSpan]; };
  StagePlace<Config> before;
  wait_for_stage(smem, place);
  read(smem.stages[place.at], 0);
  scaled_weights<Element>(frag[0], rows, scale);
#pragma unroll 1
  for (int step = s.begin; step < s.end; ++step) {
    const StagePlace<Config> next = place.next();
    const uint32_t x = swizzled_address(smem.stages[place.at].x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto multiply_pair = [&](int k) {
        const uint32_t at = x + half * Config::kRowsOfX * 8 + k * 2;
        begin_products();
        wgmma_m64k16<Element>(sums, frag[half][k], matrix_at(at), true);
        wgmma_m64k16<Element>(sums, frag[half][k + 1], matrix_at(at + 2), true);
        commit_products();
      };
      keep(frag[half]);
      keep(sums);
      multiply_pair(0);
      if (half == 1 && step + 1 < s.end) wait_for_stage(smem, next);
      read(smem.stages[half == 0 ? place.at : next.at],
           1 - half);  // past the end they are not used
      wait_for_products<1>();
      keep(frag[1 - half]);
      if (half == 0 && step > s.begin) release_stage(smem, before);
      scaled_weights<Element>(frag[1 - half], rows, scale);
      multiply_pair(2);
    }
    before = place;
    place = next;
  }
  wait_for_products<0>();
  keep(sums);
  release_stage(smem, before);
}

// The same in e4m3, whose sums on the tensor cores are short: those of a span are scaled into sums in fp32.
template <class Config>
__device__ void multiply_fp8(float (&sums)[Config::kSums], TileShared<Config>& smem, const TileSegment& s,
                             StagePlace<Config>& place) {
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
  wait_for_stage(smem, place);
  load_weights(0, smem.stages[place.at]);
#pragma unroll 1
  for (int step = s.begin; step < s.end; ++step) {
    const StagePlace<Config> next = place.next();
    const TileStage<Config>& stage = smem.stages[place.at];
    const uint32_t x = swizzled_address(stage.x);
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
                       matrix_at(x + half * Config::kRowsOfX * 8 + (span * kProducts + k) * 2), k > 0);
        commit_products();
        float scale[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          scale[i] = __uint_as_float(stage.scales[half * kSpansOfHalf + span][row + i * 8]);
        if (span + 1 == kSpansOfHalf) {  // the other fragment's products are over
          if (half == 0) {
            load_weights(1, stage);
          } else if (step + 1 < s.end) {
            wait_for_stage(smem, next);
            load_weights(0, smem.stages[next.at]);
          }
        }
        wait_for_products<0>();
        keep(part);
        if (half == 1 && span + 1 == kSpansOfHalf) release_stage(smem, place);
#pragma unroll
        for (int i = 0; i < Config::kSums; ++i) sums[i] += scale[i / 2 % 2] * part[i];
      }
    }
    place = next;
  }
}

// y of 64 rows of the weight, by way of shared memory to write it in rows. `x_scale` is that of row
// threadIdx.x % 128 of x, halved.
template <class Config>
__device__ void store_y(const float (&sums)[Config::kSums], const TileArgs& a, TileShared<Config>& smem,
                        int first_row, int first_x, float x_scale, int group) {
  using Output = typename Config::Output;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
  float bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = min(int64_t{first_row} + warp * 16 + lane / 4 + 8 * i, a.gemm.n - 1);
    bias[i] = a.gemm.bias ? load_float(a.gemm.bias, a.gemm.bias_type, row) : 0;
  }
  if constexpr (Config::kFp8) {
    smem.x_scales[group][thread] = x_scale;
    sync_warpgroup(group);
  }
  // This thread stores 16 bytes of rows thread / 8 + 16 i of x.
  const bool whole = a.gemm.n % 8 == 0;
  const int row = first_row + thread % 8 * 8;
  const int rows_of_x = row < a.gemm.n ? static_cast<int>(a.gemm.m - first_x) - thread / 8 : 0;
  Output* to = static_cast<Output*>(a.gemm.y) + (int64_t{first_x} + thread / 8) * a.gemm.n + row;
  uint4 runs[Config::kStored / 16];
  const auto store_runs = [&](int begin) {
#pragma unroll
    for (int i = 0; i < Config::kStored; i += 16, to += 16 * a.gemm.n)
      if (begin + i < rows_of_x) *reinterpret_cast<uint4*>(to) = runs[i / 16];
  };
  const int piece = (warp * 2 + lane / 8 % 2) ^ lane % 8;
#pragma unroll
  for (int begin = 0; begin < Config::kRowsOfX; begin += Config::kStored) {
    auto& smem_y = smem.y[group][begin / Config::kStored % 2];
#pragma unroll
    for (int x = 0; x < Config::kStored; x += 16) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = (begin + x) / 2 + 2 * j;
        float2 scales = {0.5f, 0.5f};  // a code reads as twice its weight
        if constexpr (Config::kFp8)
          scales =
              *reinterpret_cast<const float2*>(&smem.x_scales[group][begin + x + j / 2 * 8 + lane % 4 * 2]);
        pairs[j] = pack(from_float<Output>(scales.x * sums[i] + bias[j % 2]),
                        from_float<Output>(scales.y * sums[i + 1] + bias[j % 2]));
      }
      store_matrices_transposed(&smem_y[x + lane / 16 * 8 + lane % 8][piece * 16], pairs);
    }
    if (whole && begin > 0) store_runs(begin - Config::kStored);
    sync_warpgroup(group);
    if (whole) {
#pragma unroll
      for (int i = 0; i < Config::kStored; i += 16)
        runs[i / 16] =
            *reinterpret_cast<const uint4*>(&smem_y[i + thread / 8][(thread % 8 ^ thread / 8 % 8) * 16]);
    } else {
#pragma unroll 1
      for (int i = thread; i < Config::kStored * 64; i += 128) {
        const int64_t x = int64_t{first_x} + begin + i / 64, of = first_row + i % 64;
        if (x < a.gemm.m && of < a.gemm.n)
          static_cast<Output*>(a.gemm.y)[x * a.gemm.n + of] =
              reinterpret_cast<const Output*>(&smem_y[i / 64][(i % 64 / 8 ^ i / 64 % 8) * 16])[i % 8];
      }
    }
  }
  if (whole) store_runs(Config::kRowsOfX - Config::kStored);
}

template <class Config>
__device__ void consume(const TileArgs& a, TileShared<Config>& smem) {
  const int group = threadIdx.x / 128;
  StagePlace<Config> place;
  for_each_segment(a, [&](const TileSegment& s) {
    const int first_x = s.tile / a.row_tiles * Config::kRowsOfX, of_thread = first_x + threadIdx.x % 128;
    const float x_scale = Config::kFp8 && of_thread < a.gemm.m ? 0.5f * a.x_scales[of_thread] : 0;
    float sums[Config::kSums];
#pragma unroll
    for (int i = 0; i < Config::kSums; ++i) sums[i] = 0;
    if constexpr (Config::kFp8) {
      multiply_fp8<Config>(sums, smem, s, place);
    } else {
      multiply<Config>(sums, smem, s, place);
    }
    if (s.end != a.steps) {
      hand_over<Config>(sums, a, group);
      return;
    }
    take_over<Config>(sums, a, smem, s, place, group);
    store_y<Config>(sums, a, smem, s.tile % a.row_tiles * Config::kRows + group * 64, first_x, x_scale,
                    group);
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
