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

namespace ternary::sm90 {

template <class Element_, int kSpan_, int kColumnTiles_>
struct StreamConfig : Stream {
  using Element = Element_;
  static constexpr int kSpan = kSpan_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kRowsOfX = kColumnTiles * kColumns;
  static constexpr int kSpans = kChunk / kSpan;   // of a warp
  static constexpr int kWords = kChunk / 4 / 16;  // of a lane and row
  static constexpr int kSteps = kChunk / 16;      // of the mma, over a warp's columns
  static constexpr int kStepsPerSpan = kSteps / kSpans;
  static constexpr int kMaxThreads = 32 * (kColumnTiles == 1 ? kMaxWarps : kMaxWarps2);
};

// What a warp has of one tile: its codes, later its part of the sums.
template <class Config>
union StreamUnit {
  static constexpr int kPitch =
      Config::kTileRows + 4;          // the eight rows and four columns of a store: 32 banks
  uint4 codes[Config::kTileRows][4];  // swizzled, see codes_slot
  float sums[Config::kRowsOfX][kPitch];
};

template <class Config>
struct StreamX {
  uint4 x[Config::kRowsOfX][Config::kChunk / 8];  // swizzled, see x_slot
};

// Where 16 bytes lie, so that the lanes of one access find them in different banks.
__device__ inline int codes_slot(int row, int piece) { return piece ^ (row & 2) ^ (row >> 2 & 1); }
__device__ inline int x_slot(int row, int piece) { return piece ^ (piece >> 3 & 1) ^ (row & 1) << 1; }

struct StreamArgs {
  GemmArgs gemm;
  int tiles;      // of 16 rows, of a block
  int longer;     // the first blocks, which have one more
  int most;       // of a block
  int groups;     // of a row; 0 with one scale for all
  int last_span;  // of a row
  // 2^32 / (2 spans a group), rounded up. The high half of its product with 2 span + 1 is the span's group:
  // exactly, both being under 2^15 and the quotient never a whole number.
  uint32_t spans_to_group;
};

// Starts the copy of a warp's columns of x.
template <class Config>
__device__ void load_x(StreamX<Config>& smem, const StreamArgs& a, int64_t first_row, int rows,
                       int first_column) {
  const int lane = threadIdx.x % 32, column = first_column + lane * 8;
  const bool valid = column < a.gemm.k;
  const char* x = static_cast<const char*>(a.gemm.x) + (first_row * a.gemm.k + (valid ? column : 0)) * 2;
#pragma unroll 1
  for (int row = 0; row < rows; ++row, x += a.gemm.k * 2)
    copy_16_async(&smem.x[row][x_slot(row, lane)], x, valid);
}

// Starts the copies of a warp's columns of some tiles, a group each and kMaxTiles groups in all.
template <class Config>
__device__ void load_codes(StreamUnit<Config>* smem, const StreamArgs& a, int first_row, int tiles,
                           int first_column) {
  const int piece = threadIdx.x % 4, column = first_column + piece * 64;
  const int64_t bytes = a.gemm.k / 4;
  int row = threadIdx.x % 32 / 4;
  auto* slot =
      &smem->codes[row][codes_slot(row, piece)];  // and eight rows on, as the swizzle has that period
  int left = column < a.gemm.k ? static_cast<int>(a.gemm.n) - first_row - row : 0;
  const uint8_t* codes = a.gemm.codes + (first_row + row) * bytes + column / 4;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    copy_16_async(slot, left > 0 ? codes : a.gemm.codes, left > 0);
    copy_16_async(slot + 8 * 4, left > 8 ? codes + 8 * bytes : a.gemm.codes, left > 8);
    commit_copies();
    slot += sizeof(*smem) / sizeof(*slot);
    codes += Config::kTileRows * bytes;
    left -= Config::kTileRows;
  }
  for (int tile = tiles; tile < Config::kMaxTiles; ++tile) commit_copies();
}

