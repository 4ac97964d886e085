// What a call of hopper.cu has to do, cut into items: a tile of query rows of one head, and a span of the keys that they
// attend.
//
// Compiled with CONSUMERS, KEYS (of one step), ITEMS (of a block), MOST_SLOPES, LISTED (0 or 1: whether bounds.cu has listed
// the items, for rows with bounds of their own, or they follow from a band) and SPLIT (0 or 1: whether each span of a tile
// has a result of its own, which merge.cu merges).

#pragma once

#include "pieces.cuh"

constexpr int ROWS = 64 * CONSUMERS;

// The keys that any row of a tile attends: [low, hole) and [resume, high), all of which are walked.
struct Walk {
    int low, hole, resume, high;
    __device__ __forceinline__ int first_steps() const { return (hole - low + KEYS - 1) / KEYS; }
    __device__ __forceinline__ int steps() const { return first_steps() + (high - resume + KEYS - 1) / KEYS; }
};

// Whether all keys of a step are among some that are attended.
__device__ __forceinline__ bool is_whole(const Intervals<int>& all, int first) {
    return (first >= all.c && first + KEYS <= all.d) || (first >= all.a && first + KEYS <= all.b);
}

// An item of any head: steps of its tile's walk.
struct Listed {
    int tile, first, steps, turn;
};

// Row i of each head attends keys [i + lower, i + upper), as far as there are such keys, with lower < upper; or, of a listed
// call, those of its bounds.
struct Call {
    int heads, rows, keys;
    int span;          // keys of an item at most, a multiple of KEYS; of a listed call, blocks that share the items
    int lower, upper;  // between -rows and keys
    float scale;       // positive; times log2(e), or divided by the softcap
    float cap;         // the softcap times log2(e)
    int* next;         // the next item, 0 at first
    int* turns;        // zeros: how many spans each consumer's rows have added
    const int* listed;  // number of items of a head
    const Listed* items;
    const Walk* walks;               // of each tile
    const Intervals<int>* wholes;    // of each tile, the keys that all its rows attend
    const Intervals<int>* bounds;    // of each row, and of those that fill the last tile
    const int* positions;            // of each row: the key from which distances are counted
    const float* bias;               // of each key
    const float* unscaled;           // of rows in parts: factors that bring back products, and values
    const float* shift;              // of each row, where shifts are given
    long long shift_head, bias_head;  // from one head's to the next
    float slopes[MOST_SLOPES];       // of each head, times -log2(e)
};

// What is to be done by three calls, each of which waits for what the one before has asked memory for: draw, look_up, take.
struct Item {
    int tile, head;
    int first;  // key
    int turn;   // spans of the tile that add to the state before this one
    int steps;  // of KEYS keys; 0: there is no item left
#if LISTED
    int cut, second;  // from step `cut` on the keys begin at `second`, and not at `first`
    int stop, end;    // the end of what is walked up to the cut, and from it on
    Intervals<int> whole;
#endif

#if LISTED
    // Keys from the first of a step on to the end of what is walked without a hole.
    __device__ __forceinline__ int keys_left(int step) const { return (step < cut ? stop : end) - key(step); }
#endif

    // The first key of a step.
    __device__ __forceinline__ int key(int step) const {
#if LISTED
        return (step < cut ? first : second) + step * KEYS;
#else
        return first + step * KEYS;
#endif
    }
};

// A row attends the keys from the first of these on, up to the second.
__device__ __forceinline__ int key_within(const Call& call, long long key) {
    return key < 0 ? 0 : key < call.keys ? int(key) : call.keys;
}
__device__ __forceinline__ int key_start(const Call& call, int row) { return key_within(call, (long long)row + call.lower); }
__device__ __forceinline__ int key_stop(const Call& call, int row) { return key_within(call, (long long)row + call.upper); }

__device__ __forceinline__ int tiles_of(const Call& call) { return (call.rows + ROWS - 1) / ROWS; }

#if LISTED

// Items in the order in which bounds.cu lists them, each of all heads.
struct Items {
    const Call& call;
    int index;
    Listed item;

    __device__ Items(const Call& call) : call(call) {}

    // A few, after which a block ends; more where there are more items than the blocks that were launched can take.
    __device__ int of_block() const { return max(ITEMS, (*call.listed * call.heads + call.span - 1) / call.span); }

    __device__ void draw() { index = atomicAdd(call.next, 1); }

    __device__ void look_up() {
        item = index < *call.listed * call.heads ? call.items[index / call.heads] : Listed{};
    }

    __device__ Item take() const {
        if (item.steps == 0) return {};
        const Walk walk = call.walks[item.tile];
        const int before = walk.first_steps();
        return {item.tile, index % call.heads, walk.low + item.first * KEYS, item.turn, item.steps, before - item.first,
                walk.resume + (item.first - before) * KEYS, walk.hole, walk.high, call.wholes[item.tile]};
    }
};

#elif SPLIT

// A full call: each block has one item.
struct Items {
    const Call& call;

    __device__ Items(const Call& call) : call(call) {}

    __device__ static int of_block() { return 1; }
    __device__ static void draw() {}
    __device__ static void look_up() {}

    __device__ Item take() const {
        const int index = blockIdx.x, tiles = tiles_of(call), span = index / tiles, first = span * call.span;
        return {index % tiles, 0, first, span, (min(call.span, call.keys - first) + KEYS - 1) / KEYS};
    }
};

#else

// Items in the order in which they are taken: span by span; in each the last rows, which have most to do, first.
struct Items {
    const Call& call;
    int index;
    int span = 0, before = 0;  // items of the spans before `span`

    __device__ Items(const Call& call) : call(call) {}

    __device__ static int of_block() { return ITEMS; }
    __device__ void draw() { index = atomicAdd(call.next, 1); }
    __device__ static void look_up() {}

    // The first tile any row of which attends a key from `key` on.
    __device__ int first_tile(int key) const {
        const long long row = (long long)key + 1 - call.upper;
        return row >= call.rows ? tiles_of(call) : row < 0 ? 0 : int(row) / ROWS;
    }

    // The tile after the last any row of which attends a key before `key`.
    __device__ int stop_tile(int key) const {
        const long long rows = (long long)key - call.lower;
        return rows >= call.rows ? tiles_of(call) : rows <= 0 ? 0 : (int(rows) + ROWS - 1) / ROWS;
    }

    __device__ Item take() {
        for (; (long long)span * call.span < call.keys; ++span) {
            const int first = span * call.span, last = min(call.span, call.keys - first) + first;
            const int stop = stop_tile(last), here = max(0, stop - first_tile(first)) * call.heads;
            if (index < before + here) {
                const int tile = stop - 1 - (index - before) / call.heads;
                const int start = key_start(call, tile * ROWS), from = max(first, start / KEYS * KEYS);
                const int steps = (min(last, key_stop(call, min(call.rows, (tile + 1) * ROWS) - 1)) - from + KEYS - 1) / KEYS;
                return {tile, (index - before) % call.heads, from, span - start / call.span, steps};
            }
            before += here;
        }
        return {};
    }
};

#endif
