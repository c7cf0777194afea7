// The kernels of the decode step by launches that no other operator has: what is between the products.
//
// Each starts beside the one before it. The states are read before the wait: whoever wrote them last must be
// done by then. So the first and the last kernel of a step, and token_kernel in each layer, let the next one
// start only after their own wait, when every kernel before them is done; the states are a step old.
#pragma once

#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/ssd/step.cuh"

namespace ternary::sm90 {

struct Sequence {
  static constexpr int kStateSize = 128;  // that token_kernel serves
  static constexpr int kConvWidth = 4, kPast = kConvWidth - 1;
  static constexpr int kRun = 8;           // elements of a row that a thread has at once: 16 bytes of halves
  static constexpr int kMaxThreads = 768;  // for a row
  static constexpr int kThreads = 256;     // for channels of the state
  static constexpr int kLanes = 8;         // that share a channel: 128 bytes at once
  static constexpr int kApart = kThreads / kLanes;
  template <class State>
  static constexpr int kBlocksPerSm = sizeof(State) == 4 ? 4 : 3;  // 64 or 80 registers, 32 of them states
  template <class State>
  static constexpr int kRows = sizeof(State) == 4 ? 2 : 4;  // of the state, a lane
  template <class State>
  static constexpr int kChannels = kApart * kRows<State>;  // of a block
};

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffff, v, lanes);
  return v;
}

// B and C of a layer become the newest inputs of their convolution. All its blocks read those before: a later
// kernel moves them.
struct ShiftArgs {
  const void* inputs;  // [b, 2 n], rows `stride` apart, or null: nothing to move
  void* state;         // [b, 3, channels], from B on
  int64_t stride, channels;
};

template <class Element>
struct Shift {
  Element values[Sequence::kPast];

  __device__ void load(const ShiftArgs& a, int sequence, int i) {
    const auto* state = static_cast<const Element*>(a.state) + sequence * Sequence::kPast * a.channels + i;
#pragma unroll
    for (int j = 1; j < Sequence::kPast; ++j) values[j - 1] = __ldcg(state + j * a.channels);
    values[Sequence::kPast - 1] = __ldcg(static_cast<const Element*>(a.inputs) + sequence * a.stride + i);
  }
  __device__ void store(const ShiftArgs& a, int sequence, int i) const {
    auto* state = static_cast<Element*>(a.state) + sequence * Sequence::kPast * a.channels + i;
#pragma unroll
    for (int j = 0; j < Sequence::kPast; ++j) state[j * a.channels] = values[j];
  }
};

struct NormArgs {
  const int64_t* tokens;        // [b]: x starts as their embedding; null behind the first layer
  const void* embedding;        // [vocab, d], of Element, or int8 where it has scales
  const void* embedding_scale;  // [vocab] or null
  const void* projection;       // [b, d]: what is added to x,
  const float* squares;         // [b, parts]: times 1 / sqrt(their sum / d_inner + eps); or null
  float* x;                     // [b, d]: the residual stream
  const void* weight;           // [d], or null: behind the last layer
  void* u;                      // [b, d]
  ShiftArgs shift;              // of the last layer, behind it
  int64_t vocab;
  int dim, d_inner, parts;
  DType scale_type;
  float eps;
};

// Eight elements of a token's embedding as Element would hold them, NaN where the table has none.
template <class Element>
__device__ void load_embedding(float (&h)[Sequence::kRun], const NormArgs& a, int64_t token, int column) {
  const bool valid = token >= 0 && token < a.vocab;
  const int64_t at = (valid ? token : 0) * a.dim + column;
  if (!a.embedding_scale) {
    to_floats(h, load_words<Element, Sequence::kRun>(static_cast<const Element*>(a.embedding) + at));
  } else {
    const float scale = load_float(a.embedding_scale, a.scale_type, valid ? token : 0);
    const int2 bytes = *reinterpret_cast<const int2*>(static_cast<const int8_t*>(a.embedding) + at);
#pragma unroll
    for (int j = 0; j < Sequence::kRun; ++j)
      h[j] = to_float(from_float<Element>(reinterpret_cast<const int8_t*>(&bytes)[j] * scale));
  }
#pragma unroll
  for (int j = 0; j < Sequence::kRun; ++j) h[j] = valid ? h[j] : __int_as_float(0x7FC00000);
}

