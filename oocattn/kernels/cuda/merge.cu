// Merging and finalising of states, one warp to a row of one head. What they compute is defined in merging.py.
//
// Compiled with VALUE_DIM, MOST_PIECES (of a launch) and MOST_SINKS.

#include "launches.cuh"
#include "pieces.cuh"
#include "state.cuh"

constexpr int LANES = 32;
constexpr int OF_A_LANE = (VALUE_DIM + LANES - 1) / LANES;
constexpr int GATHERERS = 4;  // warps of a block that merges spans
constexpr int SPANS = OF_A_LANE <= 4 ? 9 : 1;  // that each of them loads at once

// What a library's attention call returned: divided already, so its denominator is 1 and its maximum the log-sum-exp.
struct Output {
    void* out;
    float* lse;
    long long out_head, out_row, lse_head, lse_row;
};

// 16-bit numbers by their bits: CUDA's headers for them may not be there at run time.
struct Half {
    unsigned short bits;
    __device__ operator float() const {
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
        return wide;
    }
    __device__ static Half of(float wide) {
        Half narrow;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(wide));
        return narrow;
    }
};

struct Bfloat16 {
    unsigned short bits;
    __device__ operator float() const { return __uint_as_float(unsigned(bits) << 16); }
    __device__ static Bfloat16 of(float wide) {  // to nearest, ties to even
        unsigned whole = __float_as_uint(wide);
        if (wide != wide) return {0x7FFF};
        return {static_cast<unsigned short>((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16)};
    }
};

struct Float {
    float value;
    __device__ operator float() const { return value; }
    __device__ static Float of(float wide) { return {wide}; }
};

// The row of one head that this warp takes; false beyond the last.
__device__ bool this_row(int heads, long long rows, int& head, long long& row) {
    long long warp = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;
    head = warp / rows;
    row = warp % rows;
    return head < heads;
}

// Add `num`, `den` and `max` of one row to the state's. Everything is read before any of it is overwritten.
template <typename Number>
__device__ void add_row(const State& state, int head, long long row, const Number* num, float den, float max) {
    const int lane = threadIdx.x % LANES;
    float* own_num = state.num + head * state.num_head + row * state.num_row;
    float* own_den = state.den + head * state.den_head + row * state.den_row;
    float* own_max = state.max + head * state.max_head + row * state.max_row;
    float own[OF_A_LANE], added[OF_A_LANE];
#pragma unroll
    for (int i = 0; i < OF_A_LANE; ++i) {
        const int at = lane + i * LANES;
        own[i] = at < VALUE_DIM ? own_num[at] : 0.0f;
        added[i] = at < VALUE_DIM ? float(num[at]) : 0.0f;
    }
    const float before = *own_max, sum = *own_den;
    __syncwarp();
    const float highest = before != before || max != max ? before + max : fmaxf(before, max);  // NaN stays NaN
    const float shift = highest == __uint_as_float(0xFF800000) ? 0.0f : highest;  // -inf: a row with no key
    const float keep = expf(before - shift), take = expf(max - shift);
#pragma unroll
    for (int i = 0; i < OF_A_LANE; ++i) {
        const int at = lane + i * LANES;
        if (at < VALUE_DIM) own_num[at] = own[i] * keep + added[i] * take;
    }
    if (lane == 0) {
        *own_max = highest;
        *own_den = sum * keep + den * take;
    }
}

// Add `other` to `into`: num, den, max and, for all heads alike, the ledger.
extern "C" __global__ void merge(State into, State other, int heads, long long rows) {
    int head;
    long long row;
    if (!this_row(heads, rows, head, row)) return;
    const float* num = other.num + head * other.num_head + row * other.num_row;
    const float den = other.den[head * other.den_head + row * other.den_row];
    const float max = other.max[head * other.max_head + row * other.max_row];
    if (head == 0 && threadIdx.x % LANES == 0) {
        into.keys[row * into.keys_row] += other.keys[row * other.keys_row];
        into.key_sum[row * into.key_sum_row] += other.key_sum[row * other.key_sum_row];
    }
    add_row(into, head, row, reinterpret_cast<const Float*>(num), den, max);
}

// Add the results of the spans of a split call (hopper.cu) to `into`. `spans` has one of them where others have a head, and
// in each the rows of all heads after one another. A block takes a row: each of its warps some of the spans, in one order.
extern "C" __global__ void __launch_bounds__(LANES* GATHERERS) gather(State into, State spans, long long rows, int count) {
    __shared__ float num[GATHERERS][VALUE_DIM], den[GATHERERS];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const long long packed = blockIdx.x, head = packed / rows, row = packed % rows;
    float* own_max = into.max + head * into.max_head + row * into.max_row;
    float* own_den = into.den + head * into.den_head + row * into.den_row;
    wait_for_launch_before();
    const float before = *own_max, sum = *own_den;
    float added[OF_A_LANE] = {}, weight = 0.0f, highest = before;
    for (int first = 0; first < count; first += GATHERERS * SPANS) {
        float part[SPANS][OF_A_LANE];  // on their way while the maximum is found
#pragma unroll
        for (int i = 0; i < SPANS; ++i) {
            const int span = min(first + i * GATHERERS + warp, count - 1);
            const float* from = spans.num + span * spans.num_head + packed * spans.num_row;
#pragma unroll
            for (int j = 0; j < OF_A_LANE; ++j) part[i][j] = lane + j * LANES < VALUE_DIM ? from[lane + j * LANES] : 0.0f;
        }
        if (first == 0) {
            for (int span = lane; span < count; span += LANES)
                highest = fmaxf(highest, spans.max[span * spans.max_head + packed * spans.max_row]);
            for (int other = 1; other < LANES; other *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, other));
            if (before != before) highest = before;  // NaN stays NaN
        }
#pragma unroll
        for (int i = 0; i < SPANS; ++i) {
            const int span = first + i * GATHERERS + warp;
            if (span >= count) break;
            const float less = highest == __uint_as_float(0xFF800000) ? 0.0f : highest;
            const float take = expf(spans.max[span * spans.max_head + packed * spans.max_row] - less);
            weight += take * spans.den[span * spans.den_head + packed * spans.den_row];
#pragma unroll
            for (int j = 0; j < OF_A_LANE; ++j) added[j] = fmaf(part[i][j], take, added[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < OF_A_LANE; ++i)
        if (lane + i * LANES < VALUE_DIM) num[warp][lane + i * LANES] = added[i];
    den[warp] = weight;
    __syncthreads();
    const float keep = expf(before - (highest == __uint_as_float(0xFF800000) ? 0.0f : highest));
    float* own_num = into.num + head * into.num_head + row * into.num_row;
    for (int at = threadIdx.x; at < VALUE_DIM; at += LANES * GATHERERS) {
        float all = own_num[at] * keep;
        for (int i = 0; i < GATHERERS; ++i) all += num[i][at];
        own_num[at] = all;
    }
    if (threadIdx.x > 0) return;
    float all = sum * keep;
    for (int i = 0; i < GATHERERS; ++i) all += den[i];
    *own_max = highest;
    *own_den = all;
}

// Enter keys in a ledger, a thread a row: those of its piece, and `keys` whose indices sum to `key_sum`.
extern "C" __global__ void enter(
    State state,
    unsigned long long keys,
    unsigned long long key_sum,
    const __grid_constant__ Pieces<long long, MOST_PIECES> pieces,
    long long rows) {
    const long long row = pieces.first_row + static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= pieces.first_row + rows) return;
    if (pieces.count) {
        const Intervals<long long> own = pieces.all[pieces.find(row)].at(row);
        const unsigned long long ranges[2][2] = {{own.a, own.b}, {own.c, own.d}};
        for (const auto& [low, high] : ranges) {
            const unsigned long long count = high - low, ends = high + low - 1;  // their product is twice the sum
            keys += count;
            key_sum += count % 2 ? count * (ends / 2) : count / 2 * ends;
        }
    }
    state.keys[row * state.keys_row] += keys;
    state.key_sum[row * state.key_sum_row] += key_sum;
}

// One logit more in the denominator of each head's rows.
struct Sinks {
    int given;
    float of_head[MOST_SINKS];
};

template <typename Number>
__device__ void fold(const State& state, const Output& result, int heads, long long rows) {
    int head;
    long long row;
    if (!this_row(heads, rows, head, row)) return;
    const Number* num = static_cast<const Number*>(result.out) + head * result.out_head + row * result.out_row;
    const float lse = result.lse[head * result.lse_head + row * result.lse_row];
    add_row(state, head, row, num, 1.0f, lse);
}

// out = num / den and lse = max + log(den), after the sink; a row with neither key nor sink gives out = 0 and lse = -inf.
template <typename Number>
__device__ void finalise(const State& state, const Output& result, const Sinks& sinks, int heads, long long rows) {
    int head;
    long long row;
    if (!this_row(heads, rows, head, row)) return;
    const int lane = threadIdx.x % LANES;
    const float* num = state.num + head * state.num_head + row * state.num_row;
    float den = state.den[head * state.den_head + row * state.den_row];
    float max = state.max[head * state.max_head + row * state.max_row], keep = 1.0f;
    if (sinks.given) {
        const float sink = sinks.of_head[head], before = max;
        max = before != before ? before : fmaxf(before, sink);  // NaN stays NaN
        const float shift = max == __uint_as_float(0xFF800000) ? 0.0f : max;
        keep = expf(before - shift);
        den = den * keep + expf(sink - shift);
    }
    const float divisor = den == 0.0f ? 1.0f : den;
    Number* out = static_cast<Number*>(result.out) + head * result.out_head + row * result.out_row;
#pragma unroll
    for (int i = 0; i < OF_A_LANE; ++i) {
        const int at = lane + i * LANES;
        if (at < VALUE_DIM) out[at] = Number::of(num[at] * keep / divisor);
    }
    if (lane == 0) result.lse[head * result.lse_head + row * result.lse_row] = max + logf(den);
}

#define FOR_OUTPUTS_OF(Number, name)                                                                               \
    extern "C" __global__ void fold_##name(State state, Output result, int heads, long long rows) {                \
        fold<Number>(state, result, heads, rows);                                                                  \
    }                                                                                                              \
    extern "C" __global__ void finalise_##name(                                                                    \
        State state, Output result, int heads, long long rows, const __grid_constant__ Sinks sinks) {              \
        finalise<Number>(state, result, sinks, heads, rows);                                                       \
    }

FOR_OUTPUTS_OF(Half, float16)
FOR_OUTPUTS_OF(Bfloat16, bfloat16)
FOR_OUTPUTS_OF(Float, float32)
