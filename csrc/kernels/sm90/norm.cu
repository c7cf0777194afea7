// A block has a row, or its part of one group. A thread has one run of 8 or 16 elements that stays in its
// registers, up to 6144 elements a part (3072 in rms_norm_gated by runs of 8); longer parts, and those that
// cannot be read 16 bytes at a time, are read twice.
#include <algorithm>
#include <initializer_list>

#include "kernels/norm.h"
#include "kernels/sm90/common/launch.cuh"
#include "kernels/sm90/common/math.cuh"
#include "kernels/sm90/common/types.cuh"

namespace ternary {
namespace sm90 {

constexpr int kMaxThreads = 768;
constexpr int kLongRun = 8;  // elements: 16 bytes of halves, twice 16 of floats

// rms_norm_gated has enough arithmetic for a thread's own costs to count: runs of 16.
constexpr int kGatedRun = 16;
constexpr int kGatedThreads = 384;  // twice an SM: 80 registers

// kRun elements as they lie, or as a float where kRun is 1. Several can be asked for before one is used.
struct Raw {
  uint4 bits[2];
};

template <int kRun>
__device__ Raw load_raw(const void* from, DType type, int64_t i) {
  Raw raw;
  if constexpr (kRun == 1) {
    raw.bits[0].x = __float_as_uint(load_float(from, type, i));
  } else {
    const auto* at = reinterpret_cast<const uint4*>(static_cast<const char*>(from) + i * size_of(type));
    raw.bits[0] = at[0];
    if (type == DType::f32) raw.bits[1] = at[1];
  }
  return raw;
}

template <class Element, int kRun>
__device__ void widen(const Raw& raw, float (&to)[kRun]) {
#pragma unroll
  for (int j = 0; j < kRun; ++j) to[j] = to_float(reinterpret_cast<const Element*>(&raw)[j]);
}

template <int kRun>
__device__ void widen(const Raw& raw, DType type, float (&to)[kRun]) {
  if (kRun == 1 || type == DType::f32)
    widen<float>(raw, to);
  else if (type == DType::f16)
    widen<__half>(raw, to);
  else
    widen<__nv_bfloat16>(raw, to);
}

template <class Element, int kRun>
__device__ Raw narrow(const float (&from)[kRun]) {
  Raw raw;
#pragma unroll
  for (int j = 0; j < kRun; ++j) reinterpret_cast<Element*>(&raw)[j] = from_float<Element>(from[j]);
  return raw;
}

// Writes kRun elements; `from` becomes what they are rounded to.
template <int kRun>
__device__ void store_run(float (&from)[kRun], void* to, DType type, int64_t i) {
  if constexpr (kRun == 1) {
    store_float(from[0], to, type, i);
    from[0] = load_float(to, type, i);
  } else {
    const Raw raw = type == DType::f32   ? narrow<float>(from)
                    : type == DType::f16 ? narrow<__half>(from)
                                         : narrow<__nv_bfloat16>(from);
    auto* at = reinterpret_cast<uint4*>(static_cast<char*>(to) + i * size_of(type));
    at[0] = raw.bits[0];
    if (type == DType::f32) at[1] = raw.bits[1];
    widen(raw, type, from);
  }
}

// The sum over the block, the same bits in each thread.
__device__ inline float block_sum(float v) {
  __shared__ float smem_sums[kMaxThreads / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffff, v, lanes);
  if (threadIdx.x % 32 == 0) smem_sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x % 32 < blockDim.x / 32 ? smem_sums[threadIdx.x % 32] : 0.0f;
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffff, v, lanes);
  return v;
}

template <int kRun>
__device__ float squares(const float (&h)[kRun]) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kRun; ++j) sum = fmaf(h[j], h[j], sum);
  return sum;
}

// h: what is normed; gate: what multiplies it afterwards, if kBefore.
template <bool kBefore, class Element, int kRun>
__device__ void load_gated(const RmsNormGatedArgs& a, int64_t row, int64_t column, float (&h)[kRun],
                           float (&gate)[kRun]) {
  using Elements = Run<Element, kRun, true>;
  const auto at = [&](const void* from, int64_t stride) {
    return *reinterpret_cast<const Elements*>(static_cast<const Element*>(from) + row * stride + column);
  };
  const Elements y = at(a.y, a.y_stride), z = at(a.z, a.z_stride);
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    gate[j] = silu_fast(to_float(z.at[j]));
    h[j] = to_float(y.at[j]) * (kBefore ? 1.0f : gate[j]);
  }
}

