#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "kernels/decode_layer.h"
#include "kernels/gemm.h"
#include "kernels/sm90/common/launch.cuh"
#include "kernels/sm90/decode/sequence.cuh"
#include "kernels/sm90/decode/sequence.h"
#include "kernels/sm90/gemm/select.h"

namespace ternary::sm90 {

// Calls f with a value of the type of 16 bits.
template <class Function>
static int with_half(DType type, Function f) {
  return type == DType::f16 ? f(__half{}) : f(__nv_bfloat16{});
}

static int channels_of_block(DType state_type) {
  return state_type == DType::f32 ? Sequence::kChannels<float> : Sequence::kChannels<__half>;
}

class SequenceOfLaunches {
 public:
  explicit SequenceOfLaunches(const DecodeArgs& args)
      : a_(args),
        e_(int64_t{args.heads} * args.head_dim),
        c_(e_ + 2 * args.state_size),
        r_(e_ + c_ + args.heads),
        blocks_(static_cast<int>(divide_up(e_, channels_of_block(args.state_type)))),
        fused_(!args.prefill && args.state_size == Sequence::kStateSize),
        in_{.x = take(args.d_model),
            .codes = args.in_codes,
            .scales = args.in_scales,
            .bias = nullptr,
            .y = nullptr,
            .type = args.type,
            .scale_type = args.scale_type,
            .bias_type = DType::f32,
            .m = args.rows(),
            .n = r_,
            .k = args.d_model,
            .group = args.in_group,
            .one_scale = args.in_one_scale,
            .fp8 = args.fp8},
        out_{.x = take(e_),
             .codes = args.out_codes,
             .scales = args.out_scales,
             .bias = nullptr,
             .y = take(args.d_model),
             .type = args.type,
             .scale_type = args.scale_type,
             .bias_type = DType::f32,
             .m = args.rows(),
             .n = args.d_model,
             .k = e_,
             .group = args.out_group,
             .one_scale = args.out_one_scale,
             .fp8 = args.fp8},
        u_(const_cast<void*>(in_.x)),
        zxBCdt_{take(r_), fused_ ? take(r_) : zxBCdt_[0]},
        y_(const_cast<void*>(out_.x)),
        xBC_(fused_ ? nullptr : take(c_)) {
    // The gated norm's 1 / rms may follow out_proj where what it would have scaled has bf16's range.
    if (args.type != DType::bf16) return;
    if (fused_) parts_ = blocks_ * channels_of_block(args.state_type) / 32;
    if (args.prefill) parts_ = static_cast<int>(ssd_gates_sm90(ssd(0, true)));
    if (parts_) squares_ = static_cast<float*>(take(2 * parts_));
  }

  // Both products are cut alike in all layers.
  int plan() {
    int error = plan_gemm_sm90(in_, &in_plan_);
    if (error == cudaSuccess) error = plan_gemm_sm90(out_, &out_plan_);
    in_.workspace = take_bytes(in_plan_.workspace);
    out_.workspace = take_bytes(out_plan_.workspace);
    int64_t bytes = 0;
    if (error == cudaSuccess && a_.prefill) error = ssd_workspace_sm90(ssd(0, parts_ != 0), &bytes);
    ssd_workspace_ = take_bytes(bytes);
    return error;
  }

  int64_t bytes() const { return bytes_; }

  int launch(cudaStream_t stream) {
    stream_ = stream;
    int error = cudaSuccess;
    const auto run = [&error](int result) { return (error = result) == cudaSuccess; };
    for (int64_t i = 0; i < a_.layers; ++i)
      if (!run(norm(i)) || !run(project(in_, in_plan_, zxBCdt_[i % 2], i)) ||
          !run(fused_ ? token(i) : conv_and_ssd(i)) ||
          !run(parts_ ? cudaSuccess : rms_norm_gated_sm90(gated_norm_of(a_, buffers(i), i), stream_)) ||
          !run(project(out_, out_plan_, out_.y, i)))
        return error;
    return norm(a_.layers);
  }

 private:
  void* take_bytes(int64_t bytes) {
    void* const from = static_cast<char*>(a_.workspace) + bytes_;
    bytes_ += (bytes + 127) / 128 * 128;
    return from;
  }
  // Room for [tokens, columns] of 16 bits.
  void* take(int64_t columns) { return take_bytes(a_.rows() * columns * 2); }

  // Of layer i, where there is one and no other kernel does it.
  ShiftArgs shift(int64_t i) const {
    if (i < 0 || !fused_) return {};
    return {.inputs = at(zxBCdt_[i % 2], a_.type, 2 * e_),
            .state = at(conv_state_of(a_, buffers(i), i), a_.type, e_),
            .stride = r_,
            .channels = c_};
  }

  // Before layer i, or behind the last.
  int norm(int64_t i) const {
    const bool first = i == 0, last = i == a_.layers;
    const NormArgs norm{.tokens = first ? a_.tokens : nullptr,
                        .embedding = a_.embedding,
                        .embedding_scale = a_.embedding_scale,
                        .projection = out_.y,
                        .squares = first ? nullptr : squares_,
                        .x = a_.hidden,
                        .weight = last ? nullptr : at(a_.norm, a_.type, i * a_.d_model),
                        .u = u_,
                        .shift = last ? shift(i - 1) : ShiftArgs{},
                        .vocab = a_.vocab,
                        .dim = a_.d_model,
                        .d_inner = static_cast<int>(e_),
                        .parts = parts_,
                        .scale_type = a_.scale_type,
                        .eps = a_.eps};
    const int runs = (a_.d_model + Sequence::kRun - 1) / Sequence::kRun;
    const unsigned threads = std::min((runs + 31) / 32 * 32, Sequence::kMaxThreads);
    return with_half(a_.type, [&](auto element) -> int {
      return launch_overlapping(norm_kernel<decltype(element)>, norm, static_cast<unsigned>(a_.rows()),
                                threads, stream_);
    });
  }

