#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "kernels/sm90/decode/select.h"
#include "kernels/sm90/gemm/select.h"
#include "ops/causal_conv1d.h"
#include "ops/choose.h"
#include "ops/decode.h"
#include "ops/gemm.h"
#include "ops/head.h"
#include "ops/loss.h"
#include "ops/norm.h"
#include "ops/quantize.h"
#include "ops/quantize_fp8.h"
#include "ops/selective_scan.h"
#include "ops/ssd.h"

namespace ternary {

static cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches on the tensor's device, in the caller's stream.
template <class Args, int (*launch)(const Args&, CUstream_st*)>
static void run(const Args& args, const Tensor& t) {
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  STD_CUDA_CHECK(cudaError_t(launch(args, current_stream(t))));
}

static void run_ssd(const SsdArgs& args, const Tensor& y) {
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  int64_t bytes = 0;
  STD_CUDA_CHECK(cudaError_t(ssd_workspace_sm90(args, &bytes)));
  const Tensor workspace = torch::stable::new_empty(y, {bytes}, ScalarType::Byte);
  SsdArgs with_workspace = args;
  with_workspace.workspace = workspace.mutable_data_ptr();
  run<SsdArgs, ssd_sm90>(with_workspace, y);
}

static void run_gemm(const GemmArgs& args, const Tensor& y) {
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  sm90::GemmPlan plan;
  STD_CUDA_CHECK(cudaError_t(plan_gemm_sm90(args, &plan)));
  GemmArgs planned = args;
  std::optional<Tensor> workspace;
  if (plan.workspace > 0) {
    workspace = torch::stable::new_empty(y, {plan.workspace}, ScalarType::Byte);
    planned.workspace = workspace->mutable_data_ptr();
  }
  STD_CUDA_CHECK(cudaError_t(gemm_sm90(planned, plan, current_stream(y))));
}

static void run_decode(const DecodeArgs& args, const Tensor& workspace) {
  const torch::stable::accelerator::DeviceGuard guard(workspace.get_device_index());
  sm90::DecodePlan plan;
  STD_CUDA_CHECK(cudaError_t(plan_decode_sm90(args, &plan)));
  STD_TORCH_CHECK(!plan.expected, "decode on this device serves ", plan.expected, "; found batch ",
                  args.batch, ", d_model ", args.d_model, ", heads ", args.heads, " of ", args.head_dim,
                  ", state size ", args.state_size, ", groups ", args.in_group, " and ", args.out_group);
  STD_TORCH_CHECK(workspace.numel() >= plan.workspace, "workspace must have ", plan.workspace, " words, not ",
                  shape(workspace));
  DecodeArgs planned = args;
  std::optional<Tensor> buffers;
  if (plan.buffers > 0) {
    buffers = torch::stable::new_empty(workspace, {plan.buffers}, ScalarType::Byte);
    planned.workspace = buffers->mutable_data_ptr();
  }
  STD_CUDA_CHECK(cudaError_t(decode_sm90(planned, plan, current_stream(workspace))));
}

static void run_prefill(DecodeArgs& args, const Tensor& hidden) {
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  const char* expected = nullptr;
  int64_t bytes = 0;
  STD_CUDA_CHECK(cudaError_t(plan_prefill_sm90(args, &expected, &bytes)));
  STD_TORCH_CHECK(!expected, "prefill on this device serves ", expected, "; found d_model ", args.d_model,
                  ", heads ", args.heads, " of ", args.head_dim, ", state size ", args.state_size);
  const Tensor workspace = torch::stable::new_empty(hidden, {bytes}, ScalarType::Byte);
  args.workspace = workspace.mutable_data_ptr();
  STD_CUDA_CHECK(cudaError_t(prefill_sm90(args, current_stream(hidden))));
}

}  // namespace ternary

STABLE_TORCH_LIBRARY_IMPL(ternary, CUDA, m) {
  using namespace ternary;
  m.impl("quantize", TORCH_BOX((&quantize<run<QuantizeArgs, quantize_sm90>>)));
  m.impl("fake_quantize", TORCH_BOX((&fake_quantize<run<QuantizeArgs, quantize_sm90>>)));
  m.impl("pack", TORCH_BOX((&pack<run<PackArgs, pack_sm90>>)));
  m.impl("unpack", TORCH_BOX((&unpack<run<UnpackArgs, unpack_sm90>>)));
  m.impl("dequantize", TORCH_BOX((&dequantize<run<DequantizeArgs, dequantize_sm90>>)));
  m.impl("quantize_fp8", TORCH_BOX((&quantize_fp8<run<QuantizeFp8Args, quantize_fp8_sm90>>)));
  m.impl("gemm", TORCH_BOX((&gemm<run_gemm, true>)));
  m.impl("decode", TORCH_BOX((&decode<run_decode, true>)));
  m.impl("prefill", TORCH_BOX((&prefill<run_prefill>)));
  m.impl("head", TORCH_BOX((&head<run<HeadArgs, head_sm90>>)));
  m.impl("choose", TORCH_BOX((&choose<run<ChooseArgs, choose_sm90>>)));
  m.impl("selective_scan", TORCH_BOX((&selective_scan<run<SelectiveScanArgs, selective_scan_sm90>>)));
  m.impl("selective_scan_fused",
         TORCH_BOX((&selective_scan_fused<run<SelectiveScanArgs, selective_scan_sm90>>)));
  m.impl("selective_scan_update",
         TORCH_BOX((&selective_scan_update<run<SelectiveScanArgs, selective_scan_update_sm90>>)));
  m.impl("rms_norm_gated", TORCH_BOX((&rms_norm_gated<run<RmsNormGatedArgs, rms_norm_gated_sm90>>)));
  m.impl("add_rms_norm", TORCH_BOX((&add_rms_norm<run<AddRmsNormArgs, add_rms_norm_sm90>>)));
  m.impl("distillation", TORCH_BOX((&distillation<run<DistillationArgs, distillation_sm90>>)));
  m.impl("causal_conv1d", TORCH_BOX((&causal_conv1d<run<CausalConv1dArgs, causal_conv1d_sm90>>)));
  m.impl("causal_conv1d_update",
         TORCH_BOX((&causal_conv1d_update<run<CausalConv1dArgs, causal_conv1d_update_sm90>>)));
  m.impl("ssd", TORCH_BOX((&ssd<run_ssd>)));
  m.impl("ssd_update", TORCH_BOX((&ssd_update<run<SsdArgs, ssd_update_sm90>>)));
}