template <class Element, int kRun, bool kBefore>
__global__ void __launch_bounds__(kGatedThreads, 2)
    rms_norm_gated_kernel(const __grid_constant__ RmsNormGatedArgs a) {
  launch_dependents();
  const auto groups = static_cast<unsigned>(a.groups), row = groups == 1 ? blockIdx.x : blockIdx.x / groups;
  const int n = static_cast<int>(a.dim / a.groups), begin = threadIdx.x * kRun, step = blockDim.x * kRun;
  const int first = static_cast<int>(blockIdx.x - row * groups) * n;
  constexpr int kPiece = kRun < kLongRun ? kRun : kLongRun;
  Raw weight[kRun / kPiece] = {};
  const auto load_weight = [&](int i) {
#pragma unroll
    for (int j = 0; j < kRun; j += kPiece)
      weight[j / kPiece] = load_raw<kPiece>(a.weight, a.weight_type, first + i + j);
  };
  if (begin < n) load_weight(begin);
  wait_for_prerequisites();
  float h[kRun], gate[kRun], w[kPiece], sum = 0;
  for (int i = begin; i < n; i += step) {
    load_gated<kBefore, Element>(a, row, first + i, h, gate);
    sum += squares(h);
  }
  const float scale = rsqrtf(block_sum(sum) / static_cast<float>(n) + a.eps);
  for (int i = begin; i < n; i += step) {
    if (n > step) {
      load_weight(i);
      load_gated<kBefore, Element>(a, row, first + i, h, gate);
    }
    Run<Element, kRun, true> out;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j % kPiece == 0) widen(weight[j / kPiece], a.weight_type, w);
      out.at[j] = from_float<Element>(h[j] * (kBefore ? gate[j] : 1.0f) * (scale * w[j % kPiece]));
    }
    *reinterpret_cast<decltype(out)*>(static_cast<Element*>(a.out) + row * a.dim + first + i) = out;
  }
}

template <int kRun>
__global__ void __launch_bounds__(kMaxThreads) add_rms_norm_kernel(const __grid_constant__ AddRmsNormArgs a) {
  launch_dependents();
  const int n = static_cast<int>(a.dim), begin = threadIdx.x * kRun, step = blockDim.x * kRun;
  const int64_t first = blockIdx.x * a.dim, first_x = blockIdx.x * a.x_stride;
  Raw weight = {};
  if (begin < n) weight = load_raw<kRun>(a.weight, a.weight_type, begin);
  wait_for_prerequisites();
  float h[kRun], w[kRun], sum = 0;
  for (int i = begin; i < n; i += step) {
    const Raw x = load_raw<kRun>(a.x, a.type, first_x + i);
    const Raw residual = load_raw<kRun>(a.residual, a.residual_type, first + i);
    widen(x, a.type, w);
    widen(residual, a.residual_type, h);
#pragma unroll
    for (int j = 0; j < kRun; ++j) h[j] += w[j];
    store_run(h, a.residual, a.residual_type, first + i);
    sum += squares(h);
  }
  const float scale = rsqrtf(block_sum(sum) / static_cast<float>(n) + a.eps);
  for (int i = begin; i < n; i += step) {
    if (n > step) {
      weight = load_raw<kRun>(a.weight, a.weight_type, i);
      widen(load_raw<kRun>(a.residual, a.residual_type, first + i), a.residual_type, h);
    }
    widen(weight, a.weight_type, w);
#pragma unroll
    for (int j = 0; j < kRun; ++j) h[j] *= scale * w[j];
    store_run(h, a.y, a.weight_type, first + i);
  }
}

// A block a part of n elements, a thread a run, in whole warps.
template <class Args>
static cudaError_t launch_norm(void (*kernel)(Args), const Args& args, int64_t parts, int64_t n, int run,
                               int most_threads, cudaStream_t stream) {
  if (parts == 0 || n == 0) return cudaSuccess;
  const int64_t warps = std::min<int64_t>((n + 32 * run - 1) / (32 * run), most_threads / 32);
  return launch_overlapping(kernel, args, static_cast<unsigned>(parts), static_cast<unsigned>(32 * warps),
                            stream);
}

static bool in_runs(std::initializer_list<const void*> tensors, std::initializer_list<int64_t> sizes) {
  bool fits = true;
  for (const void* tensor : tensors) fits = fits && is_aligned(tensor);
  for (const int64_t size : sizes) fits = fits && size % kLongRun == 0;
  return fits;
}

}  // namespace sm90

int rms_norm_gated_sm90(const RmsNormGatedArgs& args, CUstream_st* stream) {
  using namespace sm90;
  const int64_t n = args.dim / args.groups, parts = args.rows * args.groups;
  const bool runs = in_runs({args.y, args.z, args.weight, args.out}, {n, args.y_stride, args.z_stride});
  const auto launch = [&](auto element, auto run, auto before) -> int {
    const auto kernel = rms_norm_gated_kernel<decltype(element), run.value, before.value>;
    return launch_norm(kernel, args, parts, n, run.value, kGatedThreads, stream);
  };
  const auto launch_runs = [&](auto element, auto before) -> int {
    if (!runs) return launch(element, std::integral_constant<int, 1>{}, before);
    if (n % kGatedRun) return launch(element, std::integral_constant<int, kLongRun>{}, before);
    return launch(element, std::integral_constant<int, kGatedRun>{}, before);
  };
  return with_type(args.type, [&](auto element) -> int {
    return args.norm_before_gate ? launch_runs(element, std::true_type{})
                                 : launch_runs(element, std::false_type{});
  });
}

int add_rms_norm_sm90(const AddRmsNormArgs& args, CUstream_st* stream) {
  using namespace sm90;
  const bool runs = in_runs({args.x, args.residual, args.weight, args.y}, {args.dim, args.x_stride});
  const auto kernel = runs ? add_rms_norm_kernel<kLongRun> : add_rms_norm_kernel<1>;
  return launch_norm(kernel, args, args.rows, args.dim, runs ? kLongRun : 1, kMaxThreads, stream);
}

}  // namespace ternary
