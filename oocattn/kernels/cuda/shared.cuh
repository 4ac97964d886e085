// Shared memory of hopper.cu: a tile of queries, rings of keys and values, barriers, items.

#pragma once

#include "instructions.cuh"
#include "items.cuh"

constexpr int PANEL = 64;  // columns of 16 bits in the 128 bytes that TMA and the matrix units swizzle together
constexpr int KEY_PANELS = (HEAD_DIM + PANEL - 1) / PANEL;  // of each part; columns beyond HEAD_DIM are filled with zeros
constexpr int VALUE_PANELS = (VALUE_DIM + PANEL - 1) / PANEL;
constexpr int KEY_PRODUCTS = (HEAD_DIM + 15) / 16;  // of 16 columns
constexpr int SUMS = VALUE_DIM <= 8 ? 4 : VALUE_DIM <= 16 ? 8 : VALUE_PANELS * PANEL / 2;
constexpr int ROW_BYTES = 2 * PANEL;  // of a panel
constexpr int QUERY_PART = KEY_PANELS * ROWS * ROW_BYTES, QUERY_BYTES = PARTS * QUERY_PART;
constexpr int KEY_PART = KEY_PANELS * KEYS * ROW_BYTES, KEY_BYTES = PARTS * KEY_PART;  // of a stage
constexpr int VALUE_PART = VALUE_PANELS * KEYS * ROW_BYTES, VALUE_BYTES = PARTS * VALUE_PART;
// A thread's registers, multiples of 8: a block begins with 128 for each of 512 threads, or 168 for each of 384.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;

#if LISTED
struct Step {
    int first;  // key
    int live;   // keys from there on that any row of the tile attends; WHOLE if all rows attend the step
};
constexpr int WHOLE = 0x7FFFFFFF;

// A step, for a warp: the lane reads it that tells when its keys are free again, and so when it may be overwritten.
__device__ __forceinline__ Step for_warp(const Step& step) {
    Step own = {};
    if (threadIdx.x % 32 == 0) own = step;
    return {__shfl_sync(~0u, own.first, 0), __shfl_sync(~0u, own.live, 0)};
}
#endif

struct Shared {
    alignas(1024) char query[QUERY_BYTES];
    alignas(1024) char key[STAGES][KEY_BYTES];
    alignas(1024) char value[STAGES][VALUE_DIM ? VALUE_BYTES : 1];
    float4 totals[FOLD ? SUMS / 4 : 1][FOLD ? 128 * CONSUMERS : 1];  // sums that were folded, of each thread
    Word query_full, query_free;
    Word key_full[STAGES], key_free[STAGES], value_full[STAGES], value_free[STAGES];
    Item items[2];  // in turns: consumers read one until they have added it to the state
    Item next;
#if LISTED
    Intervals<int> whole[4 * CONSUMERS];  // keys that all rows of a consumer's warp attend
    Step steps[2 * STAGES];  // of a stage and the one before: a step is done with when the keys two stages on are
#endif
};

static_assert(sizeof(Shared) + 1024 <= SHARED_BYTES);  // dynamic shared memory may begin anywhere

// By one thread; `others` read items besides the consumers.
__device__ __forceinline__ void begin_barriers(Shared& shared, int others) {
    begin_barrier(&shared.query_full, 1);
    begin_barrier(&shared.query_free, 128 * CONSUMERS + others);  // of the item too, which every thread reads
    for (int stage = 0; stage < STAGES; ++stage) {
        begin_barrier(&shared.key_full[stage], 1);
        begin_barrier(&shared.value_full[stage], 1);
        begin_barrier(&shared.key_free[stage], 4 * CONSUMERS);
        begin_barrier(&shared.value_free[stage], CONSUMERS);
    }
}

// The stage of a step, over all items. Two ways to count, each measured to be the faster one with so many consumers.
struct Ring {
#if CONSUMERS == 3
    int at = 0, odd = 0;
    __device__ __forceinline__ int stage() const { return at; }
    __device__ __forceinline__ int phase() const { return odd; }
    __device__ __forceinline__ void advance() {
        if (++at == STAGES) at = 0, odd ^= 1;
    }
#else
    unsigned count = 0;
    __device__ __forceinline__ int stage() const { return count % STAGES; }
    __device__ __forceinline__ int phase() const { return count / STAGES & 1; }
    __device__ __forceinline__ void advance() { ++count; }
#endif
    __device__ __forceinline__ int slot() const { return phase() * STAGES + stage(); }  // of twice as many as stages
};
