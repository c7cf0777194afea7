#include <type_traits>

#include "kernels/sm90/common/launch.cuh"
#include "kernels/sm90/gemm/fp8.cuh"
#include "kernels/sm90/gemm/launch.h"
#include "kernels/sm90/gemm/plain.cuh"

namespace ternary {
namespace sm90 {

template <class Element, Fp8Form kForm>
static cudaError_t launch_quantize_rows(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  return launch(quantize_rows_kernel<Element, kForm>, dim3(static_cast<unsigned>(args.m)), Fp8::kThreads, 0,
                1, stream, static_cast<const Element*>(args.x), fp8_x(args, plan), fp8_scales(args, plan),
                args.k, plan.pitch);
}

template <class Element>
static cudaError_t launch_plain(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((args.m + Plain::kRowsOfX - 1) / Plain::kRowsOfX),
                    static_cast<unsigned>((args.n + Plain::kWarps - 1) / Plain::kWarps));
  if (!plan.fp8) {
    plain_kernel<Element><<<blocks, 32 * Plain::kWarps, 0, stream>>>(
        args, static_cast<const Element*>(args.x), args.k, nullptr);
  } else {
    plain_kernel<Element><<<blocks, 32 * Plain::kWarps, 0, stream>>>(
        args, reinterpret_cast<const __nv_fp8_e4m3*>(fp8_x(args, plan)), plan.pitch, fp8_scales(args, plan));
  }
  return cudaGetLastError();
}

template <class Element>
static cudaError_t launch_gemm(GemmArgs args, const GemmPlan& plan, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if constexpr (!std::is_same_v<Element, float>) {
    if (plan.kernel == GemmKernel::tile) {
      if (plan.fp8) error = launch_quantize_rows<Element, Fp8Form::permuted>(args, plan, stream);
      return error == cudaSuccess ? launch_tile(args, plan, stream) : error;
    }
    if (plan.kernel != GemmKernel::plain) {
      if (plan.fp8) {
        error = launch_quantize_rows<Element, Fp8Form::as_x>(args, plan, stream);
        args.x = fp8_x(args, plan);
      }
      if (error != cudaSuccess) return error;
      return plan.kernel == GemmKernel::stream ? launch_stream(args, plan, stream)
                                               : launch_split(args, plan, stream);
    }
  }
  if (plan.fp8) error = launch_quantize_rows<Element, Fp8Form::bytes>(args, plan, stream);
  return error == cudaSuccess ? launch_plain<Element>(args, plan, stream) : error;
}

}  // namespace sm90

int plan_gemm_sm90(const GemmArgs& args, sm90::GemmPlan* plan) {
  int sms = 0;
  const cudaError_t error = sm90::count_sms(&sms);
  const bool aligned = args.type != DType::f32 && sm90::is_aligned(args.x) && sm90::is_aligned(args.codes);
  *plan = sm90::plan_gemm(args.m, args.n, args.k, args.group, args.one_scale, aligned, sms, args.fp8);
  return error;
}

int gemm_sm90(const GemmArgs& args, const sm90::GemmPlan& plan, CUstream_st* stream) {
  return sm90::with_type(args.type, [&](auto element) -> int {
    return sm90::launch_gemm<decltype(element)>(args, plan, stream);
  });
}

}  // namespace ternary