// The scales of a warp's columns of a tile. The four lanes that share two rows of it hold the scales of these
// between them. What lies past the edges is only ever multiplied by zero: there the nearest row's or span's
// scale does.
template <class Config>
class StreamScales {
 public:
  __device__ StreamScales(const StreamArgs& a, int first_row, int first_column) : a_(a) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int index =
          4 * i + threadIdx.x % 4;  // counted over the spans of the upper row, then of the lower
      const int span = first_column / Config::kSpan + index % Config::kSpans;
      const int group = a.groups ? __umulhi(2 * min(span, a.last_span) + 1, a.spans_to_group) : 0;
      row_[i] = first_row + threadIdx.x % 32 / 4 + index / Config::kSpans * 8;
      offset_[i] = group * size_of(a.gemm.scale_type);
    }
  }

  // Starts to read those of a tile.
  __device__ void load(int tile) {
    const uint32_t row_bytes = a_.groups * size_of(a_.gemm.scale_type);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const uint32_t row = min(row_[i] + tile * Config::kTileRows, static_cast<int>(a_.gemm.n) - 1);
      const char* scale = static_cast<const char*>(a_.gemm.scales) + (row * row_bytes + offset_[i]);
      bits_[i] = a_.gemm.scale_type == DType::f32 ? *reinterpret_cast<const uint32_t*>(scale)
                                                  : *reinterpret_cast<const uint16_t*>(scale);
    }
  }

  // Hands them to the four lanes, [upper or lower row][span].
  __device__ void share(float (&scales)[2][Config::kSpans]) const {
    float mine[kOfLane];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const float f16 = __half2float(__ushort_as_half(static_cast<uint16_t>(bits_[i])));
      const float other = __uint_as_float(a_.gemm.scale_type == DType::bf16 ? bits_[i] << 16 : bits_[i]);
      mine[i] = a_.gemm.scale_type == DType::f16 ? f16 : other;
    }
#pragma unroll
    for (int i = 0; i < 2 * Config::kSpans; ++i)
      scales[i / Config::kSpans][i % Config::kSpans] = __shfl_sync(0xffffffff, mine[i / 4], i % 4, 4);
  }

 private:
  static constexpr int kOfLane = 2 * Config::kSpans / 4;
  const StreamArgs& a_;
  int row_[kOfLane];
  uint32_t offset_[kOfLane];
  uint32_t bits_[kOfLane];
};

// Of 16 halves x[0..15] in two vectors, (x[7 - i], x[15 - i]): the pair that meets weights 7 - i and 15 - i.
__device__ inline uint32_t pair_of(const uint32_t* low, const uint32_t* high, int j) {
  return __byte_perm(low[j / 2], high[j / 2], j % 2 ? 0x7632 : 0x5410);
}

// One row of x as B of a warp's steps: step s takes fragments 2 s and 2 s + 1.
template <class Config>
__device__ void load_fragments(uint32_t (&frag_x)[2 * Config::kSteps], const StreamX<Config>& smem, int row) {
  const int quad = threadIdx.x % 4;
  for (int q = 0; q < Config::kWords; ++q) {
    if constexpr (Config::kSpan == 32) {
      for (int part = 0; part < 2;
           ++part) {  // weights 7..4 or 3..0, and eight on, of a word each of two spans
        const int piece = 2 * (4 * q + 2 * part + quad / 2), offset = quad % 2 ? 0 : 2;
        uint32_t low[2], high[2];
        for (int i = 0; i < 2; ++i) {
          low[i] = reinterpret_cast<const uint32_t*>(&smem.x[row][x_slot(row, piece)])[offset + i];
          high[i] = reinterpret_cast<const uint32_t*>(&smem.x[row][x_slot(row, piece + 1)])[offset + i];
        }
        for (int i = 0; i < 4; ++i) frag_x[8 * q + 4 * part + i] = pair_of(low, high, 3 - i);
      }
    } else {
      const int word = Config::kSpan == 128 ? q / 2 * 8 + 2 * quad + q % 2 : 4 * q + quad;
      const uint4 low = smem.x[row][x_slot(row, 2 * word)], high = smem.x[row][x_slot(row, 2 * word + 1)];
      for (int i = 0; i < 8; ++i) frag_x[8 * q + i] = pair_of(&low.x, &high.x, 7 - i);
    }
  }
}

