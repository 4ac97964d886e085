// The scores of a step of hopper.cu: their terms, the keys that a row does not attend, and the softmax over all steps.
//
// A thread has two rows, `row` and 8 below it, of an item; each is shared by the four threads of a quad. Compiled with
// SOFTCAP, SLOPES and BIAS (0 or 1: the terms of a score beside its scale), WEIGHT_PARTS (1, or 2 of float16: the parts
// of a weight) and SHIFTED (0 or 1: whether the shifts are given).

#pragma once

#include "instructions.cuh"
#include "items.cuh"
#include "turns.cuh"

#define MINUS_INFINITY __uint_as_float(0xFF800000)

#define PLAIN (!SOFTCAP && !SLOPES && !BIAS)

constexpr int SCORES = KEYS / 2;  // of each of the 128 threads of a consumer: two rows, and of 8 columns two at a time
// How far, in powers of two, scores are above the shift when it is raised, and how much further they may rise before it is
// raised again. Where weights have two parts they begin high, so that the second, 2^-12 of the first, has its bits in float16.
// Weights of given shifts are 1 at most: they are lifted as far as float16 goes.
constexpr float LIFT = SHIFTED ? 15.0f : WEIGHT_PARTS == 2 ? 7.0f : 0.0f;
constexpr float RISE = 8.0f;
constexpr float MOST_SUM = WEIGHT_PARTS == 2 ? 32768.0f : 256.0f;  // of a thread's weights in a step: 2^(LIFT + RISE)
constexpr float LARGE = 67108864.0f;  // 2^26: float32 holds every fourth number
constexpr float FINE = 4194304.0f;    // 2^22: it holds halves
constexpr float LARGEST = 3.402823466e38f;
constexpr float LN2 = 0.693147180559945f, LOG2E = 1.442695040888963f;

// The row of the first of a thread's two rows; the other is 8 below.
__device__ __forceinline__ int first_row_of(const Item& item) {
    return item.tile * ROWS + (threadIdx.x / 32 - 4) * 16 + threadIdx.x % 32 / 4;
}

struct Softmax {
    float shift[2] = {MINUS_INFINITY, MINUS_INFINITY};  // exponents are taken of scaled scores less this
    float den[2] = {0.0f, 0.0f};                          // of the thread's own columns

    // Each thread's denominators become those of all columns.
    __device__ __forceinline__ void sum_den() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            den[i] += __shfl_xor_sync(~0u, den[i], 1);
            den[i] += __shfl_xor_sync(~0u, den[i], 2);
        }
    }

    // Scores less the shift, which is 0 from then on. The multiply-add of `weigh` does not round the product as the shift was
    // rounded: of large scores what is left of that would be more than an exponent.
    __device__ __forceinline__ static void subtract(float (&scores)[SCORES], float scale, float (&less)[2]) {
        const float back = 1.0f / scale;
#pragma unroll
        for (int i = 0; i < SCORES; ++i)
            scores[i] = __fsub_rn(__fmul_rn(scores[i], scale), less[i / 2 % 2]) * back;
        less[0] = less[1] = 0.0f;
    }

