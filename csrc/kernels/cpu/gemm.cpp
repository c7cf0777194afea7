#include "kernels/gemm.h"

#include <utility>

#include "kernels/codes.h"
#include "kernels/cpu/convert.h"

// A tile of y is computed in blocks of up to kBlock weights of one group:
//   1. the codes of the block are laid out with one column of y a lane;
//   2. with few rows they are decoded in registers on the way, with many once into `weights`;
//   3. half of x times twice the weights, summed in registers; then sums += scale * that.
// Each element of y goes through the same operations in the same order wherever its tile lies and
// however many rows there are: neither threads nor the batch change its bits.
namespace ternary::TERNARY_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), may_alias));

constexpr int kBlock = 128;  // short enough for fp32 sums in a row, and the usual group
constexpr int kWords = kBlock / kWeightsPerWord;
typedef int32_t RowCodes __attribute__((vector_size(4 * kWords), aligned(1), may_alias));  // of a block
constexpr int kRows = GemmTiles::kStep;  // 6 x 2 sums fill 16 registers, 6 x 4 fill 32
constexpr int kColumns = GemmTiles::kColumns;
constexpr int kVectors = kColumns / kLanes;

int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }
int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Tile {                               // a lane a column of y
  Floats sums[GemmTiles::kRows][kVectors];  // of y's rows so far
  Floats scale[kVectors];                   // of the group
  Ints words[kWords][kVectors];             // codes of the block
  Floats weights[kBlock][kVectors];         // twice what they stand for, where that is worth storing
  float x[kRows][kBlock];                   // half of x
};

// Where `multiply` finds weight 16 * word + i of the columns of vector v.
struct FromWords {
  const Tile& tile;
  Floats operator()(int word, int i, int v) const {
    return __builtin_bit_cast(Floats, twice_weight_at(tile.words[word][v], i));
  }
};
struct FromWeights {
  const Tile& tile;
  Floats operator()(int word, int i, int v) const { return tile.weights[word * kWeightsPerWord + i][v]; }
};

// sums += scale * (x w^T) for rows x vectors of the tile.
template <int rows, int vectors, class Weights>
void multiply(const Tile& tile, const Weights& weights, int words, int v0, Floats (*sums)[kVectors]) {
  Floats sum[rows][vectors] = {};
  for (int word = 0; word < words; ++word)
#pragma GCC unroll 16
    for (int i = 0; i < kWeightsPerWord; ++i) {
      Floats w[vectors];
      for (int v = 0; v < vectors; ++v) w[v] = weights(word, i, v0 + v);
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vectors; ++v) sum[r][v] += w[v] * tile.x[r][word * kWeightsPerWord + i];
    }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) sums[r][v0 + v] += sum[r][v] * tile.scale[v0 + v];
}

template <int rows = kRows, class Weights>
void multiply_rows(int wanted, const Tile& tile, const Weights& weights, int words, int across,
                   Floats (*sums)[kVectors]) {
  if constexpr (rows > 1)
    if (wanted < rows) return multiply_rows<rows - 1>(wanted, tile, weights, words, across, sums);
  // Enough sums to hide the latency of an addition, few enough for the registers.
  constexpr bool decodes = __is_same(Weights, FromWords);
  constexpr int vectors = kRegisters == 32 || rows <= 2 ? 4 : decodes && rows > 4 ? 1 : 2;
  for (int v = 0; v < across; v += vectors) multiply<rows, vectors>(tile, weights, words, v, sums);
}

// a0 b0 a1 b1 ... of the lanes from `first` on.
template <int first, size_t... i>
Ints interleave(Ints a, Ints b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * kLanes)...);
}

// [kLanes][kWords] -> [kWords][kLanes]: to interleave the halves of the whole rotates the bits of each
// element's place, until those of the row, at first the highest, are the lowest.
void transpose(Ints (&block)[kWords]) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  for (int bit = 1; bit < kLanes; bit *= 2) {
    Ints next[kWords];
    for (int i = 0; i < kWords / 2; ++i) {
      next[2 * i] = interleave<0>(block[i], block[i + kWords / 2], lanes);
      next[2 * i + 1] = interleave<kLanes / 2>(block[i], block[i + kWords / 2], lanes);
    }
    for (int i = 0; i < kWords; ++i) block[i] = next[i];
  }
}

// Asks for a part of the next tile's codes, so that all of them are read in the order in which they lie.
void prefetch(const GemmArgs& a, int64_t n0, int64_t first, int depth) {
  const uint8_t* next = a.codes + ((n0 + kColumns) * a.k + first * kColumns) / kWeightsPerByte;
  for (int i = 0; i < depth * kColumns / kWeightsPerByte; i += 64) __builtin_prefetch(next + i);
}