// A lane's words of codes of one row.
template <class Config>
__device__ void load_words(uint32_t (&words)[Config::kWords], const StreamUnit<Config>& smem, int row) {
  const int quad = threadIdx.x % 4;
  const auto piece = [&](int i) {
    return reinterpret_cast<const uint32_t*>(&smem.codes[row][codes_slot(row, i)]);
  };
  if constexpr (Config::kSpan == 128) {
    for (int span = 0; span < 2; ++span) {
      const uint2 pair = *reinterpret_cast<const uint2*>(piece(2 * span + quad / 2) + quad % 2 * 2);
      words[2 * span] = pair.x;
      words[2 * span + 1] = pair.y;
    }
  } else if constexpr (Config::kSpan == 64) {
    for (int q = 0; q < 4; ++q) words[q] = piece(q)[quad];
  } else {
    // Bytes 3 and 1 of a word hold weights 4..7 and 12..15, which the first two steps take.
    const uint32_t bytes = quad % 2 ? 0x2604 : 0x3715;
    for (int q = 0; q < 4; ++q) words[q] = __byte_perm(piece(q)[quad / 2], piece(q)[2 + quad / 2], bytes);
  }
}

// Twice the sums of one tile over a warp's columns, [tile of rows of x][place in the mma's D].
template <class Config>
__device__ void multiply(float (&sums)[Config::kColumnTiles][4], const uint32_t (&low)[Config::kWords],
                         const uint32_t (&high)[Config::kWords],
                         const uint32_t (&frag_x)[Config::kColumnTiles][2 * Config::kSteps],
                         const float (&scales)[2][Config::kSpans]) {
  constexpr uint32_t kTopCodes = 0xC000C000;
#pragma unroll
  for (int span = 0; span < Config::kSpans;
       span += 2) {  // two at a time: two chains of sums on the tensor cores
    float products[2][Config::kColumnTiles][4] = {};
#pragma unroll
    for (int i = 0; i < 2 * Config::kStepsPerSpan; ++i) {
      const int step = (span + i % 2) * Config::kStepsPerSpan + i / 2, q = step / 4, shift = step % 4 * 4;
      const uint32_t frag_w[4] = {(low[q] << shift) & kTopCodes, (high[q] << shift) & kTopCodes,
                                  (low[q] << (shift + 2)) & kTopCodes, (high[q] << (shift + 2)) & kTopCodes};
#pragma unroll
      for (int tile = 0; tile < Config::kColumnTiles; ++tile)
        mma_m16n8k16<typename Config::Element>(products[i % 2][tile], frag_w, frag_x[tile][2 * step],
                                               frag_x[tile][2 * step + 1]);
    }
#pragma unroll
    for (int i = 0; i < 2 * Config::kColumnTiles * 4; ++i)
      sums[i / 2 / 4][i / 2 % 4] +=
          scales[i / 2 % 4 / 2][span + i % 2] * products[i % 2][i / 2 / 4][i / 2 % 4];
  }
}

