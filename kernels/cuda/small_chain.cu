// Small chains: whole descents on W = W_N ... W_1 from the entries of a mask, one block a problem, many steps a launch.
//
// A problem's factors stay in shared memory. A step is: the products R_j = W_j ... W_1 up to W itself; at the entries
// G = factor w psi(W - y), zero elsewhere, in place; with B_N = G the gradients grad_j = B_j R_{j-1}^T and B_{j-1} =
// W_j^T B_j, which takes the place of R_{j-1}; the rule. Which products there are stands in a table, as for the chains
// of the CPU, so that one kernel serves every depth and every widths. Every ``check_every`` steps a problem looks
// whether it has ended; its block is then free for the next one.
//
// Options: -DREAL, -DSTORED, -DLD=n | 1 and -DTILE=ceil(n / 16) for the largest width n <= 128, -DRULE=0 gradient
// descent, 1 heavy ball, 2 Nesterov, 3 group RMSprop.
//
// Arithmetic, for n x n factors. 2 (N - 1) products for the gradients, N - 1 for W: 6 (N - 1) n^3 flops a step. Shared
// memory holds the N factors and N - 1 work matrices, R_2 ... R_{N-1} and G, (2 N - 1) n LD numbers, and some for what
// is read behind the last one. With 227 KB a block:
//
//     depth            2     3     4     5
//     float32, n <=  128   107    90    79
//     float64, n <=   96    75    63    55
//
// so n = 100, N = 3 in float32 takes 121 KB for the factors and 81 KB for two work matrices. Velocities and gradients
// lie in global memory, and stay in L2 (40 KB a factor and block, 5 MB for 132): a step writes and reads a number of
// each factor, 240 KB, 6 us at the 41 bytes a ns that each of 132 multiprocessors has of 5.5 TB/s of L2; a velocity as
// much again.
//
// The threads form a square of 16 x 16, and each takes TILE x TILE numbers of a result, 16 apart: for a step of the
// inner loop it reads 2 TILE numbers and does TILE^2 fused products. LD is odd: threads that read down a column meet 16
// banks, threads that read along a row as well, whichever operand is transposed; and it is known when compiling, so
// that no addresses are computed. At n = 100, TILE = 7: 14 reads of a warp, one a clock and multiprocessor, against 49
// products of a warp, four a clock: bound by shared memory, 8 warps x 14 x 100 clocks = 6.4 us a product at 1.755 GHz,
// six of them 38 us a step, 0.3 us a step and problem with 132 of them. That is 70 % of the peak: a fifth of what is
// computed lies behind the edges. All of this is counted; no device was at hand to measure it.
//
// A dense matrix of measurements instead of entries does not pay here: A has m n^2 numbers, 40 MB for m = 1000 and
// n = 100, and each block would read them twice a step, 132 blocks 10.6 GB: 1.9 ms at 5.5 TB/s, where L2 even holds it,
// against 38 us of products. Batches share the reads of one A in gaussian.cu.

constexpr int CHAIN_THREADS = 256, SIDE = 16, CHAIN_WARPS = CHAIN_THREADS / WARP;
constexpr int OF_LANE = (SIDE * TILE + WARP - 1) / WARP;  // entries of a row that a lane takes
constexpr int NARROW = TILE < 2 ? TILE : 2;               // the tile for results of at most 32 rows or columns

enum { GD, HEAVY_BALL, NESTEROV, GROUP_RMSPROP };
enum { RUNNING, CONVERGED, MAX_ITER, DIVERGED };

#if RULE == 1 || RULE == 2
using ChainRule = Momentum;
#else
using ChainRule = Descent;
#endif

enum { PLAIN, SECOND_TRANSPOSED, FIRST_TRANSPOSED, COPY };

// A row of the table: C = A B of m x n with the inner dimension k, with A^T or B^T, or C = A. All matrices have the
// leading dimension LD but gradients, which lie as the factors do in the flat buffer.
struct Product {
    int kind, to_gradient, c, c_ld, a, b, m, n, k;
};

// A factor as it lies in the flat buffer, from ``offset`` on, and in shared memory.
struct Factor {
    int offset, rows, columns, place;
};

// C = A B with up to 16 U x 16 V numbers; what a thread computes behind the edges is not stored. Returns the sum of
// the squares of what it stored.
template <int U, int V, bool FIRST, bool SECOND>
__device__ __forceinline__ double multiply(REAL* c, const REAL* a, const REAL* b, const Product& p) {
    int i = threadIdx.x / SIDE, j = threadIdx.x % SIDE;
    REAL sum[U][V];
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
        for (int v = 0; v < V; v++) sum[u][v] = 0;
    a += FIRST ? i : i * LD;
    b += SECOND ? j * LD : j;
#pragma unroll 2
    for (int k = 0; k < p.k; k++) {
        REAL x[U], y[V];
#pragma unroll
        for (int u = 0; u < U; u++) x[u] = a[FIRST ? k * LD + u * SIDE : u * SIDE * LD + k];
#pragma unroll
        for (int v = 0; v < V; v++) y[v] = b[SECOND ? v * SIDE * LD + k : k * LD + v * SIDE];
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int v = 0; v < V; v++) sum[u][v] = fma(x[u], y[v], sum[u][v]);
    }
    double square = 0;
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
        for (int v = 0; v < V; v++)
            if (i + SIDE * u < p.m && j + SIDE * v < p.n) {
                c[(i + SIDE * u) * p.c_ld + j + SIDE * v] = sum[u][v];
                square = fma((double)sum[u][v], (double)sum[u][v], square);
            }
    return square;
}

