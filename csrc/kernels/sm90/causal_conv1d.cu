#include <cuda_runtime.h>

#include "kernels/causal_conv1d.h"
#include "kernels/sm90/common/launch.cuh"
#include "kernels/sm90/common/math.cuh"
#include "kernels/sm90/common/sequences.cuh"
#include "kernels/sm90/common/types.cuh"

namespace ternary {
namespace sm90 {

// The width of every published model has kernels that keep the inputs before a token in registers.
constexpr int kWidth = 4, kPast = kWidth - 1;
constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 5;  // 96 registers
constexpr int kVectorBytes = 8;  // of channels of a thread: wider ones leave too few threads to hide reads
constexpr int kTile = 32;        // tokens of a thread; the three before them are read again, from L2.
constexpr int kShortTile = 8;    // Fewer, down to this,
constexpr int kFewThreads = 1 << 17;  // where that makes so few threads.
constexpr int kUnroll = 8;            // tokens read at once

template <class Element>
__device__ float activate(float y, bool use_silu) {
  if (!use_silu) return y;
  return sizeof(Element) == 4 ? silu(y) : silu_fast(y);
}

// A vector of channels.
template <class Element, class Weight>
struct Convolution {
  static constexpr int kChannels = kVectorBytes / sizeof(Element);
  using Channels = Words<Element, kChannels>;

  const CausalConv1dArgs& a;
  const int64_t channel;
  float taps[kChannels * kWidth], bias[kChannels] = {};
  float past[kPast][kChannels];

  __device__ Convolution(const CausalConv1dArgs& a, int64_t channel) : a(a), channel(channel) {
    const auto* weight = static_cast<const Weight*>(a.weight) + channel * kWidth;
    to_floats(taps, load_words<Weight, kChannels * kWidth>(weight));
    if (a.bias) to_floats(bias, load_words<Weight, kChannels>(static_cast<const Weight*>(a.bias) + channel));
  }

  // The inputs before `token`, of a sequence that begins at `begin`.
  __device__ void read_past(int64_t sequence, int64_t begin, int64_t token) {
    const auto* x = static_cast<const Element*>(a.x) + channel;
    if (token - kPast >= begin) {
      Channels before[kPast];
#pragma unroll
      for (int i = 0; i < kPast; ++i)
        before[i] = load_words<Element, kChannels>(x + (token - kPast + i) * a.x_stride);
#pragma unroll
      for (int i = 0; i < kPast; ++i) to_floats(past[i], before[i]);
      return;
    }
    with_type_on_device(a.state_type, [&](auto type) {
      using State = decltype(type);
      const auto* state = static_cast<const State*>(a.initial_state) + channel;
#pragma unroll
      for (int i = 0; i < kPast; ++i) {
        const int64_t at = token - kPast + i, row = sequence * kPast + at - begin + kPast;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) past[i][c] = 0.0f;
        if (at >= begin)
          to_floats(past[i], load_words<Element, kChannels>(x + at * a.x_stride));
        else if (a.initial_state)
          to_floats(past[i], load_words<State, kChannels>(state + row * a.channels));
      }
    });
  }

  __device__ void write_past(int64_t sequence) const {
    with_type_on_device(a.state_type, [&](auto type) {
      using State = decltype(type);
      auto* state = static_cast<State*>(a.final_state) + channel;
#pragma unroll
      for (int i = 0; i < kPast; ++i)
        store_words(state + (sequence * kPast + i) * a.channels, to_words<State>(past[i]));
    });
  }

  __device__ Channels step(const Channels& x) {
    float now[kChannels], y[kChannels];
    to_floats(now, x);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      y[c] = fmaf(taps[c * kWidth + kPast], now[c], bias[c]);
#pragma unroll
      for (int i = 0; i < kPast; ++i) y[c] = fmaf(taps[c * kWidth + i], past[i][c], y[c]);
      y[c] = activate<Element>(y[c], a.silu);
#pragma unroll
      for (int i = 0; i + 1 < kPast; ++i) past[i][c] = past[i + 1][c];
      past[kPast - 1][c] = now[c];
    }
    return to_words<Element>(y);
  }

