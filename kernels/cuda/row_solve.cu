// Ridge regressions of rows against one side: the half of a completion sweep that owns its rows.
//
// With the other side B fixed, row i of A minimises
//
//     sum_j w_ij (y_ij - a_i . b_j)^2 + sum_k L_ik (a_ik - m_ik)^2,      L_ik = scale_i scaled_ridge_k + ridge_k,
//
// over its free columns, by a few steps of conjugate gradients with the preconditioner
// D_ik = free_k / (c_i moment_k + L_ik), c_i = sum_j w_ij: what kernels/cpu/row_solve.py does, step by step.
//
// Layout. a, mean (n1, H) and the vectors (H,) REAL, b (n2, H) STORED, entries sorted by row as in entry.cu. One block
// a row of those that are chosen: a warp for short rows, many for long ones, in two launches. gridDim.x is free.
//
// Structure. Every group of lanes (rows.cu) holds all vectors of the row in registers, and goes through entries of its
// own; their sum over groups and warps is added in one order for all, so that all take the same branches. The rows b_j
// are gathered for the gradient, and again from L1 or L2 for every step. Shared memory: a row and two doubles a warp.
//
// An entry costs 4 H flops for the gradient and 4 H for every step.

// Below it float loses digits, and a step goes anywhere.
constexpr REAL LEAST = REAL(1.17549435e-38);

struct Line {
    const INDEX* columns;
    const REAL *y, *w;
    int count;
};

// Sums over the entries: of w (y - x . b) b, or of w (x . b) b if not RESIDUAL; w r^2 and w are added beside the first.
template <bool RESIDUAL>
__device__ __forceinline__ Row gram(const Row& x, const STORED* b, const Line& line, double* squares, double* weights) {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    int lane = threadIdx.x % WARP, member = lane % GROUP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    double* numbers = reinterpret_cast<double*>(shared_bytes);
    REAL* rows = reinterpret_cast<REAL*>(numbers + 2 * warps);
    int last = line.count - 1, begin = warp * STEP + lane / GROUP;
    double square = 0, weight_sum = 0;
    Row sum = zero_row();
    // All lanes of a warp take as many turns.
#pragma unroll 1
    for (int k = begin; k - lane / GROUP < line.count; k += warps * STEP) {
        Row r[TOGETHER];
#pragma unroll
        for (int u = 0; u < TOGETHER; u++)
            r[u] = load_row(b + (long long)line.columns[min(k + u * GROUPS, last)] * H, member);
#pragma unroll
        for (int u = 0; u < TOGETHER; u++) {
            int e = min(k + u * GROUPS, last);
            REAL t = dot(x, r[u]), weight = line.w ? line.w[e] : REAL(1);
            if (RESIDUAL) t = line.y[e] - t;
            if (RESIDUAL && member == 0 && k + u * GROUPS < line.count) {
                square += (double)weight * t * t;
                weight_sum += weight;
            }
            add(sum, k + u * GROUPS < line.count ? weight * t : REAL(0), r[u]);
        }
    }
    sum = sum_groups(sum);
    if (RESIDUAL) {
        square = sum_lanes(square, 1, WARP);
        weight_sum = sum_lanes(weight_sum, 1, WARP);
    }
    if (warps == 1) {
        if (RESIDUAL) *squares = square, *weights = weight_sum;
        return sum;
    }
    if (lane < GROUP) store_row(rows + warp * H, sum, member);
    if (RESIDUAL && lane == 0) numbers[2 * warp] = square, numbers[2 * warp + 1] = weight_sum;
    __syncthreads();
    sum = load_row(rows, member);
    if (RESIDUAL) *squares = numbers[0], *weights = numbers[1];
#pragma unroll 1
    for (int k = 1; k < warps; k++) {
        add(sum, 1, load_row(rows + k * H, member));
        if (RESIDUAL) *squares += numbers[2 * k], *weights += numbers[2 * k + 1];
    }
    __syncthreads();
    return sum;
}

// Improve the rows chosen[0 .. count - 1] of a, and overwrite their places in squares (n1,) with their sums of
// w (y - a . b)^2 before. mean and w may be null. At most ``steps`` steps; a row stops, after its first, when g . D g
// has fallen below tol times its start. Columns that are not free stay as they are.
extern "C" __global__ void __launch_bounds__(256, 1)
    row_solve(REAL* a, double* squares, const STORED* __restrict__ b, const REAL* __restrict__ mean,
              const long long* __restrict__ indptr, const INDEX* __restrict__ chosen, const INDEX* __restrict__ indices,
              const REAL* __restrict__ y, const REAL* __restrict__ w, const REAL* __restrict__ scale,
              const REAL* __restrict__ scaled_ridge, const REAL* __restrict__ ridge, const REAL* __restrict__ moment,
              const REAL* __restrict__ free, long long count, int steps, REAL tol) {
    int member = threadIdx.x % GROUP;
    for (long long place = blockIdx.x; place < count; place += gridDim.x) {
        long long i = chosen[place], lo = indptr[i];
        Line line = {indices + lo, y + lo, w ? w + lo : w, (int)(indptr[i + 1] - lo)};
        Row x = load_row(a + i * H, member), away = x;
        double before, weights;
        Row g = gram<true>(x, b, line, &before, &weights);
        if (mean) add(away, -1, load_row(mean + i * H, member));
        Row shrink = load_row(ridge, member), scaling = load_row(moment, member), some = load_row(free, member);
        add(shrink, scale[i], load_row(scaled_ridge, member));
#pragma unroll
        for (int s = 0; s < SHARE; s++)
#pragma unroll
            for (int k = 0; k < PACK; k++) {
                REAL l = shrink.v[s].v[k];
                g.v[s].v[k] -= l * away.v[s].v[k];
                // Neither entries nor ridge: the gradient is zero as well, and stays so when divided by something.
                scaling.v[s].v[k] = some.v[s].v[k] / max(fma((REAL)weights, scaling.v[s].v[k], l), LEAST);
            }
        Row direction = product(scaling, g);
        REAL rz = dot(g, direction), stop = tol * rz;
#pragma unroll 1
        for (int turn = 0; turn < steps; turn++) {
            if (!(rz > LEAST) || (turn && rz < stop)) break;
            Row image = gram<false>(direction, b, line, nullptr, nullptr);
            add(image, 1, product(shrink, direction));
            REAL curvature = dot(direction, image);
            if (!(curvature > LEAST)) break;
            REAL along = rz / curvature;
            add(x, along, direction);
            add(g, -along, image);
            Row z = product(scaling, g);
            REAL former = rz;
            rz = dot(g, z);
            add(z, rz / former, direction);
            direction = z;
        }
        if (threadIdx.x < GROUP) store_row(a + i * H, x, member);
        if (threadIdx.x == 0) squares[i] = before;
    }
}
