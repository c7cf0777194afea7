// The instructions that CUDA C++ has no name for, one function each.
#pragma once

#include <cuda.h>
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

// 2^x and 1 / x to a unit or two of the last place; subnormal numbers are zeros.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

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

// d += a b on the tensor cores: a [16, 32] and b [32, 8] in int8, d [16, 8].
__device__ inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Barriers in shared memory: a phase ends when `count` threads have arrived and all expected bytes have.
__device__ inline void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Shows the barriers to the copy engine.
__device__ inline void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and adds to the bytes that the phase waits for.
__device__ inline void set_expected_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// The warp arrives as one.
__device__ inline void release(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0)
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Waits until the phase of this parity is over. Phases count from 0.
__device__ inline void wait_for_phase(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts the copy of a box of a tensor of two dimensions; its bytes arrive at the barrier.
__device__ inline void copy_tile_async(void* smem, const CUtensorMap& from, int column, int row,
                                       uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(smem)),
      "l"(&from), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same of three dimensions; an index counts elements, rows, planes.
__device__ inline void copy_box_async(void* smem, const CUtensorMap& from, int column, int row, int plane,
                                      uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(smem)),
      "l"(&from), "r"(column), "r"(row), "r"(plane), "r"(shared_address(barrier))
      : "memory");
}

// Starts the copy of a run of bytes, a multiple of 16; they arrive at the barrier.
__device__ inline void copy_run_async(void* smem, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(smem)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Where a block of the cluster has what this block has at `smem`.
__device__ inline uint32_t address_in_block(const void* smem, int block) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(smem)), "r"(block));
  return address;
}

// Stores to a block of the cluster; the bytes arrive at its barrier.
__device__ inline void store_to_block(float4* smem, float4 v, uint64_t* barrier, int block) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          address_in_block(smem, block)),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(address_in_block(barrier, block))
      : "memory");
}

// All threads of the cluster wait for each other. Orders no memory.
__device__ inline void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ inline void wait_for_cluster() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// Of a warpgroup: how many registers a thread has from here on.
template <int kRegisters>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// An 8 x 8 matrix of halves, of which a lane has two neighbours of a row, transposed.
__device__ inline uint32_t transpose(uint32_t pair) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// The 128 threads of a warpgroup wait for each other.
__device__ inline void sync_warpgroup(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// So many threads of a block wait for each other, by whole warps.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// The same without waiting.
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Words that other blocks read or write meanwhile, each whole.
__device__ inline void store_word(uint32_t* to, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}
__device__ inline uint32_t load_word(const uint32_t* from) {
  uint32_t word;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}
__device__ inline uint4 load_words(const uint32_t* from) {
  uint4 words;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from)
               : "memory");
  return words;
}

// Barrier `group` + 8 of a warpgroup and one warp more: the warpgroup goes on, the warp waits for it.
__device__ inline void tell_warp(int group) {
  asm volatile("bar.arrive %0, 160;" ::"r"(group + 8) : "memory");
}
__device__ inline void wait_for_warpgroup(int group) {
  asm volatile("bar.sync %0, 160;" ::"r"(group + 8) : "memory");
}

__device__ inline void store_release(uint64_t* to, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
__device__ inline uint64_t load_acquire(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

// Stores four 8 x 8 matrices of halves transposed. A lane has two neighbours of a row of each; its address is
// where row lane % 8 of matrix lane / 8 of the transposed goes.
__device__ inline void store_matrices_transposed(void* smem, const uint32_t (&pairs)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(smem)),
      "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
      : "memory");
}

// The same without transposing: row lane % 8 of matrix lane / 8 is at the lane's address.
__device__ inline void store_matrices(void* smem, const uint32_t (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(smem)),
               "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

// Loads four 8 x 8 matrices of halves transposed, addressed like these.
__device__ inline void load_matrices_transposed(uint32_t (&pairs)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
               : "r"(shared_address(smem))
               : "memory");
}

// Shows what this thread wrote to shared memory to the tensor cores.
__device__ inline void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders what this thread reads and writes before what it asks of the copy engine, in any memory.
__device__ inline void fence_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

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

// d (+)= a b^T with both operands in shared memory, a and b [64, 16] by rows; and d += a b with a in
// registers and b [16, 64] by its rows of 16, which the tensor cores transpose. d is [64, 64].
template <class Element>
__device__ void wgmma_64(float (&d)[32], uint32_t a, uint32_t b, bool add);
template <class Element>
__device__ void wgmma_64_transposed(float (&d)[32], const uint32_t (&a)[4], uint32_t b);

#define TERNARY_SUMS_32                                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define TERNARY_FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TERNARY_IN_32(d)                                                                                \
  TERNARY_FOUR(d, 0), TERNARY_FOUR(d, 4), TERNARY_FOUR(d, 8), TERNARY_FOUR(d, 12), TERNARY_FOUR(d, 16), \
      TERNARY_FOUR(d, 20), TERNARY_FOUR(d, 24), TERNARY_FOUR(d, 28)
#define TERNARY_WGMMA_64(Element, name)                                                                     \
  template <>                                                                                               \
  __device__ inline void wgmma_64<Element>(float (&d)[32], uint32_t a, uint32_t b, bool add) {              \
    asm volatile(                                                                                           \
        "{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %34, 0;\n"                                   \
        "mov.b64 a, {%32, 0x40000040};\nmov.b64 b, {%33, 0x40000040};\n"                                    \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " TERNARY_SUMS_32                     \
        "a, b, add, 1, 1, 0, 0;\n}"                                                                         \
        : TERNARY_IN_32(d)                                                                                  \
        : "r"(a), "r"(b), "r"(int{add})                                                                     \
        : "memory");                                                                                        \
  }                                                                                                         \
  template <>                                                                                               \
  __device__ inline void wgmma_64_transposed<Element>(float (&d)[32], const uint32_t (&a)[4], uint32_t b) { \
    asm volatile(                                                                                           \
        "{\n.reg .pred add;\n.reg .b64 b;\nsetp.eq.b32 add, 0, 0;\n"                                        \
        "mov.b64 b, {%36, 0x40000040};\n"                                                                   \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " TERNARY_SUMS_32                     \
        "{%32, %33, %34, %35}, b, add, 1, 1, 1;\n}"                                                         \
        : TERNARY_IN_32(d)                                                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b)                                                \
        : "memory");                                                                                        \
  }
TERNARY_WGMMA_64(__nv_bfloat16, "bf16")
TERNARY_WGMMA_64(__half, "f16")
#undef TERNARY_WGMMA_64
#undef TERNARY_IN_32
#undef TERNARY_FOUR
#undef TERNARY_SUMS_32

}  // namespace ternary::sm90
