// Seeded measurements: losses and their pull, predictions and entries, with A drawn where it is needed.
//
// The entry c of a_i is a function of its place alone, by Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011) with
// the counter (block, 0, rows[i], problem) and the halves of the seed as its key: the formats ``gauss-v1`` and
// ``rademacher-v1`` of kernels/cpu/philox.py, to the bit. Every operation on floats below is one that rounds once, and
// is written as such, so that no compiler fuses or reorders anything; no result is subnormal.
//
// Layout. x, g (B, d), y, w (1 or B, m) REAL, d a multiple of 4; where the matrix ends before d, x must be zero and g
// means nothing. rows (m,) are the rows of the matrix that are measured. Structure: measurements.cu; a pack is the four
// samples of one block. -DSIGNS=0 draws samples of the normal distribution, one block a pack; -DSIGNS=1 draws signs, of
// which a block has 128: the packs of one warp, so that lane k draws the k-th block for all of them.
//
// No bytes of A. An entry costs some 45 instructions of the transform and Philox, a sign 2, and 4 flops a run.

static_assert(PACK == 4, "a block of Philox is four columns");

struct Words {
    unsigned v[4];
};

struct Stream {
    unsigned problem, low, high;
};

__device__ __forceinline__ Words philox(unsigned block, unsigned row, Stream stream) {
    unsigned c0 = block, c1 = 0, c2 = row, c3 = stream.problem, k0 = stream.low, k1 = stream.high;
#pragma unroll
    for (int r = 0; r < 10; r++) {
        unsigned h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
        unsigned h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0;
        c1 = l1;
        c2 = h0 ^ c3 ^ k1;
        c3 = l0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Horner's rule, lowest coefficient first, one fma a step.
template <int N>
__device__ __forceinline__ float polynomial(float x, const float (&c)[N]) {
    float total = c[N - 1];
#pragma unroll
    for (int k = N - 2; k >= 0; k--) total = __fmaf_rn(total, x, c[k]);
    return total;
}

// sqrt(-2 ln u), u = m 2^e in (0, 1) from the 23 high bits of w.
__device__ __forceinline__ float radius(unsigned w) {
    const float log[] = {-0x1.fffffcp+0f, 0x1.000482p+0f, -0x1.53e012p-1f, 0x1.16536p-1f,
                         -0x1.49734ep-4f, 0x1.8f2fd8p+0f, 0x1.12e6bcp+1f,  0x1.2e49ep+1f};
    unsigned u = __float_as_uint(__fsub_rn(__uint_as_float(w >> 9 | 0x3F800000u), 0x1.fffffep-1f));
    unsigned e = (u - 0x3F000000u) & 0xFF800000u;  // 2^23 e
    float f = __fsub_rn(__uint_as_float(u - e), 1.0f);
    return __fsqrt_rn(__fmaf_rn(__int2float_rn((int)e), -0x1.62e43p-23f, __fmul_rn(f, polynomial(f, log))));
}

// Two samples.
__device__ __forceinline__ void normals(unsigned w, unsigned v, float* x, float* y) {
    const float sine[] = {0x1.921fb6p+1f, -0x1.4abbeep+2f, 0x1.466ee4p+1f, -0x1.32e03cp-1f, 0x1.466de4p-4f};
    const float cosine[] = {0x1p+0f, -0x1.3bd3bp+2f, 0x1.03bd9ap+2f, -0x1.550206p+0f, 0x1.c29256p-3f};
    float r = radius(w), t = __fsub_rn(__uint_as_float(v >> 9 | 0x3F800001u), 1.5f), square = __fmul_rn(t, t);
    *x = __fmul_rn(r, __fmul_rn(polynomial(square, sine), t));
    *y = __fmul_rn(r, __uint_as_float(__float_as_uint(polynomial(square, cosine)) ^ v << 31));
}

__device__ __forceinline__ Pack<float, 4> samples(const Words& w) {
    Pack<float, 4> x;
    normals(w.v[0], w.v[1], &x.v[0], &x.v[1]);
    normals(w.v[2], w.v[3], &x.v[2], &x.v[3]);
    return x;
}

struct Drawn {
    const unsigned* rows;
    Stream stream;

    __device__ __forceinline__ void fetch(Tile* to, long long i, long long j, long long, int) const {
        unsigned row[ROWS] = {rows[i], rows[j]};
        if (SIGNS) {
            // A warp's packs begin at a multiple of 32, with a block.
            static_assert(ROWS * PER <= WARP, "a lane for every block of a tile");
            int lane = threadIdx.x % WARP, mine = min(lane, ROWS * PER - 1);
            long long block = (first_pack() + (long long)(mine / ROWS) * THREADS) / WARP;
            Words drawn = philox((unsigned)block, mine % ROWS ? row[1] : row[0], stream);
#pragma unroll
            for (int k = 0; k < ROWS * PER; k++) {
                unsigned bits = 0;
#pragma unroll
                for (int v = 0; v < 4; v++) {
                    unsigned word = __shfl_sync(ALL_LANES, drawn.v[v], k);
                    bits = lane / 8 == v ? word >> lane % 8 * 4 : bits;
                }
#pragma unroll
                for (int e = 0; e < PACK; e++) to[k % ROWS].v[k / ROWS].v[e] = bits >> e & 1 ? REAL(-1) : REAL(1);
            }
        } else {
#pragma unroll
            for (int k = 0; k < PER; k++)
#pragma unroll
                for (int q = 0; q < ROWS; q++) {
                    unsigned block = (unsigned)(first_pack() + k * THREADS);
                    Pack<float, 4> x = samples(philox(block, row[q], stream));
#pragma unroll
                    for (int e = 0; e < PACK; e++) to[q].v[k].v[e] = x.v[e];
                }
        }
    }
};

// Overwrite partial (gridDim.x, B, d) and terms (B, m), the losses of the measurements. One window.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    seeded_loss_pull(REAL* partial, double* terms, const REAL* __restrict__ x, const REAL* __restrict__ y,
                     const REAL* __restrict__ w, const unsigned* __restrict__ rows, long long m, long long d, int runs,
                     long long y_stride, long long w_stride, int code, REAL delta, unsigned problem, unsigned low,
                     unsigned high) {
    measure<EVALUATE>(partial, terms, nullptr, Drawn{rows, {problem, low, high}}, x, y, w, m, d, runs, y_stride,
                      w_stride, loss_numbers(code, delta), false);
}

// Overwrite out (gridDim.z, B, m) with the part of a_i . x_b that lies in each window.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    seeded_forward(REAL* out, const REAL* __restrict__ x, const unsigned* __restrict__ rows, long long m, long long d,
                   int runs, unsigned problem, unsigned low, unsigned high) {
    measure<PREDICT>(nullptr, nullptr, out, Drawn{rows, {problem, low, high}}, x, nullptr, nullptr, m, d, runs, 0, 0,
                     Loss(), false);
}