// The codes of `depth` weights from `first` on, of rows n0 .. n0 + columns of the weight; the rest is 0.
void load_words(const GemmArgs& a, int64_t n0, int columns, int across, int64_t first, int depth,
                Tile& tile) {
  for (int v = 0; v < across; ++v) {
    Ints block[kWords];
    const auto rows = reinterpret_cast<RowCodes*>(block);
    const int lanes = least(kLanes, columns - v * kLanes);
    if (lanes < kLanes || depth < kBlock) __builtin_memset(block, 0, sizeof block);
    for (int lane = 0; lane < lanes; ++lane) {
      const uint8_t* codes = a.codes + ((n0 + v * kLanes + lane) * a.k + first) / kWeightsPerByte;
      if (depth == kBlock)
        rows[lane] = *reinterpret_cast<const RowCodes*>(codes);
      else
        __builtin_memcpy(&rows[lane], codes, depth / kWeightsPerByte);
    }
    transpose(block);
    for (int word = 0; word < kWords; ++word) tile.words[word][v] = block[word];
  }
}

void load_scales(const GemmArgs& a, int64_t n0, int columns, int64_t group, Tile& tile) {
  const int64_t groups = a.k / a.group;
  float scale[kColumns] = {};
  for (int c = 0; c < columns; ++c)
    scale[c] = load_float(a.scales, a.scale_type, a.one_scale ? 0 : (n0 + c) * groups + group);
  __builtin_memcpy(tile.scale, scale, sizeof scale);
}

void load_x(const GemmArgs& a, int64_t m0, int rows, int64_t first, int depth, Tile& tile) {
  for (int r = 0; r < rows; ++r) {
    load_floats(a.x, a.type, (m0 + r) * a.k + first, depth, tile.x[r]);
    for (int i = 0; i < depth; ++i) tile.x[r][i] *= 0.5f;
    for (int i = depth; i % kWeightsPerWord; ++i) tile.x[r][i] = 0;
  }
}

void store(const GemmArgs& a, int64_t m0, int rows, int64_t n0, int columns, Tile& tile) {
  float bias[kColumns];
  if (a.bias) load_floats(a.bias, a.bias_type, n0, columns, bias);
  for (int r = 0; r < rows; ++r) {
    auto y = reinterpret_cast<float*>(tile.sums[r]);
    if (a.bias)
      for (int c = 0; c < columns; ++c) y[c] += bias[c];
    store_floats(y, columns, a.y, a.type, (m0 + r) * a.n + n0);
  }
}

void compute(const GemmArgs& a, int64_t m0, int rows, int64_t n0, int columns, Tile& tile) {
  const int across = 4 * ceil_div(columns, 4 * kLanes);  // vectors that hold the columns, in fours
  __builtin_memset(tile.sums, 0, rows * sizeof tile.sums[0]);
  for (int64_t first = 0; first < a.k;) {
    const int64_t group = first / a.group;
    const int depth = least(kBlock, (group + 1) * a.group - first);
    const int words = ceil_div(depth, kWeightsPerWord);
    if (first % a.group == 0) load_scales(a, n0, columns, group, tile);
    if (rows <= kRows) prefetch(a, n0, first, depth);
    load_words(a, n0, columns, across, first, depth, tile);
    if (rows > kRows)
      for (int word = 0; word < words; ++word)
        for (int v = 0; v < across; ++v)
          for (int i = 0; i < kWeightsPerWord; ++i)
            tile.weights[word * kWeightsPerWord + i][v] = FromWords{tile}(word, i, v);
    for (int r = 0; r < rows; r += kRows) {
      const int some = least(kRows, rows - r);
      load_x(a, m0 + r, some, first, depth, tile);
      if (rows > kRows)
        multiply_rows(some, tile, FromWeights{tile}, words, across, tile.sums + r);
      else
        multiply_rows(some, tile, FromWords{tile}, words, across, tile.sums + r);
    }
    first += depth;
  }
  store(a, m0, rows, n0, columns, tile);
}

}  // namespace

void gemm(const GemmArgs& a, int64_t begin, int64_t end) {
  Tile tile;
  const GemmTiles tiles = gemm_tiles(a);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t m0 = t / tiles.across * tiles.rows, n0 = t % tiles.across * kColumns;
    compute(a, m0, least(tiles.rows, a.m - m0), n0, least(kColumns, a.n - n0), tile);
  }
}

}  // namespace ternary::TERNARY_ISA
