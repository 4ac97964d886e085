// Attention that continues a float32 state, for compute capability 9.0. What a state is, is defined in state.py; its ledger
// is not touched here.
//
// Compiled with HEAD_DIM and VALUE_DIM (multiples of 8, 128 at most), CONSUMERS (warpgroups of 64 query rows), STAGES (of the
// rings), RING (0 or 1: whether consumers take turns), ITEMS (of a block), SHARED_BYTES, and what the headers ask for.
//
// A block takes a few items one after another: a tile of query rows of one head and a span of keys. One thread loads by
// TMA; each consumer computes S = Q K^T, the softmax and num += P V in registers, the scores of a step before the values of
// the one before, and at the end of the span adds to the state in memory. The spans of a tile add in their order, from the
// first that its rows attend on, so that the bits do not depend on which block was faster. All heads of a group attend a span
// before the next one, so that keys and values come from device memory once. The structure is FlashAttention-3's (Shah et
// al., arXiv 2407.08608, section 3).

#include "items.cuh"
#include "launches.cuh"
#include "softmax.cuh"
#include "state.cuh"

constexpr int PANEL = 64;  // columns of 16 bits in the 128 bytes that TMA and the matrix units swizzle together
constexpr int KEY_PANELS = (HEAD_DIM + PANEL - 1) / PANEL;  // columns beyond HEAD_DIM are filled with zeros
constexpr int VALUE_PANELS = (VALUE_DIM + PANEL - 1) / PANEL;
constexpr int SUMS = VALUE_PANELS * PANEL / 2;
constexpr int ROW_BYTES = 2 * PANEL;  // of a panel
constexpr int QUERY_BYTES = KEY_PANELS * ROWS * ROW_BYTES;
constexpr int KEY_BYTES = KEY_PANELS * KEYS * ROW_BYTES;  // of a stage
constexpr int VALUE_BYTES = VALUE_PANELS * KEYS * ROW_BYTES;
// A thread's registers, multiples of 8: a block begins with 128 for each of 512 threads, or 168 for each of 384.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;

#if LISTED
struct Step {
    int first;  // key
    int live;   // keys from there on that any row of the tile attends; WHOLE if all rows attend the step
};
constexpr int WHOLE = 0x7FFFFFFF;
#endif