#if SHIFTED
    // The shifts of a thread's two rows. One of -inf is of a row without keys, whose weights are 0.
    __device__ __forceinline__ void take_shift(const Call& call, int head, int first_row) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + 8 * i;
            const float natural = row < call.rows ? call.shift[head * call.shift_head + row] : 0.0f;
            shift[i] = natural == MINUS_INFINITY ? -MINUS_INFINITY : natural * LOG2E;
        }
    }

    // Turn scores into weights.
    __device__ __forceinline__ void keep_given_shift(float (&scores)[SCORES], float scale, const Turns& turns) {
        float less[2] = {shift[0], shift[1]}, sum[2];
        if (fmaxf(fabsf(less[0]), fabsf(less[1])) > FINE) {
            subtract(scores, scale, less);
            const float most = 0.9f / scale;  // of a shift that is rounded to more: weights of float16 stay finite
#pragma unroll
            for (int i = 0; i < SCORES; ++i) scores[i] = scores[i] > most ? most : scores[i];
        }
        less[0] -= LIFT;
        less[1] -= LIFT;
        exponentiate(scores, scale, less, sum, [&](int i) {
            if (i == SCORES * 3 / 8 - 1) turns.pass(scores[i]);  // measured against other parts (NOTES.md)
        });
        den[0] += sum[0];
        den[1] += sum[1];
    }

    // Bring sums of weights back to a maximum of 0, and return the factor for others.
    __device__ __forceinline__ float drop_shift() {
        const float back = exp2_of(-LIFT);
        shift[0] = shift[1] = 0.0f;
        den[0] *= back;
        den[1] *= back;
        return back;
    }
#endif

    // Turn scores into weights by the shift as it is. False where it does not do for one of the warp's rows, in this step: then
    // the scores are lost, and a shift is to be raised where it is exceeded by `rise`.
    __device__ __forceinline__ bool keep_shift(float (&scores)[SCORES], float scale, float& rise) {
        float sum[2];
        exponentiate(scores, scale, shift, sum);
        const float farthest = fmaxf(fabsf(shift[0]), fabsf(shift[1]));
        const bool high = fmaxf(sum[0], sum[1]) > MOST_SUM;
        if (__any_sync(~0u, high || farthest > LARGE)) {
            if (__any_sync(~0u, high)) rise = LIFT;  // or it would not do for the next steps either
            return false;
        }
        den[0] += sum[0];
        den[1] += sum[1];
        return true;
    }

    // Turn scores into weights. Whether the shift was raised, as it is where a score exceeds it by more than `rise`; then what
    // was summed before counts `factor` times as much.
    __device__ __forceinline__ bool find_shift(float (&scores)[SCORES], float scale, float rise, float (&factor)[2]) {
        float highest[2] = {scores[0], scores[2]};
#pragma unroll
        for (int i = 0; i < SCORES; i += 4) {
            highest[0] = fmaxf(highest[0], fmaxf(scores[i], scores[i + 1]));
            highest[1] = fmaxf(highest[1], fmaxf(scores[i + 2], scores[i + 3]));
        }
        // Rounded as `subtract` rounds: of large scores what is left of a product would be more than a weight may rise.
        auto excess = [&](int row) { return __fmul_rn(highest[row], scale) - shift[row]; };
        const bool raise = __any_sync(~0u, fmaxf(excess(0), excess(1)) > rise);
        if (raise) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                float most = highest[row];
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
                const float raised = fmaxf(shift[row], __fmul_rn(most, scale) - LIFT);
                factor[row] = raised == MINUS_INFINITY ? 1.0f : exp2_of(shift[row] - raised);
                den[row] *= factor[row];
                shift[row] = raised;
            }
        }
        float less[2] = {shift[0] == MINUS_INFINITY ? 0.0f : shift[0], shift[1] == MINUS_INFINITY ? 0.0f : shift[1]}, sum[2];
        if (fmaxf(fabsf(less[0]), fabsf(less[1])) > LARGE) subtract(scores, scale, less);
        exponentiate(scores, scale, less, sum);
        den[0] += sum[0];
        den[1] += sum[1];
        return raise;
    }

  private:
    // `then` is called of each exponential.
    template <typename Then>
    __device__ __forceinline__ static void exponentiate(
        float (&scores)[SCORES], float scale, const float (&less)[2], float (&sum)[2], Then then) {
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < SCORES; ++i) {
            scores[i] = exp2_of(fmaf(scores[i], scale, -less[i / 2 % 2]));
            sum[i / 2 % 2] += scores[i];
            then(i);
        }
    }

    __device__ __forceinline__ static void exponentiate(
        float (&scores)[SCORES], float scale, const float (&less)[2], float (&sum)[2]) {
        exponentiate(scores, scale, less, sum, [](int) {});
    }
};

