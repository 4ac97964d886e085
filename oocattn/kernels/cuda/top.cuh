// The largest weights of each row, and their keys, which survey.cu keeps.
//
// Compiled with TOP (weights of a row; 0: none are kept) and PLACES (of a row's list: a multiple of 32, TOP + 32 at least).
//
// A weight comes to its row's list if it is above the least that counts; where the list is full, its TOP largest are kept, and
// the smallest of them is the least that counts from then on. Which weights are kept depends neither on that nor on what
// other blocks do: of equal ones the first keys are.

#pragma once

#include "items.cuh"
#include "softmax.cuh"

#if TOP

// Of the calls before, and of this one: columns of a row in the state. `keys` are the numbers of the call's keys.
struct Kept {
    float* weights;
    long long head, row;
    const int* keys;
};

struct Lists {
    Word all[ROWS][PLACES];  // the bits of a weight, and below them those of the key, inverted
    int counts[ROWS];        // more than PLACES where some have found no place
};

__device__ __forceinline__ float weight_of(Word listed) { return __uint_as_float(unsigned(listed >> 32)); }

// Leave the TOP largest of a row's list, in order. By a warp.
__device__ __forceinline__ void shrink(Lists& lists, int row) {
    constexpr int OWN = PLACES / 32;
    const int lane = threadIdx.x % 32, count = min(lists.counts[row], PLACES);
    Word own[OWN];
    int rank[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) own[i] = 32 * i + lane < count ? lists.all[row][32 * i + lane] : 0, rank[i] = 0;
    for (int place = 0; place < count; ++place) {
        const Word other = lists.all[row][place];
#pragma unroll
        for (int i = 0; i < OWN; ++i) rank[i] += other > own[i];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        if (own[i] && rank[i] < TOP) lists.all[row][rank[i]] = own[i];
    if (lane == 0) lists.counts[row] = min(count, TOP);
    __syncwarp();
}

// Of a thread's two rows.
struct Top {
    float least[2];  // a weight counts above it
    int rows[2];     // in the lists

    __device__ Top(Lists& lists, const Call& call, const Kept& kept, int head, int first_row) {
        const int lane = threadIdx.x % 32, first = (threadIdx.x / 32 - 4) * 16;
        __syncwarp();
        if (lane < 16) lists.counts[first + lane] = 0;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + 8 * i;
            rows[i] = first + lane / 4 + 8 * i;
            // Another block may add to these meanwhile: any of them is right, for an equal weight of another key may yet count.
            const float before = row < call.rows ? kept.weights[head * kept.head + row * kept.row + TOP - 1] : 0.0f;
            least[i] = before > 0.0f ? __uint_as_float(__float_as_uint(before) - 1) : 0.0f;
        }
    }

    // Take what counts of the weights of a step, whose keys begin at `first`.
    __device__ __forceinline__ void take(Lists& lists, const float (&weights)[SCORES], int first) {
        const int lane = threadIdx.x % 32, first_list = (threadIdx.x / 32 - 4) * 16;
        unsigned pending[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < SCORES; ++i)
            if (weights[i] > least[i / 2 % 2]) pending[i / 2 % 2] |= 1u << (i / 4 * 2 + i % 2);
        while (true) {
            const unsigned wanted[2] = {__reduce_or_sync(~0u, pending[0]), __reduce_or_sync(~0u, pending[1])};
            if ((wanted[0] | wanted[1]) == 0) return;
#pragma unroll
            for (int i = 0; i < SCORES; ++i) {
                const int which = i / 2 % 2;
                const unsigned bit = 1u << (i / 4 * 2 + i % 2);
                if (!(wanted[which] & bit)) continue;  // the whole warp
                if (!(pending[which] & bit)) continue;
                if (weights[i] >= least[which]) {
                    const int place = atomicAdd(&lists.counts[rows[which]], 1);
                    if (place >= PLACES) continue;
                    const unsigned key = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    lists.all[rows[which]][place] = Word(__float_as_uint(weights[i])) << 32 | ~key;
                }
                pending[which] ^= bit;
            }
            __syncwarp();
            const unsigned full = __ballot_sync(~0u, lane < 16 && lists.counts[first_list + lane % 16] > PLACES);
            for (unsigned left = full; left; left &= left - 1) shrink(lists, first_list + __ffs(left) - 1);
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (full >> (rows[i] - first_list) & 1) least[i] = weight_of(lists.all[rows[i]][TOP - 1]);
        }
    }
};

// Add the lists of a warp's rows to what is kept of them; of equal weights those that are there come first. The spans of a
// tile do it in their order.
__device__ __forceinline__ void add_lists(Lists& lists, const Kept& kept, int tile, int head) {
    constexpr int OWN = (TOP + 31) / 32;
    const int lane = threadIdx.x % 32, first = (threadIdx.x / 32 - 4) * 16;
    __syncwarp();
    for (int row = first; row < first + 16; ++row) {
        if (lists.counts[row] == 0) continue;
        shrink(lists, row);
        const int count = lists.counts[row];
        float* weights = kept.weights + head * kept.head + (tile * ROWS + row) * kept.row;
        float before[OWN], key_before[OWN];
        Word own[OWN];
        int rank_before[OWN], rank[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int place = 32 * i + lane;
            before[i] = place < TOP ? weights[place] : 0.0f;
            key_before[i] = place < TOP ? weights[TOP + place] : 0.0f;
            own[i] = place < count ? lists.all[row][place] : 0;
            rank_before[i] = rank[i] = place;
        }
        for (int place = 0; place < TOP; ++place) {
            const float listed = place < count ? weight_of(lists.all[row][place]) : 0.0f, other = weights[place];
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                rank_before[i] += listed > before[i];
                rank[i] += other > 0.0f && other >= weight_of(own[i]);
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int place = 32 * i + lane;
            if (place < TOP && rank_before[i] < TOP && before[i] > 0.0f) {
                weights[rank_before[i]] = before[i];
                weights[TOP + rank_before[i]] = key_before[i];
            }
            if (place < count && rank[i] < TOP) {
                weights[rank[i]] = weight_of(own[i]);
                weights[TOP + rank[i]] = __int_as_float(kept.keys[~unsigned(own[i])] + 1);
            }
        }
        __syncwarp();
    }
}

#endif
