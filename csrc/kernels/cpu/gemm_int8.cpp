#include <algorithm>
#include <cmath>

#include "kernels/codes.h"
#include "kernels/cpu/recurrence.h"
#include "kernels/gemm.h"

// gemm of x rounded to int8. A lane holds a word of 16 codes as it lies in memory, so that the rows of the
// weight are read as one stream; x is brought into the order of the codes, once for all rows of a thread.
//
//   lane                     0        1        2     ...
//   weight of a block     0 .. 15  16 .. 31  32 .. 47
//   byte j of plane p of x   4 j + p, with 4 bytes a lane     of 4 planes in all
//
// A span is one block, or several that share a scale. Its sums, a lane each, are exact; times the scales of
// the lanes they are added up in fp32, from span to span and then from lane to lane, whatever tile and batch
// an element of y is in.
namespace ternary::TERNARY_ISA {
namespace {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

constexpr int kTokens = GemmInt8Tiles::kTokens, kRows = GemmInt8Tiles::kRows;
constexpr int kBlock = kWeightsPerWord * kLanes;  // weights
constexpr int64_t kFloats = 4 * kLanes;           // that a block of x fills: the planes
constexpr int kStep = 6;  // tokens computed at once: their sums and a block of weights are registers
// Blocks: x of a step is 14 KiB and stays in L1, and a span's sums (AVX2's, of 8 weights a block) in 16 bits.
constexpr int64_t kChunk = 2048 / kBlock;
constexpr int64_t kAhead = 4096;  // bytes of codes: what the memory takes to answer, at its speed

// How the k weights of a row are cut into blocks. They run through groups of whole words, each lane with the
// scale of its own; where groups are of other sizes, a block ends with its group. The rest are zeros of x.
struct Blocks {
  const int64_t k, group;
  const int64_t of_group;  // blocks of a group, or 0: they run through
  const int64_t count;
  const bool lanes;    // whether lanes of a block have scales of their own
  const int64_t span;  // blocks

  explicit Blocks(const GemmArgs& a)
      : k(a.k),
        group(a.group),
        of_group(group % kWeightsPerWord ? (group + kBlock - 1) / kBlock : 0),
        count(of_group ? k / group * of_group : (k + kBlock - 1) / kBlock),
        lanes(!of_group && group % kBlock),
        span(lanes ? 1 : span_of(of_group ? of_group : group / kBlock)) {}

  bool whole() const { return !of_group && k % kBlock == 0; }
  int64_t first(int64_t block) const {
    return of_group ? block / of_group * group + block % of_group * kBlock : block * kBlock;
  }
  int64_t depth(int64_t block) const {
    const int64_t end = of_group ? (block / of_group + 1) * group : k;
    return std::min<int64_t>(kBlock, end - first(block));
  }

 private:
  // As long as may be, so that a group of `blocks` has whole ones.
  static int64_t span_of(int64_t blocks) {
    int64_t span = std::min(blocks, kChunk);
    while (blocks % span) --span;
    return span;
  }
};

// A few rows of the weight in whole blocks: the codes where they lie if they allow it, otherwise copied and
// padded; the scale of each span, or of each lane.
class WeightRows {
 public:
  WeightRows(const GemmArgs& a, const Blocks& blocks, int64_t rows)
      : args_(a),
        blocks_(blocks),
        groups_(a.one_scale ? 1 : a.k / a.group),
        stride_(blocks.whole() ? a.k / kWeightsPerByte : blocks.count * sizeof(Ints)),
        row_scales_(blocks.count / blocks.span * (blocks.lanes ? kLanes : 1)),
        read_(Scratch::unset(rows * groups_)),
        scales_(Scratch::unset(rows * row_scales_)),
        copy_(blocks.whole() ? 0 : rows * blocks.count * kLanes) {
    if (a.one_scale) load_scales(0, 1);
  }

  void load(int64_t n0, int64_t rows) {
    first_ = args_.codes + n0 * (args_.k / kWeightsPerByte);
    if (!blocks_.whole()) copy_codes(rows);
    if (!args_.one_scale) load_scales(n0, rows);
  }

  const uint8_t* codes(int64_t row) const { return first_ + row * stride_; }  // blocks of sizeof(Ints)
  const float* scales(int64_t row) const { return scales_.data + (args_.one_scale ? 0 : row * row_scales_); }

  // Of each lane; `scales` those of the row.
  Vec scale(const float* scales, int64_t span) const {
    return blocks_.lanes ? TERNARY_ISA::load(scales + span * kLanes) : broadcast(scales[span]);
  }

