// Products of Hopper's matrix units, by PTX (wgmma, PTX ISA 8.0 and up): a warpgroup multiplies 64 rows.
//
// Compiled with BFLOAT16 and VALUES_BFLOAT16 (0 or 1: what the 16-bit numbers are, and weights and values).

#pragma once

#include "instructions.cuh"

// What the matrix units read from shared memory: 128-byte swizzle, 8 rows of 128 bytes after one another, and `panel`
// bytes from one panel of columns to the next (PTX ISA, "Shared Memory Matrix Layout" of wgmma). `further` moves its start.
__device__ __forceinline__ Word matrix(const char* start, int panel) {
    return Word((address(start) & 0x3FFFF) >> 4) | Word(panel >> 4) << 16 | Word(1024 >> 4) << 32 | Word(1) << 62;
}

__device__ __forceinline__ Word further(Word matrix, int bytes) { return matrix + (bytes >> 4); }

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

#if VALUES_BFLOAT16
#define VALUES "bf16"
#else
#define VALUES "f16"
#endif

#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define EIGHT(d, i) FOUR(d, i), FOUR(d, i + 4)
#define SIXTEEN(d, i) EIGHT(d, i), EIGHT(d, i + 8)
#define OUT_4(d) FOUR(d, 0)
#define OUT_8(d) EIGHT(d, 0)
#define OUT_32(d) SIXTEEN(d, 0), SIXTEEN(d, 16)
#define OUT_40(d) OUT_32(d), EIGHT(d, 32)
#define OUT_48(d) OUT_40(d), EIGHT(d, 40)
#define OUT_64(d) OUT_48(d), SIXTEEN(d, 48)
#define OUT_88(d) OUT_64(d), SIXTEEN(d, 64), EIGHT(d, 80)
#define OUT_96(d) OUT_88(d), EIGHT(d, 88)
#define OUT_128(d) OUT_96(d), SIXTEEN(d, 96), SIXTEEN(d, 112)
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_40 NAMES_32 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_48 NAMES_40 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_48 ", " "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_88 NAMES_64 ", " "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
    "%81, %82, %83, %84, %85, %86, %87"
#define NAMES_96 NAMES_88 ", " "%88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_128 NAMES_96 ", " "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
    "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d = a b^T (+ d): a [64, 16], b [WIDTH, 16], of which a thread has COUNT products.
#define PRODUCTS_OF_ROWS(COUNT, WIDTH, A, B, ADD)                                                                      \
    __device__ __forceinline__ void multiply_rows(float (&d)[COUNT], Word a, Word b, bool add) {                       \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" WIDTH "k16.f32." NUMBERS "." NUMBERS "\n{" NAMES_##COUNT      \
                     "},\n" A ", " B ", add, 1, 1, 0, 0;\n}\n" : OUT_##COUNT(d) : "l"(a), "l"(b), "r"(int(add)));     \
    }

PRODUCTS_OF_ROWS(32, "64", "%32", "%33", "%34")
PRODUCTS_OF_ROWS(40, "80", "%40", "%41", "%42")
PRODUCTS_OF_ROWS(64, "128", "%64", "%65", "%66")

// d = a b (+ d): a [64, 16] in registers, b [16, WIDTH].
#define PRODUCTS_WITH_COLUMNS(COUNT, WIDTH, A, B, ADD)                                                                 \
    __device__ __forceinline__ void multiply_columns(float (&d)[COUNT], const unsigned* a, Word b, bool add) {         \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" WIDTH "k16.f32." VALUES "." VALUES "\n{" NAMES_##COUNT      \
                     "},\n{" A "}, " B ", add, 1, 1, 1;\n}\n" : OUT_##COUNT(d)                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                             \
    }

PRODUCTS_WITH_COLUMNS(4, "8", "%4, %5, %6, %7", "%8", "%9")
PRODUCTS_WITH_COLUMNS(8, "16", "%8, %9, %10, %11", "%12", "%13")
PRODUCTS_WITH_COLUMNS(32, "64", "%32, %33, %34, %35", "%36", "%37")
PRODUCTS_WITH_COLUMNS(64, "128", "%64, %65, %66, %67", "%68", "%69")
PRODUCTS_WITH_COLUMNS(96, "192", "%96, %97, %98, %99", "%100", "%101")
PRODUCTS_WITH_COLUMNS(128, "256", "%128, %129, %130, %131", "%132", "%133")

// d += a b^T by one warp: a [16, 16] and b [16, 16] of 16-bit numbers, d as a warp has it of the products of a warpgroup.
// `a` and `b` are addresses of a lane's row of 16 bytes.
__device__ __forceinline__ void multiply_by_warp(float* d, unsigned a, unsigned b) {
    unsigned rows[4], columns[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(rows[0]), "=r"(rows[1]), "=r"(rows[2]), "=r"(rows[3]) : "r"(a) : "memory");
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(columns[0]), "=r"(columns[1]), "=r"(columns[2]), "=r"(columns[3]) : "r"(b) : "memory");
#pragma unroll
    for (int half = 0; half < 2; ++half)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NUMBERS "." NUMBERS ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : FOUR(d, 4 * half)
                     : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[2 * half]), "r"(columns[2 * half + 1]));
}
