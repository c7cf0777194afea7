#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <type_traits>

#include "kernels/sm90/gemm/plain.cuh"
#include "kernels/sm90/gemm/select.h"
#include "kernels/sm90/gemm/stream.cuh"
#include "kernels/sm90/gemm/tile.cuh"

namespace ternary {
namespace sm90 {

// Launches a kernel that may start beside the one before it.
template <class Args>
static cudaError_t launch(void (*kernel)(Args), const Args& args, dim3 blocks, int threads, size_t smem,
                          cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap = {.id = cudaLaunchAttributeProgrammaticStreamSerialization};
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config = {.gridDim = blocks,
                                     .blockDim = dim3(threads),
                                     .dynamicSmemBytes = smem,
                                     .stream = stream,
                                     .attrs = &overlap,
                                     .numAttrs = 1};
  return cudaLaunchKernelEx(&config, kernel, args);
}

static int groups_of_row(const GemmArgs& args) {
  return args.one_scale ? 0 : static_cast<int>(args.k / args.group);
}

// See StreamArgs.
static uint32_t spans_to_group(const GemmArgs& args, int span) {
  const int64_t spans = args.one_scale ? 2 : 2 * (args.group / span);
  return static_cast<uint32_t>(((int64_t{1} << 32) + spans - 1) / spans);
}

template <class Config>
static cudaError_t launch_stream(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  const int tiles = static_cast<int>((args.n + Config::kTileRows - 1) / Config::kTileRows);
  int log_rows = 0;
  while (1 << log_rows < std::min<int64_t>(args.m, Config::kRowsOfX)) ++log_rows;
  const StreamArgs a = {.gemm = args,
                        .tiles = tiles / plan.blocks,
                        .longer = tiles % plan.blocks,
                        .most = plan.tiles,
                        .groups = groups_of_row(args),
                        .last_span = static_cast<int>((args.k - 1) / Config::kSpan),
                        .log_rows = log_rows,
                        .spans_to_group = spans_to_group(args, Config::kSpan)};
  static_assert(sizeof(StreamX<Config>) == Stream::x_bytes(Config::kRowsOfX, Config::kChunk) &&
                sizeof(StreamUnit<Config>) ==
                    Stream::unit_bytes(Config::kRowsOfX, Config::kChunk, Config::kSpan));
  const size_t smem = plan.warps * (sizeof(StreamX<Config>) + plan.tiles * sizeof(StreamUnit<Config>));
  return launch(stream_kernel<Config>, a, dim3(plan.blocks), 32 * plan.warps, smem, stream);
}

template <class Element, int kSpan>
static cudaError_t launch_stream_of(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  if (plan.rows_of_x > Stream::kColumns)
    return launch_stream<StreamConfig<Element, kSpan, 2, Stream::kChunk, 1, true, false>>(args, plan, stream);
  return plan.chunk == Stream::kChunk
             ? launch_stream<StreamConfig<Element, kSpan, 1, Stream::kChunk, 1, true, false>>(args, plan,
                                                                                              stream)
             : launch_stream<StreamConfig<Element, kSpan, 1, Stream::kLongChunk, 1, true, false>>(args, plan,
                                                                                                  stream);
}

// A tensor of two dimensions that TMA copies in boxes; zeros lie around it.
static cudaError_t map_rows(CUtensorMap* map, CUtensorMapDataType type, int bytes, const void* from,
                            int64_t rows, int64_t columns, int box_rows, int box_columns,
                            CUtensorMapSwizzle swizzle) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch = columns * bytes;
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t strides[] = {1, 1};
  const CUresult result = encode(map, type, 2, const_cast<void*>(from), sizes, &pitch, box, strides,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Odd, and another one for every launch of a process: memory that was never written does not have it.
static uint64_t next_token() {
  static std::atomic<uint64_t> launches{0};
  return (2 * ++launches + 1) * 0x9E3779B97F4A7C15;
}

template <class Config>
static cudaError_t launch_tile(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  const int total = plan.tiles * plan.steps;
  auto* parts = static_cast<float4*>(args.workspace);
  TileArgs a = {.gemm = args,
                .row_tiles = static_cast<int>((args.n + Config::kRows - 1) / Config::kRows),
                .steps = plan.steps,
                .run = total / plan.blocks,
                .longer = total % plan.blocks,
                .token = next_token(),
                .parts = parts,
                .flags = reinterpret_cast<uint64_t*>(parts + int64_t{plan.blocks} * Config::kGroups *
                                                                 Config::kSums / 4 * 128),
                .groups = groups_of_row(args),
                .last_span = static_cast<int>((args.k - 1) / Config::kSpan),
                .spans_to_group = spans_to_group(args, Config::kSpan)};
  const auto type =
      args.type == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cudaError_t error =
      map_rows(&a.map_x, type, 2, args.x, args.m, args.k, Config::kRowsOfX, 64, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error == cudaSuccess)
    error =
        map_rows(&a.map_codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, args.codes, args.n, args.k / kWeightsPerByte,
                 Config::kRows, Config::kDepth / kWeightsPerByte, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (error != cudaSuccess) return error;
  return launch(tile_kernel<Config>, a, dim3(plan.blocks), Config::kThreads, sizeof(TileShared<Config>),
                stream);
}

template <class Element, int kSpan>
static cudaError_t launch_tile_of(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  if (plan.rows_of_x == 32) return launch_tile<TileConfig<Element, kSpan, 32>>(args, plan, stream);
  if (plan.rows_of_x == 64) return launch_tile<TileConfig<Element, kSpan, 64>>(args, plan, stream);
  return launch_tile<TileConfig<Element, kSpan, 128>>(args, plan, stream);
}

template <class Element, int kSpan>
static cudaError_t launch_fast(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  return plan.kernel == GemmKernel::stream ? launch_stream_of<Element, kSpan>(args, plan, stream)
                                           : launch_tile_of<Element, kSpan>(args, plan, stream);
}

template <class Element>
static cudaError_t launch_plain(const GemmArgs& args, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((args.m + Plain::kRowsOfX - 1) / Plain::kRowsOfX),
                    static_cast<unsigned>((args.n + Plain::kWarps - 1) / Plain::kWarps));
  plain_kernel<Element><<<blocks, 32 * Plain::kWarps, 0, stream>>>(args);
  return cudaGetLastError();
}

static cudaError_t plan_on_device(const GemmArgs& args, GemmPlan& plan) {
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const bool aligned = args.type != DType::f32 && is_aligned(args.x) && is_aligned(args.codes);
  if (error == cudaSuccess)
    plan = plan_gemm(args.m, args.n, args.k, args.group, args.one_scale, aligned, sms);
  return error;
}

}  // namespace sm90

int gemm_workspace_sm90(const GemmArgs& args, int64_t* bytes) {
  sm90::GemmPlan plan;
  const cudaError_t error = sm90::plan_on_device(args, plan);
  const int64_t a_group = plan.rows_of_x / 2 * 128 * sizeof(float) + sizeof(uint64_t);
  *bytes = plan.kernel == sm90::GemmKernel::tile ? plan.blocks * sm90::Tile::kGroups * a_group : 0;
  return error;
}

int gemm_sm90(const GemmArgs& args, CUstream_st* stream) {
  sm90::GemmPlan plan;
  const cudaError_t error = sm90::plan_on_device(args, plan);
  if (error != cudaSuccess) return error;
  return sm90::with_type(args.type, [&](auto element) -> int {
    using Element = decltype(element);
    if constexpr (!std::is_same_v<Element, float>) {
      if (plan.span == 128) return sm90::launch_fast<Element, 128>(args, plan, stream);
      if (plan.span == 64) return sm90::launch_fast<Element, 64>(args, plan, stream);
      if (plan.span == 32) return sm90::launch_fast<Element, 32>(args, plan, stream);
    }
    return sm90::launch_plain<Element>(args, stream);
  });
}

}  // namespace ternary