// Overwrite partial (gridDim.x, B, d) with sum_i r_bi a_i over the rows of each.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    seeded_adjoint(REAL* partial, const REAL* __restrict__ r, const unsigned* __restrict__ rows, long long m,
                   long long d, int runs, unsigned problem, unsigned low, unsigned high) {
    measure<PULL>(partial, nullptr, nullptr, Drawn{rows, {problem, low, high}}, nullptr, r, nullptr, m, d, runs, m, 0,
                  Loss(), false);
}

// Overwrite out (m, d) with the entries themselves, d a multiple of 4; gridDim.y * gridDim.z covers the rows.
extern "C" __global__ void __launch_bounds__(256)
    seeded_entries(float* out, const unsigned* __restrict__ rows, long long m, long long d, unsigned problem,
                   unsigned low, unsigned high) {
    Stream stream = {problem, low, high};
    for (long long i = blockIdx.y; i < m; i += gridDim.y)
        for (long long p = (long long)blockIdx.x * blockDim.x + threadIdx.x; p < d / 4;
             p += (long long)gridDim.x * blockDim.x) {
            Pack<float, 4> x;
            if (SIGNS) {
                Words w = philox((unsigned)(p / WARP), rows[i], stream);
                int at = (int)(p % WARP);
#pragma unroll
                for (int v = 0; v < 4; v++)
                    if (at / 8 == v)
                        for (int e = 0; e < 4; e++) x.v[e] = w.v[v] >> (at % 8 * 4 + e) & 1 ? -1.0f : 1.0f;
            } else {
                x = samples(philox((unsigned)p, rows[i], stream));
            }
            *reinterpret_cast<Pack<float, 4>*>(out + i * d + 4 * p) = x;
        }
}
