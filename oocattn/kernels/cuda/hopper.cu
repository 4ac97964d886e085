// Attention that continues a float32 state, for compute capability 9.0. What a state is, is defined in state.py; its ledger
// is not touched here.
//
// Compiled with HEAD_DIM and VALUE_DIM (multiples of 8, 256 at most), CONSUMERS (warpgroups of 64 query rows), KEYS (of a
// step), STAGES (of the rings), ITEMS (of a block), SHARED_BYTES, and what the
// headers ask for; and with
// * PARTS: 16-bit parts of a number of the rows, 1, or 2 of float32 ones: the columns of all first parts come before those of
//   the second ones. The products of two second parts, 2^-24 of the whole, are left out.
// * SCALED (0 or 1): whether split.cu has made the parts.
// * SHIFTED (0 or 1): whether the shifts of rows are given, as of a second pass: weights are scores less these, the state's
//   maximum is 0.
// * WEIGHT_PARTS: the same of a weight.
// * RESTART: steps after which the sums of the matrix units, which truncate, are added to others in float32, in registers; 0:
//   FOLD steps, in shared memory; if that is 0 too, at the end of an item.
//
// A block takes a few items one after another: a tile of query rows of one head and a span of keys. One thread loads by
// TMA; each consumer computes S = Q K^T, the softmax and num += P V in registers, the scores of a step before the values of
// the one before, and at the end of the span adds to the state in memory. The spans of a tile add in their order, from the
// first that its rows attend on, so that the bits do not depend on which block was faster. All heads of a group attend a span
// before the next one, so that keys and values come from device memory once. The structure is FlashAttention-3's (Shah et
// al., arXiv 2407.08608, section 3).

#include "adding.cuh"
#include "items.cuh"
#include "launches.cuh"
#include "products.cuh"
#include "softmax.cuh"

constexpr int PANEL = 64;  // columns of 16 bits in the 128 bytes that TMA and the matrix units swizzle together
constexpr int KEY_PANELS = (HEAD_DIM + PANEL - 1) / PANEL;  // of each part; columns beyond HEAD_DIM are filled with zeros
constexpr int VALUE_PANELS = (VALUE_DIM + PANEL - 1) / PANEL;
constexpr int KEY_PRODUCTS = (HEAD_DIM + 15) / 16;  // of 16 columns
constexpr int SUMS = VALUE_DIM <= 16 ? 8 : VALUE_PANELS * PANEL / 2;
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
#endif

struct Shared {
    alignas(1024) char query[QUERY_BYTES];
    alignas(1024) char key[STAGES][KEY_BYTES];
    alignas(1024) char value[STAGES][VALUE_BYTES];
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
        load_panels<PARTS * KEY_PANELS>(shared.query, query, &shared.query_full, ROWS * ROW_BYTES, item.tile * ROWS, item.head);
#pragma unroll 1
        for (int step = 0; step < item.steps; ++step, ring.advance()) {
            const int first = item.key(step), stage = ring.stage(), phase = ring.phase();
            wait(&shared.key_free[stage], phase ^ 1);
#if LISTED
            shared.steps[ring.slot()] = {first, is_whole(item.whole, first) ? WHOLE : item.keys_left(step)};
#endif
            arrive_expecting(&shared.key_full[stage], KEY_BYTES);
            load_panels<PARTS * KEY_PANELS>(shared.key[stage], key, &shared.key_full[stage], KEYS * ROW_BYTES, first, 0);
            wait(&shared.value_free[stage], phase ^ 1);
            arrive_expecting(&shared.value_full[stage], VALUE_BYTES);
            load_panels<PARTS * VALUE_PANELS>(shared.value[stage], value, &shared.value_full[stage], KEYS * ROW_BYTES, first, 0);
            // What comes next is drawn late, for other blocks may be free before, and so that nothing waits for memory.
            if (step == max(0, item.steps - 8) && --left > 0) items.draw();
            if (step == max(0, item.steps - 6) && left > 0) items.look_up();
            if (step == max(0, item.steps - 4)) shared.next = left > 0 ? items.take() : Item{};
        }
    }
}

// ---- A warpgroup computes 64 rows ----

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

#if LISTED

// Values that none of the tile's rows attend become zeros, from key `live` of a step on: what follows a document may be
// NaN, and 0 times NaN is NaN. All consumers do it, each before it reads them.
__device__ void clear_values(char* value, int live, int barrier) {
    for (int at = live * ROW_BYTES + threadIdx.x % 128 * 16; at < KEYS * ROW_BYTES; at += 128 * 16)
#pragma unroll
        for (int panel = 0; panel < PARTS * VALUE_PANELS; ++panel)
            *reinterpret_cast<uint4*>(value + panel * KEYS * ROW_BYTES + at) = {0, 0, 0, 0};
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    named_wait(barrier, 128);
}

#endif