// x += projection / rms, u = x weight / rms(x). A block has a row.
template <class Element>
__global__ void __launch_bounds__(Sequence::kMaxThreads) norm_kernel(const __grid_constant__ NormArgs a) {
  constexpr int kRun = Sequence::kRun;
  __shared__ float smem_sums[32];
  const bool at_an_end = a.tokens || !a.weight;
  if (!at_an_end) launch_dependents();
  const int begin = threadIdx.x * kRun, step = blockDim.x * kRun, lane = threadIdx.x % 32;
  const int64_t first = int64_t{blockIdx.x} * a.dim;
  const auto load_half = [](const void* from, int64_t i) {
    return load_words<Element, kRun>(static_cast<const Element*>(from) + i);
  };
  Words<Element, kRun> weight = {};
  if (a.weight && begin < a.dim) weight = load_half(a.weight, begin);
  wait_for_prerequisites();
  if (at_an_end) launch_dependents();

  // The first run's numbers are asked for before those that give its factor are there.
  Words<float, kRun> x = {};
  Words<Element, kRun> projection = {};
  const auto load_x = [&](int i) {
    x = load_words<float, kRun>(a.x + first + i);
    projection = load_half(a.projection, first + i);
  };
  if (!a.tokens && begin < a.dim) load_x(begin);
  float factor = 1.0f;
  if (a.squares) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = lane; i < a.parts; i += 32) sum += a.squares[int64_t{blockIdx.x} * a.parts + i];
    factor = rsqrtf(warp_sum(sum) / static_cast<float>(a.d_inner) + a.eps);
  }
  float h[kRun], w[kRun], sum = 0.0f;
  for (int i = begin; i < a.dim; i += step) {
    if (a.tokens) {
      load_embedding<Element>(h, a, a.tokens[blockIdx.x], i);
    } else {
      if (i > begin) load_x(i);
      to_floats(h, x);
      to_floats(w, projection);
#pragma unroll
      for (int j = 0; j < kRun; ++j) h[j] = fmaf(factor, w[j], h[j]);
    }
    store_words(a.x + first + i, to_words<float>(h));
#pragma unroll
    for (int j = 0; j < kRun; ++j) sum = fmaf(h[j], h[j], sum);
  }
  if (a.weight) {
    sum = warp_sum(sum);
    if (lane == 0) smem_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = warp_sum(lane < blockDim.x / 32 ? smem_sums[lane] : 0.0f);
    const float scale = rsqrtf(sum / static_cast<float>(a.dim) + a.eps);
    for (int i = begin; i < a.dim; i += step) {
      if (a.dim > step) {
        weight = load_half(a.weight, i);
        to_floats(h, load_words<float, kRun>(a.x + first + i));
      }
      to_floats(w, weight);
#pragma unroll
      for (int j = 0; j < kRun; ++j) h[j] *= scale * w[j];
      store_words(static_cast<Element*>(a.u) + first + i, to_words<Element>(h));
    }
  }
  if (a.shift.inputs)
    for (int i = threadIdx.x; i < 2 * Sequence::kStateSize; i += blockDim.x) {
      Shift<Element> shift;
      shift.load(a.shift, blockIdx.x, i);
      shift.store(a.shift, blockIdx.x, i);
    }
}

