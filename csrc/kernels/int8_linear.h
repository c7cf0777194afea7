// y[m, n] = scale[n] * sum_k x[m, k] * table[n, k]
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace ternary {

struct Int8LinearArgs {
  const void* x;        // [m, k]
  const int8_t* table;  // [n, k]
  const void* scale;    // [n]
  void* y;              // [m, n]
  DType type;           // of x and y
  DType scale_type;
  int64_t m, n, k;
};

constexpr int64_t kInt8Rows = 64;  // of the table, a work item of int8_linear_cpu with every row of x

void int8_linear_cpu(const Int8LinearArgs& args, int64_t begin, int64_t end);

}  // namespace ternary