// The row of the first of a thread's two rows; the other is 8 below.
__device__ __forceinline__ int first_row_of(const Item& item) {
    return item.tile * ROWS + (threadIdx.x / 32 - 4) * 16 + threadIdx.x % 32 / 4;
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

__device__ void consume(Shared& shared, const Call& call, const State& state) {
    const int consumer = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0), thread = threadIdx.x % 128;
    const bool elected = thread == 0;
    const float scale = SCALED ? call.scale * call.unscaled[0] : call.scale;
    const Word query = matrix(shared.query + consumer * 64 * ROW_BYTES, 16);
    const Word first_key = matrix(shared.key[0], 16), first_value = matrix(shared.value[0], KEYS * ROW_BYTES);
    Ring keys, values;
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
        float scores[SCORES], factor[2];
        Weights weights;
        Sums sums;
        Softmax softmax;
#if SHIFTED
        softmax.take_shift(call, item.head, first_row);
#endif

        auto weigh = [&](int step, bool first) {
#if LISTED
            const int slot = keys.slot(), key = shared.steps[slot].first, live = shared.steps[slot].live;
            const bool masked = live != WHOLE && !is_whole(whole, key);
#else
            const int key = item.key(step);
            const bool masked = step * KEYS < whole_start || (step + 1) * KEYS > whole_stop;
#endif
            if (PLAIN && !SHIFTED && !first && !masked) {  // in nearly all steps the shift does, and no maximum is needed
                if (softmax.keep_shift(scores, scale)) return false;
                multiply_again(scores, shared.query + consumer * 64 * ROW_BYTES, shared.key[keys.stage()]);
            }
#if !PLAIN
            add_terms(scores, call, scale, item.head, first_row, key);
#endif
            if (masked) {
#if LISTED
                mask_row<0>(scores, call.bounds[first_row], key);
                mask_row<1>(scores, call.bounds[first_row + 8], key);
#else
                const int start[2] = {key_start(call, first_row) - key, key_start(call, first_row + 8) - key};
                const int stop[2] = {key_stop(call, first_row) - key, key_stop(call, first_row + 8) - key};
                mask(scores, start, stop);
#endif
            }
#if SHIFTED
            softmax.keep_given_shift(scores, PLAIN ? scale : 1.0f);
            return false;
#else
            return softmax.find_shift(scores, PLAIN ? scale : 1.0f, factor);
#endif
        };
        auto begin_step = [&] {
            hold(scores);
            begin_products();
            begin_scores(scores, query, further(first_key, keys.stage() * KEY_BYTES));
        };
        auto begin_sums = [&] {
            wait(&shared.value_full[values.stage()], values.phase());
#if LISTED
            const int live = shared.steps[values.slot()].live;
            if (live < KEYS) clear_values(shared.value[values.stage()], live, 1 + consumer);
#endif
            begin_values(sums.num, weights, further(first_value, values.stage() * VALUE_BYTES), sums.adds());
        };
        auto end_sums = [&] {
            wait_for_products<0>();
            hold(sums.num);
            weights.hold_all();
            if (elected) arrive(&shared.value_free[values.stage()]);
            values.advance();
        };
        auto release_key = [&](int step) {  // by each warp, which may have multiplied again
            if (thread % 32 == 0) arrive(&shared.key_free[keys.stage()]);
            if (step == steps - 1) arrive(&shared.query_free);
            keys.advance();
        };

        wait(&shared.key_full[keys.stage()], keys.phase());
        begin_step();
        wait_for_products<0>();
        hold(scores);
        weigh(0, true);
        release_key(0);
        weights.narrow_from(scores);
        for (int step = 1; step < steps; ++step) {
            wait(&shared.key_full[keys.stage()], keys.phase());
            hold(sums.num);
            weights.hold_all();
            begin_step();
            begin_sums();
            wait_for_products<1>();
            hold(scores);
            const bool raised = weigh(step, false);
            release_key(step);
            end_sums();
            if (raised) sums.scale(factor);
            sums.fold(step, false, shared);
            weights.narrow_from(scores);
        }
        hold(sums.num);
        weights.hold_all();
        begin_products();
        begin_sums();
#if !SPLIT
        const Before before = load_before(state, call, item, first_row);  // while the products are on their way
#endif
        end_sums();
        sums.fold(steps, true, shared);
        float (&num)[SUMS] = sums.all();
        float back = SCALED ? call.unscaled[1] : 1.0f;
#if SHIFTED
        back *= softmax.drop_shift();
#endif
        if (SCALED)
#pragma unroll
            for (int i = 0; i < SUMS; ++i) num[i] *= back;
#if SPLIT
        write_state(state, call, item, first_row, num, softmax);
#else
        add_to_state(state, call, item, first_row, num, softmax, before);
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
            begin_barrier(&shared.key_free[stage], 4 * CONSUMERS);
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