struct TokenArgs {
  const void* zxBCdt;       // [b, 2 e + 2 n + h]
  const void* conv_weight;  // [c, 4]
  const void* conv_bias;    // [c] or null
  void* conv_state;         // [b, 3, c]; that of B and C is only read
  const float* dt_bias;     // [h]
  const float* A;           // [h]
  const float* D;           // [h]
  void* states;             // [b, e, n]
  const void* gate_norm;    // [e], or null: y leaves before the gate
  void* y;                  // [b, e]: y silu(z) gate_norm, which 1 / rms is still to multiply,
  float* squares;           // [b, blocks, kChannels / 32]: and the sums of squares that give it
  ShiftArgs shift;          // of the layer before
  int blocks;               // of a sequence
  int heads, head_dim;
  float dt_min, dt_max;
};

// A channel of the convolution before its newest input is there. From L2: what this multiprocessor saw of the
// state a step ago is old.
template <class Element>
struct Channel {
  Words<Element, Sequence::kConvWidth> taps;
  Element past[Sequence::kPast], bias;

  __device__ void load(const TokenArgs& a, int sequence, int channel, int channels) {
    const auto* state =
        static_cast<const Element*>(a.conv_state) + int64_t{sequence} * Sequence::kPast * channels + channel;
    const auto* weight = static_cast<const Element*>(a.conv_weight) + int64_t{channel} * Sequence::kConvWidth;
    taps = load_words<Element, Sequence::kConvWidth>(weight);
    bias = a.conv_bias ? static_cast<const Element*>(a.conv_bias)[channel] : from_float<Element>(0.0f);
#pragma unroll
    for (int i = 0; i < Sequence::kPast; ++i) past[i] = __ldcg(state + i * channels);
  }
  __device__ float step(Element newest) const {
    float w[Sequence::kConvWidth];
    to_floats(w, taps);
    float sum = fmaf(w[Sequence::kPast], to_float(newest), to_float(bias));
#pragma unroll
    for (int i = 0; i < Sequence::kPast; ++i) sum = fmaf(w[i], to_float(past[i]), sum);
    return silu_fast(sum);
  }
};

// What a row of the state takes, and what comes of its y: (y + skip) gate weight.
struct StepOfRow {
  float decay, xdt;
};
struct GateOfRow {
  float skip, gate, weight;
};

