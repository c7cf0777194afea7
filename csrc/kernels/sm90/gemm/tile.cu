#include <cuda_fp8.h>

#include <atomic>

#include "kernels/sm90/gemm/launch.h"
#include "kernels/sm90/gemm/tile.cuh"

namespace ternary::sm90 {

// Odd, and another one for every launch of a process: memory that was never written does not have it.
static uint64_t next_token() {
  static std::atomic<uint64_t> launches{0};
  return (2 * ++launches + 1) * 0x9E3779B97F4A7C15;
}

template <class Config>
static cudaError_t launch_as(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  const int total = plan.tiles * plan.steps;
  auto* parts = static_cast<float4*>(args.workspace);
  TileArgs a = {.gemm = args,
                .x_scales = fp8_scales(args, plan),
                .row_tiles = static_cast<int>(divide_up(args.n, Config::kRows)),
                .steps = plan.steps,
                .run = total / plan.blocks,
                .longer = total % plan.blocks,
                .token = next_token(),
                .parts = parts,
                .flags = reinterpret_cast<uint64_t*>(parts + int64_t{plan.blocks} * Config::kRows *
                                                                 Config::kRowsOfX / 4),
                .index = scale_index(args, Config::kSpan)};
  cudaError_t error = Config::kFp8
                          ? map_rows(&a.map_x, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, fp8_x(args, plan), args.m,
                                     plan.pitch, Config::kRowsOfX, 128, CU_TENSOR_MAP_SWIZZLE_128B)
                          : map_rows(&a.map_x, map_type(args.type), 2, args.x, args.m, args.k,
                                     Config::kRowsOfX, 64, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error == cudaSuccess)
    error = map_rows(&a.map_codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, args.codes, args.n,
                     args.k / kWeightsPerByte, Config::kRows, Config::kDepth / kWeightsPerByte,
                     Config::kFp8 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B);
  if (error != cudaSuccess) return error;
  return launch(tile_kernel<Config>, dim3(plan.blocks), Config::kThreads, sizeof(TileShared<Config>), 1,
                stream, a);
}

template <class Element, int kSpan>
static cudaError_t launch_a16(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  if (plan.rows_of_x == 64) return launch_as<TileConfig<Element, Element, kSpan, 64>>(args, plan, stream);
  if (kSpan == 32 || plan.rows_of_x == 128)
    return launch_as<TileConfig<Element, Element, kSpan, 128>>(args, plan, stream);
  return launch_as<TileConfig<Element, Element, 64, 256>>(args, plan, stream);
}

template <class Element>
static cudaError_t launch_of(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  using Fp8 = __nv_fp8_e4m3;
  if (plan.fp8)
    return plan.span == 128 ? launch_as<TileConfig<Fp8, Element, 128, 128>>(args, plan, stream)
                            : launch_as<TileConfig<Fp8, Element, 64, 128>>(args, plan, stream);
  return plan.span == 64 ? launch_a16<Element, 64>(args, plan, stream)
                         : launch_a16<Element, 32>(args, plan, stream);
}

cudaError_t launch_tile(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  return args.type == DType::f16 ? launch_of<__half>(args, plan, stream)
                                 : launch_of<__nv_bfloat16>(args, plan, stream);
}

}  // namespace ternary::sm90
