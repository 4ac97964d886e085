// Merging and finalising of states, one warp to a row of one head. What they compute is defined in merging.py.
//
// Compiled with HEAD_DIM defined.

#include "state.cuh"

constexpr int LANES = 32;
constexpr int OF_A_LANE = (HEAD_DIM + LANES - 1) / LANES;

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
        own[i] = at < HEAD_DIM ? own_num[at] : 0.0f;
        added[i] = at < HEAD_DIM ? float(num[at]) : 0.0f;
    }
    const float before = *own_max, sum = *own_den;
    __syncwarp();
    const float highest = before != before || max != max ? before + max : fmaxf(before, max);  // NaN stays NaN
    const float shift = highest == __uint_as_float(0xFF800000) ? 0.0f : highest;  // -inf: a row with no key
    const float keep = expf(before - shift), take = expf(max - shift);
#pragma unroll
    for (int i = 0; i < OF_A_LANE; ++i) {
        const int at = lane + i * LANES;
        if (at < HEAD_DIM) own_num[at] = own[i] * keep + added[i] * take;
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

// Keys that rows attend: row i of the call is row first_row + i of the problem. Each attends `keys` keys, whose indices sum to
// `key_sum`, and those between the two ramps of each range: a ramp is the row + offset, but `least` at least, `most` at most.
struct Entry {
    long long first_row, keys;
    unsigned long long key_sum;
    long long ranges;
    long long ramps[4][3];
    __device__ unsigned long long bound(int ramp, long long row) const {
        return max(ramps[ramp][1], min(ramps[ramp][2], row + ramps[ramp][0]));
    }
};

// Enter keys in a ledger, a thread a row.
extern "C" __global__ void enter(State state, Entry entry, long long rows) {
    const long long row = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    unsigned long long keys = entry.keys, sum = entry.key_sum;
    for (int range = 0; range < entry.ranges; ++range) {
        const unsigned long long low = entry.bound(2 * range, entry.first_row + row);
        const unsigned long long high = entry.bound(2 * range + 1, entry.first_row + row);
        const unsigned long long count = high - low, ends = high + low - 1;  // modulo 2^64: their product is twice the sum
        keys += count;
        sum += count % 2 ? count * (ends / 2) : count / 2 * ends;
    }
    state.keys[row * state.keys_row] += keys;
    state.key_sum[row * state.key_sum_row] += sum;
}

template <typename Number>
__device__ void fold(const State& state, const Output& result, int heads, long long rows) {
    int head;
    long long row;
    if (!this_row(heads, rows, head, row)) return;
    const Number* num = static_cast<const Number*>(result.out) + head * result.out_head + row * result.out_row;
    const float lse = result.lse[head * result.lse_head + row * result.lse_row];
    add_row(state, head, row, num, 1.0f, lse);
}

// out = num / den and lse = max + log(den); a row with no key gives out = 0 and lse = -inf.
template <typename Number>
__device__ void finalise(const State& state, const Output& result, int heads, long long rows) {
    int head;
    long long row;
    if (!this_row(heads, rows, head, row)) return;
    const int lane = threadIdx.x % LANES;
    const float* num = state.num + head * state.num_head + row * state.num_row;
    const float den = state.den[head * state.den_head + row * state.den_row];
    const float max = state.max[head * state.max_head + row * state.max_row];
    const float divisor = den == 0.0f ? 1.0f : den;
    Number* out = static_cast<Number*>(result.out) + head * result.out_head + row * result.out_row;
#pragma unroll
    for (int i = 0; i < OF_A_LANE; ++i) {
        const int at = lane + i * LANES;
        if (at < HEAD_DIM) out[at] = Number::of(num[at] / divisor);
    }
    if (lane == 0) result.lse[head * result.lse_head + row * result.lse_row] = max + logf(den);
}

#define FOR_OUTPUTS_OF(Number, name)                                                                              \
    extern "C" __global__ void fold_##name(State state, Output result, int heads, long long rows) {               \
        fold<Number>(state, result, heads, rows);                                                                 \
    }                                                                                                             \
    extern "C" __global__ void finalise_##name(State state, Output result, int heads, long long rows) {           \
        finalise<Number>(state, result, heads, rows);                                                             \
    }

FOR_OUTPUTS_OF(Half, float16)
FOR_OUTPUTS_OF(Bfloat16, bfloat16)
FOR_OUTPUTS_OF(Float, float32)
