// y = x W^T for few rows of x, at the speed of the memory that holds the codes.
//
// A block takes whole rows of the weight, some tiles of 16, and each of its warps 256 columns of them. The
// order of the columns within a dot product is free, so the codes stay as they lie: (word << 2 i) &
// 0xC000C000 puts weights 7 - i and 15 - i of a word where they read as {0, +2, -2}, in bf16 and in fp16, and
// a lane takes the same columns of x. Per lane `quad` of the four that share a row of the mma's A, and per
// span of columns that share a scale:
//
//   span 128   word      0   1   2   3   4   5   6   7       64   word      0   1   2   3     32   word 0 1
//              of quad   0   0   1   1   2   2   3   3            of quad   0   1   2   3          of quad 1
//              0   3 2
//                                                                                             (high, low half
//                                                                                             bytes)
// Each word is four steps of the mma (span 32: two words of two spans, two steps each).
#pragma once

#include "kernels/gemm.h"
#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/common/types.cuh"
#include "kernels/sm90/gemm/config.h"
#include "kernels/sm90/gemm/operands.cuh"

namespace ternary::sm90 {

template <class Element_, int kSpan_, int kColumnTiles_, int kChunk_>
struct StreamConfig : Stream {
  using Element = Element_;
  static constexpr int kSpan = kSpan_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kChunk = kChunk_;  // weights of a row that a warp takes
  static constexpr int kRowsOfX = kColumnTiles * kColumns;
  static constexpr int kSpans = kChunk / kSpan;   // of a warp
  static constexpr int kWords = kChunk / 4 / 16;  // of a lane and row
  static constexpr int kPieces = kWords;          // of 16 bytes, of a row
  static constexpr int kSteps = kChunk / 16;      // of the mma, over a warp's columns
  static constexpr int kStepsPerSpan = kSteps / kSpans;
  static constexpr int kMaxThreads = kChunk == 128 || kColumnTiles == 2 ? 512 : 320;
  static constexpr int kMinBlocks = kColumnTiles * kChunk >= 512 ? 1 : 2;
  static constexpr int kScales = kTileRows * kSpans;  // of a tile and warp
};

// What a warp has of one tile: its scales and its codes, later its part of the sums.
template <class Config>
struct StreamUnit {
  static constexpr int kPitch = Config::kTileRows + 4;  // eight rows and four columns of a store: 32 banks
  float scales[Config::kTileRows][Config::kSpans];
  union {
    uint4 codes[Config::kTileRows][Config::kPieces];  // swizzled, see codes_slot
    float sums[Config::kRowsOfX][kPitch];
  };
};

template <class Config>
struct StreamX {
  uint4 x[Config::kRowsOfX][Config::kChunk / 8];  // swizzled, see x_slot
};

// Where 16 bytes lie, so that the lanes of one access find them in different banks.
template <int kPieces>
__device__ inline int codes_slot(int row, int piece) {
  const int pair = kPieces == 8 ? (row & 3) << 1 : kPieces == 4 ? row & 2 : 0;
  return piece ^ pair ^ (row >> 2 & 1);
}
__device__ inline int x_slot(int row, int piece) { return piece ^ (piece >> 3 & 1) ^ (row & 1) << 1; }

struct StreamArgs {
  GemmArgs gemm;
  int tiles;              // of 16 rows, of a block
  int longer;             // the first blocks, which have one more
  int most;               // of a block
  int log_rows;           // of x of a block, rounded up to a power of two
  const float* x_scales;  // [m], or null
  ScaleIndex index;
};

// Starts the copy of a warp's columns of x.
template <class Config>
__device__ void load_x(StreamX<Config>& smem, const StreamArgs& a, int rows, int first_column) {
  const int64_t pitch = a.gemm.k * 2;
#pragma unroll 1
  for (int piece = threadIdx.x % 32; piece < Config::kChunk / 8 * rows; piece += 32) {
    const int row = piece / (Config::kChunk / 8), i = piece % (Config::kChunk / 8);
    const int column = first_column + i * 8;
    const char* x = static_cast<const char*>(a.gemm.x) + row * pitch + column * 2;
    const bool valid = column < a.gemm.k;
    copy_16_async(&smem.x[row][x_slot(row, i)], valid ? x : a.gemm.x, valid);
  }
}

// Starts the copies of a warp's columns of some tiles.
template <class Config>
__device__ void load_codes(StreamUnit<Config>* smem, const StreamArgs& a, int first_row, int tiles,
                           int first_column) {
  constexpr int kRows = 32 / Config::kPieces;  // that the lanes reach at once
  const int piece = threadIdx.x % Config::kPieces, column = first_column + piece * 64;
  const int64_t bytes = a.gemm.k / 4;
  const int row = threadIdx.x % 32 / Config::kPieces;
  int left = column < a.gemm.k ? static_cast<int>(a.gemm.n) - first_row - row : 0;
  const uint8_t* codes = a.gemm.codes + (first_row + row) * bytes + column / 4;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile, ++smem)
#pragma unroll
    for (int i = 0; i < Config::kTileRows; i += kRows, left -= kRows, codes += kRows * bytes)
      copy_16_async(&smem->codes[row + i][codes_slot<Config::kPieces>(row + i, piece)],
                    left > 0 ? codes : a.gemm.codes, left > 0);
}

