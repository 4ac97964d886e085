// Rows of the inputs as float16 parts of their scaled numbers, for the matrix units: two of float32, one of bfloat16.
//
// x scaled by a power of two is `first + second` to 22 bits: float16 has 11, and so has what is left; a bfloat16 has 8. The
// largest number of a tensor is scaled to [2^14, 2^15), so that second parts, 2^-12 of the first, keep their bits over 27
// powers of two. `find` looks for the largest numbers; `split` writes the parts, [first parts of a row | second parts], each
// padded by zeros to whole panels. Of each three blocks, each takes its share of one tensor.
//
// Compiled with BFLOAT16 (0 or 1: what the inputs are, bfloat16 or float32).

constexpr int PANEL = 64, VECTOR = 8;  // numbers that a thread takes at a time
constexpr unsigned INFINITE = 0x7F800000;
#if BFLOAT16
typedef unsigned short Number;
constexpr int PARTS = 1;
#else
typedef float Number;
constexpr int PARTS = 2;
#endif

struct Rows {
    const Number* from;
    unsigned short* to;
    long long head, row;  // strides of `from`
    int heads, count, dim;
};

struct Tensors {
    Rows of[3];        // query, key, value
    unsigned* largest;  // of each, the bits of its largest finite number; 0 at first
    float* unscaled;   // what brings back products of queries and keys, and values
};

__device__ int padded(const Rows& rows) { return (rows.dim + PANEL - 1) / PANEL * PANEL; }

// Call `take` with the row and the first column of each vector of `width` columns, for this thread's share of them.
template <typename Take>
__device__ void each_vector(const Rows& rows, int width, Take take) {
    const int of_row = width / VECTOR;
    const long long vectors = (long long)rows.heads * rows.count * of_row;
    const int block = blockIdx.x / 3, blocks = gridDim.x / 3;
    for (long long at = block * (long long)blockDim.x + threadIdx.x; at < vectors; at += (long long)blocks * blockDim.x)
        take(at / of_row, int(at % of_row) * VECTOR);
}

__device__ void load_vector(const Rows& rows, long long row, int column, float (&numbers)[VECTOR]) {
    const Number* from = rows.from + row / rows.count * rows.head + row % rows.count * rows.row + column;
    const uint4* vectors = reinterpret_cast<const uint4*>(from);
#if BFLOAT16
    const unsigned pairs[4] = {vectors->x, vectors->y, vectors->z, vectors->w};
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) numbers[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xFFFF0000 : pairs[i / 2] << 16);
#else
    const uint4 low = vectors[0], high = vectors[1];
    const unsigned bits[VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) numbers[i] = __uint_as_float(bits[i]);
#endif
}

extern "C" __global__ void find(const __grid_constant__ Tensors tensors) {
    const Rows& rows = tensors.of[blockIdx.x % 3];
    unsigned largest = 0;
    each_vector(rows, rows.dim, [&](long long row, int column) {
        float numbers[VECTOR];
        load_vector(rows, row, column, numbers);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const unsigned bits = __float_as_uint(numbers[i]) & 0x7FFFFFFF;
            if (bits < INFINITE) largest = max(largest, bits);
        }
    });
    largest = __reduce_max_sync(~0u, largest);
    if (threadIdx.x % 32 == 0 && largest) atomicMax(&tensors.largest[blockIdx.x % 3], largest);
}

// The power of two that scales a tensor, between 2^-113 and 2^126.
__device__ int scale_of(unsigned largest) { return min(14 + 127 - int(largest >> 23), 126); }

__device__ float power_of_two(int exponent) { return __uint_as_float(unsigned(exponent + 127) << 23); }

__device__ unsigned short narrowed(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ float widened(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

extern "C" __global__ void split(const __grid_constant__ Tensors tensors) {
    const Rows& rows = tensors.of[blockIdx.x % 3];
    const int width = padded(rows);
    const float scale = power_of_two(scale_of(tensors.largest[blockIdx.x % 3]));
    each_vector(rows, width, [&](long long row, int column) {
        float numbers[VECTOR] = {};
        if (column < rows.dim) load_vector(rows, row, column, numbers);
        alignas(16) unsigned short first[VECTOR], second[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float scaled = numbers[i] * scale;
            first[i] = narrowed(scaled);
            second[i] = narrowed(scaled - widened(first[i]));
        }
        unsigned short* to = rows.to + row * PARTS * width + column;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(first);
        if (PARTS == 2) *reinterpret_cast<uint4*>(to + width) = *reinterpret_cast<const uint4*>(second);
    });
    if (blockIdx.x || threadIdx.x) return;
    const unsigned* largest = tensors.largest;
    tensors.unscaled[0] = ldexpf(1.0f, -scale_of(largest[0]) - scale_of(largest[1]));
    tensors.unscaled[1] = power_of_two(-scale_of(largest[2]));
}
