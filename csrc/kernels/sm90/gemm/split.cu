#include "kernels/sm90/gemm/launch.h"
#include "kernels/sm90/gemm/split.cuh"

namespace ternary::sm90 {

template <class Config>
static cudaError_t launch_as(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  SplitArgs a = {.gemm = args,
                 .units = plan.units,
                 .boxes = plan.boxes,
                 .blocks = plan.cluster,
                 .x_scales = fp8_scales(args, plan),
                 .index = scale_index(args, Config::kSpan)};
  cudaError_t error = map_rows(&a.map_x, map_type(args.type), 2, args.x, args.m, args.k, Config::kRowsOfX, 64,
                               CU_TENSOR_MAP_SWIZZLE_128B);
  if (error == cudaSuccess)
    error =
        map_rows(&a.map_codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, args.codes, args.n, args.k / kWeightsPerByte,
                 Config::kUnitRows, Config::kBox / kWeightsPerByte, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  return launch(split_kernel<Config>, dim3(plan.blocks), 128 * plan.units,
                Config::shared_bytes(Config::kRowsOfX, plan.boxes, plan.units, plan.cluster, Config::kSpan),
                plan.cluster, stream, a);
}

template <class Element, int kSpan>
static cudaError_t launch_of(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  if (plan.rows_of_x == 16) return launch_as<SplitConfig<Element, kSpan, 16>>(args, plan, stream);
  if (plan.rows_of_x == 32) return launch_as<SplitConfig<Element, kSpan, 32>>(args, plan, stream);
  return launch_as<SplitConfig<Element, kSpan, 64>>(args, plan, stream);
}

template <class Element>
static cudaError_t launch_of(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  return plan.span == 64 ? launch_of<Element, 64>(args, plan, stream)
                         : launch_of<Element, 32>(args, plan, stream);
}

cudaError_t launch_split(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  return args.type == DType::f16 ? launch_of<__half>(args, plan, stream)
                                 : launch_of<__nv_bfloat16>(args, plan, stream);
}

}  // namespace ternary::sm90