// Adds the warps' sums in their order and writes y [rows of x, tiles of 16].
template <class Config>
__device__ void store_y(const StreamUnit<Config>* smem_units, const StreamArgs& a, int64_t first_x,
                        int rows_of_x, int first_row, int tiles) {
  constexpr int kRows = Config::kMaxTiles * Config::kTileRows;
  const int warps = blockDim.x / 32;
  const int rows = min(tiles * Config::kTileRows, static_cast<int>(a.gemm.n) - first_row);
#pragma unroll 1
  for (int i = threadIdx.x; i < rows_of_x * kRows; i += blockDim.x) {
    const int row = i % kRows, x = i / kRows;
    if (row >= rows) continue;
    const float* part = &smem_units[row / Config::kTileRows].sums[x][row % Config::kTileRows];
    float sum = 0;
#pragma unroll 4
    for (int warp = 0; warp < warps; ++warp, part += a.most * sizeof(*smem_units) / sizeof(float))
      sum += *part;
    sum *= 0.5f;  // a code reads as twice its weight
    if (a.gemm.bias) sum += load_float(a.gemm.bias, a.gemm.bias_type, first_row + row);
    const int64_t at = (first_x + x) * a.gemm.n + first_row + row;
    static_cast<typename Config::Element*>(a.gemm.y)[at] = from_float<typename Config::Element>(sum);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kMaxThreads) stream_kernel(const __grid_constant__ StreamArgs a) {
  extern __shared__ uint4 smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  auto* smem_x = reinterpret_cast<StreamX<Config>*>(smem) + warp;
  auto* smem_all = reinterpret_cast<StreamUnit<Config>*>(reinterpret_cast<StreamX<Config>*>(smem) + warps);
  auto* smem_units = smem_all + warp * a.most;

  const int block = blockIdx.y, first_tile = block * a.tiles + min(block, a.longer);
  const int tiles = a.tiles + (block < a.longer);
  const int first_row = first_tile * Config::kTileRows, first_column = warp * Config::kChunk;
  const int64_t first_x = int64_t{blockIdx.x} * Config::kRowsOfX;
  const int rows_of_x = static_cast<int>(min(int64_t{Config::kRowsOfX}, a.gemm.m - first_x));

  // The rows of a block lie in one run: on their way to L2 before the kernels before this one are done.
  // Whoever is writing them still, L2 is where the writes go.
  if (threadIdx.x == 0) {
    const int64_t rows = min(int64_t{tiles} * Config::kTileRows, a.gemm.n - first_row);
    const int64_t row_of_scales = a.groups * size_of(a.gemm.scale_type);
    prefetch_to_l2(a.gemm.codes + first_row * (a.gemm.k / 4), rows * (a.gemm.k / 4));
    prefetch_to_l2(static_cast<const char*>(a.gemm.scales) + first_row * row_of_scales, rows * row_of_scales);
  }
  launch_dependents();
  wait_for_prerequisites();

  load_x(*smem_x, a, first_x, rows_of_x, first_column);
  load_codes(smem_units, a, first_row, tiles, first_column);
  StreamScales<Config> next_scales(a, first_row, first_column);
  next_scales.load(0);

  uint32_t frag_x[Config::kColumnTiles][2 * Config::kSteps];
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<Config::kMaxTiles - 1>();  // kMaxTiles + tile groups were closed: the tile's is there
    commit_copies();
    __syncwarp();
    if (tile == 0) {  // x came in the first group; rows past the last repeat it and are not stored
#pragma unroll
      for (int i = 0; i < Config::kColumnTiles; ++i)
        load_fragments<Config>(frag_x[i], *smem_x, min(i * Config::kColumns + lane / 4, rows_of_x - 1));
    }
    float scales[2][Config::kSpans];
    next_scales.share(scales);
    next_scales.load(tile + 1);

    StreamUnit<Config>& unit = smem_units[tile];
    uint32_t low[Config::kWords], high[Config::kWords];
    load_words<Config>(low, unit, lane / 4);
    load_words<Config>(high, unit, lane / 4 + 8);
    float sums[Config::kColumnTiles][4] = {};
    multiply<Config>(sums, low, high, frag_x, scales);
    __syncwarp();  // the sums take the place of the codes
#pragma unroll
    for (int i = 0; i < Config::kColumnTiles * 4; ++i)
      unit.sums[i / 4 * Config::kColumns + lane % 4 * 2 + i % 2][lane / 4 + i % 4 / 2 * 8] =
          sums[i / 4][i % 4];
  }
  __syncthreads();
  store_y<Config>(smem_all, a, first_x, rows_of_x, first_row, tiles);
}

}  // namespace ternary::sm90
