#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/sm90/gemm/plain.cuh"
#include "kernels/sm90/gemm/select.h"
#include "kernels/sm90/gemm/stream.cuh"

namespace ternary {
namespace sm90 {

template <class Config>
static cudaError_t launch_stream(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  const int64_t spans = args.one_scale ? 2 : 2 * (args.group / Config::kSpan);
  const int tiles = static_cast<int>((args.n + Config::kTileRows - 1) / Config::kTileRows);
  const StreamArgs a = {.gemm = args,
                        .tiles = tiles / plan.blocks,
                        .longer = tiles % plan.blocks,
                        .most = plan.tiles,
                        .groups = args.one_scale ? 0 : static_cast<int>(args.k / args.group),
                        .last_span = static_cast<int>((args.k - 1) / Config::kSpan),
                        .spans_to_group = static_cast<uint32_t>(((int64_t{1} << 32) + spans - 1) / spans)};
  const size_t bytes = plan.warps * (sizeof(StreamX<Config>) + plan.tiles * sizeof(StreamUnit<Config>));
  const auto kernel = stream_kernel<Config>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute overlap = {.id = cudaLaunchAttributeProgrammaticStreamSerialization};
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const unsigned across = static_cast<unsigned>((args.m + Config::kRowsOfX - 1) / Config::kRowsOfX);
  const cudaLaunchConfig_t launch = {.gridDim = dim3(across, plan.blocks),
                                     .blockDim = dim3(32 * plan.warps),
                                     .dynamicSmemBytes = bytes,
                                     .stream = stream,
                                     .attrs = &overlap,
                                     .numAttrs = 1};
  return cudaLaunchKernelEx(&launch, kernel, a);
}

template <class Element>
static cudaError_t launch_span(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  const bool one = plan.column_tiles == 1;
  switch (plan.span) {
    case 128:
      return one ? launch_stream<StreamConfig<Element, 128, 1>>(args, plan, stream)
                 : launch_stream<StreamConfig<Element, 128, 2>>(args, plan, stream);
    case 64:
      return one ? launch_stream<StreamConfig<Element, 64, 1>>(args, plan, stream)
                 : launch_stream<StreamConfig<Element, 64, 2>>(args, plan, stream);
    default:
      return one ? launch_stream<StreamConfig<Element, 32, 1>>(args, plan, stream)
                 : launch_stream<StreamConfig<Element, 32, 2>>(args, plan, stream);
  }
}

template <class Element>
static cudaError_t launch_plain(const GemmArgs& args, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((args.m + Plain::kRowsOfX - 1) / Plain::kRowsOfX),
                    static_cast<unsigned>((args.n + Plain::kWarps - 1) / Plain::kWarps));
  plain_kernel<Element><<<blocks, 32 * Plain::kWarps, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace sm90

int gemm_sm90(const GemmArgs& args, CUstream_st* stream) {
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const bool aligned = args.type != DType::f32 && sm90::is_aligned(args.x) && sm90::is_aligned(args.codes);
  return sm90::with_type(args.type, [&](auto element) -> int {
    using Element = decltype(element);
    const auto plan = sm90::plan_gemm(args.m, args.n, args.k, args.group, args.one_scale, aligned, sms);
    if constexpr (!std::is_same_v<Element, float>)
      if (plan.kernel == sm90::GemmKernel::stream) return sm90::launch_span<Element>(args, plan, stream);
    return sm90::launch_plain<Element>(args, stream);
  });
}

}  // namespace ternary
