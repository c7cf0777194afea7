// Some blocks share a row, so that all of it is read at once. The one that ends last puts their results
// together.
#include <cuda_runtime.h>

#include "kernels/choose.h"
#include "kernels/sm90/common/launch.cuh"
#include "kernels/sm90/common/ptx.cuh"
#include "kernels/sm90/common/types.cuh"

namespace ternary {
namespace sm90 {

constexpr int kChooseThreads = 256;

// The best of a part of a row: larger for larger values, and for lower indices of equal ones. `kFinite` is
// set in all while they are compared, and then tells whether all values were finite.
constexpr uint64_t kFinite = uint64_t{1} << 31;

__device__ inline uint64_t rank_of(float value, int64_t index) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // zeros of both signs are equal
  const uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000;
  return uint64_t{order} << 32 | ~static_cast<uint32_t>(index);
}

template <class Element, bool kAligned>
__global__ void __launch_bounds__(kChooseThreads) choose_kernel(const __grid_constant__ ChooseArgs a) {
  launch_dependents();
  wait_for_prerequisites();
  const int64_t row = blockIdx.y, part = blockIdx.x, parts = gridDim.x;
  const int64_t thread = part * kChooseThreads + threadIdx.x, threads = parts * kChooseThreads;
  const auto* logits = static_cast<const Element*>(a.logits) + row * a.stride;
  float high = -INFINITY, zero = 0;  // 0 times an infinity or a NaN is a NaN
  int64_t at = a.vocab;
  const auto look = [&](float value, int64_t index) {
    zero = fmaf(value, 0.0f, zero);
    if (value > high) high = value, at = index;  // indices rise
  };
  constexpr int kWidth = 16 / sizeof(Element);
  const int64_t pieces = kAligned ? a.vocab / kWidth : 0;
#pragma unroll 4
  for (int64_t i = thread; i < pieces; i += threads) {
    float values[kWidth];
    to_floats(values, load_words<Element, kWidth>(logits + i * kWidth));
#pragma unroll
    for (int j = 0; j < kWidth; ++j) look(values[j], i * kWidth + j);
  }
  for (int64_t i = pieces * kWidth + thread; i < a.vocab; i += threads) look(to_float(logits[i]), i);

  __shared__ uint64_t smem_best[kChooseThreads / 32];
  __shared__ bool smem_last;
  uint64_t best = at < a.vocab ? rank_of(high, at) : 0;
  for (int lanes = 16; lanes > 0; lanes /= 2) best = max(best, __shfl_xor_sync(~0u, best, lanes));
  if (threadIdx.x % 32 == 0) smem_best[threadIdx.x / 32] = best;
  const bool finite = __syncthreads_and(zero == 0);
  auto* results = static_cast<uint64_t*>(a.workspace);
  auto* done = reinterpret_cast<unsigned long long*>(a.step + 1);
  if (threadIdx.x == 0) {
    for (int i = 1; i < kChooseThreads / 32; ++i) best = max(best, smem_best[i]);
    __stcg(results + row * parts + part, finite ? best | kFinite : best & ~kFinite);
    __threadfence();
    smem_last = atomicAdd(done, 1ull) == static_cast<unsigned long long>(a.rows * parts - 1);
    __threadfence();
  }
  __syncthreads();
  if (!smem_last) return;

  const int64_t step = a.step[0];
  for (int64_t r = threadIdx.x; r < a.rows; r += kChooseThreads) {
    uint64_t most = 0, all = kFinite;
    for (int64_t i = 0; i < parts; ++i) {
      const uint64_t result = __ldcg(results + r * parts + i);
      most = max(most, result | kFinite);
      all &= result;
    }
    const int64_t token = min(static_cast<int64_t>(~static_cast<uint32_t>(most)), a.vocab - 1);
    a.tokens[r] = token;
    a.chosen[step % a.slots * a.rows + r] = all ? token : -1;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    a.step[0] = step + 1;
    *done = 0;
  }
}

}  // namespace sm90

int choose_sm90(const ChooseArgs& args, CUstream_st* stream) {
  using namespace sm90;
  if (args.rows == 0) return cudaSuccess;
  return with_type(args.type, [&](auto element) -> int {
    using Element = decltype(element);
    constexpr int kWidth = 16 / sizeof(Element);
    const bool aligned = is_aligned(args.logits) && args.stride % kWidth == 0;
    const dim3 blocks(ChooseArgs::kParts, static_cast<unsigned>(args.rows));
    return launch_overlapping(aligned ? choose_kernel<Element, true> : choose_kernel<Element, false>, args,
                              blocks, kChooseThreads, stream);
  });
}

}  // namespace ternary
