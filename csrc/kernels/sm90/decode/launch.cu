#include <cuda_runtime.h>

#include "kernels/sm90/common/launch.cuh"
#include "kernels/sm90/decode/sequence.h"
#include "kernels/sm90/decode/step.cuh"

namespace ternary {
namespace sm90 {

static int groups_of_row(bool one_scale, int columns, int group) { return one_scale ? 0 : columns / group; }

// All but the plan.
static StepArgs step_args(const DecodeArgs& d) {
  StepArgs a = {.d = d};
  const int d_inner = d.heads * d.head_dim;
  a.in_rows = 2 * d_inner + 2 * d.state_size + d.heads;
  a.in_groups = groups_of_row(d.in_one_scale, d.d_model, d.in_group);
  a.out_groups = groups_of_row(d.out_one_scale, d_inner, d.out_group);
  a.state_bytes = size_of(d.state_type);
  uint32_t* words = static_cast<uint32_t*>(d.workspace);
  a.exchange = {.counter = words,
                .words = words + ExchangeArgs::kHeader,
                .batch = d.batch,
                .d_model = d.d_model,
                .heads = d.heads,
                .d_inner = d_inner};
  return a;
}

// What the tensors lack for the persistent kernel, sizes apart.
static const char* persistent_expects(const DecodeArgs& d) {
  if (d.state_size != Decode::kStateSize) return "a state size of 128";
  if (d.type == DType::f32 || d.scale_type == DType::f32) return "activations and scales in 16 bits";
  if (d.in_group % Decode::kSpan || d.out_group % Decode::kSpan) return "groups of a multiple of 128 weights";
  const void* const tensors[] = {d.norm,       d.in_codes,  d.in_scales,  d.conv_weight, d.conv_bias,
                                 d.conv_state, d.dt_bias,   d.A,          d.D,           d.ssm_state,
                                 d.gate_norm,  d.out_codes, d.out_scales, d.workspace};
  for (const void* p : tensors)
    if (!is_aligned(p)) return "tensors that start at multiples of 16 bytes";
  return nullptr;
}

template <class Config>
static cudaError_t launch(const StepArgs& a, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(
      decode_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, a.plan.shared_bytes);
  if (error != cudaSuccess) return error;
  // The blocks wait for each other: all of them run at once, or none.
  cudaLaunchAttribute together = {.id = cudaLaunchAttributeCooperative};
  together.val.cooperative = 1;
  const cudaLaunchConfig_t config = {.gridDim = dim3(a.plan.blocks),
                                     .blockDim = dim3(32 * (Config::kWarps + 2)),
                                     .dynamicSmemBytes = static_cast<size_t>(a.plan.shared_bytes),
                                     .stream = stream,
                                     .attrs = &together,
                                     .numAttrs = 1};
  return cudaLaunchKernelEx(&config, decode_kernel<Config>, a);
}

template <int kSpans>
static cudaError_t launch_of(const StepArgs& a, cudaStream_t stream) {
  return a.plan.rows == 1 ? launch<DecodeConfig<1, kSpans>>(a, stream)
                          : launch<DecodeConfig<2, kSpans>>(a, stream);
}

}  // namespace sm90

int plan_decode_sm90(const DecodeArgs& d, sm90::DecodePlan* plan) {
  *plan = {};
  plan->persistent_expects = sm90::persistent_expects(d);
  int sms = 0;
  const cudaError_t error = sm90::count_sms(&sms);
  if (error != cudaSuccess) return error;
  const sm90::StepArgs a = sm90::step_args(d);
  if (!plan->persistent_expects)
    *plan = sm90::plan_decode({.batch = d.batch,
                               .d_model = d.d_model,
                               .heads = d.heads,
                               .head_dim = d.head_dim,
                               .in_groups = a.in_groups,
                               .out_groups = a.out_groups,
                               .state_bytes = a.state_bytes},
                              sms);
  if (plan->kernel == sm90::DecodeKernel::persistent) {
    plan->workspace = a.exchange.words_in_all();
    return cudaSuccess;
  }
  plan->expected = sm90::sequence_expects(d);
  return plan->expected ? cudaSuccess : sm90::sequence_buffers(d, &plan->buffers);
}

int decode_sm90(const DecodeArgs& d, const sm90::DecodePlan& plan, CUstream_st* stream) {
  if (plan.kernel == sm90::DecodeKernel::sequence) return sm90::launch_sequence(d, stream);
  sm90::StepArgs a = sm90::step_args(d);
  a.plan = plan;
  switch (a.plan.spans) {
    case 2:
      return sm90::launch_of<2>(a, stream);
    case 4:
      return sm90::launch_of<4>(a, stream);
    case 6:
      return sm90::launch_of<6>(a, stream);
    case 8:
      return sm90::launch_of<8>(a, stream);
    case 12:
      return sm90::launch_of<12>(a, stream);
    case 16:
      return sm90::launch_of<16>(a, stream);
    case 20:
      return sm90::launch_of<20>(a, stream);
    default:
      return cudaErrorNotSupported;
  }
}

int plan_prefill_sm90(const DecodeArgs& d, const char** expected, int64_t* workspace) {
  *expected = sm90::sequence_expects(d);
  return *expected ? cudaSuccess : sm90::sequence_buffers(d, workspace);
}

int prefill_sm90(const DecodeArgs& d, CUstream_st* stream) { return sm90::launch_sequence(d, stream); }

}  // namespace ternary
