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

// The same of 8 bytes, by way of L1.
__device__ inline void copy_8_async(void* smem, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(smem)), "l"(from),
               "r"(valid ? 8 : 0)
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

}  // namespace ternary::sm90
