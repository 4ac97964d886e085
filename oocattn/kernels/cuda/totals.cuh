// What survey.cu sums over rows: weights of each key, and of pools of rows and keys.
//
// Compiled with RECEIVED and POOLED (0 or 1). Sums of many blocks are added in any order, and have the same bits in each: a
// float32 number is added as two float64 ones, multiples of 2^-28 and of 2^-63, whose sums are exact up to 2^25.

#pragma once

#include "shared.cuh"
#include "softmax.cuh"

constexpr double COARSE = 25165824.0;    // 1.5 times 2^24: what is added to it is rounded to multiples of 2^-28
constexpr double PRECISE = 0.000732421875;  // 1.5 times 2^-11: to multiples of 2^-63

// Where the sums of a call are. Strides count elements; `low` is from a sum to the one of its small parts.
struct Totals {
    double* received;  // [heads, keys]
    long long received_head, received_low;
    double* pooled;  // [heads, pools of rows, pools of keys], from the first of a block on
    long long pooled_head, pooled_low;
    const int* pools;     // of each key of the call
    int pools_of_keys;    // in a row of `pooled`
    int rows_of_pool;     // row i is in pool (i + before) / rows_of_pool
    int before;
};

__device__ __forceinline__ void add_exactly(double* sum, long long low, float more) {
    if (more == 0.0f) return;
    const double all = more, large = __dadd_rn(__dadd_rn(all, COARSE), -COARSE);
    atomicAdd(sum, large);
    if (large != all) atomicAdd(sum + low, __dadd_rn(__dadd_rn(all - large, PRECISE), -PRECISE));
}

#if RECEIVED

constexpr int SLOTS = 2;  // steps whose sums are on their way from the consumers to the warp that adds them up
constexpr int WARPS = 4 * CONSUMERS;

constexpr int OWN_KEYS = KEYS / 32;  // of a lane
constexpr int PADDING = 8;           // so that the rows of half a warp lie in different banks

struct KeySums {
    alignas(16) float sums[SLOTS][WARPS][KEYS];      // over the 16 rows of each warp
    alignas(16) float rows[WARPS][8][KEYS + PADDING];  // of each warp, over two rows
    Word full[SLOTS], free[SLOTS];

    __device__ void begin() {
        for (int slot = 0; slot < SLOTS; ++slot) begin_barrier(&full[slot], WARPS), begin_barrier(&free[slot], 1);
    }
};

struct alignas(4 * OWN_KEYS) Keys {
    float sums[OWN_KEYS];
};

// The sums of a warp's weights over its rows: each thread adds up two, the lanes exchange those, and each is left with some keys.
__device__ __forceinline__ void hand_over(KeySums& handed, unsigned turn, const float (&weights)[SCORES]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4, slot = turn % SLOTS;
    float(&rows)[8][KEYS + PADDING] = handed.rows[warp];
#pragma unroll
    for (int i = 0; i < SCORES; i += 4) {
        const float2 two = {weights[i] + weights[i + 2], weights[i + 1] + weights[i + 3]};
        *reinterpret_cast<float2*>(&rows[lane / 4][2 * i + lane % 4 * 2]) = two;
    }
    __syncwarp();
    Keys own = reinterpret_cast<const Keys*>(rows[0])[lane];
#pragma unroll
    for (int row = 1; row < 8; ++row) {
        const Keys more = reinterpret_cast<const Keys*>(rows[row])[lane];
#pragma unroll
        for (int i = 0; i < OWN_KEYS; ++i) own.sums[i] += more.sums[i];
    }
    wait(&handed.free[slot], turn / SLOTS % 2 ^ 1);
    reinterpret_cast<Keys*>(handed.sums[slot][warp])[lane] = own;
    __syncwarp();
    if (lane == 0) arrive(&handed.full[slot]);
}

