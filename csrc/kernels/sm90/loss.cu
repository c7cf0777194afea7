// A block a row, in three passes over it: the maxima, the sums of the exponentials, the gradient. The first
// reads from memory; with one block an SM the rows in flight fit in L2 for the others.
#include <cuda_runtime_api.h>

#include "kernels/loss.h"
#include "kernels/sm90/common/types.cuh"

namespace ternary {
namespace sm90 {

constexpr int kThreads = 1024;

// Each of kCount values over all threads of the block, the same in every thread and from run to run.
template <int kCount, class Operation>
__device__ void reduce(float (&values)[kCount], Operation operation) {
  __shared__ float smem_values[kThreads / 32][kCount];
  __syncthreads();  // the last call's values have been read
  for (int i = 0; i < kCount; ++i) {
    for (int lanes = 16; lanes > 0; lanes /= 2)
      values[i] = operation(values[i], __shfl_xor_sync(0xffffffff, values[i], lanes));
    if (threadIdx.x % 32 == 0) smem_values[threadIdx.x / 32][i] = values[i];
  }
  __syncthreads();
  for (int i = 0; i < kCount; ++i) {
    values[i] = smem_values[threadIdx.x % 32][i];
    for (int lanes = 16; lanes > 0; lanes /= 2)
      values[i] = operation(values[i], __shfl_xor_sync(0xffffffff, values[i], lanes));
  }
}

// kRun: logits that a thread takes at once, a divisor of the vocabulary.
template <class Element, int kRun>
__global__ void __launch_bounds__(kThreads) distillation_kernel(DistillationArgs a) {
  using Logits = Run<Element, kRun, true>;
  const int64_t row = blockIdx.x, runs = a.vocab / kRun;
  auto* student = reinterpret_cast<Logits*>(static_cast<Element*>(a.student) + row * a.vocab);
  const auto* teacher =
      reinterpret_cast<const Logits*>(static_cast<const Element*>(a.teacher) + row * a.vocab);
  const int64_t label = a.labels[row];
  const float label_logit =
      label >= 0 && label < a.vocab ? to_float(reinterpret_cast<Element*>(student)[label]) : NAN;
  const float per_T = 1 / a.temperature;

  float most[2] = {-INFINITY, -INFINITY};  // of the student's logits, of the teacher's
  for (int64_t i = threadIdx.x; i < runs; i += kThreads) {
    const Logits s = student[i], t = teacher[i];
    for (int j = 0; j < kRun; ++j) {
      most[0] = fmaxf(most[0], to_float(s.at[j]));
      most[1] = fmaxf(most[1], to_float(t.at[j]));
    }
  }
  reduce(most, [](float x, float y) { return fmaxf(x, y); });

  // exp of the student, of the student / T, of the teacher / T, and the last times (teacher - student) / T;
  // each logit less its maximum.
  float sums[4] = {};
  for (int64_t i = threadIdx.x; i < runs; i += kThreads) {
    const Logits s = student[i], t = teacher[i];
    for (int j = 0; j < kRun; ++j) {
      const float below_s = to_float(s.at[j]) - most[0], below_t = to_float(t.at[j]) - most[1];
      const float q = __expf(below_t * per_T);
      if (a.temperature != 1) sums[0] += __expf(below_s);
      sums[1] += __expf(below_s * per_T);
      sums[2] += q;
      sums[3] += q * (below_t - below_s) * per_T;
    }
  }
  if (a.temperature == 1) sums[0] = sums[1];
  reduce(sums, [](float x, float y) { return x + y; });
  if (threadIdx.x == 0) {
    a.kl[row] = sums[3] / sums[2] + logf(sums[1]) - logf(sums[2]);
    a.ce[row] = logf(sums[0]) - (label_logit - most[0]);
  }

  const float weight_p = (1 - a.kl_weight) / sums[0];
  const float weight_soft = a.kl_weight * a.temperature / sums[1];
  const float weight_q = a.kl_weight * a.temperature / sums[2];
  for (int64_t i = threadIdx.x; i < runs; i += kThreads) {
    const Logits s = student[i], t = teacher[i];
    Logits gradient;
    for (int j = 0; j < kRun; ++j) {
      const float below_s = to_float(s.at[j]) - most[0], below_t = to_float(t.at[j]) - most[1];
      const float soft = __expf(below_s * per_T);
      const float p = a.temperature == 1 ? soft : __expf(below_s);
      const float one_hot = i * kRun + j == label ? 1 - a.kl_weight : 0;
      gradient.at[j] = from_float<Element>(weight_soft * soft - weight_q * __expf(below_t * per_T) +
                                           weight_p * p - one_hot);
    }
    student[i] = gradient;
  }
}

template <class Element>
static int launch_distillation(const DistillationArgs& a, cudaStream_t stream) {
  constexpr int kRun = 16 / sizeof(Element);
  const auto blocks = static_cast<unsigned>(a.rows);
  if (a.vocab % kRun == 0 && is_aligned(a.student) && is_aligned(a.teacher)) {
    distillation_kernel<Element, kRun><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    distillation_kernel<Element, 1><<<blocks, kThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace sm90

int distillation_sm90(const DistillationArgs& args, CUstream_st* stream) {
  return sm90::with_type(args.type, [&](auto element) -> int {
    return sm90::launch_distillation<decltype(element)>(args, stream);
  });
}

}  // namespace ternary
