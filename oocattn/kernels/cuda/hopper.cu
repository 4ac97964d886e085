// Attention that continues a float32 state, for compute capability 9.0. What a state is, is defined in state.py; its ledger
// is not touched here.
//
// Compiled with HEAD_DIM and VALUE_DIM (multiples of 8, 256 at most), CONSUMERS (warpgroups of 64 query rows), KEYS (of a
// step), STAGES (of the rings), ITEMS (of a block), SHARED_BYTES, and what the headers ask for; and with
// * PARTS: 16-bit parts of a number of the rows, 1, or 2 of float32 ones: the columns of all first parts come before those of
//   the second ones. The products of two second parts, 2^-24 of the whole, are left out.
// * WEIGHT_PARTS: 16-bit parts of a weight.
// * SCALED (0 or 1): whether split.cu has made the parts.
// * SHIFTED (0 or 1): whether the shifts of rows are given, as of a second pass: weights are scores less these, the state's
//   maximum is 0.
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
#include "launches.cuh"
#include "loading.cuh"
#include "multiplying.cuh"
#include "softmax.cuh"

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

__device__ void consume(Shared& shared, const Call& call, const State& state) {
    const int consumer = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0), thread = threadIdx.x % 128;
    const bool elected = thread == 0;
    const float scale = SCALED ? call.scale * call.unscaled[0] : call.scale;
    const Word query = matrix(shared.query + consumer * 64 * ROW_BYTES, 16);
    const Word first_key = matrix(shared.key[0], 16), first_value = matrix(shared.value[0], KEYS * ROW_BYTES);
    const Turns turns(consumer);
    Ring keys, values;
    for (int phase = 0;; phase ^= 1) {
        wait(&shared.query_full, phase);
#if LISTED
        const Item& item = shared.items[phase];  // there are no registers for it
        if (item.steps == 0) return turns.end();
        const int first_row = first_row_of(item);
        Intervals<int>& whole = shared.whole[threadIdx.x / 32 - 4];
        const Intervals<int> all = shared_by_warp(call.bounds[first_row], call.bounds[first_row + 8]);
        if (thread % 32 == 0) whole = all;
        __syncwarp();
#else
        const Item item = shared.items[phase];
        if (item.steps == 0) return turns.end();
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

#if LISTED
        int live = WHOLE;  // of the step that was weighed last
#endif
        auto weigh = [&](int step, bool first) {
#if LISTED
            const Step own = for_warp(shared.steps[keys.slot()]);
            const int key = own.first;
            live = own.live;
            const bool masked = live != WHOLE && !is_whole(whole, key);
#else
            const int key = item.key(step);
            const bool masked = step * KEYS < whole_start || (step + 1) * KEYS > whole_stop;
#endif
            float rise = LIFT + RISE;
            if (PLAIN && !SHIFTED && !first && !masked) {  // in nearly all steps the shift does, and no maximum is needed
                if (softmax.keep_shift(scores, scale, rise)) return false;
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
            softmax.keep_given_shift(scores, PLAIN ? scale : 1.0f, turns);
            return false;
#else
            return softmax.find_shift(scores, PLAIN ? scale : 1.0f, rise, factor);
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
        turns.wait();
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
            turns.wait();
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
        begin_barriers(shared, 0);
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
