// Memory-bound, each with a thread per four or sixteen weights. Nothing is read back to the host: what a CPU
// refuses cannot be refused here. A weight that is not finite makes its group's scale so and the codes 0;
// pack takes signs.
#include <cuda_runtime_api.h>

#include <type_traits>

#include "kernels/codes.h"
#include "kernels/quantize.h"
#include "kernels/sm90/common/types.cuh"

namespace ternary {
namespace sm90 {

constexpr int kThreads = 256;
constexpr unsigned kWarp = 0xffffffff;

static unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

__device__ inline int64_t thread_index() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }

// Sum of |w| over weights first .. first + n, the same in each of the kLanes lanes that share the work.
template <class Element, int kLanes, bool kAligned>
__device__ double absolute_sum(const QuantizeArgs& a, int64_t first, int64_t n) {
  using Four = Run<Element, 4, kAligned>;
  const Element* weight = static_cast<const Element*>(a.weight) + first;
  double sum = 0;
  for (int64_t i = threadIdx.x % kLanes * 4; i < n; i += kLanes * 4) {
    const Four w = *reinterpret_cast<const Four*>(weight + i);
    for (int j = 0; j < 4; ++j) sum += fabsf(to_float(w.at[j]));
  }
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWarp, sum, lanes);
  return sum;
}

__device__ inline float rounded(float v, DType type) {
  if (type == DType::f32) return v;
  return type == DType::f16 ? to_float(from_float<__half>(v)) : to_float(from_float<__nv_bfloat16>(v));
}

__device__ inline void store_scale(float scale, const QuantizeArgs& a, int64_t i) {
  if (!a.scales) return;
  if (a.scale_type == DType::f32) static_cast<float*>(a.scales)[i] = scale;
  if (a.scale_type == DType::f16) static_cast<__half*>(a.scales)[i] = from_float<__half>(scale);
  if (a.scale_type == DType::bf16)
    static_cast<__nv_bfloat16*>(a.scales)[i] = from_float<__nv_bfloat16>(scale);
}

// Weights i .. i + 3 as codes, where Output is Code, or as ternary * scale in that dtype.
using Code = uint8_t;

template <class Output, class Four>
__device__ void encode_four(const QuantizeArgs& a, int64_t i, const Four& w, float scale) {
  int8_t ternary[4];
  for (int j = 0; j < 4; ++j) {
    const float v = to_float(w.at[j]);
    ternary[j] =
        2 * fabsf(v) > scale ? (v > 0 ? 1 : -1) : 0;  // doubling is exact, a quotient would be rounded
  }
  if constexpr (std::is_same_v<Output, Code>) {
    a.codes[i / 4] = pack_byte(ternary);
  } else {
    Run<Output, 4, true> products;
    for (int j = 0; j < 4; ++j) products.at[j] = from_float<Output>(static_cast<float>(ternary[j]) * scale);
    *reinterpret_cast<Run<Output, 4, true>*>(static_cast<Output*>(a.rounded) + i) = products;
  }
}

template <class Element, class Output, int kLanes, bool kAligned>
__device__ void encode(const QuantizeArgs& a, int64_t first, int64_t n, float scale) {
  using Four = Run<Element, 4, kAligned>;
  const Element* weight = static_cast<const Element*>(a.weight) + first;
  for (int64_t i = threadIdx.x % kLanes * 4; i < n; i += kLanes * 4)
    encode_four<Output>(a, first + i, *reinterpret_cast<const Four*>(weight + i), scale);
}

// kLanes lanes a group. Those past the last group repeat it, so that every lane takes part in the shuffles.
template <class Element, class Output, int kLanes, bool kAligned>
__global__ void quantize_kernel(QuantizeArgs a) {
  const int64_t group = min(thread_index() / kLanes, a.n * (a.k / a.group) - 1);
  const double sum = absolute_sum<Element, kLanes, kAligned>(a, group * a.group, a.group);
  const float scale = rounded(static_cast<float>(sum / static_cast<double>(a.group)), a.scale_type);
  if (threadIdx.x % kLanes == 0) store_scale(scale, a, group);
  encode<Element, Output, kLanes, kAligned>(a, group * a.group, a.group, scale);
}