// The scales of a warp's columns of some tiles, on their way through registers to shared memory. What lies
// past the edges is only ever multiplied by zero: there the nearest span's scale does, or none.
template <class Config>
class StreamScales {
 public:
  static constexpr int kOfLane = (Config::kScales + 31) / 32;
  static constexpr int kTiles = kOfLane == 1 ? Config::kMaxTiles : kOfLane == 2 ? 4 : 1;

  // Starts to read those of kTiles tiles at most.
  __device__ void load(const StreamArgs& a, int first_row, int tiles, int first_column) {
    if (a.gemm.scale_type == DType::f32) {
      load<uint32_t>(a, first_row, tiles, first_column);
    } else {
      load<uint16_t>(a, first_row, tiles, first_column);
    }
  }

  __device__ void store(StreamUnit<Config>* smem, DType type, int tiles) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const int index = i * 32 + threadIdx.x % 32;
        if (tile < tiles && index < Config::kScales)
          smem[tile].scales[0][index] = scale_of(bits_[tile][i], type);
      }
  }

 private:
  template <class Bits>
  __device__ void load(const StreamArgs& a, int first_row, int tiles, int first_column) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int index = i * 32 + threadIdx.x % 32;
      const int span = first_column / Config::kSpan + index % Config::kSpans;
      const int row = first_row + index / Config::kSpans % Config::kTileRows;
      const int left = min(tiles * Config::kTileRows, static_cast<int>(a.gemm.n) - row);
      const Bits* scale =
          static_cast<const Bits*>(a.gemm.scales) + int64_t{row} * a.index.groups + a.index.group(span);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile, scale += Config::kTileRows * a.index.groups)
        bits_[tile][i] = tile * Config::kTileRows < left ? *scale : 0;
    }
  }

  uint32_t bits_[kTiles][kOfLane];
};

// Of 16 halves x[0..15] in two vectors, (x[7 - i], x[15 - i]): the pair that meets weights 7 - i and 15 - i.
__device__ inline uint32_t pair_of(const uint32_t* low, const uint32_t* high, int j) {
  return __byte_perm(low[j / 2], high[j / 2], j % 2 ? 0x7632 : 0x5410);
}

