// Hopper's own instructions, by PTX (PTX ISA 8.0 and up): barriers, TMA loads into shared memory, conversions.
//
// Compiled with VALUES_BFLOAT16 (0 or 1: what weights and values are).

#pragma once

typedef unsigned long long Word;

struct alignas(64) TensorMap {
    char opaque[128];
};

__device__ __forceinline__ unsigned address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void begin_barrier(Word* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(Word* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(Word* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(Word* barrier, int phase) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(address(barrier)), "r"(phase) : "memory");
}

// A box of `map` from (column, row, head) on, as rows of 128 bytes.
__device__ __forceinline__ void load(char* to, const TensorMap& map, Word* barrier, int column, int row, int head) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
        ::"r"(address(to)), "l"(&map), "r"(address(barrier)), "r"(column), "r"(row), "r"(head) : "memory");
}

// Barriers of some warps of the block; 0 is that of __syncthreads.
__device__ __forceinline__ void named_wait(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers as 16-bit ones.
__device__ __forceinline__ unsigned narrow(float low, float high) {
    unsigned both;
#if VALUES_BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

// Two numbers of float16 as float32.
__device__ __forceinline__ float2 widen(unsigned both) {
    float2 two;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
        : "=f"(two.x), "=f"(two.y) : "r"(both));
    return two;
}
