#include "kernels/sm90/gemm/launch.h"
#include "kernels/sm90/gemm/stream.cuh"

namespace ternary::sm90 {

template <class Config>
static cudaError_t launch_as(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  const int tiles = static_cast<int>(divide_up(args.n, Config::kTileRows));
  int log_rows = 0;
  while (1 << log_rows < std::min<int64_t>(args.m, Config::kRowsOfX)) ++log_rows;
  const StreamArgs a = {.gemm = args,
                        .tiles = tiles / plan.blocks,
                        .longer = tiles % plan.blocks,
                        .most = plan.tiles,
                        .log_rows = log_rows,
                        .x_scales = fp8_scales(args, plan),
                        .index = scale_index(args, Config::kSpan)};
  static_assert(sizeof(StreamX<Config>) == Stream::x_bytes(Config::kRowsOfX, Config::kChunk) &&
                sizeof(StreamUnit<Config>) ==
                    Stream::unit_bytes(Config::kRowsOfX, Config::kChunk, Config::kSpan));
  const size_t smem = plan.warps * (sizeof(StreamX<Config>) + plan.tiles * sizeof(StreamUnit<Config>));
  return launch(stream_kernel<Config>, dim3(plan.blocks), 32 * plan.warps, smem, 1, stream, a);
}

template <class Element, int kSpan>
static cudaError_t launch_of(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  if (plan.rows_of_x > Stream::kColumns)
    return launch_as<StreamConfig<Element, kSpan, 2, Stream::kChunk>>(args, plan, stream);
  return plan.chunk == Stream::kChunk
             ? launch_as<StreamConfig<Element, kSpan, 1, Stream::kChunk>>(args, plan, stream)
             : launch_as<StreamConfig<Element, kSpan, 1, Stream::kLongChunk>>(args, plan, stream);
}

template <class Element>
static cudaError_t launch_of(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  if (plan.span == 128) return launch_of<Element, 128>(args, plan, stream);
  if (plan.span == 64) return launch_of<Element, 64>(args, plan, stream);
  return launch_of<Element, 32>(args, plan, stream);
}

cudaError_t launch_stream(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  return args.type == DType::f16 ? launch_of<__half>(args, plan, stream)
                                 : launch_of<__nv_bfloat16>(args, plan, stream);
}

}  // namespace ternary::sm90
