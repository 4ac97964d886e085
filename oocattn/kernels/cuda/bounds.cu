// The bounds of each row of a call, and the items into which hopper.cu cuts it: what a listed call reads (items.cuh).
//
// Compiled with MOST_PIECES, PROCESSORS (to fill), MOST_STEPS and FEWEST_STEPS (of an item), and what items.cuh asks for. A
// block takes a tile of rows, a thread each; the last block to end lists the items.

#include "items.cuh"
#include "launches.cuh"

constexpr int BUCKETS = 1024;
constexpr int SLACK = 16;  // the last item of a tile is longer by a sixteenth at most, where that saves another one
constexpr int FAR = 1 << 30;  // beyond any key

struct Listing {
    int rows, tiles, heads;
    int* ended;   // blocks, 0 at first
    int* listed;  // items of a head
    Listed* items;
    Walk* walks;
    Intervals<int>* wholes;
    Intervals<int>* bounds;
    int* positions;  // or null
};

// The keys that rows from `row` to `last` of a piece attend begin and end here; between them lies a hole, which may be empty.
__device__ Walk walk_of(const Piece<int>& piece, int row, int last) {
    const Intervals<int> low = piece.at(row), high = piece.at(last);
    const bool first = low.a < high.b, second = low.c < high.d;  // has any row keys in its first interval, in its second?
    if (!first && !second) return {FAR, 0, 0, -FAR};
    if (!first) return {low.c, low.c, low.c, high.d};
    if (!second) return {low.a, low.a, low.a, high.b};
    if (low.c <= high.b) return {low.a, low.a, low.a, high.d};
    return {low.a, high.b, low.c, high.d};
}

// One interval is always the second, so that rows of a warp that have one and rows that have two are comparable.
__device__ Intervals<int> joined(const Intervals<int>& own) {
    if (own.b == own.c) return {own.a, own.a, own.a, own.d};
    if (own.c == own.d) return {own.a, own.a, own.a, own.b};
    return own;
}

// Take the items of this thread's tiles, with the bucket of each.
template <typename Take>
__device__ void each_item(const Listing& listing, int span, Take take) {
    for (int tile = threadIdx.x; tile < listing.tiles; tile += ROWS) {
        const int steps = listing.walks[tile].steps();
        for (int turn = 0, first = 0, count; first < steps; ++turn, first += count) {
            count = steps - first <= span + span / SLACK ? steps - first : span;
            take(count < span ? BUCKETS - count : turn, Listed{tile, first, count, turn});
        }
    }
}

// Items with most steps first; those of full length by their turn, so that the spans of a tile are far apart.
__device__ void list_items(const Listing& listing) {
    __shared__ unsigned long long total;
    __shared__ int places[BUCKETS + BUCKETS / 32];
    auto place_of = [&](int bucket) -> int& { return places[bucket + bucket / 32]; };  // lanes meet no conflict of banks
    for (int bucket = threadIdx.x; bucket < BUCKETS; bucket += ROWS) place_of(bucket) = 0;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    unsigned long long own = 0;
    for (int tile = threadIdx.x; tile < listing.tiles; tile += ROWS) own += listing.walks[tile].steps();
    atomicAdd(&total, own);
    __syncthreads();
    const unsigned long long share = (total * listing.heads + 2 * PROCESSORS - 1) / (2 * PROCESSORS);
    const int span = int(min(max(share, (unsigned long long)FEWEST_STEPS), (unsigned long long)MOST_STEPS));

    each_item(listing, span, [&](int bucket, const Listed&) { atomicAdd(&place_of(bucket), 1); });
    __syncthreads();
    if (threadIdx.x < 32) {  // places become those of the first item of each bucket
        int sum = 0, before;
        for (int i = 0; i < BUCKETS / 32; ++i) sum += place_of(threadIdx.x * (BUCKETS / 32) + i);
        int upto = sum;
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            const int other = __shfl_up_sync(~0u, upto, lanes);
            if (threadIdx.x >= lanes) upto += other;
        }
        before = upto - sum;
        for (int i = 0; i < BUCKETS / 32; ++i) {
            int& place = place_of(threadIdx.x * (BUCKETS / 32) + i);
            const int count = place;
            place = before;
            before += count;
        }
        if (threadIdx.x == 31) *listing.listed = before;
    }
    __syncthreads();
    each_item(listing, span, [&](int bucket, const Listed& item) { listing.items[atomicAdd(&place_of(bucket), 1)] = item; });
}

extern "C" __global__ void __launch_bounds__(ROWS) list(
    const __grid_constant__ Pieces<int, MOST_PIECES> pieces, const __grid_constant__ Listing listing) {
    __shared__ int low, high;
    __shared__ unsigned long long hole;  // the longest: its length and start
    __shared__ Intervals<int> whole;
    __shared__ bool is_last;
    const int first = blockIdx.x * ROWS, row = first + threadIdx.x;
    let_next_launch_begin();
    if (threadIdx.x == 0) low = FAR, high = -FAR, hole = 0, whole = {-FAR, FAR, -FAR, FAR};
    __syncthreads();
    Intervals<int> own = {-FAR, FAR, -FAR, FAR};  // a row beyond the last attends anything
    if (row < listing.rows) {
        const int found = pieces.find(row);
        const Piece<int>& piece = pieces.all[found];
        own = joined(piece.at(row));
        if (listing.positions) listing.positions[row] = row + piece.position;
        if (row == max(first, pieces.start_row(found))) {
            const Walk walk = walk_of(piece, row, min(piece.stop_row, first + ROWS) - 1);
            atomicMin(&low, walk.low);
            atomicMax(&high, walk.high);
            const unsigned long long length = max(walk.resume - walk.hole, 0);
            if (length) atomicMax(&hole, length << 32 | unsigned(walk.hole));
        }
    } else if (listing.positions) {
        listing.positions[row] = 0;
    }
    listing.bounds[row] = own;
    const int ends[4] = {__reduce_max_sync(~0u, own.a), __reduce_min_sync(~0u, own.b), __reduce_max_sync(~0u, own.c),
                         __reduce_min_sync(~0u, own.d)};
    if (threadIdx.x % 32 == 0) {
        atomicMax(&whole.a, ends[0]);
        atomicMin(&whole.b, ends[1]);
        atomicMax(&whole.c, ends[2]);
        atomicMin(&whole.d, ends[3]);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        listing.wholes[blockIdx.x] = whole;
        const int start = int(hole & 0xFFFFFFFF), stop = start + int(hole >> 32);
        const Walk split = {low, start, stop, high}, whole = {low, low, low, high};
        listing.walks[blockIdx.x] = low >= high ? Walk{} : hole && split.steps() < whole.steps() ? split : whole;
        __threadfence();
        is_last = atomicAdd(listing.ended, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    list_items(listing);
}
