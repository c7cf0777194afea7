// Tensors that the copy engine reads in boxes.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/dtype.h"

namespace ternary::sm90 {

// Halves [planes, rows, columns], planes `stride` elements apart, in boxes [box, 1, 64] whose rows of 128
// bytes are swizzled; zeros lie around it.
inline cudaError_t map_panels(CUtensorMap* map, DType type, const void* from, int64_t planes, int64_t rows,
                              int64_t columns, int64_t stride, int box) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encode) return cudaErrorNotSupported;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n > 0 ? n : 1); };
  const cuuint64_t sizes[] = {size(columns), size(rows), size(planes)};
  const cuuint64_t strides[] = {size(columns) * 2, size(stride) * 2};
  const cuuint32_t boxes[] = {64, 1, static_cast<cuuint32_t>(box)}, steps[] = {1, 1, 1};
  const CUresult result = encode(
      map, type == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<void*>(from), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace ternary::sm90
