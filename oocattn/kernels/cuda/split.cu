// Rows of the inputs as float16 parts of their scaled numbers, for the matrix units: two of float32, one of 16-bit numbers.
//
// x scaled by a power of two is `first + second` to 22 bits: float16 has 11, and so has what is left; a bfloat16 has 8. The
// largest number that is attended is scaled to [2^14, 2^15): numbers down to 2^-17 of it keep all bits, and smaller ones are
// off by 2^-40 of the largest at most. Finite numbers that are not attended stay finite. `find` looks for the largest;
// `split` writes the parts, [first parts of a row | second parts], each padded by zeros to whole panels. Of each three
// blocks, each takes its share of one tensor. Values may be projected before.
//
// Compiled with MOST_COLUMNS (of values that are projected).

constexpr int PANEL = 64, VECTOR = 8;  // numbers that a thread takes at a time, and columns of a projection
constexpr unsigned INFINITE = 0x7F800000;
constexpr float LARGEST = 3.402823466e38f, LARGEST_HALF = 65504.0f;

enum Kind { FLOAT32, BFLOAT16, FLOAT16 };

struct Rows {
    const void* from;
    unsigned short* to;
    long long head, row;  // strides of `from`, in numbers
    int heads, count, dim;  // count is 0 where a tensor is left as it is
    int kind, parts;
    int depth;  // columns that are projected to `dim`; 0: none
    int low, high;  // rows of a single head that are attended
};

struct Tensors {
    Rows of[3];         // query, key, value
    unsigned* largest;  // of each, the bits of its largest finite number; 0 at first
    float* unscaled;    // what brings back products of queries and keys, and values
};

struct Projection {
    float of[MOST_COLUMNS][VECTOR];
};

__device__ int padded(const Rows& rows) { return (rows.dim + PANEL - 1) / PANEL * PANEL; }

// Call `take` with the row and the first column of each vector of `width` columns, for this thread's share of them.
template <typename Take>
__device__ void each_vector(const Rows& rows, int width, Take take) {
    const int of_row = width / VECTOR, at_once = gridDim.x / 3 * (blockDim.x / of_row);  // rows
    if (threadIdx.x >= blockDim.x / of_row * of_row) return;
    const long long count = (long long)rows.heads * rows.count;
    for (long long row = blockIdx.x / 3 * (blockDim.x / of_row) + threadIdx.x / of_row; row < count; row += at_once)
        take(row, threadIdx.x % of_row * VECTOR);
}

__device__ float widened(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ unsigned short narrowed(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Eight numbers of a row, of which 16 bytes are loaded at a time.
__device__ void load_numbers(const Rows& rows, long long row, int column, float (&numbers)[VECTOR]) {
    const long long head = rows.heads == 1 ? 0 : row / rows.count;
    const long long at = head * rows.head + (row - head * rows.count) * rows.row + column;
    if (rows.kind == FLOAT32) {
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(rows.from) + at);
        const float4 low = from[0], high = from[1];
        const float all[VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) numbers[i] = all[i];
        return;
    }
    const uint4 from = *reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(rows.from) + at);
    const unsigned pairs[VECTOR / 2] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        const unsigned short bits = pairs[i / 2] >> i % 2 * 16;
        numbers[i] = rows.kind == BFLOAT16 ? __uint_as_float(unsigned(bits) << 16) : widened(bits);
    }
}

// The same of what is to be split.
__device__ void load_vector(
    const Rows& rows, const Projection& projection, long long row, int column, float (&numbers)[VECTOR]) {
    if (!rows.depth) return load_numbers(rows, row, column, numbers);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) numbers[i] = 0.0f;
    for (int first = 0; first < rows.depth; first += VECTOR) {
        float own[VECTOR];
        load_numbers(rows, row, first, own);
#pragma unroll
        for (int at = 0; at < VECTOR; ++at)
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) numbers[i] = fmaf(own[at], projection.of[first + at][i], numbers[i]);
    }
}

extern "C" __global__ void find(const __grid_constant__ Tensors tensors, const __grid_constant__ Projection projection) {
    const Rows& rows = tensors.of[blockIdx.x % 3];
    unsigned largest = 0;
    each_vector(rows, rows.dim, [&](long long row, int column) {
        if (rows.heads == 1 && (row < rows.low || row >= rows.high)) return;
        float numbers[VECTOR];
        load_vector(rows, projection, row, column, numbers);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const unsigned bits = __float_as_uint(numbers[i]) & 0x7FFFFFFF;
            if (bits < INFINITE) largest = max(largest, bits);
        }
    });
    __shared__ unsigned of_block;
    if (threadIdx.x == 0) of_block = 0;
    __syncthreads();
    largest = __reduce_max_sync(~0u, largest);
    if (threadIdx.x % 32 == 0) atomicMax(&of_block, largest);
    __syncthreads();
    if (threadIdx.x == 0 && of_block) atomicMax(&tensors.largest[blockIdx.x % 3], of_block);
}

// The power of two that scales a tensor, between 2^-113 and 2^126.
__device__ int scale_of(unsigned largest) { return min(14 + 127 - int(largest >> 23), 126); }

__device__ float power_of_two(int exponent) { return __uint_as_float(unsigned(exponent + 127) << 23); }

extern "C" __global__ void split(const __grid_constant__ Tensors tensors, const __grid_constant__ Projection projection) {
    const Rows& rows = tensors.of[blockIdx.x % 3];
    const int width = padded(rows);
    const float scale = power_of_two(scale_of(tensors.largest[blockIdx.x % 3]));
    each_vector(rows, width, [&](long long row, int column) {
        float numbers[VECTOR] = {};
        if (column < rows.dim) load_vector(rows, projection, row, column, numbers);
        alignas(16) unsigned short first[VECTOR], second[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            float scaled = numbers[i] * scale;
            if (fabsf(numbers[i]) <= LARGEST) scaled = fminf(fmaxf(scaled, -LARGEST_HALF), LARGEST_HALF);
            first[i] = narrowed(scaled);
            second[i] = narrowed(scaled - widened(first[i]));
        }
        unsigned short* to = rows.to + row * rows.parts * width + column;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(first);
        if (rows.parts == 2) *reinterpret_cast<uint4*>(to + width) = *reinterpret_cast<const uint4*>(second);
    });
    if (blockIdx.x || threadIdx.x) return;
    const unsigned* largest = tensors.largest;
    tensors.unscaled[0] = tensors.of[0].count ? ldexpf(1.0f, -scale_of(largest[0]) - scale_of(largest[1])) : 1.0f;
    tensors.unscaled[1] = power_of_two(-scale_of(largest[2]));
}
