// What a consumer of hopper.cu does with the sums of an item: they are added to the state, or are a result of their own.
//
// Compiled with VALUE_DIM, CONSUMERS and SPLIT.

#pragma once

#include "items.cuh"
#include "softmax.cuh"
#include "state.cuh"

__device__ __forceinline__ int acquire(const int* count) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
    return value;
}

#if SPLIT

// Write what an item summed: `state` has the results of a span where others have those of a head.
template <int SUMS>
__device__ void write_state(
    const State& state, const Call& call, const Item& item, int first_row, const float (&num)[SUMS], Softmax& softmax) {
    softmax.sum_den();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const long long row = first_row + 8 * i;
        if (row >= call.rows) continue;
        float* own = state.num + item.turn * state.num_head + row * state.num_row + threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < SUMS / 4; ++j) {
            if (8 * j >= VALUE_DIM) break;
            *reinterpret_cast<float2*>(own + 8 * j) = {num[4 * j + 2 * i], num[4 * j + 2 * i + 1]};
        }
        if (threadIdx.x % 4 == 0) {
            state.max[item.turn * state.max_head + row * state.max_row] = softmax.shift[i] * LN2;
            state.den[item.turn * state.den_head + row * state.den_row] = softmax.den[i];
        }
    }
}

#else

// Of a thread's two rows in the state.
struct Before {
    float max[2], den[2];
};

__device__ __forceinline__ int* turn_of(const Call& call, const Item& item) {
    return call.turns + (item.head * tiles_of(call) + item.tile) * CONSUMERS + threadIdx.x / 128 - 1;
}

// Wait until the spans of the tile before this one are added.
__device__ __forceinline__ void wait_for_turn(const Call& call, const Item& item) {
    if (item.turn == 0) return;
    if (threadIdx.x % 128 == 0)
        while (acquire(turn_of(call, item)) != item.turn) __nanosleep(100);
    named_wait(threadIdx.x / 128, 128);
}

// Let the span after this one be added.
__device__ __forceinline__ void end_turn(const Call& call, const Item& item) {
    named_wait(threadIdx.x / 128, 128);  // what all have written is released by one
    if (threadIdx.x % 128 == 0)
        asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turn_of(call, item)), "r"(item.turn + 1) : "memory");
}

__device__ Before load_before(const State& state, const Call& call, const Item& item, int first_row) {
    wait_for_turn(call, item);
    Before before;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const long long row = first_row + 8 * i;
        before.max[i] = row < call.rows ? state.max[item.head * state.max_head + row * state.max_row] : 0.0f;
        before.den[i] = row < call.rows ? state.den[item.head * state.den_head + row * state.den_row] : 0.0f;
    }
    return before;
}

// Add the sums of the first or second of a thread's rows to those at `own`, if it has any.
template <bool ANY, int SUMS>
__device__ __forceinline__ void add_row(float* own, const float (&num)[SUMS], int which, float keep, float take) {
#pragma unroll
    for (int j = 0; j < SUMS / 4; ++j) {
        if (8 * j >= VALUE_DIM) break;
        float2* two = reinterpret_cast<float2*>(own + 8 * j);
        const float2 old = ANY ? *two : float2{0.0f, 0.0f};
        const float2 added = {num[4 * j + 2 * which], num[4 * j + 2 * which + 1]};
        *two = {old.x * keep + added.x * take, old.y * keep + added.y * take};
    }
}

// Add what an item summed to the state.
template <int SUMS>
__device__ void add_to_state(
    const State& state,
    const Call& call,
    const Item& item,
    int first_row,
    const float (&num)[SUMS],
    Softmax& softmax,
    const Before& before) {
    softmax.sum_den();
    __syncwarp();  // all have read what one overwrites
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const long long row = first_row + 8 * i;
        if (row >= call.rows) continue;
        const float shift = softmax.shift[i] * LN2, max = before.max[i];
        const float highest = max != max ? max : fmaxf(max, shift);     // NaN stays NaN
        const float less = highest == MINUS_INFINITY ? 0.0f : highest;  // -inf: a row with no key
        const float keep = expf(max - less), take = expf(shift - less);
        float* own = state.num + item.head * state.num_head + row * state.num_row + threadIdx.x % 4 * 2;
        if (max == MINUS_INFINITY)  // no keys so far: nothing is read, and nothing waits for memory
            add_row<false>(own, num, i, keep, take);
        else
            add_row<true>(own, num, i, keep, take);
        if (threadIdx.x % 4 == 0) {
            state.max[item.head * state.max_head + row * state.max_row] = highest;
            state.den[item.head * state.den_head + row * state.den_row] = before.den[i] * keep + softmax.den[i] * take;
        }
    }
    end_turn(call, item);
}

#endif
