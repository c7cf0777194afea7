// Binds the operators' contracts to the CPU kernels.
#include <algorithm>

#include "kernels/cpu/isa.h"
#include "ops/causal_conv1d.h"
#include "ops/gemm.h"
#include "ops/norm.h"
#include "ops/quantize.h"
#include "ops/selective_scan.h"
#include "ops/ssd.h"

namespace ternary {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// Calls kernel(args, begin, end) on parts of 0 .. n, of `cost` elements each.
template <class Args>
static void parallel(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t n,
                     int64_t cost) {
  isa();  // throws where TERNARY_CPU_ISA is wrong; out of parallel_for the message would not come
  torch::stable::parallel_for(0, n, kGrain / std::max<int64_t>(cost, 1) + 1,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

static void run_quantize(const QuantizeArgs& args, const Tensor&) {
  parallel(absolute_sums_cpu, args, args.n, args.k);
  parallel(quantize_cpu, args, args.n, args.k);
}

template <class Args, void (*kernel)(const Args&, int64_t, int64_t)>
static void run_rows(const Args& args, const Tensor&) {
  parallel(kernel, args, args.n, args.k);
}

static void run_gemm(const GemmArgs& args, const Tensor&) {
  const GemmTiles tiles = gemm_tiles(args);
  parallel(gemm_cpu, args, tiles.down * tiles.across, tiles.rows * args.k);
}

// How many tokens a sequence has, on average and counted up.
template <class Args>
static int64_t tokens(const Args& args) {
  return args.cu_seqlens ? args.length / args.sequences + 1 : args.length;
}

static void run_causal_conv1d(const CausalConv1dArgs& args, const Tensor&) {
  const int64_t blocks = (args.channels + kConvBlock - 1) / kConvBlock;
  parallel(causal_conv1d_cpu, args, args.sequences * blocks, tokens(args) * kConvBlock * args.width);
}

static void run_selective_scan(const SelectiveScanArgs& args, const Tensor&) {
  const int64_t blocks = (args.channels + kScanBlock - 1) / kScanBlock;
  const int64_t token = kScanBlock * (args.state_size + args.dt_rank);
  parallel(selective_scan_cpu, args, args.sequences * blocks, tokens(args) * token);
}

static void run_ssd(const SsdArgs& args, const Tensor&) {
  parallel(ssd_cpu, args, args.sequences * args.heads, tokens(args) * args.head_dim * args.state_size);
}

static void run_rms_norm_gated(const RmsNormGatedArgs& args, const Tensor&) {
  parallel(rms_norm_gated_cpu, args, args.rows * args.groups, args.dim / args.groups);
}

static void run_add_rms_norm(const AddRmsNormArgs& args, const Tensor&) {
  parallel(add_rms_norm_cpu, args, args.rows, args.dim);
}

}  // namespace ternary

STABLE_TORCH_LIBRARY_IMPL(ternary, CPU, m) {
  using namespace ternary;
  m.impl("quantize", TORCH_BOX(&quantize<run_quantize>));
  m.impl("pack", TORCH_BOX((&pack<run_rows<PackArgs, pack_cpu>>)));
  m.impl("unpack", TORCH_BOX((&unpack<run_rows<UnpackArgs, unpack_cpu>>)));
  m.impl("dequantize", TORCH_BOX((&dequantize<run_rows<DequantizeArgs, dequantize_cpu>>)));
  m.impl("gemm", TORCH_BOX((&gemm<run_gemm, false>)));
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d<run_causal_conv1d>));
  m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update<run_causal_conv1d>));
  m.impl("selective_scan", TORCH_BOX(&selective_scan<run_selective_scan>));
  m.impl("selective_scan_fused", TORCH_BOX(&selective_scan_fused<run_selective_scan>));
  m.impl("selective_scan_update", TORCH_BOX(&selective_scan_update<run_selective_scan>));
  m.impl("rms_norm_gated", TORCH_BOX(&rms_norm_gated<run_rms_norm_gated>));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm<run_add_rms_norm>));
  m.impl("ssd", TORCH_BOX(&ssd<run_ssd>));
  m.impl("ssd_update", TORCH_BOX(&ssd_update<run_ssd>));
}