struct Shared {
    alignas(1024) char query[QUERY_BYTES];
    alignas(1024) char key[STAGES][KEY_BYTES];
    alignas(1024) char value[STAGES][VALUE_BYTES];
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

// ---- One thread loads ----

template <int PANELS>
__device__ __forceinline__ void load_panels(char* to, const TensorMap& map, Word* full, int panel_bytes, int row, int head) {
    for (int panel = 0; panel < PANELS; ++panel) load(to + panel * panel_bytes, map, full, panel * PANEL, row, head);
}

__device__ void produce(
    Shared& shared, const Call& call, const TensorMap& query, const TensorMap& key, const TensorMap& value) {
    Items items(call);
    Ring ring;
    int left = items.of_block();
    items.draw();
    items.look_up();
    shared.next = items.take();
    for (int turn = 0;; turn ^= 1) {
        wait(&shared.query_free, turn ^ 1);
        const Item& item = shared.items[turn];  // it has few registers
        shared.items[turn] = shared.next;
        if (item.steps == 0) {
            arrive(&shared.query_full);
            return;
        }
        arrive_expecting(&shared.query_full, QUERY_BYTES);
        load_panels<KEY_PANELS>(shared.query, query, &shared.query_full, ROWS * ROW_BYTES, item.tile * ROWS, item.head);
#pragma unroll 1
        for (int step = 0; step < item.steps; ++step, ring.advance()) {
            const int first = item.key(step), stage = ring.stage(), phase = ring.phase();
            wait(&shared.key_free[stage], phase ^ 1);
#if LISTED
            shared.steps[ring.slot()] = {first, is_whole(item.whole, first) ? WHOLE : item.keys_left(step)};
#endif
            arrive_expecting(&shared.key_full[stage], KEY_BYTES);
            load_panels<KEY_PANELS>(shared.key[stage], key, &shared.key_full[stage], KEYS * ROW_BYTES, first, 0);
            wait(&shared.value_free[stage], phase ^ 1);
            arrive_expecting(&shared.value_full[stage], VALUE_BYTES);
            load_panels<VALUE_PANELS>(shared.value[stage], value, &shared.value_full[stage], KEYS * ROW_BYTES, first, 0);
            // What comes next is drawn late, for other blocks may be free before, and so that nothing waits for memory.
            if (step == max(0, item.steps - 8) && --left > 0) items.draw();
            if (step == max(0, item.steps - 6) && left > 0) items.look_up();
            if (step == max(0, item.steps - 4)) shared.next = left > 0 ? items.take() : Item{};
        }
    }
}

// ---- A warpgroup computes 64 rows ----

// Issue S = Q K^T.
__device__ __forceinline__ void begin_scores(float (&scores)[SCORES], const char* query, const char* key) {
#pragma unroll
    for (int k = 0; k < KEY_PANELS * PANEL / 16; ++k) {
        const Word a = matrix(query + k / 4 * ROWS * ROW_BYTES + k % 4 * 32, 16);
        const Word b = matrix(key + k / 4 * KEYS * ROW_BYTES + k % 4 * 32, 16);
        multiply_scores(scores, a, b, k > 0);
    }
    commit_products();
}

// Issue num += P V.
__device__ __forceinline__ void begin_values(float (&num)[SUMS], const unsigned (&weights)[SCORES / 2], const char* value) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k)
        multiply_values(num, weights + 4 * k, matrix(value + k * 16 * ROW_BYTES, KEYS * ROW_BYTES));
    commit_products();
}

__device__ __forceinline__ void scale_rows(float (&num)[SUMS], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) num[i] *= factor[i / 2 % 2];
}

#if LISTED

// Values that none of the tile's rows attend become zeros, from key `live` of a step on: what follows a document may be
// NaN, and 0 times NaN is NaN. All consumers do it, each before it reads them.
__device__ void clear_values(char* value, int live, int barrier) {
    for (int at = live * ROW_BYTES + threadIdx.x % 128 * 16; at < KEYS * ROW_BYTES; at += 128 * 16)
#pragma unroll
        for (int panel = 0; panel < VALUE_PANELS; ++panel)
            *reinterpret_cast<uint4*>(value + panel * KEYS * ROW_BYTES + at) = {0, 0, 0, 0};
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    named_wait(barrier, 128);
}

#endif

__device__ __forceinline__ int acquire(const int* count) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
    return value;
}

#if SPLIT

