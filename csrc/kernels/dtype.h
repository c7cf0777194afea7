// The element types that kernels read and write, and their storage on the CPU.
#pragma once

#include <cstdint>
#include <cstring>

namespace ternary {

enum class DType { f32, bf16, f16 };

struct bfloat16 {
  uint16_t bits;
};
using float16 = _Float16;

}  // namespace ternary