// Convolution, state and gate of a token. A block has some channels of a sequence: thread i the convolution,
// step size and gate of channel i, and that of B or C; eight lanes together each row of the state.
template <class Element, class State>
__global__ void __launch_bounds__(Sequence::kThreads, Sequence::kBlocksPerSm<State>)
    token_kernel(const __grid_constant__ TokenArgs a) {
  constexpr int n = Sequence::kStateSize, kLanes = Sequence::kLanes, kApart = Sequence::kApart;
  constexpr int kRows = Sequence::kRows<State>, kChannels = Sequence::kChannels<State>;
  constexpr int kWidth = 16 / sizeof(State), kPieces = n / kLanes / kWidth;
  static_assert(Sequence::kThreads == 2 * n, "a thread convolves a channel of B or C");
  __shared__ __align__(16) float smem_BC[2 * n];
  __shared__ StepOfRow smem_steps[kChannels];
  __shared__ GateOfRow smem_gates[kChannels];  // apart from the steps: fewer registers until they are read
  __shared__ float smem_y[kChannels];
  const int thread = threadIdx.x, lane = thread % kLanes, row = thread / kLanes;  // and kApart on
  const int sequence = blockIdx.x / a.blocks, block = blockIdx.x - sequence * a.blocks;
  const int d_inner = a.heads * a.head_dim, channels = d_inner + 2 * n;
  const int first = block * kChannels, channel = first + thread, rows = min(kChannels, d_inner - first);
  auto* states =
      static_cast<State*>(a.states) + (int64_t{sequence} * d_inner + first + row) * n + lane * kWidth;

  // What the kernels before do not write in this step.
  uint4 state[kRows][kPieces];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (row + r * kApart < rows)
        state[r][i] = __ldcg(reinterpret_cast<const uint4*>(states + r * kApart * n + i * kLanes * kWidth));
  const bool has_channel = thread < rows;
  const int head = has_channel ? channel / a.head_dim : 0;
  Channel<Element> of_x, of_BC;
  of_BC.load(a, sequence, d_inner + thread, channels);
  float dt_bias = 0.0f, A = 0.0f, D = 0.0f;
  Element weight = from_float<Element>(1.0f);
  if (has_channel) {
    of_x.load(a, sequence, channel, channels);
    dt_bias = a.dt_bias[head], A = a.A[head], D = a.D[head];
    if (a.gate_norm) weight = static_cast<const Element*>(a.gate_norm)[channel];
  }
  wait_for_prerequisites();
  launch_dependents();

  const auto* in = static_cast<const Element*>(a.zxBCdt) + int64_t{sequence} * (d_inner + channels + a.heads);
  const Element newest = in[2 * d_inner + thread];
  Element newest_x = newest, read_dt = newest, z = newest;
  if (has_channel) {
    newest_x = in[d_inner + channel];
    read_dt = in[d_inner + channels + head];
    if (a.gate_norm) z = in[channel];
  }
  smem_BC[thread] = of_BC.step(newest);
  if (has_channel) {
    const float x = of_x.step(newest_x);
    auto* past =
        static_cast<Element*>(a.conv_state) + int64_t{sequence} * Sequence::kPast * channels + channel;
    past[0] = of_x.past[1];
    past[channels] = of_x.past[2];
    past[2 * channels] = newest_x;
    float dt = softplus_fast(to_float(read_dt) + dt_bias);
    dt = dt < a.dt_min ? a.dt_min : dt;
    dt = dt > a.dt_max ? a.dt_max : dt;
    smem_steps[thread] = {exp_exact(not_above_zero(dt * A)), x * dt};
    smem_gates[thread] = {D * x, a.gate_norm ? silu_fast(to_float(z)) : 1.0f, to_float(weight)};
  }
  __syncthreads();

  StepOfRow steps[kRows];
  float y[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) steps[r] = smem_steps[row + r * kApart];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const float* from = smem_BC + lane * kWidth + i * kLanes * kWidth;
    float b[kWidth], c[kWidth], s[kWidth];
    to_floats(b, load_words<float, kWidth>(from));
    to_floats(c, load_words<float, kWidth>(from + n));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * kApart >= rows) continue;
      to_floats(s, *reinterpret_cast<const Words<State, kWidth>*>(&state[r][i]));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        s[j] = fmaf(steps[r].decay, s[j], steps[r].xdt * b[j]);
        y[r] = fmaf(s[j], c[j], y[r]);
      }
      // Not read again for a step: the first to leave L2.
      const Words<State, kWidth> words = to_words<State>(s);
      __stcs(reinterpret_cast<uint4*>(states + r * kApart * n + i * kLanes * kWidth),
             *reinterpret_cast<const uint4*>(&words));
    }
  }
  Shift<Element> shift;
  const bool shifts = block == 0 && a.shift.inputs;
  if (shifts) shift.load(a.shift, sequence, thread);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) y[r] += __shfl_xor_sync(0xffffffff, y[r], lanes);
    if (lane == r) smem_y[row + r * kApart] = y[r];
  }
  __syncthreads();
  if (shifts) shift.store(a.shift, sequence, thread);
  if (thread >= kChannels) return;
  float own = 0.0f;
  if (has_channel) {
    const GateOfRow of_y = smem_gates[thread];
    own = (smem_y[thread] + of_y.skip) * of_y.gate;
    static_cast<Element*>(a.y)[int64_t{sequence} * d_inner + channel] =
        from_float<Element>(own * of_y.weight);
  }
  if (!a.gate_norm) return;
  const float sum = warp_sum(own * own);
  if (thread % 32 == 0) a.squares[(int64_t{blockIdx.x} * kChannels + thread) / 32] = sum;
}

}  // namespace ternary::sm90
