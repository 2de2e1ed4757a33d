// Measurements r_i = a_i . x - y_i and their adjoint, every entry of A fetched once: what the dense and the seeded
// kernels share. It goes behind common.cu, in front of a family that says where the entries come from.
//
// Options: -DPACK columns that are loaded at once, -DPER packs of a thread, -DTHREADS threads of a block, -DRUNS
// right-hand sides that share a read of A. The block holds, in registers, x for RUNS right-hand sides, the sums for g,
// and two rows of A. It takes the pairs blockIdx.x, blockIdx.x + gridDim.x, ... of rows: fetches both, sums their
// products with x over the threads, and adds them to g while they are still there. blockIdx.y is the tile of RUNS
// right-hand sides, blockIdx.z the window of columns. What the block has summed at the end goes to its place in
// ``partial`` (gridDim.x, B, d), which ``measured_join`` adds up in order. The bits depend on gridDim.x and the
// options; the host derives them from the shape of the problem, so that they are the same on every device.
//
// With one window a single launch does everything. Rows that do not fit in a block have several: their products are
// summed over the windows by ``measured_judge`` between a launch that predicts and one that pulls, for as many rows at
// a time as stay in the L2 cache in between.

constexpr int ROWS = 2, WARPS = THREADS / WARP, WIDTH = THREADS * PER;  // packs of a window

using Entries = Pack<REAL, PACK>;

struct Tile {
    Entries v[PER];
};

// The first pack of this thread; the next ones are THREADS further each.
__device__ __forceinline__ long long first_pack() { return (long long)blockIdx.z * WIDTH + threadIdx.x; }

// Whether the row of d / PACK packs has the k-th pack of this thread.
__device__ __forceinline__ bool has_pack(int k, int packs_left) { return (int)threadIdx.x + k * THREADS < packs_left; }

// The share of this thread in a row, zero behind its end.
template <class T>
__device__ __forceinline__ Tile load_tile(const T* row, int packs_left) {
    Tile x;
    const T* from = row + first_pack() * PACK;
#pragma unroll
    for (int k = 0; k < PER; k++) {
#pragma unroll
        for (int e = 0; e < PACK; e++) x.v[k].v[e] = 0;
        if (has_pack(k, packs_left)) x.v[k] = load_pack<PACK>(from + k * THREADS * PACK);
    }
    return x;
}

__device__ __forceinline__ void store_tile(REAL* row, const Tile& x, int packs_left) {
    REAL* to = row + first_pack() * PACK;
#pragma unroll
    for (int k = 0; k < PER; k++)
        if (has_pack(k, packs_left)) store_pack<PACK>(to + k * THREADS * PACK, x.v[k]);
}

__device__ __forceinline__ REAL dot(const Tile& x, const Tile& y) {
    REAL total = 0;
#pragma unroll
    for (int k = 0; k < PER; k++)
#pragma unroll
        for (int e = 0; e < PACK; e++) total = fma(x.v[k].v[e], y.v[k].v[e], total);
    return total;
}

__device__ __forceinline__ void add(Tile& x, REAL t, const Tile& y) {
#pragma unroll
    for (int k = 0; k < PER; k++)
#pragma unroll
        for (int e = 0; e < PACK; e++) x.v[k].v[e] = fma(t, y.v[k].v[e], x.v[k].v[e]);
}

// Replace the parts of each thread by their sums over the block, the same bits for all threads. Two sets of sums are
// used in turn: a set is written again only behind the barrier of the other one.
__device__ __forceinline__ void sum_block(REAL (&s)[ROWS][RUNS], bool odd) {
    __shared__ REAL sums[2][WARPS][ROWS][RUNS];
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int b = 0; b < RUNS; b++) {
            s[i][b] = sum_lanes(s[i][b], 1, WARP);
            if (threadIdx.x % WARP == 0) sums[odd][threadIdx.x / WARP][i][b] = s[i][b];
            s[i][b] = 0;
        }
    __syncthreads();
#pragma unroll 1  // the tiles leave no registers for more
    for (int k = 0; k < WARPS; k++)
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int b = 0; b < RUNS; b++) s[i][b] += sums[odd][k][i][b];
}

// EVALUATE: g and the terms w rho (B, m). PREDICT: the products of this window with x to ``out`` (windows, B, m).
// PULL: g for the given y (B, m), added to what ``partial`` holds if ``accumulate``.
enum Task { EVALUATE, PREDICT, PULL };

