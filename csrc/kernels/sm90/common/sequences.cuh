// Where the sequences of a batch lie.
#pragma once

#include <cstdint>

namespace ternary::sm90 {

struct Tokens {
  int64_t begin, end;  // in the batch seen as one row of tokens
};

// Bounds that are out of order or beyond the batch select fewer tokens, never memory that is not the batch's.
template <class Args>
__device__ Tokens tokens_of(const Args& a, int64_t sequence) {
  if (!a.cu_seqlens) return {sequence * a.length, (sequence + 1) * a.length};
  const int64_t begin = min(max(int64_t{a.cu_seqlens[sequence]}, int64_t{0}), a.length);
  return {begin, min(max(int64_t{a.cu_seqlens[sequence + 1]}, begin), a.length)};
}

}  // namespace ternary::sm90