template <bool FIRST, bool SECOND>
__device__ __forceinline__ double multiply_fitting(REAL* c, const REAL* a, const REAL* b, const Product& p) {
    bool few_rows = p.m <= SIDE * NARROW, few_columns = p.n <= SIDE * NARROW;
    if (few_rows && few_columns) return multiply<NARROW, NARROW, FIRST, SECOND>(c, a, b, p);
    if (few_rows) return multiply<NARROW, TILE, FIRST, SECOND>(c, a, b, p);
    if (few_columns) return multiply<TILE, NARROW, FIRST, SECOND>(c, a, b, p);
    return multiply<TILE, TILE, FIRST, SECOND>(c, a, b, p);
}

// Run one row of the table; returns this thread's part of the squared norm of the result.
__device__ __forceinline__ double run_product(const Product& p, REAL* shared, REAL* grad) {
    REAL *c = (p.to_gradient ? grad : shared) + p.c, *a = shared + p.a, *b = shared + p.b;
    if (p.kind == PLAIN) return multiply_fitting<false, false>(c, a, b, p);
    if (p.kind == SECOND_TRANSPOSED) return multiply_fitting<false, true>(c, a, b, p);
    if (p.kind == FIRST_TRANSPOSED) return multiply_fitting<true, false>(c, a, b, p);
    double square = 0;
    for (int i = threadIdx.x / SIDE; i < p.m; i += SIDE)
        for (int j = threadIdx.x % SIDE; j < p.n; j += SIDE) {
            REAL x = c[i * p.c_ld + j] = a[i * LD + j];
            square = fma((double)x, (double)x, square);
        }
    return square;
}

// Replace the predictions (n1, n2), at the entries, by factor w psi(prediction - y), and by zero elsewhere; predictions
// and results may be one matrix. A row is one warp's. Returns the thread's sum of w rho.
__device__ __forceinline__ double residuals(REAL* out, const REAL* predictions, int n1, int n2,
                                            const long long* indptr, const int* indices, const REAL* y, const REAL* w,
                                            REAL factor, const Loss& shape) {
    int lane = threadIdx.x % WARP;
    double total = 0;
    for (int i = threadIdx.x / WARP; i < n1; i += CHAIN_WARPS) {
        long long lo = indptr[i];
        int count = (int)(indptr[i + 1] - lo), column[OF_LANE];
        REAL pull[OF_LANE];
#pragma unroll
        for (int q = 0; q < OF_LANE; q++) {
            int e = lane + WARP * q;
            if (e >= count) continue;
            column[q] = indices[lo + e];
            REAL weight = w ? w[lo + e] : REAL(1), psi;
            REAL rho = rho_psi(predictions[i * LD + column[q]] - y[lo + e], shape, &psi);
            total += (double)weight * rho;
            pull[q] = factor * (weight * psi);
        }
        __syncwarp();
        for (int j = lane; j < n2; j += WARP) out[i * LD + j] = 0;
        __syncwarp();
#pragma unroll
        for (int q = 0; q < OF_LANE; q++)
            if (lane + WARP * q < count) out[i * LD + column[q]] = pull[q];
    }
    return total;
}

// The sum of the parts of the warps, in order.
__device__ __forceinline__ double add_warps(const double* of_warp) {
    double total = 0;
    for (int k = 0; k < CHAIN_WARPS; k++) total += of_warp[k];
    return total;
}

