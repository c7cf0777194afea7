// The instructions that CUDA C++ has no name for, one function each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ternary::sm90 {

__device__ inline uint32_t shared_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// Starts copying 16 bytes to shared memory past L1; writes zeros instead where not `valid`.
__device__ inline void copy_16_async(void* smem, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(smem)),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than kGroups of this thread's groups are under way.
template <int kGroups>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Asks for the 16-byte blocks within a run of bytes to be brought to L2. Reads nothing yet.
__device__ inline void prefetch_to_l2(const void* from, int64_t bytes) {
  const uint64_t begin = (reinterpret_cast<uint64_t>(from) + 15) / 16 * 16;
  const uint64_t end = (reinterpret_cast<uint64_t>(from) + bytes) / 16 * 16;
  if (begin >= end) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(begin),
               "r"(static_cast<uint32_t>(end - begin))
               : "memory");
}

// Programmatic dependent launch: lets the next kernel of the stream start beside this one ...
__device__ inline void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// ... where it waits here until all kernels before it are done and their writes can be seen.
__device__ inline void wait_for_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// d += a b on the tensor cores: a [16, 16] and b [16, 8] in halves, d [16, 8].
template <class Element>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define TERNARY_MMA(Element, name)                                                                 \
  template <>                                                                                      \
  __device__ inline void mma_m16n8k16<Element>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, \
                                               uint32_t b1) {                                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                     \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                           \
  }
TERNARY_MMA(__nv_bfloat16, "bf16")
TERNARY_MMA(__half, "f16")
#undef TERNARY_MMA

}  // namespace ternary::sm90