 private:
  void copy_codes(int64_t rows) {
    const auto copy = reinterpret_cast<uint8_t*>(copy_.data);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t b = 0; b < blocks_.count; ++b)
        __builtin_memcpy(copy + r * stride_ + b * sizeof(Ints),
                         first_ + (r * args_.k + blocks_.first(b)) / kWeightsPerByte,
                         blocks_.depth(b) / kWeightsPerByte);
    first_ = copy;
  }

  void load_scales(int64_t n0, int64_t rows) {
    const bool as_read = row_scales_ == groups_;
    load_floats(args_.scales, args_.scale_type, n0 * groups_, rows * groups_, as_read ? scales_ : read_);
    if (as_read) return;
    // A group has `copies` parts: spans, which need one scale each, or else halves or words of a block.
    const bool halves = blocks_.lanes && args_.group % (kBlock / 2) == 0;
    const int64_t part = halves ? kBlock / 2 : kWeightsPerWord;
    const int64_t copies = blocks_.lanes ? args_.group / part : row_scales_ / groups_;
    for (int64_t r = 0; r < rows; ++r) {
      float* to = scales_.data + r * row_scales_;
      float* const end = to + row_scales_;
      for (int64_t g = 0; g < groups_; ++g)
        for (int64_t i = 0; i < copies; ++i, to += halves ? kLanes / 2 : 1)
          for (int j = 0; j < (halves ? kLanes / 2 : 1); ++j) to[j] = read_[r * groups_ + g];
      std::fill(to, end, 0.0f);  // the lanes past the row
    }
  }

  const GemmArgs& args_;
  const Blocks& blocks_;
  const int64_t groups_;      // of a row
  const int64_t stride_;      // bytes
  const int64_t row_scales_;  // floats
  Scratch read_, scales_, copy_;
  const uint8_t* first_ = nullptr;
};

// x [n], n whole vectors, becomes whole numbers in [-127, 127]; returns what to multiply them by, NaN where x
// has a NaN or an infinity.
float round_to_int8(float* x, int64_t n) {
  Vec most{}, nan{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load(x + i);
    most = max(max(v, -v), most);
    nan += v * 0.0f;
  }
  float largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
  const float scale = std::max(largest / 127, 0x1p-100f) + sum(nan), inverse = 1 / scale;
  for (int64_t i = 0; i < n; ++i) x[i] = scale == scale ? std::nearbyint(x[i] * inverse) : 0;
  return scale;
}

// The weights of a block as bytes, a plane each.
#ifdef __AVX2__
// They are one more than they should be, as the products want them unsigned: sums begin at minus the sum of
// x. Two codes in four bits are looked up at once, first the one and then the other.
struct Weights {
#ifdef __AVX512F__
  typedef __m512i Bytes;
  static Bytes table(int32_t a, int32_t b, int32_t c, int32_t d) {
    return _mm512_broadcast_i32x4(_mm_setr_epi32(a, b, c, d));
  }
  static Bytes lookup(Bytes table, Bytes at) { return _mm512_shuffle_epi8(table, at); }
  static Ints total(Bytes sums) { return Ints(sums); }
#else
  typedef __m256i Bytes;
  static Bytes table(int32_t a, int32_t b, int32_t c, int32_t d) {
    return _mm256_setr_epi32(a, b, c, d, a, b, c, d);
  }
  static Bytes lookup(Bytes table, Bytes at) { return _mm256_shuffle_epi8(table, at); }
  static Ints total(Bytes sums) { return Ints(_mm256_madd_epi16(sums, _mm256_set1_epi16(1))); }
#endif
  Bytes planes[4];

  explicit Weights(Ints words) {
    const Ints low = words & 0x0f0f0f0f, high = words >> 4 & 0x0f0f0f0f;
    const Bytes first = table(0x00010201, 0x00010201, 0x00010201, 0x00010201);
    const Bytes second = table(0x01010101, 0x02020202, 0x01010101, 0x00000000);
    planes[0] = lookup(first, Bytes(low));
    planes[1] = lookup(second, Bytes(low));
    planes[2] = lookup(first, Bytes(high));
    planes[3] = lookup(second, Bytes(high));
  }

