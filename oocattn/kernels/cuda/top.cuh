// The largest weights of each row, and their keys, which survey.cu keeps.
//
// Compiled with TOP (weights of a row; 0: none are kept) and PLACES (of a row's list: a multiple of 32, TOP + 4 at least).
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

constexpr bool SEEDED = TOP <= 8;

struct Lists {
    Word all[ROWS][PLACES];  // the bits of a weight, and below them those of the key, inverted; 0: none
    int counts[ROWS];        // more than PLACES where some have found no place
};

__device__ __forceinline__ float weight_of(Word listed) { return __uint_as_float(unsigned(listed >> 32)); }

// The next smaller number, of 0 or more.
__device__ __forceinline__ float below(float weight) {
    return weight > 0.0f ? __uint_as_float(__float_as_uint(weight) - 1) : 0.0f;
}

// Leave the TOP largest of a row's list, in order. By a warp.
__device__ __forceinline__ void shrink(Lists& lists, int row) {
    constexpr int OWN = PLACES / 32;
    const int lane = threadIdx.x % 32, count = min(lists.counts[row], PLACES);
    Word(&list)[PLACES] = lists.all[row], own[OWN];
    int rank[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) own[i] = 32 * i + lane < count ? list[32 * i + lane] : 0, rank[i] = 0;
    for (int place = 0; place < count; ++place) {
        const Word other = list[place];
#pragma unroll
        for (int i = 0; i < OWN; ++i) rank[i] += other > own[i];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        if (own[i] && rank[i] < TOP) list[rank[i]] = own[i];
    if (lane == 0) lists.counts[row] = min(count, TOP);
    __syncwarp();
}

// Add a list to the weights that are kept of a row, and their keys, whose numbers are `numbers`; of equal weights those that are
// there come first. By a warp.
__device__ __forceinline__ void add_list(const Word (&list)[PLACES], int count, float* weights, const int* numbers) {
    constexpr int OWN = (TOP + 31) / 32;
    const int lane = threadIdx.x % 32;
    float before[OWN], key_before[OWN];
    Word own[OWN];
    int rank_before[OWN], rank[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const int place = 32 * i + lane;
        before[i] = place < TOP ? weights[place] : 0.0f;
        key_before[i] = place < TOP ? weights[TOP + place] : 0.0f;
        own[i] = place < count ? list[place] : 0;
        rank_before[i] = rank[i] = place;
    }
    for (int place = 0; place < TOP; ++place) {
        const float listed = place < count ? weight_of(list[place]) : 0.0f, other = weights[place];
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
            weights[TOP + rank[i]] = __int_as_float(numbers[~unsigned(own[i])] + 1);
        }
    }
    __syncwarp();
}

// Of a thread's two rows.
struct Top {
    float least[2];  // a weight counts above it
    int rows[2];     // in the lists

    __device__ Top(Lists& lists, const Call& call, const Kept& kept, int head, int first_row) {
        const int lane = threadIdx.x % 32, first = first_list();
        __syncwarp();
        if (lane < 16) lists.counts[first + lane] = 0;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + 8 * i;
            rows[i] = first + lane / 4 + 8 * i;
            // Another block may add to these meanwhile: any of them is right, for an equal weight of another key may yet count.
            least[i] = row < call.rows ? below(kept.weights[head * kept.head + row * kept.row + TOP - 1]) : 0.0f;
        }
    }

    // Take what counts of the weights of a step, whose keys begin at `first`. A thread's are looked at by groups of four: the
    // two of each of its rows and 8 keys, and of the next 8.
    __device__ __forceinline__ void take(Lists& lists, const float (&weights)[SCORES], int first) {
        const int lane = threadIdx.x % 32;
        float least_here[2] = {least[0], least[1]};  // of equal weights in one step the first keys count, which may come later
        if (SEEDED && __any_sync(~0u, least[0] == 0.0f || least[1] == 0.0f)) seed(weights, least_here);
        unsigned pending = 0;  // groups
#pragma unroll
        for (int i = 0; i < SCORES; i += 2)
            if (fmaxf(weights[i], weights[i + 1]) > least_here[i / 2 % 2]) pending |= 1u << (i / 8 * 2 + i / 2 % 2);
        while (const unsigned wanted = __reduce_or_sync(~0u, pending)) {
#pragma unroll
            for (int group = 0; group < SCORES / 4; ++group) {
                const int row = group % 2, i = group / 2 * 8 + 2 * row;
                const unsigned bit = 1u << group;
                if (!(wanted & bit)) continue;  // the whole warp
                const float four[4] = {weights[i], weights[i + 1], weights[i + 4], weights[i + 5]};
                const unsigned key = first + group / 2 * 16 + lane % 4 * 2;
                if ((pending & bit) && add(lists, rows[row], four, least_here[row], key)) pending ^= bit;
            }
            __syncwarp();
            const unsigned full = __ballot_sync(~0u, lane < 16 && lists.counts[first_list() + lane % 16] > PLACES);
            for (unsigned left = full; left; left &= left - 1) shrink(lists, first_list() + __ffs(left) - 1);
#pragma unroll
            for (int row = 0; row < 2; ++row)
                if (full >> (rows[row] - first_list()) & 1) raise(row, weight_of(lists.all[rows[row]][TOP - 1]), least_here);
        }
    }

    // Add the lists of a warp's rows to what is kept of them. The spans of a tile do it in their order.
    __device__ __forceinline__ static void add_to(const Kept& kept, Lists& lists, int tile, int head) {
        __syncwarp();
        for (int row = first_list(); row < first_list() + 16; ++row) {
            if (lists.counts[row] == 0) continue;
            shrink(lists, row);
            float* weights = kept.weights + head * kept.head + ((long long)tile * ROWS + row) * kept.row;
            add_list(lists.all[row], lists.counts[row], weights, kept.keys);
        }
    }

  private:
    // Of the warp's rows.
    __device__ __forceinline__ static int first_list() { return (threadIdx.x / 32 - 4) * 16; }

    // Add those of a group that count to a row's list: all, or none where there is no room.
    __device__ __forceinline__ static bool add(Lists& lists, int row, const float (&four)[4], float least, unsigned key) {
        int count = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) count += four[i] > least;
        int place = atomicAdd(&lists.counts[row], count);
        if (place + count > PLACES) {
            for (; place < PLACES; ++place) lists.all[row][place] = 0;
            return false;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (four[i] > least) lists.all[row][place++] = Word(__float_as_uint(four[i])) << 32 | ~(key + i / 2 * 8 + i % 2);
        return true;
    }

    // That many weights up to this step are as large as `weight`.
    __device__ __forceinline__ void raise(int row, float weight, float (&least_here)[2]) {
        if (weight <= least[row]) return;
        least[row] = weight;
        least_here[row] = below(weight);
    }

    // Begin where nothing is known of a row: of each of eight parts of a step's keys one weight is as large as the smallest of
    // the largest of all.
    __device__ __forceinline__ void seed(const float (&weights)[SCORES], float (&least_here)[2]) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float largest[2] = {0.0f, 0.0f};
#pragma unroll
            for (int i = 2 * row; i < SCORES; i += 4)
#pragma unroll
                for (int j = 0; j < 2; ++j) largest[j] = fmaxf(largest[j], weights[i + j]);
            float smallest = fminf(largest[0], largest[1]);
            smallest = fminf(smallest, __shfl_xor_sync(~0u, smallest, 1));
            raise(row, fminf(smallest, __shfl_xor_sync(~0u, smallest, 2)), least_here);
        }
    }
};

#endif