// The same for groups of kGroup weights, which stay in registers: every weight is read once, several loads of
// a lane at a time.
template <class Element, class Output, int kGroup, bool kAligned>
__global__ void quantize_held_kernel(QuantizeArgs a) {
  constexpr int kLanes = 8, kRuns = kGroup / (4 * kLanes);  // 8 lanes read 128 bytes of fp32 in a row
  using Four = Run<Element, 4, kAligned>;
  const int64_t group = min(thread_index() / kLanes, a.n * (a.k / kGroup) - 1);
  const int64_t first = group * kGroup + threadIdx.x % kLanes * 4;
  Four w[kRuns];
#pragma unroll
  for (int i = 0; i < kRuns; ++i)
    w[i] = *reinterpret_cast<const Four*>(static_cast<const Element*>(a.weight) + first + i * kLanes * 4);
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kRuns; ++i)
    for (int j = 0; j < 4; ++j) sum += fabsf(to_float(w[i].at[j]));
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWarp, sum, lanes);
  const float scale = rounded(static_cast<float>(sum / kGroup), a.scale_type);
  if (threadIdx.x % kLanes == 0) store_scale(scale, a, group);
#pragma unroll
  for (int i = 0; i < kRuns; ++i) encode_four<Output>(a, first + i * kLanes * 4, w[i], scale);
}

// One scale for the whole matrix: a warp sums a row, one block sums the rows' sums, a warp encodes a row.
template <class Element, bool kAligned>
__global__ void sum_rows_kernel(QuantizeArgs a) {
  const int64_t row = min(thread_index() / 32, a.n - 1);
  a.sums[row] = absolute_sum<Element, 32, kAligned>(a, row * a.k, a.k);
}

__global__ void one_scale_kernel(QuantizeArgs a) {
  __shared__ double smem_sums[kThreads];
  double sum = 0;
  for (int64_t row = threadIdx.x; row < a.n; row += kThreads) sum += a.sums[row];
  smem_sums[threadIdx.x] = sum;
  for (int threads = kThreads / 2; threads > 0; threads /= 2) {
    __syncthreads();
    if (threadIdx.x < threads) smem_sums[threadIdx.x] += smem_sums[threadIdx.x + threads];
  }
  if (threadIdx.x == 0) {
    const double mean = smem_sums[0] / static_cast<double>(a.n * a.k);
    store_scale(rounded(static_cast<float>(mean), a.scale_type), a, 0);
  }
}

template <class Element, class Output, bool kAligned>
__global__ void encode_rows_kernel(QuantizeArgs a) {
  const int64_t row = min(thread_index() / 32, a.n - 1);
  encode<Element, Output, 32, kAligned>(a, row * a.k, a.k, load_float(a.scales, a.scale_type, 0));
}

template <class Element, class Output, bool kAligned>
static void launch_quantize(const QuantizeArgs& a, cudaStream_t stream) {
  const int64_t groups = a.n * (a.k / a.group);
  if (a.one_scale) {
    sum_rows_kernel<Element, kAligned><<<blocks_for(a.n * 32), kThreads, 0, stream>>>(a);
    one_scale_kernel<<<1, kThreads, 0, stream>>>(a);
    encode_rows_kernel<Element, Output, kAligned><<<blocks_for(a.n * 32), kThreads, 0, stream>>>(a);
  } else if (a.group <= 32) {
    quantize_kernel<Element, Output, 8, kAligned><<<blocks_for(groups * 8), kThreads, 0, stream>>>(a);
  } else if (a.group <= 64) {
    quantize_kernel<Element, Output, 16, kAligned><<<blocks_for(groups * 16), kThreads, 0, stream>>>(a);
  } else if (a.group == 128) {
    quantize_held_kernel<Element, Output, 128, kAligned><<<blocks_for(groups * 8), kThreads, 0, stream>>>(a);
  } else {
    quantize_kernel<Element, Output, 32, kAligned><<<blocks_for(groups * 32), kThreads, 0, stream>>>(a);
  }
}

// Thread i packs weights 4 kBytes i and on.
template <int kBytes, bool kAligned>
__global__ void pack_kernel(PackArgs a, int64_t threads) {
  const int64_t i = thread_index();
  if (i >= threads) return;
  const auto values = reinterpret_cast<const Run<int8_t, 4 * kBytes, kAligned>*>(a.ternary)[i];
  Run<uint8_t, kBytes, true> codes;
  for (int byte = 0; byte < kBytes; ++byte) {
    int8_t signs[4];
    for (int j = 0; j < 4; ++j) {
      const int8_t v = values.at[4 * byte + j];
      signs[j] = (v > 0) - (v < 0);
    }
    codes.at[byte] = pack_byte(signs);
  }
  reinterpret_cast<Run<uint8_t, kBytes, true>*>(a.codes)[i] = codes;
}

