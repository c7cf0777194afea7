#pragma once

#include "kernels/sm90/ssd/unit.cuh"

namespace ternary::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) chunk_kernel(const __grid_constant__ ChunkArgs args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& smem = *reinterpret_cast<ChunkShared<Config>*>(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      init_barrier(&smem.full[i], 1 + Config::kUnits);  // the copies, and the decays of each unit
      init_barrier(&smem.empty[i], 4 * Config::kUnits);
    }
    fence_barriers();
  }
  // Outputs behind `added` need not wait: its blocks let them start when they have waited themselves. Those
  // of first segments run beside it; the others wait for the parts.
  if (!Config::kOutputs || args.cuts == 0) wait_for_prerequisites();
  launch_dependents();
  const int64_t teams = args.ssd.groups * args.teams;
  const int team = static_cast<int>(blockIdx.x % teams), group = threadIdx.x / 128;
  Segment segment;
  if (!find_segment(args, blockIdx.x / teams, segment) || (!Config::kOutputs && segment.last)) return;
  __syncthreads();
  if (group == Config::kUnits) {
    if constexpr (Config::kGivesRegisters) give_registers<56>();
    const int warp = threadIdx.x % 128 / 32;
    if (warp < Config::kUnits) {
      const Unit unit(args, Config::kUnits, team, warp);
      const float decay = DecayWorker<Config>(args, smem, segment, unit, warp).run();
      if (!Config::kOutputs && unit.active && threadIdx.x % 32 == 0)
        args.decays[unit.part(args, segment.part + segment.index)] = decay;
    } else if (threadIdx.x % 128 == 32 * Config::kUnits) {
      copy_chunks<Config>(args, smem, segment, team);
    }
  } else {
    if constexpr (Config::kGivesRegisters) take_registers<224>();
    UnitWorker<Config> worker(args, smem, segment, team, group);
    if constexpr (Config::kOutputs)
      worker.run();
    else
      worker.add();
  }
}

}  // namespace ternary::sm90
