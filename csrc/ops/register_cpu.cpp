// Binds the operators' contracts to the CPU kernels.
#include <algorithm>
#include <type_traits>

#include "kernels/cpu/crew.h"
#include "kernels/cpu/isa.h"
#include "kernels/decode_layer.h"
#include "ops/causal_conv1d.h"
#include "ops/decode.h"
#include "ops/gemm.h"
#include "ops/int8_linear.h"
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

static void run_first_invalid(const FirstInvalidArgs& args, const Tensor& codes) {
  parallel(first_invalid_cpu, args, codes.numel(), 1);
}

static int64_t items(const GemmArgs& args) {
  const GemmTiles tiles = gemm_tiles(args);
  return tiles.down * tiles.across;
}

static void run_gemm(const GemmArgs& args, const Tensor&) {
  parallel(gemm_cpu, args, items(args), args.m * args.n * args.k / items(args));
}

static void run_int8_linear(const Int8LinearArgs& args, const Tensor&) {
  parallel(int8_linear_cpu, args, (args.n + kInt8Rows - 1) / kInt8Rows, kInt8Rows * args.m * args.k);
}

// How many tokens a sequence has, on average and counted up.
template <class Args>
static int64_t tokens(const Args& args) {
  return args.cu_seqlens ? args.length / args.sequences + 1 : args.length;
}

static int64_t items(const CausalConv1dArgs& args) {
  return args.sequences * ((args.channels + kConvBlock - 1) / kConvBlock);
}

static void run_causal_conv1d(const CausalConv1dArgs& args, const Tensor&) {
  parallel(causal_conv1d_cpu, args, items(args), tokens(args) * kConvBlock * args.width);
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

// What lies between the kernels of decode.
struct DecodeTensors {
  Tensor u, zxBCdt, xBC, y;  // [b, d]: what goes into a layer, what comes out; [b, r]; [b, c]; [b, e]
  Tensor squares, sums;      // [b, d], [b], of fp32
};

// One kernel after another, each of which gives what its operator gives.
static void decode_layers(const DecodeArgs& a, DecodeTensors& tensors, Member& member) {
  const int64_t b = a.batch, d = a.d_model, e = int64_t{a.heads} * a.head_dim;
  const int64_t c = e + 2 * a.state_size, r = e + c + a.heads;
  void* const u = tensors.u.mutable_data_ptr();
  const DecodeBuffers buffers{.e = e,
                              .c = c,
                              .r = r,
                              .zxBCdt = tensors.zxBCdt.mutable_data_ptr(),
                              .xBC = tensors.xBC.mutable_data_ptr(),
                              .y = tensors.y.mutable_data_ptr()};

  const EmbedArgs embed{.tokens = a.tokens,
                        .table = a.embedding,
                        .scale = a.embedding_scale,
                        .u = u,
                        .type = a.type,
                        .scale_type = a.scale_type,
                        .dim = d};
  ResidualArgs residual{.x = a.hidden,
                        .u = u,
                        .squares = tensors.squares.mutable_data_ptr<float>(),
                        .sums = tensors.sums.const_data_ptr<float>(),
                        .weight = nullptr,
                        .type = a.type,
                        .dim = d,
                        .eps = a.eps};
  // to [b, columns] = from [b, k] times a weight [columns, k].
  const auto project = [&](const void* from, void* to, const uint8_t* codes, const void* scales,
                           int64_t columns, int64_t k, int64_t group, bool one_scale) {
    const GemmArgs gemm{.x = from,
                        .codes = codes,
                        .scales = scales,
                        .bias = nullptr,
                        .y = to,
                        .type = a.type,
                        .scale_type = a.scale_type,
                        .bias_type = DType::f32,
                        .m = b,
                        .n = columns,
                        .k = k,
                        .group = group,
                        .one_scale = one_scale,
                        .a8 = a.a8};
    member.run(gemm_cpu, gemm, items(gemm));
  };
  member.run(embed_cpu, embed, b);
  for (int64_t i = 0; i < a.layers; ++i) {
    const DecodeLayer& layer = a.layer[i];
    residual.weight = at(a.norm, a.type, i * d);
    member.lead([&] {  // short enough for one thread; the sum as in the layers, to the last bit
      add_residual_cpu(residual, 0, b);
      torch::stable::sum_out(tensors.sums, tensors.squares, std::vector<int64_t>{1});
      norm_residual_cpu(residual, 0, b);
    });
    project(u, buffers.zxBCdt, layer.in_codes, layer.in_scales, r, d, a.in_group, a.in_one_scale);
    const CausalConv1dArgs conv = conv_of(a, buffers, i);
    member.run(causal_conv1d_cpu, conv, items(conv));
    member.run(ssd_cpu, ssd_of(a, buffers, i), b * a.heads);
    member.run(rms_norm_gated_cpu, gated_norm_of(a, buffers, i), b);
    project(buffers.y, u, layer.out_codes, layer.out_scales, d, e, a.out_group, a.out_one_scale);
  }
  member.run(add_residual_cpu, residual, b);
}

// All layers in one parallel region.
static void run_decode(const DecodeArgs& a, const Tensor& workspace) {
  const int64_t b = a.batch, d = a.d_model, e = static_cast<int64_t>(a.heads) * a.head_dim;
  const int64_t c = e + 2 * a.state_size;
  for (int64_t i = 0; i < b; ++i)
    STD_TORCH_CHECK(a.tokens[i] >= 0 && a.tokens[i] < a.vocab, "tokens[", i, "] is ", a.tokens[i],
                    ", expected 0 to ", a.vocab - 1);
  const auto rows = [&](int64_t columns) {
    return torch::stable::new_empty(workspace, {b, columns}, ScalarType::Float);  // room for any type
  };
  DecodeTensors tensors{rows(d), rows(e + c + a.heads),
                        rows(c), rows(e),
                        rows(d), torch::stable::new_empty(workspace, {b}, ScalarType::Float)};
  std::fill_n(a.hidden, b * d, 0.0f);
  isa();
  Crew crew;
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    Member member(crew, threads, begin == 0);
    decode_layers(a, tensors, member);
  });
  if (crew.error) std::rethrow_exception(crew.error);
}

}  // namespace ternary

STABLE_TORCH_LIBRARY_IMPL(ternary, CPU, m) {
  using namespace ternary;
  m.impl("quantize", TORCH_BOX(&quantize<run_quantize>));
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize<run_quantize>));
  m.impl("pack", TORCH_BOX((&pack<run_rows<PackArgs, pack_cpu>>)));
  m.impl("unpack", TORCH_BOX((&unpack<run_rows<UnpackArgs, unpack_cpu>>)));
  m.impl("first_invalid", TORCH_BOX(&first_invalid<run_first_invalid>));
  m.impl("dequantize", TORCH_BOX((&dequantize<run_rows<DequantizeArgs, dequantize_cpu>>)));
  m.impl("gemm", TORCH_BOX((&gemm<run_gemm, false>)));
  m.impl("int8_linear", TORCH_BOX(&int8_linear<run_int8_linear>));
  m.impl("decode", TORCH_BOX((&decode<run_decode, false>)));
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
