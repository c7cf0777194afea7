#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/sm90/common/launch.cuh"
#include "kernels/sm90/selective_scan/plain.cuh"
#include "kernels/sm90/selective_scan/tile.cuh"
#include "kernels/sm90/selective_scan/update.cuh"

namespace ternary {
namespace sm90 {

static unsigned divide_up(int64_t n, int64_t by) { return static_cast<unsigned>((n + by - 1) / by); }

// Whether rows can be read 16 bytes at a time.
static bool in_pieces(const void* from, int64_t stride) { return is_aligned(from) && stride % 8 == 0; }

static bool takes_tiles(const SelectiveScanArgs& a) {
  const bool sizes =
      a.type != DType::f32 && a.state_size == 16 && a.channels % 8 == 0 && a.length < int64_t{1} << 30;
  const bool reads = in_pieces(a.x, a.x_stride) && in_pieces(a.z, a.z_stride) && in_pieces(a.B, a.B_stride) &&
                     in_pieces(a.C, a.C_stride) && in_pieces(a.dt, a.dt_stride) && is_aligned(a.y);
  const bool whole_groups = a.dt_group % 16 == 0 || a.dt_group == a.dt_rank;
  return sizes && reads && (!a.dt_weight || (a.dt_rank % 8 == 0 && a.dt_rank <= 256 && whole_groups));
}

template <class Config>
static cudaError_t launch_tiles(const SelectiveScanArgs& args, cudaStream_t stream) {
  constexpr int kBytes = sizeof(ScanShared<Config>);
  const cudaError_t error =
      cudaFuncSetAttribute(scan_tile_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const unsigned blocks = divide_up(args.channels, Config::kChannels) * static_cast<unsigned>(args.sequences);
  scan_tile_kernel<Config><<<blocks, Config::kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <class Element>
static cudaError_t launch_tiles_of(const SelectiveScanArgs& args, cudaStream_t stream) {
  if (!args.dt_weight) return launch_tiles<ScanConfig<Element, 0>>(args, stream);
  if (args.dt_rank <= 128) return launch_tiles<ScanConfig<Element, 128>>(args, stream);
  return launch_tiles<ScanConfig<Element, 256>>(args, stream);
}

template <class Element, class State, int kRun>
static cudaError_t launch_update(const SelectiveScanArgs& args, cudaStream_t stream) {
  const dim3 blocks(divide_up(args.channels, ScanUpdate::kThreads / ScanUpdate::kLanes),
                    static_cast<unsigned>(std::min(args.sequences, ScanUpdate::kMaxSequences)));
  return launch_overlapping(scan_update_kernel<Element, State, kRun>, args, blocks, ScanUpdate::kThreads,
                            stream);
}

}  // namespace sm90

int selective_scan_sm90(const SelectiveScanArgs& args, CUstream_st* stream) {
  const int64_t rows = args.sequences * args.channels;
  if (rows == 0) return cudaSuccess;
  return sm90::with_type(args.type, [&](auto element) -> int {
    using Element = decltype(element);
    if constexpr (sizeof(Element) == 2)
      if (sm90::takes_tiles(args)) return sm90::launch_tiles_of<Element>(args, stream);
    constexpr int kWarps = sm90::PlainScan::kWarps;
    sm90::scan_plain_kernel<Element><<<sm90::divide_up(rows, kWarps), 32 * kWarps, 0, stream>>>(args);
    return cudaGetLastError();
  });
}

int selective_scan_update_sm90(const SelectiveScanArgs& args, CUstream_st* stream) {
  if (args.sequences * args.channels == 0) return cudaSuccess;
  const bool runs = args.state_size % 8 == 0 && args.B_stride % 8 == 0 && args.C_stride % 8 == 0 &&
                    sm90::is_aligned(args.A) && sm90::is_aligned(args.B) && sm90::is_aligned(args.C) &&
                    sm90::is_aligned(args.final_state);
  return sm90::with_type(args.type, [&](auto element) -> int {
    return sm90::with_type(args.state_type, [&](auto state) -> int {
      using Element = decltype(element);
      using State = decltype(state);
      return runs ? sm90::launch_update<Element, State, 8>(args, stream)
                  : sm90::launch_update<Element, State, 1>(args, stream);
    });
  });
}

}  // namespace ternary