// Write what an item summed: `state` has the results of a span where others have those of a head.
__device__ void write_state(
    const State& state, const Call& call, const Item& item, int first_row, const float (&num)[SUMS], Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const long long row = first_row + 8 * i;
        softmax.den[i] += __shfl_xor_sync(~0u, softmax.den[i], 1);
        softmax.den[i] += __shfl_xor_sync(~0u, softmax.den[i], 2);
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

// Add what an item summed to the state, after the spans of its tile before it.
__device__ void add_to_state(
    const State& state, const Call& call, const Item& item, int first_row, const float (&num)[SUMS], Softmax& softmax) {
    const int consumer = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, barrier = 1 + CONSUMERS + consumer;
    int* turn = call.turns + (item.head * tiles_of(call) + item.tile) * CONSUMERS + consumer;
    if (item.turn > 0) {
        if (thread == 0)
            while (acquire(turn) != item.turn) __nanosleep(100);
        named_wait(barrier, 128);
    }
    float before[2], sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const long long row = first_row + 8 * i;
        softmax.den[i] += __shfl_xor_sync(~0u, softmax.den[i], 1);
        softmax.den[i] += __shfl_xor_sync(~0u, softmax.den[i], 2);
        before[i] = row < call.rows ? state.max[item.head * state.max_head + row * state.max_row] : 0.0f;
        sum[i] = row < call.rows ? state.den[item.head * state.den_head + row * state.den_row] : 0.0f;
    }
    __syncwarp();  // all have read what one overwrites
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const long long row = first_row + 8 * i;
        if (row >= call.rows) continue;
        const float shift = softmax.shift[i] * LN2;
        const float highest = before[i] != before[i] ? before[i] : fmaxf(before[i], shift);  // NaN stays NaN
        const float less = highest == MINUS_INFINITY ? 0.0f : highest;                       // -inf: a row with no key
        const float keep = expf(before[i] - less), take = expf(shift - less);
        float* own = state.num + item.head * state.num_head + row * state.num_row + thread % 4 * 2;
#pragma unroll
        for (int j = 0; j < SUMS / 4; ++j) {
            if (8 * j >= VALUE_DIM) break;
            float2* two = reinterpret_cast<float2*>(own + 8 * j);
            const float2 old = *two;
            *two = {old.x * keep + num[4 * j + 2 * i] * take, old.y * keep + num[4 * j + 2 * i + 1] * take};
        }
        if (thread % 4 == 0) {
            state.max[item.head * state.max_head + row * state.max_row] = highest;
            state.den[item.head * state.den_head + row * state.den_row] = sum[i] * keep + softmax.den[i] * take;
        }
    }
    named_wait(barrier, 128);  // what all have written is released by one
    if (thread == 0) asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turn), "r"(item.turn + 1) : "memory");
}

#endif

// The row of the first of a thread's two rows; the other is 8 below.
__device__ __forceinline__ int first_row_of(const Item& item) {
    return item.tile * ROWS + (threadIdx.x / 32 - 4) * 16 + threadIdx.x % 32 / 4;
}

