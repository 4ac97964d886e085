// Attention that continues a float32 state, for compute capability 9.0. What a state is, is defined in state.py; its ledger
// is not touched here.
//
// Compiled with HEAD_DIM (a multiple of 8, 128 at most), CONSUMERS (warpgroups of 64 query rows), STAGES (of the rings),
// RING (0 or 1: whether consumers take turns), ITEMS (of a block), SHARED_BYTES, and what instructions.cuh asks for.
//
// A block takes a few items one after another: a tile of query rows of one head and a span of keys. One thread loads by
// TMA; each consumer computes S = Q K^T, the softmax and num += P V in registers, the scores of a step before the values of
// the one before, and at the end of the span adds to the state in memory. The spans of a tile add in their order, from the
// first that its rows attend on, so that the bits do not depend on which block was faster. All heads of a group attend a span before the next one, so that keys and values come
// from device memory once. The structure is FlashAttention-3's (Shah et al., arXiv 2407.08608, section 3).

#include "instructions.cuh"
#include "state.cuh"

#define MINUS_INFINITY __uint_as_float(0xFF800000)

constexpr int PANEL = 64;  // columns of 16 bits in the 128 bytes that TMA and the matrix units swizzle together
constexpr int PANELS = (HEAD_DIM + PANEL - 1) / PANEL;  // columns beyond HEAD_DIM are filled with zeros
constexpr int WIDTH = PANELS * PANEL;
constexpr int KEYS = 128;  // of one step
constexpr int ROWS = 64 * CONSUMERS;
constexpr int SCORES = KEYS / 2;  // of each of the 128 threads of a consumer: two rows, and of 8 columns two at a time
constexpr int SUMS = WIDTH / 2;
constexpr int QUERY_BYTES = ROWS * WIDTH * 2;
constexpr int STAGE_BYTES = KEYS * WIDTH * 2;
// A thread's registers, multiples of 8: a block begins with 128 for each of 512 threads, or 168 for each of 384.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
constexpr float RISE = 8.0f;  // how far, in powers of two, scores may exceed the shift before it is raised
constexpr float LARGE = 67108864.0f;  // 2^26: float32 holds every fourth number
constexpr float LN2 = 0.693147180559945f;

// Row i of each head attends keys [i + lower, i + upper), as far as there are such keys; lower < upper.
struct Call {
    int heads, rows, keys;
    int span;          // keys of an item at most, a multiple of KEYS
    int lower, upper;  // between -rows and keys
    float scale;       // positive, times log2(e)
    int* turns;        // zeros: the next item; how many spans each consumer's rows have added
};

struct Item {
    int tile, head;
    int first;  // key, a multiple of KEYS
    int turn;   // spans of the tile that add to the state before this one
    int steps;  // of KEYS keys; 0: there is no item left
};

struct Shared {
    alignas(1024) char query[QUERY_BYTES];
    alignas(1024) char key[STAGES][STAGE_BYTES];
    alignas(1024) char value[STAGES][STAGE_BYTES];
    Word query_full, query_free;
    Word key_full[STAGES], key_free[STAGES], value_full[STAGES], value_free[STAGES];
    Item item;
};

static_assert(sizeof(Shared) + 1024 <= SHARED_BYTES);  // dynamic shared memory may begin anywhere

// ---- What there is to do ----

// A row attends the keys from the first of these on, up to the second.
__device__ __forceinline__ int key_within(const Call& call, long long key) {
    return key < 0 ? 0 : key < call.keys ? int(key) : call.keys;
}
__device__ __forceinline__ int key_start(const Call& call, int row) { return key_within(call, (long long)row + call.lower); }
__device__ __forceinline__ int key_stop(const Call& call, int row) { return key_within(call, (long long)row + call.upper); }

// Items in the order in which they are taken: span by span; in each the last rows, which have most to do, first.
struct Items {
    const Call& call;
    int span = 0, before = 0;  // items of the spans before `span`

    __device__ Items(const Call& call) : call(call) {}

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

    __device__ Item find(int index) {
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
        return {0, 0, 0, 0, 0};
    }

    __device__ static int tiles_of(const Call& call) { return (call.rows + ROWS - 1) / ROWS; }
};

