// Sums in double over ranges of RANGE numbers, each by one block of SUM_THREADS threads in a fixed order. It goes behind
// common.cu, in front of the families that add up slices, cells or pairs.

constexpr int SUM_THREADS = 256, RANGE = 4096;

// The sum over the threads of the block, for thread 0. All threads come here.
__device__ __forceinline__ double sum_block(double x) {
    __shared__ double of_warp[SUM_THREADS / WARP];
    x = sum_lanes(x, 1, WARP);
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    double total = 0;
    for (int k = 0; k < SUM_THREADS / WARP; k++) total += of_warp[k];
    return total;
}
