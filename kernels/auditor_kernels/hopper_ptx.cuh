// What the Hopper filter uses by name: barriers, the tensor copy engine, matrix descriptors, a warp's prefix sums.
#pragma once
#include <cuda.h>
#include <stdint.h>

__device__ __forceinline__ void bar_sync(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }
__device__ __forceinline__ void bar_arrive(int id, int n) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n) : "memory");
}
__device__ __forceinline__ uint32_t smem_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void mbar_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void mbar_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbar_wait(uint32_t bar, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\n"
      "bra WAIT;\nDONE:\n}\n" ::"r"(bar), "r"(phase) : "memory");
}
// No .release.cluster here: it compiles to MEMBAR.ALL.GPU in every step and costs a fifth of the kernel.
__device__ __forceinline__ void mbar_arrive_cluster(uint32_t bar, int cta) {
  asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(bar), "r"(cta) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t bar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      ::"r"(to), "l"(map), "r"(bar), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void tma_multicast(uint32_t to, const CUtensorMap* map, uint32_t bar, int c0, int c1,
                                              uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;"
      ::"r"(to), "l"(map), "r"(bar), "r"(c0), "r"(c1), "h"(ctas) : "memory");
}
// Shared-memory matrix descriptor: K-major, 128-byte swizzle, 8 rows of 128 bytes per core matrix.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  return (uint64_t)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// A score takes the place of its sum.
__device__ __forceinline__ void put(float& sum, float v) { sum = v; }
__device__ __forceinline__ void put(int& sum, float v) { sum = __float_as_int(v); }

// Keep four sums if `bit` of `found` is set: predicated, no branch. The operands are of the accumulators' own type: with
// any other, ptxas finds no registers for the wgmma pipeline and waits after each product.
__device__ __forceinline__ void keep_group(uint32_t& at, uint32_t found, uint32_t bit, const float* sum) {
  asm volatile("{\n.reg .pred p;\n.reg .b32 on;\nand.b32 on, %1, %2;\nsetp.ne.b32 p, on, 0;\n"
               "@p st.shared.v4.f32 [%0], {%3, %4, %5, %6};\n@p add.u32 %0, %0, 16;\n}\n"
               : "+r"(at) : "r"(found), "r"(bit), "f"(sum[0]), "f"(sum[1]), "f"(sum[2]), "f"(sum[3]) : "memory");
}

__device__ __forceinline__ void keep_group(uint32_t& at, uint32_t found, uint32_t bit, const int* sum) {
  asm volatile("{\n.reg .pred p;\n.reg .b32 on;\nand.b32 on, %1, %2;\nsetp.ne.b32 p, on, 0;\n"
               "@p st.shared.v4.b32 [%0], {%3, %4, %5, %6};\n@p add.u32 %0, %0, 16;\n}\n"
               : "+r"(at) : "r"(found), "r"(bit), "r"(sum[0]), "r"(sum[1]), "r"(sum[2]), "r"(sum[3]) : "memory");
}

// Where each lane's groups begin among those of its warp.
__device__ __forceinline__ int groups_before(int number, int lane) {
  int sum = number;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  return sum - number;
}
