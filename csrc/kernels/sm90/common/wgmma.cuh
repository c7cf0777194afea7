// wgmma: the products of a warpgroup on the tensor cores.
#pragma once

#include "kernels/sm90/common/ptx.cuh"

namespace ternary::sm90 {

// The products of a warpgroup run beside it, in groups that it opens, closes and waits for. The sums and A
// are registers that the compiler must leave alone until then: naming them in an empty asm keeps them in
// place.
template <int n>
__device__ void keep(float (&sums)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
__device__ inline void keep(uint32_t (&frag)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(frag[i / 4][i % 4])::"memory");
}
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroups>
__device__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// B in shared memory: rows of 128 bytes, the pieces of 16 swizzled in blocks of eight rows.
__device__ inline uint64_t swizzled_matrix(const void* smem) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16 |
         uint64_t{(shared_address(smem) & 0x3FFFF) / 16};
}

// The same by its low word, where 16 more bytes are 1 more.
__device__ inline uint32_t swizzled_address(const void* smem) { return 1 << 16 | shared_address(smem) / 16; }
__device__ inline uint64_t matrix_at(uint32_t address) { return uint64_t{0x40000040} << 32 | address; }

// The operands of wgmma below: the sums d[0 .. n) by number and by name.
#define TERNARY_N8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TERNARY_N16 TERNARY_N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TERNARY_N32 \
  TERNARY_N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TERNARY_N64                                                                  \
  TERNARY_N32                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TERNARY_N128                                                                             \
  TERNARY_N64                                                                                    \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TERNARY_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TERNARY_D8(i) TERNARY_D4(i), TERNARY_D4(i + 4)
#define TERNARY_D16(i) TERNARY_D8(i), TERNARY_D8(i + 8)
#define TERNARY_D32(i) TERNARY_D16(i), TERNARY_D16(i + 16)
#define TERNARY_D64(i) TERNARY_D32(i), TERNARY_D32(i + 32)
#define TERNARY_D128(i) TERNARY_D64(i), TERNARY_D64(i + 64)

// d (+)= a b: a [64, 16] in registers, b [16, 2 kSums] in shared memory, d [64, 2 kSums]; fresh where not
// `add`. wgmma_m64k32 is the same for e4m3: a [64, 32], b [32, 2 kSums].
template <class Element, int kSums>
__device__ void wgmma_m64k16(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b, bool add);
template <int kSums>
__device__ void wgmma_m64k32(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b, bool add);

// `a`, `b`, `add` are the numbers of those operands.
#define TERNARY_WGMMA(function, sums, shape, types, a0, b0, add0, last)                             \
  template <>                                                                                       \
  __device__ inline void function(float (&d)[sums], const uint32_t (&a)[4], uint64_t b, bool add) { \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add0                                       \
                 ", 0;\n"                                                                           \
                 "wgmma.mma_async.sync.aligned." shape ".f32." types " {" TERNARY_N##sums           \
                 "}, {" a0 "}, " b0 ", add, 1, 1" last ";\n}"                                       \
                 : TERNARY_D##sums(0)                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{add})                \
                 : "memory");                                                                       \
  }
#define TERNARY_WGMMA_16(sums, n, a0, b0, add0)                                                      \
  TERNARY_WGMMA(wgmma_m64k16<__nv_bfloat16>, sums, "m64n" n "k16", "bf16.bf16", a0, b0, add0, ", 0") \
  TERNARY_WGMMA(wgmma_m64k16<__half>, sums, "m64n" n "k16", "f16.f16", a0, b0, add0, ", 0")
TERNARY_WGMMA_16(8, "16", "%8, %9, %10, %11", "%12", "%13")
TERNARY_WGMMA_16(16, "32", "%16, %17, %18, %19", "%20", "%21")
TERNARY_WGMMA_16(32, "64", "%32, %33, %34, %35", "%36", "%37")
TERNARY_WGMMA_16(64, "128", "%64, %65, %66, %67", "%68", "%69")
TERNARY_WGMMA_16(128, "256", "%128, %129, %130, %131", "%132", "%133")
TERNARY_WGMMA(wgmma_m64k32, 64, "m64n128k32", "e4m3.e4m3", "%64, %65, %66, %67", "%68", "%69", "")

// d (+)= a b^T with both operands in shared memory, a and b [64, 16] by rows; and d += a b with a in
// registers and b [16, 64] by its rows of 16, which the tensor cores transpose. d is [64, 64].
template <class Element>
__device__ void wgmma_64(float (&d)[32], uint32_t a, uint32_t b, bool add);
template <class Element>
__device__ void wgmma_64_transposed(float (&d)[32], const uint32_t (&a)[4], uint32_t b);

#define TERNARY_WGMMA_64(Element, name)                                                                     \
  template <>                                                                                               \
  __device__ inline void wgmma_64<Element>(float (&d)[32], uint32_t a, uint32_t b, bool add) {              \
    asm volatile(                                                                                           \
        "{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %34, 0;\n"                                   \
        "mov.b64 a, {%32, 0x40000040};\nmov.b64 b, {%33, 0x40000040};\n"                                    \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" TERNARY_N32                        \
        "}, a, b, add, 1, 1, 0, 0;\n}"                                                                      \
        : TERNARY_D32(0)                                                                                    \
        : "r"(a), "r"(b), "r"(int{add})                                                                     \
        : "memory");                                                                                        \
  }                                                                                                         \
  template <>                                                                                               \
  __device__ inline void wgmma_64_transposed<Element>(float (&d)[32], const uint32_t (&a)[4], uint32_t b) { \
    asm volatile(                                                                                           \
        "{\n.reg .pred add;\n.reg .b64 b;\nsetp.eq.b32 add, 0, 0;\n"                                        \
        "mov.b64 b, {%36, 0x40000040};\n"                                                                   \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" TERNARY_N32                        \
        "}, {%32, %33, %34, %35}, b, add, 1, 1, 1;\n}"                                                      \
        : TERNARY_D32(0)                                                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b)                                                \
        : "memory");                                                                                        \
  }
TERNARY_WGMMA_64(__nv_bfloat16, "bf16")
TERNARY_WGMMA_64(__half, "f16")
#undef TERNARY_WGMMA_64
#undef TERNARY_WGMMA_16
#undef TERNARY_WGMMA
#undef TERNARY_N8
#undef TERNARY_N16
#undef TERNARY_N32
#undef TERNARY_N64
#undef TERNARY_N128
#undef TERNARY_D4
#undef TERNARY_D8
#undef TERNARY_D16
#undef TERNARY_D32
#undef TERNARY_D64
#undef TERNARY_D128

}  // namespace ternary::sm90
