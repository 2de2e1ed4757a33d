// What the kernels share: stored numbers, rows in registers, sums over lanes, losses. It goes in front of every family.
//
// Options of the compiler: -DREAL=float|double, the arithmetic; -DSTORED=float|double|bfloat16|float16, what the large
// arrays hold: REAL itself, or half the bytes beside float. Sums of losses are double always.
//
// No atomic operation on floats, no order that the hardware chooses: the same launch gives the same bits.

[[maybe_unused]] constexpr int WARP = 32;
[[maybe_unused]] constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

struct bfloat16 {
    unsigned short bits;
};

struct float16 {
    unsigned short bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float widen(float16 x) {
#ifdef CUDA_EMULATOR
    // Moved to the place of a float's bits, a finite number is too small by 2^112.
    float size = __uint_as_float((x.bits & 0x7FFFu) << 13) * 0x1p112f;
    return x.bits >> 15 ? -size : size;
#else
    float y;
    asm("{ .reg .b16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

// Numbers that are loaded and stored together, by one instruction up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T v[N];
};

// How many numbers of ``count`` in a row, each row behind the other, can go together.
__device__ constexpr int pack_size(int count) {
    return count % (16 / (int)sizeof(REAL)) == 0 ? 16 / (int)sizeof(REAL) : count % 2 == 0 ? 2 : 1;
}

template <int N, class T>
__device__ __forceinline__ Pack<REAL, N> load_pack(const T* from) {
    Pack<T, N> raw = *reinterpret_cast<const Pack<T, N>*>(from);
    Pack<REAL, N> x;
#pragma unroll
    for (int k = 0; k < N; k++) x.v[k] = widen(raw.v[k]);
    return x;
}

template <int N>
__device__ __forceinline__ void store_pack(REAL* to, const Pack<REAL, N>& x) {
    *reinterpret_cast<Pack<REAL, N>*>(to) = x;
}

// The sum over the lanes that differ from this one in the bits of ``from`` up to below ``to``, for all of them, to the
// same bits. All lanes of the warp come here.
template <class T>
__device__ __forceinline__ T sum_lanes(T x, int from, int to) {
    for (int o = from; o < to; o *= 2) x += __shfl_xor_sync(ALL_LANES, x, o);
    return x;
}

enum { SQUARED, HUBER, TRUNCATED, ABSOLUTE };

// The losses of fastdmf/losses.py as one formula with four numbers: with a = |r|, rho = r^2 and psi = rho' / 2 = r
// where a <= edge, rho = c0 + c1 a and psi = sign(r) c2 elsewhere. NaN stays NaN in both.
struct Loss {
    REAL edge, c0, c1, c2;
};

__device__ __forceinline__ Loss loss_numbers(int code, REAL delta) {
    switch (code) {
        case SQUARED:
            return {__uint_as_float(0x7F800000u), 0, 0, 0};
        case HUBER:
            return {delta, -delta * delta, 2 * delta, delta};
        case TRUNCATED:
            return {delta, delta * delta, 0, 0};
        default:
            return {0, 0, 1, REAL(0.5)};
    }
}

__device__ __forceinline__ REAL rho_psi(REAL r, const Loss& loss, REAL* psi) {
    REAL a = fabs(r);
    bool beyond = a > loss.edge;
    *psi = beyond ? copysign(loss.c2, r) : r;
    return beyond ? fma(loss.c1, a, loss.c0) : r * r;
}