struct Ring {
    int stage = 0, phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// ---- One thread loads ----

__device__ void produce(
    Shared& shared, const Call& call, const TensorMap& query, const TensorMap& key, const TensorMap& value) {
    Items items(call);
    Ring ring;
    for (int taken = 0, phase = 0;; ++taken, phase ^= 1) {
        const Item item = taken < ITEMS ? items.find(atomicAdd(call.turns, 1)) : Item{};
        wait(&shared.query_free, phase ^ 1);
        shared.item = item;
        if (item.steps == 0) {
            arrive(&shared.query_full);
            return;
        }
        arrive_expecting(&shared.query_full, QUERY_BYTES);
        for (int panel = 0; panel < PANELS; ++panel)
            load(shared.query + panel * ROWS * 128, query, &shared.query_full, panel * PANEL, item.tile * ROWS, item.head);
#pragma unroll 1  // it has few registers
        for (int step = 0; step < item.steps; ++step, ring.advance()) {
            const int first = item.first + step * KEYS, stage = ring.stage;
            wait(&shared.key_free[stage], ring.phase ^ 1);
            arrive_expecting(&shared.key_full[stage], STAGE_BYTES);
            for (int panel = 0; panel < PANELS; ++panel)
                load(shared.key[stage] + panel * KEYS * 128, key, &shared.key_full[stage], panel * PANEL, first, 0);
            wait(&shared.value_free[stage], ring.phase ^ 1);
            arrive_expecting(&shared.value_full[stage], STAGE_BYTES);
            for (int panel = 0; panel < PANELS; ++panel)
                load(shared.value[stage] + panel * KEYS * 128, value, &shared.value_full[stage], panel * PANEL, first, 0);
        }
    }
}

// ---- A warpgroup computes 64 rows ----

// The two rows of a thread, `row` and 8 below it, of an item; each is shared by the four threads of a quad.
struct Softmax {
    float shift[2] = {MINUS_INFINITY, MINUS_INFINITY};  // exponents are taken of scaled scores less this
    float den[2] = {0.0f, 0.0f};                          // of the thread's own columns

    // Scores less the shift, which is 0 from then on. The multiply-add of `weigh` does not round the product as the shift was
    // rounded: of large scores what is left of that would be more than an exponent.
    __device__ __forceinline__ static void subtract(float (&scores)[SCORES], float scale, float (&less)[2]) {
        const float back = 1.0f / scale;
#pragma unroll
        for (int i = 0; i < SCORES; ++i)
            scores[i] = __fsub_rn(__fmul_rn(scores[i], scale), less[i / 2 % 2]) * back;
        less[0] = less[1] = 0.0f;
    }

    // Turn scores into weights. Whether the shift was raised; then what was summed before counts `factor` times as much.
    __device__ __forceinline__ bool weigh(float (&scores)[SCORES], float scale, float (&factor)[2]) {
        float highest[2] = {scores[0], scores[2]};
#pragma unroll
        for (int i = 0; i < SCORES; i += 4) {
            highest[0] = fmaxf(highest[0], fmaxf(scores[i], scores[i + 1]));
            highest[1] = fmaxf(highest[1], fmaxf(scores[i + 2], scores[i + 3]));
        }
        const bool above = highest[0] * scale > shift[0] + RISE || highest[1] * scale > shift[1] + RISE;
        const bool raise = __any_sync(~0u, above);
        if (raise) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                float most = highest[row];
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
                const float raised = fmaxf(shift[row], most * scale);
                factor[row] = raised == MINUS_INFINITY ? 1.0f : exp2_of(shift[row] - raised);
                den[row] *= factor[row];
                shift[row] = raised;
            }
        }
        float less[2] = {shift[0] == MINUS_INFINITY ? 0.0f : shift[0], shift[1] == MINUS_INFINITY ? 0.0f : shift[1]};
        if (fmaxf(fabsf(less[0]), fabsf(less[1])) > LARGE) subtract(scores, scale, less);
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < SCORES; ++i) {
            scores[i] = exp2_of(fmaf(scores[i], scale, -less[i / 2 % 2]));
            sum[i / 2 % 2] += scores[i];
        }
        den[0] += sum[0];
        den[1] += sum[1];
        return raise;
    }
};

// Scores of keys that a row does not attend become -inf: its two rows attend [start, stop) of the keys of this step.
__device__ __forceinline__ void mask(float (&scores)[SCORES], const int (&start)[2], const int (&stop)[2]) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
        const int key = i / 4 * 8 + column + i % 2;
        if (key < start[i / 2 % 2] || key >= stop[i / 2 % 2]) scores[i] = MINUS_INFINITY;
    }
}

// Issue S = Q K^T.
__device__ __forceinline__ void begin_scores(float (&scores)[SCORES], const char* query, const char* key) {
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k) {
        const Word a = matrix(query + k / 4 * ROWS * 128 + k % 4 * 32, 16);
        const Word b = matrix(key + k / 4 * KEYS * 128 + k % 4 * 32, 16);
        multiply_scores(scores, a, b, k > 0);
    }
    commit_products();
}

// Issue num += P V.
__device__ __forceinline__ void begin_values(float (&num)[SUMS], const unsigned (&weights)[SCORES / 2], const char* value) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) multiply_values(num, weights + 4 * k, matrix(value + k * 16 * 128, KEYS * 128));
    commit_products();
}

__device__ __forceinline__ void scale_rows(float (&num)[SUMS], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) num[i] *= factor[i / 2 % 2];
}

__device__ __forceinline__ int acquire(const int* count) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
    return value;
}

