#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/sm90/common/launch.cuh"
#include "kernels/sm90/common/limits.h"
#include "kernels/sm90/common/tensor_map.h"
#include "kernels/sm90/ssd/kernel.cuh"
#include "kernels/sm90/ssd/plain.cuh"
#include "kernels/sm90/ssd/update.cuh"

namespace ternary {
namespace sm90 {

// Launches a kernel with shared memory of any size, `overlapping` as launch_overlapping does.
template <class Args>
static cudaError_t launch(void (*kernel)(Args), const Args& args, unsigned blocks, unsigned threads,
                          size_t smem, bool overlapping, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap = {.id = cudaLaunchAttributeProgrammaticStreamSerialization};
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config = {.gridDim = dim3(blocks),
                                     .blockDim = dim3(threads),
                                     .dynamicSmemBytes = smem,
                                     .stream = stream,
                                     .attrs = &overlap,
                                     .numAttrs = overlapping ? 1u : 0u};
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Whether the tokens of a tensor with dense rows of this many elements are whole pieces of 16 bytes.
static bool is_aligned_rows(const void* from, int64_t stride, int64_t row) {
  return is_aligned(from) && row % Chunked::kAlignment == 0 && stride % Chunked::kAlignment == 0;
}

static bool has_aligned_states(const SsdArgs& args) {
  return is_aligned_rows(args.B, args.B_stride, args.state_size) &&
         is_aligned_rows(args.C, args.C_stride, args.state_size);
}

static bool is_empty(const SsdArgs& args) { return args.sequences * args.heads * args.head_dim == 0; }

static int64_t tokens_of_batch(const SsdArgs& args) {
  return args.cu_seqlens ? args.length : args.sequences * args.length;
}

static bool is_chunked(const SsdArgs& args) {
  const int64_t states = args.groups * args.state_size;
  // The copy engine wants a tensor that is not empty, and rows that do not overlap.
  const bool apart =
      args.x_stride >= args.heads * args.head_dim && args.B_stride >= states && args.C_stride >= states;
  return args.type != DType::f32 && args.state_size > 0 && args.state_size <= Chunked::kMaxStates &&
         has_aligned_states(args) && is_aligned_rows(args.x, args.x_stride, args.head_dim) && apart &&
         is_aligned(args.initial_state, 8) && is_aligned(args.z, 4) && args.z_stride % 2 == 0 &&
         tokens_of_batch(args) > 0 && tokens_of_batch(args) < INT32_MAX;
}

// Units of a head.
static int64_t row_tiles(const SsdArgs& args) {
  return (args.head_dim + Chunked::kRows - 1) / Chunked::kRows;
}

// How the batch is cut. The workspace starts with the parts; the decays lie behind them.
struct ChunkPlan {
  ChunkArgs args;
  int panels;        // of the instance: 1, 2 or 4
  int64_t segments;  // at most

  int64_t bytes_of_parts() const {
    return args.cuts * args.ssd.groups * args.units * Chunked::kRows * panels * Chunked::kColumns * 4;
  }
  int64_t bytes() const { return bytes_of_parts() + args.cuts * args.ssd.groups * args.units * 4; }
};

static cudaError_t plan_chunks(const SsdArgs& args, ChunkPlan& plan) {
  int sms = 0;
  const cudaError_t error = count_sms(&sms);
  if (error != cudaSuccess) return error;
  plan.panels = args.state_size <= Chunked::kColumns ? 1 : args.state_size <= 2 * Chunked::kColumns ? 2 : 4;
  const int64_t units = args.heads / args.groups * row_tiles(args), of_block = Chunked::units(plan.panels);
  const int64_t teams = (units + of_block - 1) / of_block;
  const int64_t rows = args.cu_seqlens ? 1 : args.sequences;
  const int64_t segment = segment_tokens(rows, args.length, teams * args.groups, sms);
  const int64_t each = std::max<int64_t>(1, (args.length + segment - 1) / segment);
  plan.args.ssd = args;
  plan.args.segment = segment;
  plan.args.row_tiles = static_cast<int>(row_tiles(args));
  plan.args.units = static_cast<int>(units);
  plan.args.teams = static_cast<int>(teams);
  // Of packed sequences at most this many: each ends in one segment, and the others are whole.
  plan.segments = args.cu_seqlens ? args.length / segment + args.sequences : args.sequences * each;
  plan.args.cuts = each == 1 ? 0 : tokens_of_batch(args) / segment;
  return cudaSuccess;
}

static cudaError_t map_operands(ChunkArgs& args) {
  const SsdArgs& a = args.ssd;
  const int64_t tokens = tokens_of_batch(a);
  const auto map = [&](CUtensorMap* to, const void* from, int64_t rows, int64_t columns, int64_t stride) {
    return map_panels(to, a.type, from, tokens, rows, columns, stride, Chunked::kTokens);
  };
  cudaError_t error = map(&args.map_x, a.x, a.heads, a.head_dim, a.x_stride);
  if (error == cudaSuccess) error = map(&args.map_B, a.B, a.groups, a.state_size, a.B_stride);
  if (error == cudaSuccess) error = map(&args.map_C, a.C, a.groups, a.state_size, a.C_stride);
  return error;
}

template <class Element, int kPanels>
static cudaError_t launch_chunks(ChunkPlan& plan, cudaStream_t stream) {
  using Outputs = ChunkConfig<Element, kPanels, true>;
  using Added = ChunkConfig<Element, kPanels, false>;
  ChunkArgs& args = plan.args;
  const auto blocks = static_cast<unsigned>(plan.segments * args.ssd.groups * args.teams);
  constexpr size_t kBytes = sizeof(ChunkShared<Outputs>);
  static_assert(kBytes <= kSharedBytes && kBytes == sizeof(ChunkShared<Added>));
  args.parts = static_cast<float4*>(args.ssd.workspace);
  args.decays = reinterpret_cast<float*>(static_cast<char*>(args.ssd.workspace) + plan.bytes_of_parts());
  cudaError_t error = map_operands(args);
  if (error == cudaSuccess && args.cuts > 0)
    error = launch(chunk_kernel<Added>, args, blocks, Added::kThreads, kBytes, true, stream);
  if (error != cudaSuccess) return error;
  return launch(chunk_kernel<Outputs>, args, blocks, Outputs::kThreads, kBytes, true, stream);
}

static cudaError_t launch_plain(const SsdArgs& args, cudaStream_t stream) {
  const int64_t warp_bytes = std::max<int64_t>(args.state_size, 1) * Plain::kRows * sizeof(float);
  int64_t warps = Plain::kWarps;
  while (warps > 1 && warps * warp_bytes > kSharedBytes) warps /= 2;
  const int64_t rows = warps * Plain::kRows;
  return cudaError_t(with_type(args.type, [&](auto element) -> int {
    const auto kernel = plain_ssd_kernel<decltype(element)>;
    const int64_t blocks = (args.head_dim + rows - 1) / rows * args.sequences * args.heads;
    return launch(kernel, args, static_cast<unsigned>(blocks), static_cast<unsigned>(32 * warps),
                  warps * warp_bytes, false, stream);
  }));
}

template <class Element, class State, int kPieces>
static cudaError_t launch_update(const SsdArgs& args, cudaStream_t stream) {
  using Config = UpdateConfig<State, kPieces>;
  const int64_t blocks = (args.head_dim + Config::kRowsOfBlock - 1) / Config::kRowsOfBlock;
  return launch_overlapping(update_kernel<Element, Config>, args,
                            static_cast<unsigned>(blocks * args.sequences * args.heads), Update::kThreads,
                            stream);
}

template <class Element, class State>
static cudaError_t launch_update_of(const SsdArgs& args, int64_t row_bytes, cudaStream_t stream) {
  if (row_bytes <= 128) return launch_update<Element, State, 1>(args, stream);
  if (row_bytes <= 256) return launch_update<Element, State, 2>(args, stream);
  if (row_bytes <= 512) return launch_update<Element, State, 4>(args, stream);
  return launch_update<Element, State, 8>(args, stream);
}

}  // namespace sm90

int ssd_workspace_sm90(const SsdArgs& args, int64_t* bytes) {
  *bytes = 0;
  if (sm90::is_empty(args) || !sm90::is_chunked(args)) return cudaSuccess;
  sm90::ChunkPlan plan;
  const cudaError_t error = sm90::plan_chunks(args, plan);
  if (error == cudaSuccess) *bytes = plan.bytes();
  return error;
}

int64_t ssd_gates_sm90(const SsdArgs& args) {
  const bool fits = sm90::is_chunked(args) && sm90::is_aligned_rows(args.z, args.z_stride, args.head_dim) &&
                    sm90::is_aligned(args.gate_norm);
  return fits ? args.heads * sm90::row_tiles(args) : 0;
}

int ssd_sm90(const SsdArgs& args, CUstream_st* stream) {
  if (sm90::is_empty(args)) return cudaSuccess;
  if (!sm90::is_chunked(args)) return sm90::launch_plain(args, stream);
  sm90::ChunkPlan plan;
  const cudaError_t error = sm90::plan_chunks(args, plan);
  if (error != cudaSuccess) return error;
  return sm90::with_type(args.type, [&](auto element) -> int {
    using Element = decltype(element);
    if constexpr (!std::is_same_v<Element, float>) {
      if (plan.panels == 1) return sm90::launch_chunks<Element, 1>(plan, stream);
      if (plan.panels == 2) return sm90::launch_chunks<Element, 2>(plan, stream);
      return sm90::launch_chunks<Element, 4>(plan, stream);
    }
    return cudaErrorInvalidValue;
  });
}

int ssd_update_sm90(const SsdArgs& args, CUstream_st* stream) {
  if (sm90::is_empty(args)) return cudaSuccess;
  const int64_t row_bytes = args.state_size * sm90::size_of(args.state_type);
  const bool pieces = row_bytes > 0 && row_bytes <= 128 * sm90::Update::kVectors &&
                      sm90::is_aligned(args.final_state) && sm90::has_aligned_states(args);
  if (!pieces) return sm90::launch_plain(args, stream);
  return sm90::with_type(args.type, [&](auto element) -> int {
    return sm90::with_type(args.state_type, [&](auto state) -> int {
      return sm90::launch_update_of<decltype(element), decltype(state)>(args, row_bytes, stream);
    });
  });
}

}  // namespace ternary