  // sums += the planes times those of x; two lanes of 16 bits for each of ours, or one.
  void add_dot(const float* x, Bytes& sums) const {
    const auto at = reinterpret_cast<const Bytes*>(x);
#ifdef __AVX512F__
    Bytes dot = _mm512_setzero_si512();
    for (int p = 0; p < 4; ++p) dot = _mm512_dpbusd_epi32(dot, planes[p], at[p]);
    sums = _mm512_add_epi32(sums, dot);
#else
    const Bytes low =
        _mm256_add_epi16(_mm256_maddubs_epi16(planes[0], at[0]), _mm256_maddubs_epi16(planes[1], at[1]));
    const Bytes high =
        _mm256_add_epi16(_mm256_maddubs_epi16(planes[2], at[2]), _mm256_maddubs_epi16(planes[3], at[3]));
    sums = _mm256_add_epi16(sums, _mm256_add_epi16(low, high));
#endif
  }

  // minus -= the sum of x, lanes as those of add_dot.
  static void subtract(const float* x, Bytes& minus) {
    Bytes sum{};
    Weights(Ints{}).add_dot(x, sum);  // zeros, which are ones here
#ifdef __AVX512F__
    minus = _mm512_sub_epi32(minus, sum);
#else
    minus = _mm256_sub_epi16(minus, sum);
#endif
  }
};
#else
struct Weights {
  int8_t planes[4][kBlock / 4];

  explicit Weights(Ints words) {
    uint8_t bytes[kBlock / 4];
    __builtin_memcpy(bytes, &words, sizeof bytes);
    for (int j = 0; j < kBlock / 4; ++j)
      for (int p = 0; p < 4; ++p) planes[p][j] = static_cast<int8_t>(weight_at(bytes + j, p));
  }

  typedef Ints Bytes;

  void add_dot(const float* x, Ints& sums) const {
    const auto at = reinterpret_cast<const int8_t*>(x);
    for (int p = 0; p < 4; ++p)
      for (int j = 0; j < kBlock / 4; ++j) sums[j / 4] += planes[p][j] * at[p * (kBlock / 4) + j];
  }

  static void subtract(const float*, Ints&) {}  // they are what they should be
  static Ints total(Ints sums) { return sums; }
};
#endif

// Whole numbers x [depth] in the order of the codes, padded with zeros to a block.
void arrange(const float* x, int64_t depth, float* to) {
  float padded[kBlock] = {};
  if (depth < kBlock) x = static_cast<float*>(__builtin_memcpy(padded, x, depth * sizeof(float)));
  const auto planes = reinterpret_cast<int8_t*>(to);
#ifdef __AVX2__
  // Eight times four bytes at once; their order within four, then four times four.
  const __m256i by_plane =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int j = 0; j < kBlock / 4; j += 8) {
    __m256i part[4];
    for (int i = 0; i < 4; ++i) part[i] = _mm256_cvtps_epi32(_mm256_loadu_ps(x + 4 * j + 8 * i));
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
    const __m256i sorted = _mm256_shuffle_epi8(bytes, by_plane);
    const __m128i even = _mm256_castsi256_si128(sorted), odd = _mm256_extracti128_si256(sorted, 1);
    const __m128i two[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
    for (int p = 0; p < 4; ++p)
      __builtin_memcpy(planes + p * (kBlock / 4) + j, reinterpret_cast<const char*>(two) + 8 * p, 8);
  }
#else
  for (int p = 0; p < 4; ++p)
    for (int j = 0; j < kBlock / 4; ++j) planes[p * (kBlock / 4) + j] = static_cast<int32_t>(x[4 * j + p]);
#endif
}

// Tokens of x, [spans, tokens, floats]: the blocks of a span, then where its sums begin.
struct Prepared {
  const Blocks& blocks;
  const int64_t floats;
  Scratch x;
  float scale[kTokens];
  int tokens = 0;
  int64_t first = -1;  // the tile that is in x

  Prepared(const GemmArgs& a, const Blocks& blocks)
      : blocks(blocks),
        floats(blocks.span * kFloats + kLanes),
        x(Scratch::unset(std::min<int64_t>(a.m, kTokens) * blocks.count / blocks.span * floats)) {}

  float* at(int64_t span, int token) const { return x.data + (span * tokens + token) * floats; }