__device__ void consume(Shared& shared, const Call& call, const State& state) {
    const int consumer = threadIdx.x / 128 - 1, thread = threadIdx.x % 128;
    const bool elected = thread == 0;
    const char* query = shared.query + consumer * 64 * 128;
    Ring keys, values;
    if (RING && consumer == CONSUMERS - 1) named_arrive(1, 256);  // the first consumer begins
    for (int phase = 0;; phase ^= 1) {
        wait(&shared.query_full, phase);
#if LISTED
        const Item& item = shared.items[phase];  // there are no registers for it
        if (item.steps == 0) return;
        const int first_row = first_row_of(item);
        Intervals<int>& whole = shared.whole[threadIdx.x / 32 - 4];
        const Intervals<int> all = shared_by_warp(call.bounds[first_row], call.bounds[first_row + 8]);
        if (thread % 32 == 0) whole = all;
        __syncwarp();
#else
        const Item item = shared.items[phase];
        if (item.steps == 0) return;
        const int first_row = first_row_of(item);
        // Of the item's keys, those that all rows of the consumer attend.
        const int whole_start = key_start(call, item.tile * ROWS + consumer * 64 + 63) - item.first;
        const int whole_stop = key_stop(call, item.tile * ROWS + consumer * 64) - item.first;
#endif
        const int steps = item.steps;
        float num[SUMS], scores[SCORES], factor[2];
        unsigned weights[SCORES / 2];
        Softmax softmax;
#pragma unroll
        for (int i = 0; i < SUMS; ++i) num[i] = 0.0f;

        auto weigh = [&](int step, int slot) {
#if LISTED
            const int key = shared.steps[slot].first, live = shared.steps[slot].live;
#else
            const int key = item.key(step);
#endif
#if !PLAIN
            add_terms(scores, call, item.head, first_row, key);
#endif
#if LISTED
            if (live != WHOLE && !is_whole(whole, key)) {
                mask_row<0>(scores, call.bounds[first_row], key);
                mask_row<1>(scores, call.bounds[first_row + 8], key);
            }
#else
            if (step * KEYS < whole_start || (step + 1) * KEYS > whole_stop) {
                const int start[2] = {key_start(call, first_row) - key, key_start(call, first_row + 8) - key};
                const int stop[2] = {key_stop(call, first_row) - key, key_stop(call, first_row + 8) - key};
                mask(scores, start, stop);
            }
#endif
            return softmax.weigh(scores, PLAIN ? call.scale : 1.0f, factor);
        };
        auto loaded_values = [&] {
            char* value = shared.value[values.stage()];
            wait(&shared.value_full[values.stage()], values.phase());
#if LISTED
            const int live = shared.steps[values.slot()].live;
            if (live < KEYS) clear_values(value, live, 1 + CONSUMERS + consumer);
#endif
            return value;
        };
        auto release_key = [&](int step) {
            const int slot = keys.slot();
            if (elected) arrive(&shared.key_free[keys.stage()]);
            if (step == steps - 1) arrive(&shared.query_free);
            keys.advance();
            return slot;
        };
        auto narrow_weights = [&] {
#pragma unroll
            for (int i = 0; i < SCORES / 2; ++i) weights[i] = narrow(scores[2 * i], scores[2 * i + 1]);
        };

        wait(&shared.key_full[keys.stage()], keys.phase());
        hold(scores);
        begin_products();
        begin_scores(scores, query, shared.key[keys.stage()]);
        wait_for_products<0>();
        hold(scores);
        weigh(0, release_key(0));
        narrow_weights();
        for (int step = 1; step < steps; ++step) {
            wait(&shared.key_full[keys.stage()], keys.phase());
            if (RING) named_wait(1 + consumer, 256);
            hold(scores);
            hold(num);
            hold(weights);
            begin_products();
            begin_scores(scores, query, shared.key[keys.stage()]);
            begin_values(num, weights, loaded_values());
            if (RING) named_arrive(1 + (consumer + 1) % CONSUMERS, 256);
            wait_for_products<1>();
            hold(scores);
            const bool raised = weigh(step, release_key(step));
            wait_for_products<0>();
            hold(num);
            hold(weights);
            if (elected) arrive(&shared.value_free[values.stage()]);
            values.advance();
            if (raised) scale_rows(num, factor);
            narrow_weights();
        }
        const char* value = loaded_values();
        hold(num);
        hold(weights);
        begin_products();
        begin_values(num, weights, value);
        wait_for_products<0>();
        hold(num);
        if (elected) arrive(&shared.value_free[values.stage()]);
        values.advance();
#if SPLIT
        write_state(state, call, item, first_row, num, softmax);
#else
        add_to_state(state, call, item, first_row, num, softmax);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1) attend(
    const __grid_constant__ TensorMap query,
    const __grid_constant__ TensorMap key,
    const __grid_constant__ TensorMap value,
    const __grid_constant__ State state,
    const __grid_constant__ Call call) {
    extern __shared__ char dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic + (1024 - address(dynamic) % 1024) % 1024);
    if (threadIdx.x == 0) {
        begin_barrier(&shared.query_full, 1);
        begin_barrier(&shared.query_free, 128 * CONSUMERS);  // of the item too, which every thread reads
        for (int stage = 0; stage < STAGES; ++stage) {
            begin_barrier(&shared.key_full[stage], 1);
            begin_barrier(&shared.value_full[stage], 1);
            begin_barrier(&shared.key_free[stage], CONSUMERS);
            begin_barrier(&shared.value_free[stage], CONSUMERS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
#if SPLIT || LISTED
    let_next_launch_begin();
    wait_for_launch_before();
#endif
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (threadIdx.x == 0) produce(shared, call, query, key, value);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(shared, call, state);
    }
}
