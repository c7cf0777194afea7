#include "kernels/int8_linear.h"

#include <algorithm>

#include "kernels/cpu/recurrence.h"

// Each element of y is a vector of sums over k, whatever the rows computed beside it: neither threads nor the
// batch change its bits.
namespace ternary::TERNARY_ISA {
namespace {

constexpr int kTokens = 4;        // at once: 4 x 2 sums, and what they are made of, fill 16 registers
constexpr int64_t kAhead = 4096;  // bytes of the table: what the memory takes to answer, at its speed

typedef int8_t Bytes __attribute__((vector_size(kLanes)));

Vec widen(Bytes bytes) {  // the compiler would do it a lane at a time
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(__builtin_bit_cast(__m128i, bytes)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(__builtin_bit_cast(int64_t, bytes))));
#else
  return __builtin_convertvector(bytes, Vec);
#endif
}

Vec widen_bytes(const int8_t* from, int64_t n) {
  Bytes bytes{};
  __builtin_memcpy(&bytes, from, n);
  return widen(bytes);
}

// y[t][r] = rows of the table times tokens, x [tokens, stride] padded with zeros.
template <int rows, int tokens>
void multiply(const int8_t* table, int64_t k, const float* x, int64_t stride, float (*y)[kInt8Rows]) {
  Vec sum[rows][tokens] = {};
  const int64_t whole = k / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    if (tokens == 1 && j % (64 / rows) == 0) __builtin_prefetch(table + j * rows + kAhead);
    for (int r = 0; r < rows; ++r) {
      const Vec w = widen_bytes(table + r * k + j, kLanes);
      for (int t = 0; t < tokens; ++t) sum[r][t] += w * load(x + t * stride + j);
    }
  }
  for (int r = 0; r < rows; ++r) {
    if (whole < k) {
      const Vec w = widen_bytes(table + r * k + whole, k - whole);
      for (int t = 0; t < tokens; ++t) sum[r][t] += w * load(x + t * stride + whole);
    }
    for (int t = 0; t < tokens; ++t) y[t][r] = TERNARY_ISA::sum(sum[r][t]);
  }
}

template <int tokens = kTokens>
void multiply_tokens(int wanted, const int8_t* table, int64_t rows, int64_t k, const float* x, int64_t stride,
                     float (*y)[kInt8Rows]) {
  if constexpr (tokens > 1)
    if (wanted < tokens) return multiply_tokens<tokens - 1>(wanted, table, rows, k, x, stride, y);
  constexpr int together = tokens == 1 ? 4 : 2;
  const auto from = [&](int64_t r) { return reinterpret_cast<float (*)[kInt8Rows]>(y[0] + r); };
  int64_t r = 0;
  for (; r + together <= rows; r += together)
    multiply<together, tokens>(table + r * k, k, x, stride, from(r));
  for (; r < rows; ++r) multiply<1, tokens>(table + r * k, k, x, stride, from(r));
}

}  // namespace

void int8_linear(const Int8LinearArgs& a, int64_t begin, int64_t end) {
  const int64_t stride = round_up(a.k);
  Scratch x(kTokens * stride);
  float y[kTokens][kInt8Rows], scale[kInt8Rows];
  for (int64_t m0 = 0; m0 < a.m; m0 += kTokens) {
    const int tokens = static_cast<int>(std::min<int64_t>(kTokens, a.m - m0));
    for (int t = 0; t < tokens; ++t) load_floats(a.x, a.type, (m0 + t) * a.k, a.k, x + t * stride);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n0 = i * kInt8Rows, rows = std::min(kInt8Rows, a.n - n0);
      multiply_tokens(tokens, a.table + n0 * a.k, rows, a.k, x, stride, y);
      load_floats(a.scale, a.scale_type, n0, rows, scale);
      for (int t = 0; t < tokens; ++t) {
        for (int64_t r = 0; r < rows; ++r) y[t][r] *= scale[r];
        store_floats(y[t], rows, a.y, a.type, (m0 + t) * a.n + n0);
      }
    }
  }
}

}  // namespace ternary::TERNARY_ISA
