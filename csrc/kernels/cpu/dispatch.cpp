// One entry a kernel, kernel_cpu: hands begin .. end to the copy for this CPU's instruction set.
#include "kernels/causal_conv1d.h"
#include "kernels/cpu/isa.h"
#include "kernels/decode.h"
#include "kernels/gemm.h"
#include "kernels/int8_linear.h"
#include "kernels/norm.h"
#include "kernels/quantize.h"
#include "kernels/selective_scan.h"
#include "kernels/ssd.h"

namespace ternary {

template <class Args>
using Kernel = void(const Args& args, int64_t begin, int64_t end);

template <class Args>
static Kernel<Args>* pick(Kernel<Args>* portable, Kernel<Args>* avx2, Kernel<Args>* avx512) {
  return isa() == Isa::avx512 ? avx512 : isa() == Isa::avx2 ? avx2 : portable;
}

// clang-format off
#ifdef TERNARY_X86
#define COPIES(kernel) portable::kernel, avx2::kernel, avx512::kernel
#else
#define COPIES(kernel) portable::kernel, nullptr, nullptr
#endif

#define DISPATCH(kernel, Args)                                        \
  namespace portable { Kernel<Args> kernel; }                         \
  namespace avx2 { Kernel<Args> kernel; }                             \
  namespace avx512 { Kernel<Args> kernel; }                           \
  void kernel##_cpu(const Args& args, int64_t begin, int64_t end) {   \
    static Kernel<Args>* const copy = pick<Args>(COPIES(kernel));     \
    copy(args, begin, end);                                           \
  }
// clang-format on

DISPATCH(absolute_sums, QuantizeArgs)
DISPATCH(quantize, QuantizeArgs)
DISPATCH(pack, PackArgs)
DISPATCH(unpack, UnpackArgs)
DISPATCH(first_invalid, FirstInvalidArgs)
DISPATCH(dequantize, DequantizeArgs)
DISPATCH(gemm, GemmArgs)
DISPATCH(int8_linear, Int8LinearArgs)
DISPATCH(causal_conv1d, CausalConv1dArgs)
DISPATCH(selective_scan, SelectiveScanArgs)
DISPATCH(ssd, SsdArgs)
DISPATCH(rms_norm_gated, RmsNormGatedArgs)
DISPATCH(add_rms_norm, AddRmsNormArgs)
DISPATCH(embed, EmbedArgs)
DISPATCH(add_residual, ResidualArgs)
DISPATCH(norm_residual, ResidualArgs)

}  // namespace ternary
