// What the launchers of the gemm kernels share.
#pragma once

#include <cuda_runtime.h>

#include "kernels/gemm.h"
#include "kernels/sm90/common/tensor_map.h"
#include "kernels/sm90/gemm/operands.cuh"
#include "kernels/sm90/gemm/select.h"

namespace ternary::sm90 {

cudaError_t launch_stream(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream);
cudaError_t launch_split(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream);
cudaError_t launch_tile(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream);

// Where the workspace has the rounded x, in rows of plan.pitch bytes, and its scales [m].
inline uint8_t* fp8_x(const GemmArgs& args, const GemmPlan& plan) {
  return static_cast<uint8_t*>(args.workspace) + plan.parts;
}
inline float* fp8_scales(const GemmArgs& args, const GemmPlan& plan) {
  return plan.fp8 ? reinterpret_cast<float*>(fp8_x(args, plan) + args.m * plan.pitch) : nullptr;
}

// Launches a kernel that may start beside the one before it.
template <class... Args>
cudaError_t launch(void (*kernel)(Args...), dim3 blocks, int threads, size_t smem, int cluster,
                   cudaStream_t stream, const Args&... args) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {{.id = cudaLaunchAttributeProgrammaticStreamSerialization},
                                       {.id = cudaLaunchAttributeClusterDimension}};
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  const cudaLaunchConfig_t config = {.gridDim = blocks,
                                     .blockDim = dim3(threads),
                                     .dynamicSmemBytes = smem,
                                     .stream = stream,
                                     .attrs = attributes,
                                     .numAttrs = cluster > 1 ? 2u : 1u};
  return cudaLaunchKernelEx(&config, kernel, args...);
}

inline ScaleIndex scale_index(const GemmArgs& args, int span) {
  const int64_t spans = args.one_scale ? 2 : 2 * (args.group / span);
  return {.groups = args.one_scale ? 0 : static_cast<int>(args.k / args.group),
          .last_span = static_cast<int>((args.k - 1) / span),
          .spans_to_group = static_cast<uint32_t>(((int64_t{1} << 32) + spans - 1) / spans)};
}

}  // namespace ternary::sm90
