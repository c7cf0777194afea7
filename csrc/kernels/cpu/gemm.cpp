#include "kernels/gemm.h"

#include "kernels/cpu/gemm_operands.h"

// Integers times integers. x is rounded to one byte an element (a8) or to two (a16), which are two rows of
// bytes here; weights become bytes. A lane is a row of the weight, so that nothing is summed across lanes:
//
//   lane                       0       1       2      ...
//   bytes of the weight      row 0   row 1   row 2           4 columns of each, as unsigned bytes
//   bytes of x               the same 4 columns of a token
//
// The sums of a span are exact. Times the scales of x and of the lanes they are added up in fp32, from span
// to span, whatever tile and batch an element of y is in.
namespace ternary::TERNARY_ISA {
namespace {

constexpr int kSums = 6;    // rows of x computed at once: 2 x 6 sums and their terms fill 16 registers
constexpr int kDirect = 2;  // rows of x for which the weights' bytes are not worth storing

// sums[t] += exact sums of a span times both scales.
template <int tokens, int planes>
inline void add_span(const Ints (&exact)[tokens * planes][kVectors], const float* scale, const Panel& panel,
                     const Span& span, Vec (*sums)[kVectors]) {
#pragma GCC unroll 6  // at once: otherwise the compiler keeps all of `exact` in memory
  for (int t = 0; t < tokens; ++t)
    for (int v = 0; v < kVectors; ++v) {
      Ints whole = total(exact[t * planes][v]);
      if (planes == 2) whole += total(exact[t * planes + planes - 1][v]) << 8;
      sums[t][v] += __builtin_convertvector(whole, Vec) * scale[t] * panel.scale(span, v);
    }
}

// sums[t] += span s of tokens t0 + t.
template <int tokens, int planes>
void multiply(const Panel& panel, const RoundedTokens& x, const Span& span, int64_t s, int t0,
              Vec (*sums)[kVectors]) {
  constexpr int rows = tokens * planes;
  Ints exact[rows][kVectors];
  const int32_t *const start = x.start(s, t0 * planes), *const bytes = x.bytes(s, t0 * planes);
  const int64_t stride = 4 * span.padded;
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors; ++v) exact[r][v] = start[r] - Ints{};
#pragma GCC unroll 2
  for (int64_t j = 0; j < 4 * span.words; ++j) {
    const Ints w[kVectors] = {panel.bytes[j][0], panel.bytes[j][1]};
    for (int r = 0; r < rows; ++r) {
      const Ints one = bytes[r * stride + j] - Ints{};
      for (int v = 0; v < kVectors; ++v) exact[r][v] = add_dot(exact[r][v], w[v], one);
    }
  }
  add_span<tokens, planes>(exact, x.scale(s, t0), panel, span, sums);
}

// sums = all spans of so few tokens that the weights' bytes are not worth storing.
template <int tokens, int planes>
void multiply_few(const Panel& panel, const RoundedTokens& x, const std::vector<Span>& spans,
                  Vec (*sums)[kVectors]) {
  constexpr int rows = tokens * planes;
  Vec found[tokens][kVectors] = {};
  for (size_t s = 0; s < spans.size(); ++s) {
    const Span& span = spans[s];
    const int32_t *const start = x.start(s, 0), *const bytes = x.bytes(s, 0);
    const int64_t stride = 4 * span.padded;
    Ints exact[rows][kVectors];
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < kVectors; ++v) exact[r][v] = start[r] - Ints{};
    for (int64_t word = 0; word < span.words; word += 4) {
      Ints words[kVectors][4];
      for (int v = 0; v < kVectors; ++v) panel.load_words(span, word, v, words[v]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          Ints w[4];
          decode(words[v][i], w);
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p)
#pragma GCC unroll 2
            for (int r = 0; r < rows; ++r) {
              exact[r][v] = add_dot(exact[r][v], w[p], bytes[r * stride + 4 * (word + i) + p] - Ints{});
#ifdef TERNARY_X86
              asm("" : "+v"(exact[r][v]));  // in this order: all products at once exceed the registers
#endif
            }
        }
      }
    }
    add_span<tokens, planes>(exact, x.scale(s, 0), panel, span, found);
  }
  for (int t = 0; t < tokens; ++t)
    for (int v = 0; v < kVectors; ++v) sums[t][v] = found[t][v];
}

template <int planes, int tokens = kSums / planes>
void multiply_tokens(int wanted, const Panel& panel, const RoundedTokens& x, const Span& span, int64_t s,
                     int t0, Vec (*sums)[kVectors]) {
  if constexpr (tokens > 1)
    if (wanted < tokens) return multiply_tokens<planes, tokens - 1>(wanted, panel, x, span, s, t0, sums);
  multiply<tokens, planes>(panel, x, span, s, t0, sums);
}

void store_tile(const GemmArgs& a, int64_t m0, int tokens, int64_t n0, int64_t rows,
                const Vec (*sums)[kVectors]) {
  float bias[kPanel] = {}, y[kPanel];
  if (a.bias) load_floats(a.bias, a.bias_type, n0, rows, bias);
  for (int t = 0; t < tokens; ++t) {
    __builtin_memcpy(y, sums[t], sizeof y);
    if (a.bias)
      for (int64_t r = 0; r < rows; ++r) y[r] += bias[r];
    store_floats(y, rows, a.y, a.type, (m0 + t) * a.n + n0);
  }
}

}  // namespace

void gemm(const GemmArgs& a, int64_t begin, int64_t end) {
  const GemmTiles tiles = gemm_tiles(a);
  const std::vector<Span> spans = spans_of(a);
  RoundedTokens x(a, spans);
  Panel panel(a);
  Vec sums[GemmTiles::kTokens][kVectors];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t m0 = i / tiles.across * tiles.tokens, n1 = i % tiles.across * GemmTiles::kRows;
    const int tokens = static_cast<int>(std::min(tiles.tokens, a.m - m0));
    const int most = kSums / x.planes, steps = (tokens + most - 1) / most;
    x.load(m0, tokens);
    for (int64_t n0 = n1; n0 < std::min(n1 + GemmTiles::kRows, a.n); n0 += kPanel) {
      const int64_t rows = std::min<int64_t>(kPanel, a.n - n0);
      panel.select(n0, rows);
      __builtin_memset(sums, 0, tokens * sizeof sums[0]);
      if (tokens * x.planes <= kDirect) {
        const auto run = !a.a8 ? multiply_few<1, 2> : tokens == 1 ? multiply_few<1, 1> : multiply_few<2, 1>;
        run(panel, x, spans, sums);
      } else {
        for (size_t s = 0; s < spans.size(); ++s) {
          panel.load_bytes(spans[s]);
          for (int step = 0; step < steps; ++step) {
            const int t0 = tokens * step / steps, t1 = tokens * (step + 1) / steps;
            const auto multiply_some = a.a8 ? multiply_tokens<1> : multiply_tokens<2>;
            multiply_some(t1 - t0, panel, x, spans[s], s, t0, sums + t0);
          }
        }
      }
      store_tile(a, m0, tokens, n0, rows, sums);
    }
  }
}

}  // namespace ternary::TERNARY_ISA
