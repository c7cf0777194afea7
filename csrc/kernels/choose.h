// Greedy choice of the next tokens: tokens = argmax of logits, the first of equals.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

struct CUstream_st;

namespace ternary {

struct ChooseArgs {
  const void* logits;  // [rows, at least vocab]
  int64_t* tokens;     // [rows]
  int64_t* chosen;     // [slots, rows]; row `step % slots` gets the tokens, -1 where a logit is not finite
  int64_t* step;       // [2]: the step's number, counted up; parts that are done, 0 between calls
  void* workspace;     // [rows, kParts] of 8 bytes
  DType type;
  int64_t stride;  // elements between rows of logits
  int64_t rows, vocab, slots;

  static constexpr int kParts = 8;  // of a row
};

int choose_sm90(const ChooseArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace ternary
