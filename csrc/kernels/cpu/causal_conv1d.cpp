#include "kernels/causal_conv1d.h"

#include "kernels/cpu/recurrence.h"

namespace ternary::TERNARY_ISA {
namespace {

constexpr int64_t kBlock = kConvBlock;
constexpr int64_t kTile = 32;  // tokens between two moves of the history

// One block of channels. Rows of kBlock floats: the lanes past the last channel hold what they may.
struct Block {
  Scratch rows, taps, bias;  // weight as it lies [kBlock, w] and transposed [w, kBlock], [kBlock]
  Scratch history, y;        // [w - 1 + kTile, kBlock], [kBlock]
  int64_t width;

  explicit Block(int64_t width)
      : rows(kBlock * width),
        taps(width * kBlock),
        bias(kBlock),
        history((width - 1 + kTile) * kBlock),
        y(kBlock),
        width(width) {}

  void load_weight(const CausalConv1dArgs& a, int64_t channel, int64_t channels) {
    load_floats(a.weight, a.weight_type, channel * width, channels * width, rows);
    for (int64_t i = 0; i < width; ++i)
      for (int64_t c = 0; c < channels; ++c) taps[i * kBlock + c] = rows[c * width + i];
    if (a.bias) load_floats(a.bias, a.weight_type, channel, channels, bias);
  }

  // The output of the token whose oldest input is row `first` of the history.
  void convolve(int64_t first, bool use_silu) {
    for (int64_t c = 0; c < kBlock; c += kLanes) {
      Vec sum = load(bias + c);
      for (int64_t i = 0; i < width; ++i)
        sum += load(taps + i * kBlock + c) * load(history + (first + i) * kBlock + c);
      store(y + c, use_silu ? silu(sum) : sum);
    }
  }
};

}  // namespace

void causal_conv1d(const CausalConv1dArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.channels + kBlock - 1) / kBlock, past = a.width - 1;
  Block block(a.width);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sequence = item / blocks, channel = item % blocks * kBlock;
    const int64_t channels = a.channels - channel < kBlock ? a.channels - channel : kBlock;
    const auto [first, last] = tokens_of(a, sequence);
    block.load_weight(a, channel, channels);
    for (int64_t i = 0; i < past; ++i) {
      float* row = block.history + i * kBlock;
      const int64_t at = (sequence * past + i) * a.channels + channel;
      if (a.initial_state)
        load_floats(a.initial_state, a.state_type, at, channels, row);
      else
        __builtin_memset(row, 0, sizeof(float) * kBlock);
    }
    for (int64_t t = first; t < last; t += kTile) {
      const int64_t tokens = last - t < kTile ? last - t : kTile;
      for (int64_t i = 0; i < tokens; ++i) {
        load_floats(a.x, a.type, (t + i) * a.x_stride + channel, channels,
                    block.history + (past + i) * kBlock);
        block.convolve(i, a.silu);
        store_floats(block.y, channels, a.y, a.type, (t + i) * a.channels + channel);
      }
      __builtin_memmove(block.history, block.history + tokens * kBlock, sizeof(float) * past * kBlock);
    }
    for (int64_t i = 0; i < past; ++i) {
      const int64_t at = (sequence * past + i) * a.channels + channel;
      store_floats(block.history + i * kBlock, channels, a.final_state, a.state_type, at);
    }
  }
}

}  // namespace ternary::TERNARY_ISA
