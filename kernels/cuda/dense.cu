// Dense masks: the residual of a full product, in place, between the products that cuBLAS does.
//
// Replaces g (B, cells) by w psi(g - y) and overwrites terms (B, ranges) with the sums of w rho over each range of RANGE
// cells, taken in double by one block in a fixed order. y and w hold zeros at the holes and are shared by the runs where
// their stride is 0. 5 flops a cell; reads g, y, w and writes g: 4 numbers a cell. gridDim = (ranges, B).

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    dense_residual(REAL* g, double* terms, const REAL* __restrict__ y, const REAL* __restrict__ w, long long cells,
                   long long y_stride, long long w_stride, int code, REAL delta) {
    Loss loss = loss_numbers(code, delta);
    long long b = blockIdx.y, begin = (long long)blockIdx.x * RANGE, end = min(begin + RANGE, cells);
    double total = 0;
    for (long long c = begin + threadIdx.x; c < end; c += SUM_THREADS) {
        REAL weight = w[b * w_stride + c], psi;
        REAL rho = rho_psi(g[b * cells + c] - y[b * y_stride + c], loss, &psi);
        g[b * cells + c] = weight * psi;
        total += (double)(weight * rho);
    }
    total = sum_block(total);
    if (threadIdx.x == 0) terms[b * gridDim.x + blockIdx.x] = total;
}
