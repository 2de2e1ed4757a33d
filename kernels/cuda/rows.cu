// Rows of factors in the registers of a warp: what the entry masks and the regressions of rows share. It goes behind
// common.cu. A row is H numbers (-DH=...), in packs of at most 16 bytes; a warp is cut into groups of as many lanes as
// a row has packs, up to 32, and each group takes entries of its own, TOGETHER at once.

constexpr int PACK = pack_size(H);
constexpr int PACKS = H / PACK;
constexpr int GROUP = PACKS > 16 ? 32 : PACKS > 8 ? 16 : PACKS > 4 ? 8 : PACKS > 2 ? 4 : PACKS;  // lanes of one entry
constexpr int GROUPS = WARP / GROUP;
constexpr int SHARE = (PACKS + GROUP - 1) / GROUP;  // packs of one lane
constexpr int TOGETHER = SHARE * PACK > 8 ? 1 : SHARE * PACK > 4 ? 2 : 4;
constexpr int STEP = GROUPS * TOGETHER;

// One lane's share of a row.
struct Row {
    Pack<REAL, PACK> v[SHARE];
};

__device__ __forceinline__ bool holds(int s, int member) { return PACKS % GROUP == 0 || s * GROUP + member < PACKS; }

__device__ __forceinline__ Row zero_row() {
    Row x;
#pragma unroll
    for (int s = 0; s < SHARE; s++)
#pragma unroll
        for (int k = 0; k < PACK; k++) x.v[s].v[k] = 0;
    return x;
}

template <class T>
__device__ __forceinline__ Row load_row(const T* from, int member) {
    Row x = zero_row();
#pragma unroll
    for (int s = 0; s < SHARE; s++)
        if (holds(s, member)) x.v[s] = load_pack<PACK>(from + (s * GROUP + member) * PACK);
    return x;
}

__device__ __forceinline__ void store_row(REAL* to, const Row& x, int member) {
#pragma unroll
    for (int s = 0; s < SHARE; s++)
        if (holds(s, member)) store_pack<PACK>(to + (s * GROUP + member) * PACK, x.v[s]);
}

// x . y, for all lanes of the group.
__device__ __forceinline__ REAL dot(const Row& x, const Row& y) {
    REAL total = 0;
#pragma unroll
    for (int s = 0; s < SHARE; s++)
#pragma unroll
        for (int k = 0; k < PACK; k++) total = fma(x.v[s].v[k], y.v[s].v[k], total);
    return sum_lanes(total, 1, GROUP);
}

// x += t y.
__device__ __forceinline__ void add(Row& x, REAL t, const Row& y) {
#pragma unroll
    for (int s = 0; s < SHARE; s++)
#pragma unroll
        for (int k = 0; k < PACK; k++) x.v[s].v[k] = fma(t, y.v[s].v[k], x.v[s].v[k]);
}

// The sum over the groups of a warp, for all of them.
__device__ __forceinline__ Row sum_groups(Row x) {
#pragma unroll
    for (int s = 0; s < SHARE; s++)
#pragma unroll
        for (int k = 0; k < PACK; k++) x.v[s].v[k] = sum_lanes(x.v[s].v[k], GROUP, WARP);
    return x;
}

// x y, number by number.
__device__ __forceinline__ Row product(const Row& x, const Row& y) {
    Row z;
#pragma unroll
    for (int s = 0; s < SHARE; s++)
#pragma unroll
        for (int k = 0; k < PACK; k++) z.v[s].v[k] = x.v[s].v[k] * y.v[s].v[k];
    return z;
}