template <Task TASK, class Source>
__device__ __forceinline__ void measure(REAL* partial, double* terms, REAL* out, Source source, const REAL* x,
                                        const REAL* y, const REAL* w, long long m, long long d, int runs,
                                        long long y_stride, long long w_stride, Loss shape, bool accumulate) {
    int packs_left = (int)min(d / PACK - (long long)blockIdx.z * WIDTH, (long long)WIDTH);
    Tile xs[RUNS], gs[RUNS], a[ROWS];
#pragma unroll
    for (int b = 0; b < RUNS; b++) {
        int run = blockIdx.y * RUNS + b, none = run < runs ? packs_left : 0;  // the last tile may have fewer
        if (TASK != PULL) xs[b] = load_tile(x + run * d, none);
        if (TASK != PREDICT)
            gs[b] = load_tile(partial + (blockIdx.x * (long long)runs + run) * d, accumulate ? none : 0);
    }
    bool odd = false;
#pragma unroll 1
    for (long long i = (long long)blockIdx.x * ROWS; i < m; i += (long long)gridDim.x * ROWS) {
        source.fetch(a, i, min(i + 1, m - 1), d, packs_left);
        REAL t[ROWS][RUNS];
        if (TASK != PULL) {
#pragma unroll
            for (int k = 0; k < ROWS; k++)
#pragma unroll
                for (int b = 0; b < RUNS; b++) t[k][b] = dot(a[k], xs[b]);
            sum_block(t, odd);
            odd = !odd;
        }
#pragma unroll
        for (int k = 0; k < ROWS; k++)
#pragma unroll
            for (int b = 0; b < RUNS; b++) {
                long long run = blockIdx.y * RUNS + b;
                bool real = i + k < m && run < runs;
                REAL given = real && TASK != PREDICT ? y[run * y_stride + i + k] : REAL(0);
                if (TASK == PREDICT && real && threadIdx.x == 0)
                    out[((long long)blockIdx.z * runs + run) * m + i + k] = t[k][b];
                if (TASK == PULL) t[k][b] = given;
                if (TASK == EVALUATE) {
                    REAL rho = rho_psi(t[k][b] - given, shape, &t[k][b]);
                    REAL weight = w && real ? w[run * w_stride + i + k] : REAL(1);
                    t[k][b] = real ? weight * t[k][b] : REAL(0);
                    if (real && threadIdx.x == 0) terms[run * m + i + k] = (double)weight * rho;
                }
                if (TASK != PREDICT) add(gs[b], t[k][b], a[k]);
            }
    }
#pragma unroll
    for (int b = 0; b < RUNS; b++) {
        long long run = blockIdx.y * RUNS + b;
        if (TASK != PREDICT && run < runs)
            store_tile(partial + (blockIdx.x * (long long)runs + run) * d, gs[b], packs_left);
    }
}

// Overwrite r (B, count) with w psi and ``count`` numbers of terms (B, m) from ``first`` on with w rho, for predictions
// that are the sums over the windows of parts (windows, B, count), in order. y, w and terms hold all m measurements.
// gridDim.y = B.
extern "C" __global__ void __launch_bounds__(256)
    measured_judge(REAL* r, double* terms, const REAL* __restrict__ parts, const REAL* __restrict__ y,
                   const REAL* __restrict__ w, long long m, long long first, long long count, int windows,
                   long long y_stride, long long w_stride, int code, REAL delta) {
    Loss shape = loss_numbers(code, delta);
    long long b = blockIdx.y;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (long long)gridDim.x * blockDim.x) {
        REAL prediction = 0, psi;
        for (int k = 0; k < windows; k++) prediction += parts[((long long)k * gridDim.y + b) * count + i];
        REAL rho = rho_psi(prediction - y[b * y_stride + first + i], shape, &psi);
        REAL weight = w ? w[b * w_stride + first + i] : REAL(1);
        r[b * count + i] = weight * psi;
        terms[b * m + first + i] = (double)weight * rho;
    }
}

// Overwrite out (size,) with the sum over the leading axis of parts (count, size), in order.
extern "C" __global__ void __launch_bounds__(256)
    measured_join(REAL* out, const REAL* __restrict__ parts, int count, long long size) {
    for (long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x; c < size;
         c += (long long)gridDim.x * blockDim.x) {
        REAL total = 0;
        for (int k = 0; k < count; k++) total += parts[k * size + c];
        out[c] = total;
    }
}
