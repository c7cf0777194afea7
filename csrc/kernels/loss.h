// With p = softmax(student), p' = softmax(student / T), q = softmax(teacher / T), a row at a time:
// KL = sum q (log q - log p'),  CE = -log p[label],
// student <- kl_weight T (p' - q) + (1 - kl_weight) (p - one-hot(label)), the gradient of kl_weight T^2 KL +
// (1 - kl_weight) CE.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

struct CUstream_st;

namespace ternary {

struct DistillationArgs {
  void* student;        // [rows, vocab] logits, then their gradient
  const void* teacher;  // [rows, vocab] logits
  DType type;
  const int64_t* labels;  // [rows]; one outside the vocabulary makes its CE NaN
  float* kl;              // [rows]
  float* ce;              // [rows]
  int64_t rows, vocab;
  float kl_weight, temperature;
};

// Returns a cudaError_t.
int distillation_sm90(const DistillationArgs& args, CUstream_st* stream);

}  // namespace ternary
