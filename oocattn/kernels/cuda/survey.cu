// Softmax weights of given shifts, reduced in the registers that they come in, for compute capability 9.0: a second pass
// without values.
//
// Compiled with what hopper.cu is (VALUE_DIM 0, WEIGHT_PARTS 1, SHIFTED 1, SPLIT, RESTART and FOLD 0), and with what is made of
// the weights: LOGARITHMS, RECEIVED, POOLED (0 or 1), TOP and PLACES (top.cuh).
//
// Items, loading and scores are those of hopper.cu. A consumer has the weights of 64 rows and the keys of a step in registers.
// Along keys a thread adds up those of its two rows. Along rows, eight lanes exchange halves of what they have until each has the
// sums of an eighth of the keys over a warp's 16 rows; another warp adds these up over the tile, and to all that was summed
// before. What many blocks add to has the same bits in any order (totals.cuh), and the spans of a tile add to its rows in theirs.

#include "adding.cuh"
#include "launches.cuh"
#include "loading.cuh"
#include "multiplying.cuh"
#include "softmax.cuh"
#include "top.cuh"
#include "totals.cuh"

struct Reduced {
    float* logarithms;  // of each row, the sum of weights times their logarithms to the base 2
    long long logarithms_head;
    float* top;
    long long top_head, top_row;
    const int* key_numbers;
    Totals totals;
};

struct Surveying : Shared {
#if RECEIVED
    KeySums handed;
#endif
#if TOP
    Lists lists;
#endif
};

static_assert(sizeof(Surveying) + 1024 <= SHARED_BYTES);

constexpr float WITHOUT_KEYS = 1e30f;  // the shift of a row whose weights are 0: exponents stay finite

// Sums over keys of a thread's two rows.
struct RowSums {
    float shift[2], den[2] = {0.0f, 0.0f}, logarithms[2] = {0.0f, 0.0f};

    __device__ RowSums(const Call& call, int head, int first_row) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + 8 * i;
            const float natural = row < call.rows ? call.shift[head * call.shift_head + row] : MINUS_INFINITY;
            shift[i] = natural == MINUS_INFINITY ? WITHOUT_KEYS : natural * LOG2E;
        }
    }

    // Turn scores into weights, and add them up: `sum` becomes those of this step. Whether the sum of any four that a thread
    // has of a row is above the row's `least`, as where one of them is.
    __device__ __forceinline__ bool weigh(float (&scores)[SCORES], float scale, const float (&least)[2], float (&sum)[2]) {
        float less[2] = {shift[0], shift[1]}, products[2] = {0.0f, 0.0f};
        if (fmaxf(fabsf(less[0]), fabsf(less[1])) > FINE) Softmax::subtract(scores, scale, less);
        bool above = false;
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int first = 0; first < SCORES; first += 8) {
            float part[2] = {0.0f, 0.0f};
#pragma unroll
            for (int i = first; i < first + 8; ++i) {
                const int row = i / 2 % 2;
                const float exponent = fmaf(scores[i], scale, -less[row]);
                scores[i] = exp2_of(exponent);
                part[row] += scores[i];
                if (LOGARITHMS) products[row] = fmaf(scores[i], exponent, products[row]);
            }
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                above = above || part[row] > least[row];
                sum[row] += part[row];
            }
        }
        if (LOGARITHMS && !(products[0] + products[1] > MINUS_INFINITY)) {
            if (!(products[0] > MINUS_INFINITY)) products[0] = bounded<0>(scores);
            if (!(products[1] > MINUS_INFINITY)) products[1] = bounded<1>(scores);
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) den[row] += sum[row], logarithms[row] += products[row];
        return above;
    }

  private:
    // The sum of a row's products, where weights of 0 count for nothing, whatever their logarithm.
    template <int ROW>
    __device__ __forceinline__ static float bounded(const float (&weights)[SCORES]) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 2 * ROW; i < SCORES; i += 4)
#pragma unroll
            for (int j = i; j < i + 2; ++j) sum += weights[j] == 0.0f ? 0.0f : weights[j] * __log2f(weights[j]);
        return sum;
    }
};

// Add what an item has of a thread's rows to what the spans before it have: in their turn.
__device__ __forceinline__ void add_rows(
    const State& state, const Reduced& reduced, const Call& call, const Item& item, int first_row, RowSums& sums) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int apart = 1; apart < 4; apart *= 2) {
            sums.den[i] += __shfl_xor_sync(~0u, sums.den[i], apart);
            sums.logarithms[i] += __shfl_xor_sync(~0u, sums.logarithms[i], apart);
        }
        const long long row = first_row + 8 * i;
        if (threadIdx.x % 4 || row >= call.rows) continue;
#if LISTED
        const Intervals<int> own = call.bounds[row];
        const bool attends = own.a < own.b || own.c < own.d;
#else
        const bool attends = key_start(call, row) < key_stop(call, row);
