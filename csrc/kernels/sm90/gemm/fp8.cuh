// x -> e4m3 with a scale a row: scale = max |x| / 448 (at least 2^-100), q = x * (1 / scale) to nearest even.
//
// For the tensor cores the columns of each 64 are permuted so that the codes can stay as they lie: column
// 16 q + 4 j + 3 - i goes to place 16 i + 4 q + j, where lane `quad` q finds what meets weight 4 j + 3 - i of
// its word in the A operand (see operands.cuh).
#pragma once

#include <cuda_fp8.h>

#include "kernels/gemm.h"
#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/common/types.cuh"

namespace ternary::sm90 {

struct Fp8 {
  static constexpr int kThreads = 128;  // of a row
  static constexpr float kMax = 448, kLeastScale = 0x1p-100f;
};

// Four columns of x as e4m3.
__device__ inline uint32_t to_e4m3(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
  return low | uint32_t{__nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3)} << 16;
}

// How the rounded x lies: columns in order, permuted as above, or in order as numbers of x's type.
enum class Fp8Form { bytes, permuted, as_x };

// q [m] rows of `pitch` bytes, scales [m]. But for `bytes`, x is aligned to 16 bytes and k a multiple of 64;
// `permuted` has a pitch of a multiple of 128, with zeros from k on.
template <class Element, Fp8Form kForm>
__global__ void __launch_bounds__(Fp8::kThreads)
    quantize_rows_kernel(const Element* x, uint8_t* q, float* scales, int64_t k, int64_t pitch) {
  constexpr bool kBytes = kForm == Fp8Form::bytes;
  constexpr int kRun = kBytes ? 4 : 16;  // columns that a thread takes at once
  constexpr int kKept = kBytes ? 1 : 4;  // runs that stay in registers; the others are read twice
  using Columns = Run<Element, kRun, !kBytes>;
  __shared__ float smem_most[Fp8::kThreads / 32];
  launch_dependents();
  wait_for_prerequisites();
  const int64_t row = blockIdx.x;
  const int64_t runs = k / kRun, places = kForm == Fp8Form::as_x ? runs : pitch / kRun;
  const auto* from = reinterpret_cast<const Columns*>(x + row * k);
  Columns kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int at = threadIdx.x + i * Fp8::kThreads;
    kept[i] = at < runs ? from[at] : Columns{};
  }
  float most = 0;
  const auto take = [&](const Columns& run) {
#pragma unroll
    for (int j = 0; j < kRun; ++j) most = fmaxf(most, fabsf(to_float(run.at[j])));
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) take(kept[i]);
  for (int64_t at = threadIdx.x + kKept * Fp8::kThreads; at < runs; at += Fp8::kThreads) take(from[at]);
  for (int lanes = 16; lanes > 0; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, lanes));
  if (threadIdx.x % 32 == 0) smem_most[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Fp8::kThreads / 32; ++i) most = fmaxf(most, smem_most[i]);
  const float scale = fmaxf(most / Fp8::kMax, Fp8::kLeastScale), inverse = 1 / scale;
  if (threadIdx.x == 0) scales[row] = scale;

  q += row * pitch;
  const auto put = [&](const Columns& run, int64_t at) {
    float v[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) v[j] = to_float(run.at[j]) * inverse;
    if constexpr (kForm == Fp8Form::permuted) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        reinterpret_cast<uint32_t*>(q)[at / 4 * 16 + j * 4 + at % 4] =
            to_e4m3(v[3 - j], v[7 - j], v[11 - j], v[15 - j]);
    } else if constexpr (kForm == Fp8Form::as_x) {
      Columns rounded;
#pragma unroll
      for (int j = 0; j < kRun; ++j)
        rounded.at[j] = from_float<Element>(static_cast<float>(__nv_fp8_e4m3(v[j])));
      reinterpret_cast<Columns*>(q)[at] = rounded;
    } else {
      reinterpret_cast<uint32_t*>(q)[at] = to_e4m3(v[0], v[1], v[2], v[3]);
    }
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int at = threadIdx.x + i * Fp8::kThreads;
    if (at < places) put(kept[i], at);
  }
  for (int64_t at = threadIdx.x + kKept * Fp8::kThreads; at < places; at += Fp8::kThreads)
    put(at < runs ? from[at] : Columns{}, at);
}

}  // namespace ternary::sm90
