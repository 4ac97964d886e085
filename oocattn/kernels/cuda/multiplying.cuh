// What a warpgroup of hopper.cu has the matrix units multiply: queries and keys, weights and values; and the sums.

#pragma once

#include "products.cuh"
#include "shared.cuh"
#include "softmax.cuh"

// Issue S = Q K^T, small parts first.
__device__ __forceinline__ void begin_scores(float (&scores)[SCORES], Word query, Word key) {
#pragma unroll
    for (int product = PARTS == 2 ? 2 : 0; product >= 0; --product)
#pragma unroll
        for (int k = 0; k < KEY_PRODUCTS; ++k) {
            const Word a = further(query, (product == 2 ? QUERY_PART : 0) + k / 4 * ROWS * ROW_BYTES + k % 4 * 32);
            const Word b = further(key, (product == 1 ? KEY_PART : 0) + k / 4 * KEYS * ROW_BYTES + k % 4 * 32);
            multiply_rows(scores, a, b, k > 0 || product != (PARTS == 2 ? 2 : 0));
        }
    commit_products();
}

// S = Q K^T of a warp's 16 rows, once more, where its scores are lost.
__device__ __forceinline__ void multiply_again(float (&scores)[SCORES], const char* query, const char* key) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16, of_key = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < SCORES; ++i) scores[i] = 0.0f;
    for (int product = PARTS == 2 ? 2 : 0; product >= 0; --product)
#pragma unroll 1
        for (int k = 0; k < 2 * KEY_PRODUCTS; k += 2) {  // of 8 columns, which lie swizzled
            const char* a = query + (product == 2 ? QUERY_PART : 0) + k / 8 * ROWS * ROW_BYTES;
            const char* b = key + (product == 1 ? KEY_PART : 0) + k / 8 * KEYS * ROW_BYTES;
            const int of_a = ((k + lane / 16) ^ row) % 8 * 16, of_b = ((k + lane / 8 % 2) ^ of_key) % 8 * 16;
#pragma unroll
            for (int i = 0; i < KEYS / 16; ++i)
                multiply_by_warp(scores + 8 * i, address(a + row * ROW_BYTES) + of_a,
                                 address(b + (16 * i + of_key) * ROW_BYTES) + of_b);
        }
}

struct Weights {
    unsigned parts[WEIGHT_PARTS][SCORES / 2];

    __device__ __forceinline__ void narrow_from(const float (&scores)[SCORES]) {
#pragma unroll
        for (int i = 0; i < SCORES / 2; ++i) {
            const float low = scores[2 * i], high = scores[2 * i + 1];
            parts[0][i] = narrow(low, high);
            if (WEIGHT_PARTS == 1) continue;
            const float2 first = widen(parts[0][i]);
            parts[WEIGHT_PARTS - 1][i] = narrow(low - first.x, high - first.y);
        }
    }
    __device__ __forceinline__ void hold_all() {
#pragma unroll
        for (int part = 0; part < WEIGHT_PARTS; ++part) hold(parts[part]);
    }
};

// Issue num = P V, added to num if `add` says so; small parts first.
__device__ __forceinline__ void begin_values(float (&num)[SUMS], const Weights& weights, Word value, bool add) {
#pragma unroll
    for (int product = PARTS + WEIGHT_PARTS - 2; product >= 0; --product)
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k) {
            const unsigned* a = weights.parts[product == 1 ? WEIGHT_PARTS - 1 : 0] + 4 * k;
            const Word b = further(value, (product == 2 ? VALUE_PART : 0) + k * 16 * ROW_BYTES);
            multiply_columns(num, a, b, add || k > 0 || product != PARTS + WEIGHT_PARTS - 2);
        }
    commit_products();
}

__device__ __forceinline__ void scale_rows(float (&num)[SUMS], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) num[i] *= factor[i / 2 % 2];
}

// What the matrix units sum, and what is summed of that in float32.
struct Sums {
    float num[SUMS];
#if RESTART
    float total[SUMS];
    int chained = 0;  // steps in num

    __device__ __forceinline__ float (&all())[SUMS] { return total; }
    __device__ __forceinline__ bool adds() const { return RESTART > 1 && chained > 0; }
#else
    float kept[2] = {1.0f, 1.0f};  // by how much what is folded counts less by now

    __device__ __forceinline__ float (&all())[SUMS] { return num; }
    __device__ __forceinline__ static bool adds() { return true; }
#endif

    __device__ __forceinline__ Sums() { clear(all()); }

    __device__ __forceinline__ static void clear(float (&sums)[SUMS]) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
    }

    // So many steps are summed; the last one of an item, maybe.
    __device__ __forceinline__ void fold(int steps, bool last, Shared& shared) {
#if RESTART
        if (++chained < RESTART && !last) return;
        chained = 0;
#pragma unroll
        for (int i = 0; i < SUMS; ++i) total[i] += num[i];
#elif FOLD
        if (last ? steps <= FOLD : steps % FOLD > 0) return;
#pragma unroll
        for (int i = 0; i < SUMS / 4; ++i) {
            float4& own = shared.totals[i][threadIdx.x - 128];
            const float4 before = steps == FOLD ? float4{} : own;
            num[4 * i] += before.x * kept[0];
            num[4 * i + 1] += before.y * kept[0];
            num[4 * i + 2] += before.z * kept[1];
            num[4 * i + 3] += before.w * kept[1];
            if (!last) own = {num[4 * i], num[4 * i + 1], num[4 * i + 2], num[4 * i + 3]};
        }
        if (!last) clear(num);
        kept[0] = kept[1] = 1.0f;
#endif
    }

    __device__ __forceinline__ void scale(const float (&factor)[2]) {
        scale_rows(all(), factor);
#if RESTART
        if (RESTART > 1) scale_rows(num, factor);
#elif FOLD
        kept[0] *= factor[0];
        kept[1] *= factor[1];
#endif
    }
};
