// What gemm multiplies: x rounded to bytes, and rows of the weight turned into bytes.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/codes.h"
#include "kernels/cpu/recurrence.h"
#include "kernels/gemm.h"

namespace ternary::TERNARY_ISA {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes), may_alias));
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
typedef uint16_t UnsignedShorts __attribute__((vector_size(4 * kLanes)));
typedef int32_t FourWords __attribute__((vector_size(16)));
typedef int16_t EightShorts __attribute__((vector_size(16)));
typedef int8_t SixteenBytes __attribute__((vector_size(16)));

constexpr int kVectors = 2;                // of rows of the weight computed at once
constexpr int kPanel = kVectors * kLanes;  // rows of the weight
constexpr int kSpan = 256;                 // weights at most: of sums in 16 bits they fill a half

// Weights first .. first + depth of a row, which share a scale; the words that they fill.
struct Span {
  int64_t first, depth, group;
  int64_t words, padded;  // padded: to a multiple of 4
  int64_t before;         // padded words of all spans before
};

// a8 has a scale of x for a row, so that a span is as long as may be; a16 one for a span.
inline std::vector<Span> spans_of(const GemmArgs& a) {
  const int64_t most = a.a8 ? kSpan : 128;
  std::vector<Span> spans;
  for (int64_t first = 0, before = 0; first < a.k;) {
    const int64_t group = first / a.group, depth = std::min(most, (group + 1) * a.group - first);
    const int64_t words = (depth + kWeightsPerWord - 1) / kWeightsPerWord, padded = (words + 3) / 4 * 4;
    spans.push_back({first, depth, group, words, padded, before});
    first += depth;
    before += padded;
  }
  return spans;
}

#ifdef __AVX2__
// Of each four bits the byte of the table, the same one for every four lanes.
inline Ints lookup(FourWords table, Ints at) {
#ifdef __AVX512F__
  return Ints(_mm512_shuffle_epi8(
      __m512i(__builtin_shufflevector(table, table, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3)),
      __m512i(at)));
#else
  return Ints(_mm256_shuffle_epi8(__m256i(__builtin_shufflevector(table, table, 0, 1, 2, 3, 0, 1, 2, 3)),
                                  __m256i(at)));
#endif
}
#endif

// Words of codes: byte j of bytes[p] is weight 4 j + p of the word, plus 1.
inline void decode(Ints words, Ints (&bytes)[4]) {
#ifdef __AVX2__  // two codes in four bits are looked up at once, first the one and then the other
  const Ints low = words & 0x0f0f0f0f, high = words >> 4 & 0x0f0f0f0f;
  const FourWords first = {0x00010201, 0x00010201, 0x00010201, 0x00010201};
  const FourWords second = {0x01010101, 0x02020202, 0x01010101, 0x00000000};
  bytes[0] = lookup(first, low);
  bytes[1] = lookup(second, low);
  bytes[2] = lookup(first, high);
  bytes[3] = lookup(second, high);
#else
  for (int p = 0; p < 4; ++p) {
    const Ints one = words >> 2 * p & 0x01010101, sign = words >> (2 * p + 1) & one;
    bytes[p] = one + 0x01010101 - 2 * sign;
  }
#endif
}

// sums + weights (unsigned bytes) times x, four products in each lane: in one sum, or in two of 16 bits.
inline Ints add_dot(Ints sums, Ints weights, Ints x) {
#if defined(__AVX512F__)
  return Ints(_mm512_dpbusd_epi32(__m512i(sums), __m512i(weights), __m512i(x)));
#elif defined(__AVX2__)
  return Ints(_mm256_add_epi16(__m256i(sums), _mm256_maddubs_epi16(__m256i(weights), __m256i(x))));
#else
  const Shorts even = (Shorts(weights) & 255) * (Shorts(x) << 8 >> 8);
  const Shorts odd = (Shorts(weights) >> 8) * (Shorts(x) >> 8);
  return Ints(UnsignedShorts(sums) + UnsignedShorts(even + odd));
#endif
}

#ifdef __AVX512F__
constexpr bool kHalves = false;
#else
constexpr bool kHalves = true;  // of a lane, the low one of bytes 0 and 1
#endif
inline Ints total(Ints sums) { return kHalves ? (sums << 16 >> 16) + (sums >> 16) : sums; }

// Tokens of x as rows of bytes in the order of decode's: one a token (a8), or two (a16), whose sums go
// together as low + 256 high. A span's rows follow each other.
class RoundedTokens {
 public:
  const int planes;  // rows of a token