  int project(GemmArgs gemm, const GemmPlan& plan, void* y, int64_t i) const {
    gemm.codes += i * gemm.n * (gemm.k / kWeightsPerByte);
    gemm.scales = at(gemm.scales, gemm.scale_type, i * (gemm.one_scale ? 1 : gemm.n * (gemm.k / gemm.group)));
    gemm.y = y;
    return gemm_sm90(gemm, plan, stream_);
  }

  int token(int64_t i) const {
    const auto blocks = static_cast<unsigned>(a_.batch * blocks_);
    const TokenArgs token{.zxBCdt = zxBCdt_[i % 2],
                          .conv_weight = at(a_.conv_weight, a_.type, i * c_ * Sequence::kConvWidth),
                          .conv_bias = at(a_.conv_bias, a_.type, i * c_),
                          .conv_state = conv_state_of(a_, buffers(i), i),
                          .dt_bias = a_.dt_bias + i * a_.heads,
                          .A = a_.A + i * a_.heads,
                          .D = a_.D + i * a_.heads,
                          .states = ssm_state_of(a_, buffers(i), i),
                          .gate_norm = parts_ ? at(a_.gate_norm, a_.type, i * e_) : nullptr,
                          .y = y_,
                          .squares = squares_,
                          .shift = shift(i - 1),
                          .blocks = blocks_,
                          .heads = a_.heads,
                          .head_dim = a_.head_dim,
                          .dt_min = a_.dt_min,
                          .dt_max = a_.dt_max};
    return with_half(a_.type, [&](auto element) {
      return with_type(a_.state_type, [&](auto state) -> int {
        return launch_overlapping(token_kernel<decltype(element), decltype(state)>, token, blocks,
                                  Sequence::kThreads, stream_);
      });
    });
  }

  // Of prefill, and of steps with other sizes of the state.
  int conv_and_ssd(int64_t i) const {
    const CausalConv1dArgs conv = conv_of(a_, buffers(i), i);
    const int error =
        a_.prefill ? causal_conv1d_sm90(conv, stream_) : causal_conv1d_update_sm90(conv, stream_);
    if (error != cudaSuccess) return error;
    const SsdArgs args = ssd(i, parts_ != 0);
    return a_.prefill ? ssd_sm90(args, stream_) : ssd_update_sm90(args, stream_);
  }

  // gates: y leaves gated.
  SsdArgs ssd(int64_t i, bool gates) const {
    SsdArgs args = ssd_of(a_, buffers(i), i);
    args.workspace = ssd_workspace_;
    if (gates) {
      args.z = zxBCdt_[i % 2];
      args.gate_norm = at(a_.gate_norm, a_.type, i * e_);
      args.squares = squares_;
    }
    return args;
  }

  DecodeBuffers buffers(int64_t i) const { return {e_, c_, r_, zxBCdt_[i % 2], xBC_, y_}; }

  const DecodeArgs& a_;
  int64_t bytes_ = 0;        // taken
  const int64_t e_, c_, r_;  // as in DecodeArgs: d_inner, channels of the convolution, rows of in_proj
  const int blocks_;         // of token_kernel, a sequence
  const bool fused_;         // what is between the products in one kernel
  GemmArgs in_, out_;        // of the first layer
  void* const u_;
  void* const zxBCdt_[2];  // layers take turns: token_kernel moves the layer before's B and C
  void *const y_, *const xBC_;
  int parts_ = 0;             // sums of squares of a token, or 0: the gated norm is a kernel of its own
  float* squares_ = nullptr;  // [tokens, parts_]
  void* ssd_workspace_ = nullptr;
  GemmPlan in_plan_, out_plan_;
  cudaStream_t stream_ = nullptr;
};

const char* sequence_expects(const DecodeArgs& d) {
  if (d.type == DType::f32) return "activations in 16 bits";
  if (d.d_model % Sequence::kRun) return "d_model a multiple of 8";
  const int64_t items = int64_t{d.batch} * d.heads * d.head_dim;
  if (items >= int64_t{1} << 31) return "fewer than 2^31 channels in a batch";
  const void* const tensors[] = {d.embedding, d.norm, d.conv_weight, d.ssm_state};
  for (const void* p : tensors)
    if (!is_aligned(p)) return "tensors that start at multiples of 16 bytes";
  return nullptr;
}

int sequence_buffers(const DecodeArgs& d, int64_t* bytes) {
  DecodeArgs unplaced = d;
  unplaced.workspace = nullptr;
  SequenceOfLaunches launches(unplaced);
  const int error = launches.plan();
  *bytes = launches.bytes();
  return error;
}

int launch_sequence(const DecodeArgs& d, CUstream_st* stream) {
  SequenceOfLaunches launches(d);
  const int error = launches.plan();
  return error == cudaSuccess ? launches.launch(stream) : error;
}

}  // namespace ternary::sm90