#endif
        if (attends) state.max[item.head * state.max_head + row * state.max_row] = 0.0f;
        state.den[item.head * state.den_head + row * state.den_row] += sums.den[i];
        if (LOGARITHMS) reduced.logarithms[item.head * reduced.logarithms_head + row] += sums.logarithms[i];
    }
}

__device__ void consume(Surveying& shared, const Call& call, const State& state, const Reduced& reduced) {
    const int consumer = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0), thread = threadIdx.x % 128;
    const float scale = SCALED ? call.scale * call.unscaled[0] : call.scale;
    const Word query = matrix(shared.query + consumer * 64 * ROW_BYTES, 16), first_stage = matrix(shared.key[0], 16);
    Ring keys;
    unsigned turn = 0;  // of what is handed over
    for (int phase = 0;; phase ^= 1) {
        wait(&shared.query_full, phase);
        const Item& item = shared.items[phase];
        const int steps = item.steps, head = item.head;
        if (steps == 0) return;
        const int first_row = first_row_of(item);
#if LISTED
        Intervals<int>& whole = shared.whole[threadIdx.x / 32 - 4];
        const Intervals<int> all = shared_by_warp(call.bounds[first_row], call.bounds[first_row + 8]);
        if (thread % 32 == 0) whole = all;
        __syncwarp();
#else
        const int whole_start = key_start(call, item.tile * ROWS + consumer * 64 + 63);
        const int whole_stop = key_stop(call, item.tile * ROWS + consumer * 64);
#endif
        RowSums sums(call, head, first_row);
        float least[2] = {LARGEST, LARGEST};
#if TOP
        const Kept kept = {reduced.top, reduced.top_head, reduced.top_row, reduced.key_numbers};
        Top top(shared.lists, call, kept, head, first_row);
#endif
#if POOLED
        Pools pools;
#endif
        for (int step = 0; step < steps; ++step) {
            float scores[SCORES], sum[2];
            wait(&shared.key_full[keys.stage()], keys.phase());
#if LISTED
            const auto [first, live] = for_warp(shared.steps[keys.slot()]);
            const bool masked = live != WHOLE && !is_whole(whole, first);
#else
            const int first = item.key(step);
            const bool masked = first < whole_start || first + KEYS > whole_stop;
#endif
#if POOLED
            const int low = reduced.totals.pools[first], high = reduced.totals.pools[min(first + KEYS, call.keys) - 1];
#endif
            hold(scores);
            begin_products();
            begin_scores(scores, query, further(first_stage, keys.stage() * KEY_BYTES));
            wait_for_products<0>();
            hold(scores);
            if (thread % 32 == 0) arrive(&shared.key_free[keys.stage()]);
            if (step == steps - 1) arrive(&shared.query_free);
            keys.advance();
#if !PLAIN
            add_terms(scores, call, scale, head, first_row, first);
#endif
            if (masked) {
#if LISTED
                mask_row<0>(scores, call.bounds[first_row], first);
                mask_row<1>(scores, call.bounds[first_row + 8], first);
#else
                const int start[2] = {key_start(call, first_row) - first, key_start(call, first_row + 8) - first};
                const int stop[2] = {key_stop(call, first_row) - first, key_stop(call, first_row + 8) - first};
                mask(scores, start, stop);
#endif
            }
#if TOP
            if (__any_sync(~0u, sums.weigh(scores, PLAIN ? scale : 1.0f, top.least, sum)))
                top.take(shared.lists, scores, first);
#else
            sums.weigh(scores, PLAIN ? scale : 1.0f, least, sum);
#endif
#if POOLED
            pools.begin(call, reduced.totals, head, first_row, low);
            if (low == high) {
                pools.sums[0] += sum[0];
                pools.sums[1] += sum[1];
            } else {
                pools.add_apart(scores, call, reduced.totals, head, first_row, first, high);
            }
#endif
#if RECEIVED
            hand_over(shared.handed, turn++, scores);
#endif
        }
#if POOLED
        pools.add(call, reduced.totals, head, first_row);
#endif
        wait_for_turn(call, item);
        add_rows(state, reduced, call, item, first_row, sums);
#if TOP
        top.add_to(kept, shared.lists, item.tile, head);
#endif
        end_turn(call, item);
    }
}

extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1) survey(
    const __grid_constant__ TensorMap query,
    const __grid_constant__ TensorMap key,
    const __grid_constant__ State state,
    const __grid_constant__ Reduced reduced,
    const __grid_constant__ Call call) {
    extern __shared__ char dynamic[];
    Surveying& shared = *reinterpret_cast<Surveying*>(dynamic + (1024 - address(dynamic) % 1024) % 1024);
    if (threadIdx.x == 0) {
        begin_barriers(shared, RECEIVED);
#if RECEIVED
        shared.handed.begin();
#endif
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
#if LISTED
    let_next_launch_begin();
    wait_for_launch_before();
#endif
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (threadIdx.x == 0) produce(shared, call, query, key, key);
#if RECEIVED
        if (threadIdx.x / 32 == 1) collect(shared, shared.handed, call, reduced.totals);
#endif
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(shared, call, state, reduced);
    }
}
