// y = x W^T for any dtype, size and alignment, in fp32 without tensor cores: right, not fast.
// x [m, pitch] may be in e4m3, with a scale a row.
#pragma once

#include <cuda_fp8.h>

#include "kernels/gemm.h"
#include "kernels/sm90/common/types.cuh"

namespace ternary::sm90 {

struct Plain {
  static constexpr int kWarps = 8;  // of a block, each with one row of the weight
  static constexpr int kRowsOfX = 8;
};

__device__ inline float to_float(__nv_fp8_e4m3 v) { return static_cast<float>(v); }

template <class Output, class Element>
__global__ void __launch_bounds__(32 * Plain::kWarps)
    plain_kernel(const __grid_constant__ GemmArgs a, const Element* x, int64_t pitch, const float* x_scales) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.y} * Plain::kWarps + threadIdx.x / 32;
  const int64_t first_x = int64_t{blockIdx.x} * Plain::kRowsOfX;
  const int rows_of_x = static_cast<int>(min(int64_t{Plain::kRowsOfX}, a.m - first_x));
  if (row >= a.n) return;

  x += first_x * pitch;
  const uint8_t* codes = a.codes + row * (a.k / kWeightsPerByte);
  const int64_t first_group = a.one_scale ? 0 : row * (a.k / a.group);
  float sums[Plain::kRowsOfX] = {};
  for (uint32_t byte = lane; byte < a.k / kWeightsPerByte; byte += 32) {
    const uint32_t group = byte / static_cast<uint32_t>(a.group / kWeightsPerByte);
    const float scale = load_float(a.scales, a.scale_type, first_group + group);
    float w[kWeightsPerByte];
#pragma unroll
    for (int j = 0; j < kWeightsPerByte; ++j) w[j] = scale * static_cast<float>(weight_at(codes + byte, j));
#pragma unroll
    for (int i = 0; i < Plain::kRowsOfX; ++i) {
      if (i >= rows_of_x) break;
#pragma unroll
      for (int j = 0; j < kWeightsPerByte; ++j)
        sums[i] += w[j] * to_float(x[i * pitch + byte * kWeightsPerByte + j]);
    }
  }
#pragma unroll
  for (int i = 0; i < Plain::kRowsOfX; ++i) {
    for (int lanes = 16; lanes > 0; lanes /= 2) sums[i] += __shfl_xor_sync(0xffffffff, sums[i], lanes);
    if (lane != 0 || i >= rows_of_x) continue;
    const float bias = a.bias ? load_float(a.bias, a.bias_type, row) : 0;
    const float scale = x_scales ? x_scales[first_x + i] : 1;
    static_cast<Output*>(a.y)[(first_x + i) * a.n + row] = from_float<Output>(scale * sums[i] + bias);
  }
}

}  // namespace ternary::sm90