// Add what an item summed to the state, after the spans of its tile before it.
__device__ void add_to_state(
    const State& state, const Call& call, const Item& item, int first_row, const float (&num)[SUMS], Softmax& softmax) {
    const int consumer = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, barrier = 1 + CONSUMERS + consumer;
    int* turn = call.turns + 1 + (item.head * Items::tiles_of(call) + item.tile) * CONSUMERS + consumer;
    if (thread == 0)
        while (acquire(turn) != item.turn) __nanosleep(100);
    named_wait(barrier, 128);
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
            if (8 * j >= HEAD_DIM) break;
            float2* two = reinterpret_cast<float2*>(own + 8 * j);
            const float2 old = *two;
            *two = {old.x * keep + num[4 * j + 2 * i] * take, old.y * keep + num[4 * j + 2 * i + 1] * take};
        }
        if (thread % 4 == 0) {
            state.max[item.head * state.max_head + row * state.max_row] = highest;
            state.den[item.head * state.den_head + row * state.den_row] = sum[i] * keep + softmax.den[i] * take;
        }
    }
    __threadfence();
    named_wait(barrier, 128);
    if (thread == 0) asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turn), "r"(item.turn + 1) : "memory");
}

__device__ void consume(Shared& shared, const Call& call, const State& state) {
    const int consumer = threadIdx.x / 128 - 1, thread = threadIdx.x % 128;
    const bool elected = thread == 0;
    const char* query = shared.query + consumer * 64 * 128;
    Ring keys, values;
    if (RING && consumer == CONSUMERS - 1) named_arrive(1, 256);  // the first consumer begins
    for (int phase = 0;; phase ^= 1) {
        wait(&shared.query_full, phase);
        const Item item = shared.item;
        if (item.steps == 0) return;
        const int first_row = item.tile * ROWS + consumer * 64 + thread / 32 * 16 + thread % 32 / 4;  // and 8 below
        // Of the item's keys, those that all rows of the consumer attend.
        const int whole_start = key_start(call, item.tile * ROWS + consumer * 64 + 63) - item.first;
        const int whole_stop = key_stop(call, item.tile * ROWS + consumer * 64) - item.first;
        float num[SUMS], scores[SCORES], factor[2];
        unsigned weights[SCORES / 2];
        Softmax softmax;
#pragma unroll
        for (int i = 0; i < SUMS; ++i) num[i] = 0.0f;

        auto weigh = [&](int step) {
            if (step * KEYS < whole_start || (step + 1) * KEYS > whole_stop) {
                const int first = item.first + step * KEYS;
                const int start[2] = {key_start(call, first_row) - first, key_start(call, first_row + 8) - first};
                const int stop[2] = {key_stop(call, first_row) - first, key_stop(call, first_row + 8) - first};
                mask(scores, start, stop);
            }
            return softmax.weigh(scores, call.scale, factor);
        };
        auto release_key = [&](int step) {
            if (elected) arrive(&shared.key_free[keys.stage]);
            if (step == item.steps - 1) arrive(&shared.query_free);
            keys.advance();
        };
        auto narrow_weights = [&] {
#pragma unroll
            for (int i = 0; i < SCORES / 2; ++i) weights[i] = narrow(scores[2 * i], scores[2 * i + 1]);
        };

        wait(&shared.key_full[keys.stage], keys.phase);
        hold(scores);
        begin_products();
        begin_scores(scores, query, shared.key[keys.stage]);
        wait_for_products<0>();
        hold(scores);
        release_key(0);
        weigh(0);
        narrow_weights();
        for (int step = 1; step < item.steps; ++step) {
            wait(&shared.key_full[keys.stage], keys.phase);
            if (RING) named_wait(1 + consumer, 256);
            hold(scores);
            hold(num);
            hold(weights);
            begin_products();
            begin_scores(scores, query, shared.key[keys.stage]);
            wait(&shared.value_full[values.stage], values.phase);
            begin_values(num, weights, shared.value[values.stage]);
            if (RING) named_arrive(1 + (consumer + 1) % CONSUMERS, 256);
            wait_for_products<1>();
            hold(scores);
            release_key(step);
            const bool raised = weigh(step);
            wait_for_products<0>();
            hold(num);
            hold(weights);
            if (elected) arrive(&shared.value_free[values.stage]);
            values.advance();
            if (raised) scale_rows(num, factor);
            narrow_weights();
        }
        wait(&shared.value_full[values.stage], values.phase);
        hold(num);
        hold(weights);
        begin_products();
        begin_values(num, weights, shared.value[values.stage]);
        wait_for_products<0>();
        hold(num);
        if (elected) arrive(&shared.value_free[values.stage]);
        values.advance();
        add_to_state(state, call, item, first_row, num, softmax);
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
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (threadIdx.x == 0) produce(shared, call, query, key, value);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(shared, call, state);
    }
}