// One row of x as B of a warp's steps: step s takes fragments 2 s and 2 s + 1. at(i) are the eight columns
// from 8 i on.
template <class Config, class At>
__device__ void load_fragments(uint32_t (&frag_x)[2 * Config::kSteps], At at) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int q = 0; q < Config::kWords; ++q) {
    if constexpr (Config::kSpan == 32) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        // weights 7..4 or 3..0, and eight on, of a word each of two spans
        const int word = 4 * q + 2 * part + quad / 2;
        const uint4 low = at(2 * word), high = at(2 * word + 1);
        const uint32_t low4[2] = {quad % 2 ? low.x : low.z, quad % 2 ? low.y : low.w};
        const uint32_t high4[2] = {quad % 2 ? high.x : high.z, quad % 2 ? high.y : high.w};
        for (int i = 0; i < 4; ++i) frag_x[8 * q + 4 * part + i] = pair_of(low4, high4, 3 - i);
      }
    } else {
      const int word = Config::kSpan == 128 ? q / 2 * 8 + 2 * quad + q % 2 : 4 * q + quad;
      const uint4 low = at(2 * word), high = at(2 * word + 1);
      for (int i = 0; i < 8; ++i) frag_x[8 * q + i] = pair_of(&low.x, &high.x, 7 - i);
    }
  }
}

// A lane's words of codes of one row.
template <class Config>
__device__ void load_words(uint32_t (&words)[Config::kWords], const StreamUnit<Config>& smem, int row) {
  const int quad = threadIdx.x % 4;
  const auto piece = [&](int i) {
    return reinterpret_cast<const uint32_t*>(&smem.codes[row][codes_slot<Config::kPieces>(row, i)]);
  };
  if constexpr (Config::kSpan == 128) {
    for (int span = 0; span < Config::kSpans; ++span) {
      const uint2 pair = *reinterpret_cast<const uint2*>(piece(2 * span + quad / 2) + quad % 2 * 2);
      words[2 * span] = pair.x;
      words[2 * span + 1] = pair.y;
    }
  } else if constexpr (Config::kSpan == 64) {
    for (int q = 0; q < Config::kWords; ++q) words[q] = piece(q)[quad];
  } else {
    // Bytes 3 and 1 of a word hold weights 4..7 and 12..15, which the first two steps take.
    const uint32_t bytes = quad % 2 ? 0x2604 : 0x3715;
    for (int q = 0; q < Config::kWords; ++q)
      words[q] = __byte_perm(piece(q)[quad / 2], piece(q)[2 + quad / 2], bytes);
  }
}

// Twice the sums of one tile over a warp's columns, [tile of rows of x][place in the mma's D].
template <class Config>
__device__ void multiply(float (&sums)[Config::kColumnTiles][4], const uint32_t (&low)[Config::kWords],
                         const uint32_t (&high)[Config::kWords],
                         const uint32_t (&frag_x)[Config::kColumnTiles][2 * Config::kSteps],
                         const StreamUnit<Config>& smem) {
  constexpr uint32_t kTopCodes = 0xC000C000;
  constexpr int kTogether = Config::kSpans == 1 ? 1 : 2;  // spans: more chains of sums on the tensor cores
#pragma unroll
  for (int span = 0; span < Config::kSpans; span += kTogether) {
    float products[kTogether][Config::kColumnTiles][4] = {};
#pragma unroll
    for (int i = 0; i < Config::kStepsPerSpan * kTogether; ++i) {
      const int chain = i % kTogether, step = (span + chain) * Config::kStepsPerSpan + i / kTogether;
      const int q = step / 4, shift = step % 4 * 4;
      const uint32_t frag_w[4] = {(low[q] << shift) & kTopCodes, (high[q] << shift) & kTopCodes,
                                  (low[q] << (shift + 2)) & kTopCodes, (high[q] << (shift + 2)) & kTopCodes};
#pragma unroll
      for (int tile = 0; tile < Config::kColumnTiles; ++tile)
        mma_m16n8k16<typename Config::Element>(products[chain][tile], frag_w, frag_x[tile][2 * step],
                                               frag_x[tile][2 * step + 1]);
    }
#pragma unroll
    for (int i = 0; i < kTogether * Config::kColumnTiles * 4; ++i) {
      const int at = i % 4, tile = i / 4 % Config::kColumnTiles, which = i / 4 / Config::kColumnTiles;
      sums[tile][at] +=
          smem.scales[threadIdx.x % 32 / 4 + at / 2 * 8][span + which] * products[which][tile][at];
    }
  }
}