  RoundedTokens(const GemmArgs& a, const std::vector<Span>& spans)
      : planes(a.a8 ? 1 : 2),
        args_(a),
        spans_(spans),
        most_(std::min<int64_t>(GemmTiles::kTokens, a.m)),
        bytes_(Scratch::unset(planes * most_ * 4 * (spans.back().before + spans.back().padded))),
        start_(Scratch::unset(planes * most_ * spans.size())),
        scale_(Scratch::unset(most_ * spans.size())) {}

  // Tokens m0 .. m0 + tokens, unless they are here.
  void load(int64_t m0, int tokens) {
    if (first_ == m0) return;
    first_ = m0;
    const float integer = args_.a8 ? 127 : 127 * 256 + 127;  // all bytes are signed
    for (int t = 0; t < tokens; ++t) {
      float largest = 0;
      if (args_.a8)
        for (const Span& span : spans_) {
          load_span(m0 + t, span);
          largest = larger(largest, largest_of(span));
        }
      for (size_t s = 0; s < spans_.size(); ++s) {
        load_span(m0 + t, spans_[s]);
        if (!args_.a8) largest = largest_of(spans_[s]);
        const float scale = std::max(largest / integer, 0x1p-100f) + largest * 0.0f;
        scale_[s * most_ + t] = scale;
        round(spans_[s], 1 / scale, integer);
        if (args_.a8) {
          arrange(s, t, [](EightShorts v) { return v; });
        } else {
          arrange(s, 2 * t, [](EightShorts v) { return v << 8 >> 8; });
          arrange(s, 2 * t + 1, [](EightShorts v) { return (v + 128) >> 8; });
        }
      }
    }
  }

  // Of a row, each for all lanes; rows follow each other after 4 * padded.
  int32_t* bytes(int64_t span, int row) const {
    return ints(bytes_) + 4 * (planes * most_ * spans_[span].before + row * spans_[span].padded);
  }
  // What the sums of a row begin with: minus the sum of x, as the weights are one too large.
  int32_t* start(int64_t span, int row) const { return ints(start_) + span * planes * most_ + row; }
  // What the sums of a token are multiplied by; NaN where x has a NaN or an infinity.
  const float* scale(int64_t span, int token) const { return scale_.data + span * most_ + token; }

 private:
  static int32_t* ints(const Scratch& scratch) { return reinterpret_cast<int32_t*>(scratch.data); }
  static float larger(float a, float b) { return a > b || a != a ? a : b; }

  void load_span(int64_t row, const Span& span) {
    load_floats(args_.x, args_.type, row * args_.k + span.first, span.depth, x_);
    for (int64_t i = span.depth; i < span.padded * kWeightsPerWord; ++i) x_[i] = 0;
  }

  // The largest |x|, or NaN.
  float largest_of(const Span& span) const {
    Vec most{}, nan{};
    for (int64_t i = 0; i < span.padded * kWeightsPerWord; i += kLanes) {
      const Vec v = TERNARY_ISA::load(x_ + i);
      most = max(max(v, -v), most);
      nan += v * 0.0f;
    }
    float largest = 0;
    for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
    return largest + sum(nan);
  }

  // To nearest, ties to even: by an addition that leaves the integer in the low bits.
  void round(const Span& span, float inverse, float most) {
    for (int64_t i = 0; i < span.padded * kWeightsPerWord; ++i) {
      const float v = std::max(-most, std::min(x_[i] * inverse, most));
      integers_[i] = static_cast<int16_t>(__builtin_bit_cast(int32_t, v + 0x1.8p23f));
    }
  }

  // part(integers) as bytes, which they fit.
  template <class Part>
  void arrange(int64_t s, int row, const Part& part) {
    char* to = reinterpret_cast<char*>(bytes(s, row));
    EightShorts sums[2] = {};
    for (int64_t w = 0; w < spans_[s].padded; ++w, to += sizeof(SixteenBytes)) {
      EightShorts v[2];
      __builtin_memcpy(v, integers_ + w * kWeightsPerWord, sizeof v);
      for (int i = 0; i < 2; ++i) sums[i] += v[i] = part(v[i]);
      const SixteenBytes sorted = __builtin_shufflevector(SixteenBytes(v[0]), SixteenBytes(v[1]), 0, 8, 16,
                                                          24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30);
      __builtin_memcpy(to, &sorted, sizeof sorted);
    }
    int32_t minus[2] = {};
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 8; ++i) minus[half] -= sums[half][i];
    *start(s, row) = kHalves ? (minus[0] & 0xffff) | minus[1] << 16 : minus[0] + minus[1];
  }

  const GemmArgs& args_;
  const std::vector<Span>& spans_;
  const int64_t most_;  // tokens
  Scratch bytes_, start_, scale_;
  int64_t first_ = -1;  // of the tokens that are here
  alignas(64) float x_[kSpan];
  alignas(64) int16_t integers_[kSpan];
};