  __device__ void steps(int64_t begin, int64_t end) {
    const auto* from = static_cast<const Element*>(a.x) + begin * a.x_stride + channel;
    auto* to = static_cast<Element*>(a.y) + begin * a.channels + channel;
    for (int left = static_cast<int>(end - begin); left > 0; left -= kUnroll) {
      Channels x[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i)
        if (i < left) x[i] = load_words<Element, kChannels>(from + i * a.x_stride);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (i >= left) break;
        store_words(to, step(x[i]));
        to += a.channels;
      }
      from += kUnroll * a.x_stride;
    }
  }
};

// The first sequence that ends behind `token`; where none does, their number.
__device__ inline int64_t sequence_of(const CausalConv1dArgs& a, int64_t token) {
  if (!a.cu_seqlens) return token / a.length;
  int64_t low = 0, high = a.sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (tokens_of(a, middle).end > token)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

__host__ __device__ inline int64_t tokens_of_batch(const CausalConv1dArgs& a) {
  return a.cu_seqlens ? a.length : a.sequences * a.length;
}

struct ConvArgs {
  CausalConv1dArgs conv;
  int tile;                 // tokens
  unsigned blocks_of_tile;  // of kThreads vectors of channels
};

// A thread has a vector of channels of a tile of tokens, and the state of every sequence that ends in it.
template <class Element, class Weight>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) conv_kernel(const __grid_constant__ ConvArgs args) {
  const CausalConv1dArgs& a = args.conv;
  const int64_t vector = blockIdx.x % args.blocks_of_tile * kThreads + threadIdx.x;
  const int64_t channel = vector * Convolution<Element, Weight>::kChannels;
  const int64_t first = int64_t{blockIdx.x / args.blocks_of_tile} * args.tile;
  const int64_t end = min(first + args.tile, tokens_of_batch(a));
  launch_dependents();
  if (channel >= a.channels) return;
  Convolution<Element, Weight> convolution(a, channel);
  wait_for_prerequisites();
  // From the start, empty sequences there included.
  for (int64_t sequence = first == 0 ? 0 : sequence_of(a, first); sequence < a.sequences; ++sequence) {
    const Tokens tokens = tokens_of(a, sequence);
    if (tokens.begin >= end && tokens.end > end) break;
    const int64_t begin = max(tokens.begin, first);
    convolution.read_past(sequence, tokens.begin, begin);
    convolution.steps(begin, min(tokens.end, end));
    if (tokens.end > end) break;
    convolution.write_past(sequence);
  }
}

// The input at `token` of a sequence that begins at `begin`, or of its initial state before that.
template <class Element>
__device__ float input_at(const CausalConv1dArgs& a, int64_t sequence, int64_t begin, int64_t token,
                          int64_t channel) {
  if (token >= begin) return to_float(static_cast<const Element*>(a.x)[token * a.x_stride + channel]);
  const int64_t row = (sequence + 1) * (a.width - 1) + token - begin;
  return a.initial_state ? load_float(a.initial_state, a.state_type, row * a.channels + channel) : 0.0f;
}

// Any width and alignment. A thread has one output, or behind these one number of the final state.
template <class Element>
__global__ void __launch_bounds__(kThreads) plain_conv_kernel(const __grid_constant__ CausalConv1dArgs a) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, past = a.width - 1;
  const int64_t row = index / a.channels, channel = index % a.channels, token = row;
  if (token < tokens_of_batch(a)) {
    const int64_t sequence = sequence_of(a, token);
    if (sequence >= a.sequences) return;
    const int64_t begin = tokens_of(a, sequence).begin;
    float sum = a.bias ? load_float(a.bias, a.weight_type, channel) : 0.0f;
    for (int64_t i = 0; i <= past; ++i)
      sum = fmaf(load_float(a.weight, a.weight_type, channel * a.width + i),
                 input_at<Element>(a, sequence, begin, token - past + i, channel), sum);
    static_cast<Element*>(a.y)[index] = from_float<Element>(activate<Element>(sum, a.silu));
  } else if (row - tokens_of_batch(a) < a.sequences * past) {
    const int64_t at = row - tokens_of_batch(a), sequence = at / past;
    const Tokens tokens = tokens_of(a, sequence);
    store_float(input_at<Element>(a, sequence, tokens.begin, tokens.end - past + at % past, channel),
                a.final_state, a.state_type, at * a.channels + channel);
  }
}