// One warp adds what the consumers hand over, step by step, to the sums of the keys.
__device__ void collect(Shared& shared, KeySums& handed, const Call& call, const Totals& totals) {
    const int lane = threadIdx.x % 32;
    unsigned turn = 0;
    for (int phase = 0;; phase ^= 1) {
        wait(&shared.query_full, phase);
        const Item& item = shared.items[phase];
        const int steps = item.steps;
        if (steps == 0) return;
        __syncwarp();
        if (lane == 0) arrive(&shared.query_free);  // queries are not read, and of two items this one is not overwritten next
        double* sums = totals.received + item.head * totals.received_head;
#pragma unroll 1
        for (int step = 0; step < steps; ++step, ++turn) {
            const int slot = turn % SLOTS, first = item.key(step);
            wait(&handed.full[slot], turn / SLOTS % 2);
            float own[KEYS / 32] = {};
#pragma unroll 1
            for (int warp = 0; warp < WARPS; ++warp)
#pragma unroll
                for (int i = 0; i < KEYS / 32; ++i) own[i] += handed.sums[slot][warp][32 * i + lane];
            __syncwarp();
            if (lane == 0) arrive(&handed.free[slot]);
#pragma unroll
            for (int i = 0; i < KEYS / 32; ++i) {
                const int key = first + 32 * i + lane;
                if (key < call.keys) add_exactly(sums + key, totals.received_low, own[i]);
            }
        }
    }
}

#endif

#if POOLED

// Weights of a thread's two rows and the keys of one pool, until they are added to what all have of it.
struct Pools {
    float sums[2] = {0.0f, 0.0f};
    int of_keys = -1;

    // Go on with the keys of a pool.
    __device__ void begin(const Call& call, const Totals& totals, int head, int first_row, int pool) {
        if (pool == of_keys) return;
        if (of_keys >= 0) add(call, totals, head, first_row);
        of_keys = pool;
    }

    // Add the sums to those of the pools, of which the warp's rows may have several.
    __device__ void add(const Call& call, const Totals& totals, int head, int first_row) {
        int of_rows[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            of_rows[i] = (min(first_row + 8 * i, call.rows - 1) + totals.before) / totals.rows_of_pool;
        const int lane = threadIdx.x % 32, last = __shfl_sync(~0u, of_rows[1], 31);
        for (int pool = __shfl_sync(~0u, of_rows[0], 0); pool <= last; ++pool) {
            float sum = (of_rows[0] == pool ? sums[0] : 0.0f) + (of_rows[1] == pool ? sums[1] : 0.0f);
#pragma unroll
            for (int apart = 1; apart < 32; apart *= 2) sum += __shfl_xor_sync(~0u, sum, apart);
            double* place = totals.pooled + head * totals.pooled_head + (long long)pool * totals.pools_of_keys + of_keys;
            if (lane == 0) add_exactly(place, totals.pooled_low, sum);
        }
        sums[0] = sums[1] = 0.0f;
    }

    // Add the weights of a step whose keys are of several pools: from that of the first, which is begun, to `last`.
    __device__ void add_apart(
        const float (&weights)[SCORES],
        const Call& call,
        const Totals& totals,
        int head,
        int first_row,
        int first_key,
        int last) {
        const int lane = threadIdx.x % 32, column = lane % 4 * 2;
        int of_key[KEYS / 32];
#pragma unroll
        for (int i = 0; i < KEYS / 32; ++i) of_key[i] = totals.pools[min(first_key + 32 * i + lane, call.keys - 1)];
        for (int pool = of_keys, start = 0, stop; pool <= last; ++pool, start = stop) {
            stop = 0;
#pragma unroll
            for (int i = 0; i < KEYS / 32; ++i) stop += __popc(__ballot_sync(~0u, of_key[i] <= pool));
            begin(call, totals, head, first_row, pool);
#pragma unroll
            for (int i = 0; i < SCORES; ++i) {
                const int key = i / 4 * 8 + column + i % 2;
                if (key >= start && key < stop) sums[i / 2 % 2] += weights[i];
            }
        }
    }
};

#endif
