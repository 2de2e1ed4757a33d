// Kernels that the emulator's own tests run: what it must be able to do, and planted faults that it must find.

#define ALL 0xFFFFFFFFu

struct alignas(16) Four {
    float v[4];
};

// Sums of 32 numbers by every shuffle, and a count by a ballot; the results of the lanes.
extern "C" __global__ void shuffles(float* out, int* counts, const float* x, const double* y, double* wide) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31;
    float down = x[i], up = x[i], cross = x[i];
    for (int o = 16; o; o >>= 1) {
        down += __shfl_down_sync(ALL, down, o);
        cross += __shfl_xor_sync(ALL, cross, o, 8);
    }
    for (int o = 1; o < 32; o <<= 1) {
        float before = __shfl_up_sync(ALL, up, o);
        if (lane >= o) up += before;
    }
    wide[i] = __shfl_sync(ALL, y[i], lane + 1, 16);
    out[3 * i] = __shfl_sync(ALL, down, 0);
    out[3 * i + 1] = up;
    out[3 * i + 2] = cross;
    // Halves of a warp at once, each with its own mask.
    unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
    counts[i] = (int)__ballot_sync(half, x[i] > 0);
}

// out[i] = x of the next thread of the block, through static and dynamic shared memory.
extern "C" __global__ void turn(float* out, const float* x, int n) {
    __shared__ float here[256];
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    float* there = (float*)shared_bytes;
    for (int start = blockIdx.x * blockDim.x; start < n; start += gridDim.x * blockDim.x) {
        here[threadIdx.x] = x[start + threadIdx.x];
        __syncthreads();
        there[threadIdx.x] = here[(threadIdx.x + 1) % blockDim.x];
        __syncthreads();
        out[start + threadIdx.x] = there[threadIdx.x];
    }
}

// Places of threads in blocks and grids of three dimensions.
extern "C" __global__ void places(int* out) {
    unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = (int)(100 * block + thread);
}

extern "C" __global__ void votes(int* out, const int* x) { out[threadIdx.x] = __syncthreads_or(x[threadIdx.x]); }

extern "C" __global__ void quarter(float* out, const float* x, const unsigned short* unused, long long n) {
    for (long long i = threadIdx.x; i < n / 4; i += blockDim.x) {
        Four a = *(const Four*)(x + 4 * i);
        out[i] = a.v[0] + a.v[1] + a.v[2] + a.v[3];
    }
}

// Faults ----------------------------------------------------------------------------------------------------------

extern "C" __global__ void missing_barrier(float* out, const float* x) {
    __shared__ float here[256];
    here[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = here[(threadIdx.x + 128) % 256];
}

// The barrier at the end of a turn is missing: fast threads write what slow ones have not read.
extern "C" __global__ void missing_second_barrier(float* out, const float* x, int turns) {
    __shared__ float here[64];
    for (int k = 0; k < turns; k++) {
        here[threadIdx.x] = x[64 * k + threadIdx.x];
        __syncthreads();
        out[64 * k + threadIdx.x] = here[(threadIdx.x + 1) % 64];
    }
}

// As before, but what fast warps overwrite comes some turns later.
extern "C" __global__ void missing_late_barrier(float* out, const float* x, int turns) {
    __shared__ float here[64];
    for (int k = 0; k < turns; k++) {
        float v = x[64 * k + threadIdx.x];
        for (int o = 1; o < 32; o *= 2) v = __shfl_xor_sync(ALL, v, o);  // at last from the lane 31 - threadIdx.x % 32
        here[threadIdx.x] = v;
        __syncthreads();
        out[64 * k + threadIdx.x] = here[63 - threadIdx.x];
    }
}

extern "C" __global__ void missing_warp_barrier(float* out, const float* x) {
    __shared__ float here[32];
    here[threadIdx.x] = x[threadIdx.x];
#ifdef WITH_WARP_BARRIER
    __syncwarp();
#endif
    out[threadIdx.x] = here[31 - threadIdx.x];
}

extern "C" __global__ void divergent_barrier(float* out) {
    if (threadIdx.x < 16) __syncthreads();
    out[threadIdx.x] = 1;
    if (threadIdx.x >= 16) __syncthreads();
}

extern "C" __global__ void barrier_not_for_all(float* out) {
    if (threadIdx.x == 5) return;
    __syncthreads();
    out[threadIdx.x] = 1;
}

extern "C" __global__ void barrier_and_shuffle(float* out) {
    if (threadIdx.x < 7)
        __syncthreads();
    else
        out[threadIdx.x] = __shfl_xor_sync(ALL, 1.0f, 1);
}

extern "C" __global__ void lanes_that_ended(float* x) {
    if (threadIdx.x < 20) x[threadIdx.x] += __shfl_xor_sync(ALL, x[threadIdx.x], 1);
}

extern "C" __global__ void lane_not_in_mask(float* x) {
    x[threadIdx.x] = __shfl_xor_sync(0x0000FFFFu, x[threadIdx.x], 1);
}

extern "C" __global__ void different_masks(float* x) {
    unsigned mask = threadIdx.x == 3 ? 0x7FFFFFFFu : ALL;
    x[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);
}

extern "C" __global__ void lane_outside_mask(float* x) {
    if (threadIdx.x < 16) x[threadIdx.x] = __shfl_down_sync(0x0000FFFFu, x[threadIdx.x], 1);
}

extern "C" __global__ void different_lines(float* x) {
    if (threadIdx.x < 16)
        x[threadIdx.x] = __shfl_xor_sync(ALL, x[threadIdx.x], 1);
    else
        x[threadIdx.x] = __shfl_xor_sync(ALL, x[threadIdx.x], 2);
}

extern "C" __global__ void write_behind(float* out, int n) {
    for (int i = threadIdx.x; i <= n; i += blockDim.x) out[i] = 1;
}

extern "C" __global__ void write_before(float* out) { out[(int)threadIdx.x - 1] = 1; }

extern "C" __global__ void write_to_input(const float* x) { *(float*)x = 1; }

extern "C" __global__ void write_behind_shared() {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    shared_bytes[4 * blockDim.x] = 0;
}

extern "C" __global__ void unwritten_shared(float* out) {
    __shared__ float here[2];
    if (blockIdx.x == 0) here[0] = 1;
    out[blockIdx.x] = here[0];
}

extern "C" __global__ void not_aligned(float* out, const float* x) {
    Four a = *(const Four*)(x + 2);
    out[0] = a.v[0];
}

extern "C" __global__ void index_outside(float* out, int k) {
    __shared__ float here[8];
    here[k] = 1;
    out[0] = here[k];
}

extern "C" __global__ void large_frame(float* out, int n) {
    volatile float here[17000];
    for (int k = 0; k < n; k++) here[k] = (float)k;
    out[0] = here[n - 1];
}