// A thread has one channel of one sequence, of one token.
template <class Element, class Weight, class State>
__global__ void __launch_bounds__(kThreads) conv_update_kernel(const __grid_constant__ CausalConv1dArgs a) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, past = a.width - 1;
  const int64_t sequence = index / a.channels, channel = index % a.channels;
  launch_dependents();
  if (sequence >= a.sequences) return;
  const auto* taps = static_cast<const Weight*>(a.weight) + channel * a.width;
  auto* state = static_cast<State*>(a.final_state) + sequence * past * a.channels + channel;
  float sum = a.bias ? to_float(static_cast<const Weight*>(a.bias)[channel]) : 0.0f;
  wait_for_prerequisites();

  const Element x = static_cast<const Element*>(a.x)[sequence * a.x_stride + channel];
  sum = fmaf(to_float(taps[past]), to_float(x), sum);
  for (int64_t i = 0; i < past; i += kUnroll) {
    State before[kUnroll];
    float tap[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
      if (i + j < past) before[j] = state[(i + j) * a.channels], tap[j] = to_float(taps[i + j]);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (i + j >= past) break;
      sum = fmaf(tap[j], to_float(before[j]), sum);
      if (i + j > 0) state[(i + j - 1) * a.channels] = before[j];
    }
  }
  if (past > 0) state[(past - 1) * a.channels] = from_float<State>(to_float(x));
  static_cast<Element*>(a.y)[index] = from_float<Element>(activate<Element>(sum, a.silu));
}

// Calls f with values of the types of x and of the weight, which is fp32 or x's.
template <class Function>
static int with_types(const CausalConv1dArgs& args, Function f) {
  return with_type(args.type, [&](auto element) -> int {
    return args.weight_type == DType::f32 ? f(element, float{}) : f(element, element);
  });
}

static unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace sm90

int causal_conv1d_sm90(const CausalConv1dArgs& args, CUstream_st* stream) {
  using namespace sm90;
  if (args.sequences * args.channels == 0) return cudaSuccess;
  const int64_t vector = kVectorBytes / size_of(args.type), tokens = tokens_of_batch(args);
  const bool aligned = is_aligned(args.x) && is_aligned(args.weight) && is_aligned(args.bias) &&
                       is_aligned(args.initial_state) && args.x_stride % vector == 0;
  return with_types(args, [&](auto element, auto weight) -> int {
    using Element = decltype(element);
    if (args.width == kWidth && aligned && args.channels % vector == 0) {
      const int64_t vectors = args.channels / vector;
      int tile = kTile;
      while (tile > kShortTile && tokens / tile * vectors < kFewThreads) tile /= 2;
      const ConvArgs a = {args, tile, blocks_for(vectors)};
      const auto tiles = static_cast<unsigned>(tokens == 0 ? 1 : (tokens + tile - 1) / tile);
      return launch_overlapping(conv_kernel<Element, decltype(weight)>, a, tiles * a.blocks_of_tile, kThreads,
                                stream);
    }
    const int64_t rows = tokens + args.sequences * (args.width - 1);
    if (rows == 0) return cudaSuccess;
    plain_conv_kernel<Element><<<blocks_for(rows * args.channels), kThreads, 0, stream>>>(args);
    return cudaGetLastError();
  });
}

int causal_conv1d_update_sm90(const CausalConv1dArgs& args, CUstream_st* stream) {
  using namespace sm90;
  if (args.sequences * args.channels == 0) return cudaSuccess;
  const unsigned blocks = blocks_for(args.sequences * args.channels);
  return with_types(args, [&](auto element, auto weight) -> int {
    return with_type(args.state_type, [&](auto state) -> int {
      return launch_overlapping(conv_update_kernel<decltype(element), decltype(weight), decltype(state)>,
                                args, blocks, kThreads, stream);
    });
  });
}

}  // namespace ternary
