// Updates of the rules: one launch moves all factors of a batch, flat buffers (B, D), a slice for each run.
//
// What changes from step to step is read from memory: step lengths, counts, norms, and which slices are active, so that
// a graph that holds these launches never has to be recorded again. A launch counts its own step. Slices that are not
// active stay as they are, their counts included; active may be null, for all, and so may count where no arithmetic
// needs it; counts are whole numbers in double, as the rules hold them. The rules' sums, ||grad||^2, come from slices.cu.
//
// Bytes of an element of 4: gradient descent reads x and the gradient and writes x, 12; momentum 20; Adam 28. At most
// two quotients and a root beside them: bound by memory.

constexpr int UPDATE_THREADS = 256;

// Move packs of N numbers, ``begin``, ``begin + stride``, ... below ``end``.
template <int N, class Rule>
__device__ __forceinline__ void update_packs(REAL* const (&arrays)[Rule::ARRAYS], const REAL* grad, long long begin,
                                             long long end, long long stride, const Rule& rule) {
    constexpr int A = Rule::ARRAYS;
    for (long long c = begin; c < end; c += stride) {
        Pack<REAL, N> held[A], g = load_pack<N>(grad + N * c);
#pragma unroll
        for (int a = 0; a < A; a++) held[a] = load_pack<N>(arrays[a] + N * c);
#pragma unroll
        for (int k = 0; k < N; k++) {
            REAL numbers[A];
#pragma unroll
            for (int a = 0; a < A; a++) numbers[a] = held[a].v[k];
            rule(numbers, g.v[k]);
#pragma unroll
            for (int a = 0; a < A; a++) held[a].v[k] = numbers[a];
        }
#pragma unroll
        for (int a = 0; a < A; a++) store_pack<N>(arrays[a] + N * c, held[a]);
    }
}

// Move the slice blockIdx.y of all arrays; the blocks of a slice share its packs.
template <class Rule>
__device__ __forceinline__ void update_slice(REAL* const (&arrays)[Rule::ARRAYS], const REAL* grad, long long size,
                                             const Rule& rule) {
    constexpr int N = 16 / sizeof(REAL);
    long long at = blockIdx.y * size, first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long stride = (long long)gridDim.x * blockDim.x;
    REAL* slices[Rule::ARRAYS];
#pragma unroll
    for (int a = 0; a < Rule::ARRAYS; a++) slices[a] = arrays[a] + at;
    // Slices begin on 16 bytes where all of them do.
    long long packs = size % N == 0 ? size / N : 0;
    update_packs<N>(slices, grad + at, first, packs, stride, rule);
    update_packs<1>(slices, grad + at, N * packs + first, size, stride, rule);
}

// Whether this thread is the one that counts for its slice, where the count is not read by others.
__device__ __forceinline__ bool counts(const double* count) {
    return count && blockIdx.x == 0 && threadIdx.x == 0;
}

// x <- x - step_size grad (fma), all (B, D). 2 flops an element. gridDim.y = B.
extern "C" __global__ void __launch_bounds__(UPDATE_THREADS)
    update_gd(REAL* x, const REAL* grad, const double* step_size, double* count, const unsigned char* active,
              long long size) {
    long long b = blockIdx.y;
    if (active && !active[b]) return;
    REAL* const arrays[] = {x};
    update_slice(arrays, grad, size, Descent{(REAL)step_size[b]});
    if (counts(count)) count[b]++;
}

// Heavy ball, or Nesterov's momentum. 4 flops an element, or 6. gridDim.y = B.
extern "C" __global__ void __launch_bounds__(UPDATE_THREADS)
    update_momentum(REAL* x, REAL* velocity, const REAL* grad, const double* step_size, double* count,
                    const unsigned char* active, long long size, double beta, int nesterov) {
    long long b = blockIdx.y;
    if (active && !active[b]) return;
    REAL* const arrays[] = {x, velocity};
    update_slice(arrays, grad, size, Momentum{(REAL)step_size[b], (REAL)beta, nesterov != 0});
    if (counts(count)) count[b]++;
}

// Adam, whose corrections need the number of the step: count[b] + 1, which the block that is the last to have read it
// writes. tickets (B,) are zero before the first launch, and after each. Some 15 flops an element. gridDim.y = B.
extern "C" __global__ void __launch_bounds__(UPDATE_THREADS)
    update_adam(REAL* x, REAL* mean, REAL* square, const REAL* grad, const double* step_size, double* count,
                unsigned* tickets, const unsigned char* active, long long size, double beta1, double beta2, double eps) {
    __shared__ REAL corrections[2];
    long long b = blockIdx.y;
    if (active && !active[b]) return;
    if (threadIdx.x == 0) {
        double t = count[b] + 1;
        corrections[0] = (REAL)(1 - pow(beta1, t));
        corrections[1] = (REAL)(1 - pow(beta2, t));
        __threadfence();
        if (atomicInc(&tickets[b], gridDim.x - 1) == gridDim.x - 1) count[b] = t;
    }
    __syncthreads();
    REAL* const arrays[] = {x, mean, square};
    update_slice(arrays, grad, size,
                 Adam{(REAL)step_size[b], (REAL)(1 - beta1), (REAL)(1 - beta2), corrections[0], corrections[1],
                      (REAL)eps});
}

// Overwrite step_size (B,) with the steps of group RMSprop for the points whose gradients have the squared norms
// ``squares``, and move mean_square on; ``count`` is what led to the points. One thread a slice, lr (B,).
extern "C" __global__ void __launch_bounds__(UPDATE_THREADS)
    update_group_rmsprop(double* step_size, double* mean_square, const double* squares, const double* lr,
                         const double* count, const unsigned char* active, int runs, double beta, double eps) {
    int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b >= runs || (active && !active[b])) return;
    step_size[b] = group_rmsprop_step(mean_square + b, squares[b], count[b], lr[b], beta, eps);
}