// Go on with every problem that runs, until it has ended or taken ``turns`` steps and reached a multiple of
// ``check_every``.
//
// x, grad and velocity (B, size) in the layout of the table, mean_square, losses (B,); count (B,) the steps taken,
// status (B,). At each multiple of check_every, and at max_iter, a problem ends if its loss is not below ceiling[b]
// (NaN is not), if losses / divisors <= tol, or at max_iter; if not for the first reason, x takes the point. So x is
// the last point that was looked at and was fine, and a descent in many launches gives the bits of one in a single one.
// indptr (B, n1 + 1) are places in indices, y and w; an entry's column is less than n2, and none stands twice in a row.
// grad is scratch; velocity, mean_square and w may be null where the rule does not need them. The table: ``before`` of
// the ``products`` come before the residuals, ``sizes`` are n1, n2, the place of the predictions and that of G. gridDim.x = B, shared memory as the plan says.
extern "C" __global__ void __launch_bounds__(CHAIN_THREADS, TILE > 4 ? 1 : 2)
    small_chain(REAL* x, REAL* grad, REAL* velocity, double* mean_square, long long* count, int* status,
                double* losses, const double* __restrict__ lr, const REAL* __restrict__ factors,
                const double* __restrict__ divisors, const double* __restrict__ ceilings,
                const long long* __restrict__ indptr, const int* __restrict__ indices, const REAL* __restrict__ y,
                const REAL* __restrict__ w, const int* __restrict__ table, const int* __restrict__ places,
                const int* __restrict__ sizes, int products, int before, int depth, long long size, int code,
                REAL delta, double beta, double eps, double tol, long long max_iter, long long check_every,
                long long turns) {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    __shared__ double loss_of_warp[CHAIN_WARPS], square_of_warp[CHAIN_WARPS], group_step;
    long long b = blockIdx.x;
    if (status[b] != RUNNING) return;
    REAL* shared = reinterpret_cast<REAL*>(shared_bytes);
    const Product* rows = reinterpret_cast<const Product*>(table);
    const Factor* parts = reinterpret_cast<const Factor*>(places);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x += b * size;
    grad += b * size;
    if (velocity) velocity += b * size;
    const long long* own = indptr + b * (sizes[0] + 1);
    Loss shape = loss_numbers(code, delta);
    double mean = RULE == GROUP_RMSPROP ? mean_square[b] : 0;
    long long t = count[b], end = t + turns;
    for (int f = 0; f < depth; f++) {
        Factor p = parts[f];
        for (int r = warp; r < p.rows; r += CHAIN_WARPS)
            for (int c = lane; c < p.columns; c += WARP)
                shared[p.place + r * LD + c] = x[p.offset + r * p.columns + c];
    }
    __syncthreads();
#pragma unroll 1
    for (;; t++) {
#pragma unroll 1
        for (int k = 0; k < before; k++) {
            run_product(rows[k], shared, grad);
            __syncthreads();
        }
        double part = residuals(shared + sizes[3], shared + sizes[2], sizes[0], sizes[1], own, indices, y, w, factors[b],
                                shape);
        part = sum_lanes(part, 1, WARP);
        if (lane == 0) loss_of_warp[warp] = part;
        __syncthreads();
        if (t % check_every == 0 || t >= max_iter) {
            double loss = add_warps(loss_of_warp);
            int state = !(loss <= ceilings[b])         ? DIVERGED
                        : loss / divisors[b] <= tol ? CONVERGED
                        : t >= max_iter             ? MAX_ITER
                                                    : RUNNING;
            if (state != DIVERGED)
                for (int f = 0; f < depth; f++) {
                    Factor p = parts[f];
                    for (int r = warp; r < p.rows; r += CHAIN_WARPS)
                        for (int c = lane; c < p.columns; c += WARP)
                            x[p.offset + r * p.columns + c] = shared[p.place + r * LD + c];
                }
            if (state != RUNNING || t >= end) {
                if (threadIdx.x == 0) {
                    count[b] = t;
                    status[b] = state;
                    losses[b] = loss;
                    if (RULE == GROUP_RMSPROP) mean_square[b] = mean;
                }
                return;
            }
        }
        double square = 0;
#pragma unroll 1
        for (int k = before; k < products; k++) {
            double part = run_product(rows[k], shared, grad);
            if (rows[k].to_gradient) square += part;
            __syncthreads();
        }
        ChainRule rule;
        rule.step = (REAL)lr[b];
#if RULE == 1 || RULE == 2
        rule.beta = (REAL)beta;
        rule.nesterov = RULE == NESTEROV;
#endif
        if (RULE == GROUP_RMSPROP) {
            square = sum_lanes(square, 1, WARP);
            if (lane == 0) square_of_warp[warp] = square;
            __syncthreads();
            if (threadIdx.x == 0)
                group_step = group_rmsprop_step(&mean, add_warps(square_of_warp), (double)t, lr[b], beta, eps);
            __syncthreads();
            rule.step = (REAL)group_step;
        }
        for (int f = 0; f < depth; f++) {
            Factor p = parts[f];
            for (int r = warp; r < p.rows; r += CHAIN_WARPS)
                for (int c = lane; c < p.columns; c += WARP) {
                    int at = p.offset + r * p.columns + c;
                    REAL* place = shared + p.place + r * LD + c;
                    REAL numbers[ChainRule::ARRAYS] = {*place};
                    if (ChainRule::ARRAYS > 1) numbers[ChainRule::ARRAYS - 1] = velocity[at];
                    rule(numbers, grad[at]);
                    *place = numbers[0];
                    if (ChainRule::ARRAYS > 1) velocity[at] = numbers[ChainRule::ARRAYS - 1];
                }
        }
        __syncthreads();
    }
}
