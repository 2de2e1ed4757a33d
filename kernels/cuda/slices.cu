// Steps, sums and inner products of a batch: one pass over (B, D) buffers, a scalar a slice.
//
// The factors of a run are one slice, so that one launch moves all of them. Sums are taken over ranges of RANGE numbers
// in double, each by one block in a fixed order, and the sums of the ranges once more by ``slices_sum`` until one is
// left: the bits depend on neither the grid nor the device. Step lengths are read from memory: a graph that moves need
// not be recorded again for the next step.
//
// A product of two floats is exact in double, so that an inner product is rounded only when it is added.

// Overwrite partial (B, ranges) with the inner products of a and b (B, D) over each range; gridDim = (ranges, B).
// 2 flops and 2 numbers read an element.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    slices_dot(double* partial, const REAL* a, const REAL* b, long long size) {
    long long begin = (long long)blockIdx.x * RANGE, end = min(begin + RANGE, size), at = blockIdx.y * size;
    double total = 0;
    for (long long c = begin + threadIdx.x; c < end; c += SUM_THREADS)
        total = fma((double)a[at + c], (double)b[at + c], total);
    total = sum_block(total);
    if (threadIdx.x == 0) partial[(long long)blockIdx.y * gridDim.x + blockIdx.x] = total;
}

// Overwrite partial (B, ranges) with the sums of x (B, D) over each range; gridDim = (ranges, B).
extern "C" __global__ void __launch_bounds__(SUM_THREADS) slices_sum(double* partial, const double* x, long long size) {
    long long begin = (long long)blockIdx.x * RANGE, end = min(begin + RANGE, size), at = blockIdx.y * size;
    double total = 0;
    for (long long c = begin + threadIdx.x; c < end; c += SUM_THREADS) total += x[at + c];
    total = sum_block(total);
    if (threadIdx.x == 0) partial[(long long)blockIdx.y * gridDim.x + blockIdx.x] = total;
}

// Overwrite out with x_b + steps[b] direction_b, all (B, D); out may be x. 2 flops and 3 numbers moved an element.
// gridDim.y = B.
template <int N>
__device__ __forceinline__ void move(REAL* out, const REAL* x, REAL t, const REAL* direction, long long begin,
                                     long long end, long long step) {
    for (long long c = begin; c < end; c += step) {
        Pack<REAL, N> from = load_pack<N>(x + N * c), along = load_pack<N>(direction + N * c);
#pragma unroll
        for (int k = 0; k < N; k++) from.v[k] = fma(t, along.v[k], from.v[k]);
        store_pack<N>(out + N * c, from);
    }
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    slices_move(REAL* out, const REAL* x, const double* steps, const REAL* direction, long long size) {
    constexpr int N = 16 / sizeof(REAL);
    long long at = blockIdx.y * size, first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long step = (long long)gridDim.x * blockDim.x;
    REAL t = (REAL)steps[blockIdx.y];
    // Slices begin on 16 bytes where all of them do.
    long long packs = size % N == 0 ? size / N : 0;
    move<N>(out + at, x + at, t, direction + at, first, packs, step);
    move<1>(out + at, x + at, t, direction + at, N * packs + first, size, step);
}