template <int kBytes, bool kAligned>
__global__ void unpack_kernel(UnpackArgs a, int64_t threads) {
  const int64_t i = thread_index();
  if (i >= threads) return;
  const auto codes = reinterpret_cast<const Run<uint8_t, kBytes, kAligned>*>(a.codes)[i];
  Run<int8_t, 4 * kBytes, true> values;
  for (int j = 0; j < 4 * kBytes; ++j) values.at[j] = static_cast<int8_t>(weight_at(codes.at, j));
  reinterpret_cast<Run<int8_t, 4 * kBytes, true>*>(a.ternary)[i] = values;
}

// The 4 kBytes weights of a thread are of one group.
template <class Element, int kBytes, bool kAligned>
__global__ void dequantize_kernel(DequantizeArgs a, int64_t threads) {
  const int64_t i = thread_index();
  if (i >= threads) return;
  const auto codes = reinterpret_cast<const Run<uint8_t, kBytes, kAligned>*>(a.codes)[i];
  const int64_t group = a.one_scale ? 0 : i * (4 * kBytes) / a.group;  // counted through the matrix
  const float scale = load_float(a.scales, a.scale_type, group);
  Run<Element, 4 * kBytes, true> weights;
  for (int j = 0; j < 4 * kBytes; ++j)
    weights.at[j] = from_float<Element>(static_cast<float>(weight_at(codes.at, j)) * scale);
  reinterpret_cast<Run<Element, 4 * kBytes, true>*>(a.weight)[i] = weights;
}

}  // namespace sm90

template <class Element, class Output>
static int quantize_to(const QuantizeArgs& args, CUstream_st* stream) {
  if (sm90::is_aligned(args.weight)) {
    sm90::launch_quantize<Element, Output, true>(args, stream);
  } else {
    sm90::launch_quantize<Element, Output, false>(args, stream);
  }
  return cudaGetLastError();
}

int quantize_sm90(const QuantizeArgs& args, CUstream_st* stream) {
  if (!args.codes) {  // fake_quantize, of fp32 alone
    return sm90::with_type(args.rounded_type, [&](auto output) -> int {
      return quantize_to<float, decltype(output)>(args, stream);
    });
  }
  return sm90::with_type(args.weight_type, [&](auto element) -> int {
    return quantize_to<decltype(element), sm90::Code>(args, stream);
  });
}

int pack_sm90(const PackArgs& args, CUstream_st* stream) {
  const int64_t bytes = args.n * (args.k / 4);
  if (bytes % 4 == 0 && sm90::is_aligned(args.ternary)) {
    sm90::pack_kernel<4, true><<<sm90::blocks_for(bytes / 4), sm90::kThreads, 0, stream>>>(args, bytes / 4);
  } else {
    sm90::pack_kernel<1, false><<<sm90::blocks_for(bytes), sm90::kThreads, 0, stream>>>(args, bytes);
  }
  return cudaGetLastError();
}

int unpack_sm90(const UnpackArgs& args, CUstream_st* stream) {
  const int64_t bytes = args.n * (args.k / 4);
  if (bytes % 4 == 0 && sm90::is_aligned(args.codes)) {
    sm90::unpack_kernel<4, true><<<sm90::blocks_for(bytes / 4), sm90::kThreads, 0, stream>>>(args, bytes / 4);
  } else {
    sm90::unpack_kernel<1, false><<<sm90::blocks_for(bytes), sm90::kThreads, 0, stream>>>(args, bytes);
  }
  return cudaGetLastError();
}

int dequantize_sm90(const DequantizeArgs& args, CUstream_st* stream) {
  const int64_t bytes = args.n * (args.k / 4);
  const bool words = args.group % kWeightsPerWord == 0 && sm90::is_aligned(args.codes);
  return sm90::with_type(args.weight_type, [&](auto element) -> int {
    using Element = decltype(element);
    using namespace sm90;
    if (words) {
      dequantize_kernel<Element, 4, true><<<blocks_for(bytes / 4), kThreads, 0, stream>>>(args, bytes / 4);
    } else {
      dequantize_kernel<Element, 1, false><<<blocks_for(bytes), kThreads, 0, stream>>>(args, bytes);
    }
    return cudaGetLastError();
  });
}

}  // namespace ternary
