// Hopper's own instructions, by PTX (PTX ISA 8.0 and up): barriers and TMA loads into shared memory, products by warpgroups.
//
// Compiled with BFLOAT16 (0 or 1: what the 16-bit numbers are).

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

__device__ __forceinline__ void named_arrive(int name, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// What the matrix units read from shared memory: 128-byte swizzle, 8 rows of 128 bytes after one another, and `panel`
// bytes from one panel of columns to the next (PTX ISA, "Shared Memory Matrix Layout" of wgmma).
__device__ __forceinline__ Word matrix(const char* start, int panel) {
    return Word((address(start) & 0x3FFFF) >> 4) | Word(panel >> 4) << 16 | Word(1024 >> 4) << 32 | Word(1) << 62;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Registers that the matrix units read or write behind the compiler's back are not moved over this.
template <int COUNT>
__device__ __forceinline__ void hold(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void hold(unsigned (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

#if BFLOAT16
#define NUMBERS "bf16"
#else
#define NUMBERS "f16"
#endif

#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(d, i) FOUR(d, i), FOUR(d, i + 4), FOUR(d, i + 8), FOUR(d, i + 12)
#define THIRTY_TWO "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SIXTY_FOUR THIRTY_TWO ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
    "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d = a b^T (+ d): a [64, 16], b [128, 16].
__device__ __forceinline__ void multiply_scores(float (&d)[64], Word a, Word b, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NUMBERS "." NUMBERS "\n{" SIXTY_FOUR "},\n"
        "%64, %65, add, 1, 1, 0, 0;\n}\n"
        : SIXTEEN(d, 0), SIXTEEN(d, 16), SIXTEEN(d, 32), SIXTEEN(d, 48)
        : "l"(a), "l"(b), "r"(int(add)));
}

// d += a b: a [64, 16] in registers, b [16, WIDTH].
__device__ __forceinline__ void multiply_values(float (&d)[32], const unsigned* a, Word b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NUMBERS "." NUMBERS "\n{" THIRTY_TWO "},\n"
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : SIXTEEN(d, 0), SIXTEEN(d, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void multiply_values(float (&d)[64], const unsigned* a, Word b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NUMBERS "." NUMBERS "\n{" SIXTY_FOUR "},\n"
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : SIXTEEN(d, 0), SIXTEEN(d, 16), SIXTEEN(d, 32), SIXTEEN(d, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned narrow(float low, float high) {
    unsigned both;
#if BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}