  void load(const GemmArgs& a, int64_t m0, int count) {
    if (first == m0) return;
    first = m0;
    tokens = count;
    Scratch row(round_up(a.k));
    for (int t = 0; t < tokens; ++t) {
      load_floats(a.x, a.type, (m0 + t) * a.k, a.k, row);
      scale[t] = round_to_int8(row, round_up(a.k));
      for (int64_t b = 0; b < blocks.count;) {
        float* to = at(b / blocks.span, t);
        Weights::Bytes minus{};
        for (int64_t end = b + blocks.span; b < end; ++b, to += kFloats) {
          arrange(row + blocks.first(b), blocks.depth(b), to);
          Weights::subtract(to, minus);
        }
        __builtin_memcpy(to, &minus, sizeof minus);
      }
    }
  }
};

struct Tile {
  Vec sums[kRows][kTokens];
};

// sums[r][t] += the spans begin .. end of weight row r times token t, a row after another. Spans of `known`
// blocks, or of any number where that is 0.
template <int tokens, int known>
void multiply(const Prepared& p, const WeightRows& w, int t0, int rows, int64_t begin, int64_t end,
              Tile& tile) {
  const int64_t span = known ? known : p.blocks.span, floats = span * kFloats + kLanes;
  for (int r = 0; r < rows; ++r) {
    const uint8_t* codes = w.codes(r) + begin * span * sizeof(Ints);
    const float* scales = w.scales(r);
    Vec sums[tokens];
    for (int t = 0; t < tokens; ++t) sums[t] = tile.sums[r][t0 + t];
    for (int64_t s = begin; s < end; ++s) {
      const float* x = p.at(s, t0);
      Weights::Bytes exact[tokens];
      for (int t = 0; t < tokens; ++t)
        exact[t] = __builtin_bit_cast(Weights::Bytes, load(x + t * floats + span * kFloats));
#pragma GCC unroll 2
      for (int64_t b = 0; b < span; ++b, x += kFloats, codes += sizeof(Ints)) {
        if (tokens == 1) __builtin_prefetch(codes + kAhead);
        Ints words;
        __builtin_memcpy(&words, codes, sizeof words);
        const Weights weights(words);
        for (int t = 0; t < tokens; ++t) weights.add_dot(x + t * floats, exact[t]);
      }
      const Vec scale = w.scale(scales, s);
      for (int t = 0; t < tokens; ++t)
        sums[t] += __builtin_convertvector(Weights::total(exact[t]), Vec) * scale;
    }
    for (int t = 0; t < tokens; ++t) tile.sums[r][t0 + t] = sums[t];
  }
}

template <int tokens = kStep>
void multiply_tokens(int wanted, const Prepared& p, const WeightRows& w, int t0, int rows, int64_t begin,
                     int64_t end, Tile& tile) {
  if constexpr (tokens > 1)
    if (wanted < tokens) return multiply_tokens<tokens - 1>(wanted, p, w, t0, rows, begin, end, tile);
  const int64_t span = p.blocks.span;  // two blocks of many tokens would not leave enough registers
  const auto run = span == 1                  ? multiply<tokens, 1>
                   : span == 2 && tokens == 1 ? multiply<tokens, 2>
                                              : multiply<tokens, 0>;
  run(p, w, t0, rows, begin, end, tile);
}

void store_tile(const GemmArgs& a, const Prepared& p, int64_t m0, int64_t n0, int rows, const Tile& tile) {
  float bias[kRows] = {}, y[kRows];
  if (a.bias) load_floats(a.bias, a.bias_type, n0, rows, bias);
  for (int t = 0; t < p.tokens; ++t) {
    for (int r = 0; r < rows; ++r) y[r] = sum(tile.sums[r][t]) * p.scale[t];
    if (a.bias)
      for (int r = 0; r < rows; ++r) y[r] += bias[r];
    store_floats(y, rows, a.y, a.type, (m0 + t) * a.n + n0);
  }
}

}  // namespace

void gemm_int8(const GemmArgs& a, int64_t begin, int64_t end) {
  const GemmInt8Tiles tiles = gemm_int8_tiles(a);
  const Blocks blocks(a);
  const int64_t spans = blocks.count / blocks.span, chunk = kChunk / blocks.span;
  Prepared x(a, blocks);
  WeightRows weight(a, blocks, kRows);
  Tile tile;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t m0 = i / tiles.across * tiles.tokens, n0 = i % tiles.across * kRows;
    const int tokens = static_cast<int>(std::min(tiles.tokens, a.m - m0));
    const int rows = static_cast<int>(std::min<int64_t>(kRows, a.n - n0));
    const int steps = (tokens + kStep - 1) / kStep;
    x.load(a, m0, tokens);
    weight.load(n0, rows);
    for (int r = 0; r < rows; ++r) std::fill_n(tile.sums[r], tokens, Vec{});
    for (int64_t first = 0; first < spans; first += chunk)
      for (int s = 0; s < steps; ++s) {
        const int t0 = tokens * s / steps, t1 = tokens * (s + 1) / steps;
        const int64_t last = std::min(first + chunk, spans);
        multiply_tokens(t1 - t0, x, weight, t0, rows, first, last, tile);
      }
    store_tile(a, x, m0, n0, rows, tile);
  }
}

}  // namespace ternary::TERNARY_ISA
