// The passes of L-BFGS over its memory; what is decided between them the host decides.
//
// pairs (B, rows, D) holds steps and gradients' differences. Sums are taken in double over ranges of RANGE numbers, each
// by one block in a fixed order.

// Overwrite partial (B, rows, ranges) with the inner products of every row with g (B, D) over each range; gridDim =
// (ranges, rows, B). 2 flops and a number of pairs an element; g comes from the L2 cache.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    pairs_dot(double* partial, const REAL* __restrict__ pairs, const REAL* __restrict__ g, long long size) {
    long long row = (long long)blockIdx.z * gridDim.y + blockIdx.y, begin = (long long)blockIdx.x * RANGE;
    long long end = min(begin + RANGE, size);
    double total = 0;
    for (long long c = begin + threadIdx.x; c < end; c += SUM_THREADS)
        total = fma((double)pairs[row * size + c], (double)g[blockIdx.z * size + c], total);
    total = sum_block(total);
    if (threadIdx.x == 0) partial[row * gridDim.x + blockIdx.x] = total;
}

// Overwrite direction_b with -(gamma_b g_b + sum_i c_bi pairs_bi) for the runs with aimed_b; rows with c = 0 are not
// read, whatever they hold. 2 (rows + 1) flops and as many numbers an element, 1 more written. gridDim.y = B.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    pairs_direction(REAL* direction, const REAL* __restrict__ pairs, const REAL* __restrict__ g,
                    const double* __restrict__ coefficients, const double* __restrict__ gamma,
                    const int* __restrict__ aimed, long long size, int rows) {
    long long b = blockIdx.y;
    if (!aimed[b]) return;
    for (long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x; c < size;
         c += (long long)gridDim.x * blockDim.x) {
        REAL d = -(REAL)gamma[b] * g[b * size + c];
        for (int i = 0; i < rows; i++) {
            REAL z = (REAL)coefficients[b * rows + i];
            if (z != 0) d = fma(-z, pairs[(b * rows + i) * size + c], d);
        }
        direction[b * size + c] = d;
    }
}
