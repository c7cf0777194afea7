// A block a row. Memory-bound: runs of 16 bytes, which stay in registers up to kKept a thread.
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include "kernels/quantize_fp8.h"
#include "kernels/sm90/common/types.cuh"

namespace ternary {
namespace sm90 {

constexpr int kThreads = 256;
constexpr int kKept = 2;  // all of a row of 4,096 halves; longer rows are read twice
constexpr float kMost = 448, kLeastScale = 0x1p-100f;

// kRun: elements that a thread takes at once, a divisor of k.
template <class Element, int kRun>
__global__ void __launch_bounds__(kThreads) quantize_fp8_kernel(QuantizeFp8Args a) {
  using Columns = Run<Element, kRun, true>;
  using Bytes = Run<uint8_t, kRun, true>;
  __shared__ float smem_most[kThreads / 32];
  const int64_t row = blockIdx.x, runs = a.k / kRun;
  const auto* from = reinterpret_cast<const Columns*>(static_cast<const Element*>(a.x) + row * a.k);
  auto* to = reinterpret_cast<Bytes*>(a.q + row * a.k);
  Columns kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t at = threadIdx.x + i * kThreads;
    kept[i] = at < runs ? from[at] : Columns{};
  }
  float most = 0;
  const auto take = [&](const Columns& run) {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const float size = fabsf(to_float(run.at[j]));
      most = size > most || isnan(size) ? size : most;  // a NaN stays, as in the reference
    }
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) take(kept[i]);
  for (int64_t at = threadIdx.x + kKept * kThreads; at < runs; at += kThreads) take(from[at]);
  const auto join = [](float x, float y) { return y > x || isnan(y) ? y : x; };
  for (int lanes = 16; lanes > 0; lanes /= 2) most = join(most, __shfl_xor_sync(0xffffffff, most, lanes));
  if (threadIdx.x % 32 == 0) smem_most[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) most = join(most, smem_most[i]);

  float scale = most / kMost;
  if (scale < kLeastScale) scale = kLeastScale;
  const float inverse = 1 / scale;
  if (threadIdx.x == 0) a.scale[row] = scale;
  const auto put = [&](const Columns& run, int64_t at) {
    Bytes bytes;
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      bytes.at[j] = __nv_cvt_float_to_fp8(to_float(run.at[j]) * inverse, __NV_SATFINITE, __NV_E4M3);
    to[at] = bytes;
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t at = threadIdx.x + i * kThreads;
    if (at < runs) put(kept[i], at);
  }
  for (int64_t at = threadIdx.x + kKept * kThreads; at < runs; at += kThreads) put(from[at], at);
}

template <class Element>
static int launch_quantize_fp8(const QuantizeFp8Args& a, cudaStream_t stream) {
  constexpr int kRun = 16 / sizeof(Element);
  const auto blocks = static_cast<unsigned>(a.m);
  if (a.k % kRun == 0 && is_aligned(a.x)) {
    quantize_fp8_kernel<Element, kRun><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    quantize_fp8_kernel<Element, 1><<<blocks, kThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace sm90

int quantize_fp8_sm90(const QuantizeFp8Args& args, CUstream_st* stream) {
  return sm90::with_type(args.type, [&](auto element) -> int {
    return sm90::launch_quantize_fp8<decltype(element)>(args, stream);
  });
}

}  // namespace ternary
