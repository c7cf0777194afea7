// Tensors that the copy engine reads in boxes.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/dtype.h"

namespace ternary::sm90 {

inline CUtensorMapDataType map_type(DType type) {
  return type == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// A tensor that TMA copies in boxes; zeros lie around it. Sizes and boxes count the innermost dimension
// first, pitches are bytes of the others.
template <int kDims>
cudaError_t map_boxes(CUtensorMap* map, CUtensorMapDataType type, const void* from,
                      const cuuint64_t (&sizes)[kDims], const cuuint64_t (&pitches)[kDims - 1],
                      const cuuint32_t (&box)[kDims], CUtensorMapSwizzle swizzle) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encode) return cudaErrorNotSupported;
  cuuint32_t steps[kDims];
  for (cuuint32_t& step : steps) step = 1;
  const CUresult result = encode(map, type, kDims, const_cast<void*>(from), sizes, pitches, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Halves [planes, rows, columns], planes `stride` elements apart, in boxes [box, 1, 64] whose rows of 128
// bytes are swizzled.
inline cudaError_t map_panels(CUtensorMap* map, DType type, const void* from, int64_t planes, int64_t rows,
                              int64_t columns, int64_t stride, int box) {
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n > 0 ? n : 1); };
  return map_boxes<3>(map, map_type(type), from, {size(columns), size(rows), size(planes)},
                      {size(columns) * 2, size(stride) * 2}, {64, 1, static_cast<cuuint32_t>(box)},
                      CU_TENSOR_MAP_SWIZZLE_128B);
}

// Elements of so many bytes [rows, columns].
inline cudaError_t map_rows(CUtensorMap* map, CUtensorMapDataType type, int bytes, const void* from,
                            int64_t rows, int64_t columns, int box_rows, int box_columns,
                            CUtensorMapSwizzle swizzle) {
  return map_boxes<2>(map, type, from, {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                      {static_cast<cuuint64_t>(columns * bytes)},
                      {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, swizzle);
}

}  // namespace ternary::sm90