// ---- Terms ----

#if !PLAIN

// Products of queries and keys become scores in powers of two: the keys of this step begin at `first`.
__device__ __forceinline__ void add_terms(
    float (&scores)[SCORES], const Call& call, float scale, int head, int first_row, int first) {
    const int column = first + threadIdx.x % 4 * 2;
#if SLOPES
    const float slope = call.slopes[head];
    const int position[2] = {call.positions[first_row], call.positions[first_row + 8]};
#endif
#if BIAS
    const float* bias = call.bias + head * call.bias_head;
#endif
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
        const int key = column + i / 4 * 8 + i % 2;
        float score = scores[i] * scale;
#if SOFTCAP
        score = tanhf(score) * call.cap;
#endif
#if SLOPES
        const int row = i / 2 % 2;
        const unsigned apart = position[row] > key ? unsigned(position[row]) - key : unsigned(key) - position[row];
        score = fmaf(slope, float(apart), score);
#endif
#if BIAS
        const float natural = bias[min(key, call.keys - 1)], of_key = natural * LOG2E;
        score += natural > MINUS_INFINITY ? fmaxf(of_key, -LARGEST) : of_key;  // as of padding that a constant masks
#endif
        scores[i] = score;
    }
}

#endif

// ---- Keys that a row does not attend ----

#if LISTED

// Keys [a, b) and [c, d) that all rows of a warp attend.
__device__ __forceinline__ Intervals<int> shared_by_warp(const Intervals<int>& one, const Intervals<int>& other) {
    Intervals<int> all = {max(one.a, other.a), min(one.b, other.b), max(one.c, other.c), min(one.d, other.d)};
#pragma unroll
    for (int lane = 4; lane < 32; lane *= 2) {
        all.a = max(all.a, __shfl_xor_sync(~0u, all.a, lane));
        all.b = min(all.b, __shfl_xor_sync(~0u, all.b, lane));
        all.c = max(all.c, __shfl_xor_sync(~0u, all.c, lane));
        all.d = min(all.d, __shfl_xor_sync(~0u, all.d, lane));
    }
    return all;
}

// Scores of the keys that one of a thread's two rows does not attend become -inf: those outside of [start, stop), or inside
// of it, counted from the first key of the step.
template <int ROW, bool INSIDE = false>
__device__ __forceinline__ void mask_row(float (&scores)[SCORES], int start, int stop) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < SCORES / 2; ++i) {
        const int key = i / 2 * 8 + column + i % 2;
        const bool hidden = INSIDE ? key >= start && key < stop : key < start || key >= stop;
        if (hidden) scores[i / 2 * 4 + 2 * ROW + i % 2] = MINUS_INFINITY;
    }
}

// The same for a row's bounds, where the keys of the step begin at `first`.
template <int ROW>
__device__ __forceinline__ void mask_row(float (&scores)[SCORES], const Intervals<int>& bounds, int first) {
    int a, b, c, d;  // loaded here, and not before the other row is masked: there are no registers for both
    asm volatile("ld.global.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(&bounds) : "memory");
    b -= first;
    c -= first;
    mask_row<ROW>(scores, (b > 0 ? a : c + first) - first, c < KEYS ? d - first : b);
    if (b > 0 && b < c && c < KEYS) mask_row<ROW, true>(scores, b, c);
}

#else

// Scores of keys that a row does not attend become -inf: its two rows attend [start, stop) of the keys of this step.
__device__ __forceinline__ void mask(float (&scores)[SCORES], const int (&start)[2], const int (&stop)[2]) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
        const int key = i / 4 * 8 + column + i % 2;
        if (key < start[i / 2 % 2] || key >= stop[i / 2 % 2]) scores[i] = MINUS_INFINITY;
    }
}

#endif
