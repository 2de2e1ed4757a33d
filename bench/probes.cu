// What the device can do at most: sums of rows that are gathered in a given order, as the mask's kernels gather them.
//
// Overwrite out (warps) with the sum of the rows indices[first .. last] of table (n, WIDTH), each warp its own range;
// 4 WIDTH + 4 bytes an index. WIDTH is a multiple of 4.
struct alignas(16) Four {
    float x, y, z, w;
};

extern "C" __global__ void __launch_bounds__(256)
    gather(float* out, const float* __restrict__ table, const int* __restrict__ indices, long long count) {
    long long warps = (long long)gridDim.x * (blockDim.x / 32);
    long long warp = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    constexpr int LANES = WIDTH / 4 < 32 ? WIDTH / 4 : 32, GROUPS = 32 / LANES;
    int lane = threadIdx.x % 32, member = lane % LANES, group = lane / LANES;
    long long begin = count * warp / warps, end = count * (warp + 1) / warps;
    float total = 0;
    if (group < GROUPS)
        for (long long e = begin + group; e < end; e += GROUPS)
            for (int k = member; k < WIDTH / 4; k += LANES) {
                Four v = reinterpret_cast<const Four*>(table)[(long long)indices[e] * (WIDTH / 4) + k];
                total += v.x + v.y + v.z + v.w;
            }
    out[(warp * 32 + lane)] = total;
}