// kPanel rows of the weight, a lane a row.
class Panel {
 public:
  explicit Panel(const GemmArgs& a)
      : args_(a),
        stride_(a.k / kWeightsPerByte),
        groups_(a.one_scale ? 1 : a.k / a.group),
        read_(Scratch::unset(kPanel * groups_)),
        scales_(kPanel * groups_),
        padded_(Scratch::unset((kPanel * stride_ + sizeof(FourWords)) / sizeof(float) + 1)) {}

  void select(int64_t n0, int64_t rows) {
    first_ = codes_ = args_.codes + n0 * stride_;
    // Up to four words are read behind a row's end.
    if ((args_.n - n0 - kPanel) * stride_ < static_cast<int64_t>(sizeof(FourWords)))
      codes_ = static_cast<uint8_t*>(__builtin_memcpy(padded_.data, first_, rows * stride_));
    const bool one = args_.one_scale;
    load_floats(args_.scales, args_.scale_type, one ? 0 : n0 * groups_, one ? 1 : rows * groups_, read_);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t g = 0; g < groups_; ++g) scales_[g * kPanel + r] = read_[one ? 0 : r * groups_ + g];
  }

  // The four words of a span from `word` on, of the lanes of vector v. Asks for as much of the next panel, so
  // that the rows are read in the order in which they lie.
  void load_words(const Span& span, int64_t word, int v, Ints (&words)[4]) const {
    const int64_t column = span.first / kWeightsPerByte + 4 * word;
    const uint8_t* const next = first_ + kPanel * (stride_ + column) + v * sizeof words;
    for (size_t i = 0; i < sizeof words; i += 64) __builtin_prefetch(next + i);
    const uint8_t* const from = codes_ + v * kLanes * stride_ + column;
    for (int i = 0; i < 4; ++i) words[i] = gather(from + i * stride_);
    transpose(words);
  }

  // Decodes a span into `bytes`, [4 * words][kVectors].
  void load_bytes(const Span& span) {
    for (int v = 0; v < kVectors; ++v)
      for (int64_t w = 0; w < span.words; w += 4) {
        Ints words[4], weights[4];
        load_words(span, w, v, words);
        for (int i = 0; i < 4; ++i) {
          decode(words[i], weights);
          for (int p = 0; p < 4; ++p) bytes[4 * (w + i) + p][v] = weights[p];
        }
      }
  }

  Vec scale(const Span& span, int v) const {
    return TERNARY_ISA::load(scales_.data + (args_.one_scale ? 0 : span.group * kPanel) + v * kLanes);
  }

  Ints bytes[kSpan / 4][kVectors];

 private:
  // Four words of every fourth row.
  Ints gather(const uint8_t* from) const {
    const auto one = [&](int row) {
      FourWords words;
      __builtin_memcpy(&words, from + row * stride_, sizeof words);
      return words;
    };
#ifdef __AVX2__
    const auto two = [&](int row) {
      return __builtin_shufflevector(one(row), one(row + 4), 0, 1, 2, 3, 4, 5, 6, 7);
    };
#endif
#if defined(__AVX512F__)
    return __builtin_shufflevector(two(0), two(8), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
    return two(0);
#else
    return one(0);
#endif
  }

  // a0 b0 a1 b1 of every four lanes, or a2 b2 a3 b3.
  template <int half, size_t... i>
  static Ints interleave(Ints a, Ints b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, (i / 4 * 4 + 2 * half + i % 4 / 2 + i % 2 * kLanes)...);
  }

  // Of every four lanes and the four vectors: to interleave their halves twice.
  static void transpose(Ints (&words)[4]) {
    constexpr auto lanes = std::make_index_sequence<kLanes>();
    for (int round = 0; round < 2; ++round) {
      const Ints next[4] = {
          interleave<0>(words[0], words[2], lanes), interleave<1>(words[0], words[2], lanes),
          interleave<0>(words[1], words[3], lanes), interleave<1>(words[1], words[3], lanes)};
      for (int i = 0; i < 4; ++i) words[i] = next[i];
    }
  }

  const GemmArgs& args_;
  const int64_t stride_;   // bytes of a row
  const int64_t groups_;   // of a row
  Scratch read_, scales_;  // as they lie, and [groups, kPanel]
  Scratch padded_;         // codes
  const uint8_t *first_ = nullptr, *codes_ = nullptr;
};

}  // namespace ternary::TERNARY_ISA
