// Dense measurements: losses and their pull with A read ONCE, predictions, and the pull of given numbers.
//
//     loss = sum_i w_i rho(a_i . x - y_i),    g = sum_i w_i psi(a_i . x - y_i) a_i
//
// Layout. a (m, d) STORED holds one measurement a row; x, g (B, d), y, w (1 or B, m) and residuals are REAL, all
// C-contiguous; d is a multiple of PACK, which rows of 16 bytes load fastest. B right-hand sides share a read of A in
// tiles of RUNS. Structure: measurements.cu. A number of A costs 4 flops a right-hand side and is read from memory once
// a tile: bound by memory up to some 15 right-hand sides.

struct Dense {
    const STORED* a;

    __device__ __forceinline__ void fetch(Tile* rows, long long i, long long j, long long d, int packs_left) const {
        rows[0] = load_tile(a + i * d, packs_left);
        rows[1] = load_tile(a + j * d, packs_left);
    }
};

// Overwrite partial (gridDim.x, B, d) and terms (B, m), the losses of the measurements. One window.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gaussian_loss_pull(REAL* partial, double* terms, const STORED* __restrict__ a, const REAL* __restrict__ x,
                       const REAL* __restrict__ y, const REAL* __restrict__ w, long long m, long long d, int runs,
                       long long y_stride, long long w_stride, int code, REAL delta) {
    measure<EVALUATE>(partial, terms, nullptr, Dense{a}, x, y, w, m, d, runs, y_stride, w_stride,
                      loss_numbers(code, delta), false);
}

// Overwrite out (gridDim.z, B, m) with the part of a_i . x_b that lies in each window. 2 flops a number and run.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gaussian_forward(REAL* out, const STORED* __restrict__ a, const REAL* __restrict__ x, long long m, long long d,
                     int runs) {
    measure<PREDICT>(nullptr, nullptr, out, Dense{a}, x, nullptr, nullptr, m, d, runs, 0, 0, Loss(), false);
}

// Overwrite partial (gridDim.x, B, d) with sum_i r_bi a_i over the rows of each, or add that to it. 2 flops a number.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gaussian_pull(REAL* partial, const STORED* __restrict__ a, const REAL* __restrict__ r, long long m, long long d,
                  int runs, int accumulate) {
    measure<PULL>(partial, nullptr, nullptr, Dense{a}, nullptr, r, nullptr, m, d, runs, m, 0, Loss(), accumulate);
}