// Adds the warps' sums in their order and writes y [rows of x, tiles of 16].
template <class Config>
__device__ void store_y(const StreamUnit<Config>* smem_units, const StreamArgs& a, int rows_of_x,
                        int first_row, int tiles) {
  using Element = typename Config::Element;
  const int warps = blockDim.x / 32, stride = a.most * static_cast<int>(sizeof(*smem_units) / sizeof(float));
#pragma unroll 1
  for (int i = threadIdx.x; i < tiles * Config::kTileRows << a.log_rows; i += blockDim.x) {
    const int in_tile = i % Config::kTileRows, x = i / Config::kTileRows & ((1 << a.log_rows) - 1);
    const int tile = i / Config::kTileRows >> a.log_rows,
              row = first_row + tile * Config::kTileRows + in_tile;
    if (row >= a.gemm.n || x >= rows_of_x) continue;
    const float* part = &smem_units[tile].sums[x][in_tile];
    const float bias = a.gemm.bias ? load_float(a.gemm.bias, a.gemm.bias_type, row) : 0;
    float sum = 0;
#pragma unroll 8
    for (int warp = 0; warp < warps; ++warp, part += stride) sum += *part;
    const float scale = a.x_scales ? 0.5f * a.x_scales[x] : 0.5f;  // a code reads as twice its weight
    static_cast<Element*>(a.gemm.y)[int64_t{x} * a.gemm.n + row] = from_float<Element>(scale * sum + bias);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kMaxThreads, Config::kMinBlocks)
    stream_kernel(const __grid_constant__ StreamArgs a) {
  extern __shared__ uint4 smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  auto* smem_all = reinterpret_cast<StreamUnit<Config>*>(smem);
  auto* smem_units = smem_all + warp * a.most;
  auto* smem_x = reinterpret_cast<StreamX<Config>*>(smem_all + warps * a.most) + warp;

  const int block = blockIdx.x, first_tile = block * a.tiles + min(block, a.longer);
  const int tiles = a.tiles + (block < a.longer);
  const int first_row = first_tile * Config::kTileRows, first_column = warp * Config::kChunk;
  const int rows_of_x = static_cast<int>(a.gemm.m);

  launch_dependents();
  StreamScales<Config> scales;
  load_codes(smem_units, a, first_row, tiles, first_column);
  scales.load(a, first_row, tiles, first_column);
  wait_for_prerequisites();
  load_x(*smem_x, a, rows_of_x, first_column);
  commit_copies();
  for (int tile = 0; tile < (scales.kTiles < Config::kMaxTiles ? tiles : 1); tile += scales.kTiles) {
    if (scales.kTiles < Config::kMaxTiles && tile > 0)
      scales.load(a, first_row + tile * Config::kTileRows, tiles - tile, first_column);
    scales.store(smem_units + tile, a.gemm.scale_type, tiles - tile);
  }
  wait_for_copies<0>();
  __syncwarp();
  // rows past the last repeat it and are not stored
  uint32_t frag_x[Config::kColumnTiles][2 * Config::kSteps];
#pragma unroll
  for (int i = 0; i < Config::kColumnTiles; ++i) {
    const int row = min(i * Config::kColumns + lane / 4, rows_of_x - 1);
    load_fragments<Config>(frag_x[i], [&](int piece) { return smem_x->x[row][x_slot(row, piece)]; });
  }

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    StreamUnit<Config>& unit = smem_units[tile];
    uint32_t low[Config::kWords], high[Config::kWords];
    load_words<Config>(low, unit, lane / 4);
    load_words<Config>(high, unit, lane / 4 + 8);
    float sums[Config::kColumnTiles][4] = {};
    multiply<Config>(sums, low, high, frag_x, unit);
    __syncwarp();  // the sums take the place of the codes
#pragma unroll
    for (int i = 0; i < Config::kColumnTiles * 4; ++i)
      unit.sums[i / 4 * Config::kColumns + lane % 4 * 2 + i % 2][lane / 4 + i % 4 / 2 * 8] =
          sums[i / 4][i % 4];
  }
  __syncthreads();
  store_y<Config>(smem_all, a, rows_of_x, first_row, tiles);
}

}  // namespace ternary::sm90
