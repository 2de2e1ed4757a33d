// The step of a rule for one number: what the fused update and the small chains share. It goes behind common.cu.
//
// The same operations in the same order as fastdmf/rules.py does them in NumPy, each rounded by itself: products are
// written so that no compiler fuses them with what follows. CPU and device agree to the bit but where float is
// subnormal (zero here) and where their pow differs.

__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }

// x <- x - step grad, rounded once, as slices_move does it.
struct Descent {
    static constexpr int ARRAYS = 1;  // that the rule moves: x
    REAL step;

    __device__ __forceinline__ void operator()(REAL (&x)[ARRAYS], REAL grad) const { x[0] = fma(-step, grad, x[0]); }
};

// v <- beta v + grad; x <- x - step v, or x - step (grad + beta v) for Nesterov.
struct Momentum {
    static constexpr int ARRAYS = 2;  // x, velocity
    REAL step, beta;
    bool nesterov;

    __device__ __forceinline__ void operator()(REAL (&x)[ARRAYS], REAL grad) const {
        x[1] = times(beta, x[1]) + grad;
        x[0] -= times(step, nesterov ? grad + times(beta, x[1]) : x[1]);
    }
};

// m <- m + (1 - beta1) (grad - m), s <- s + (1 - beta2) (grad^2 - s),
// x <- x - step m / (1 - beta1^t) / (sqrt(s / (1 - beta2^t)) + eps).
struct Adam {
    static constexpr int ARRAYS = 3;  // x, mean, square
    REAL step, rest1, rest2, correction1, correction2, eps;

    __device__ __forceinline__ void operator()(REAL (&x)[ARRAYS], REAL grad) const {
        x[1] += times(rest1, grad - x[1]);
        x[2] += times(rest2, times(grad, grad) - x[2]);
        REAL root = sqrt(x[2] / correction2);
        x[0] -= times(step, x[1] / correction1) / (root + eps);
    }
};

// v <- beta v + (1 - beta) square, with the squared norm of the whole gradient. Returns the step from the point that
// ``count`` steps have led to, lr / (sqrt(v / (1 - beta^(count + 1))) + eps).
__device__ __forceinline__ double group_rmsprop_step(double* mean_square, double square, double count, double lr,
                                                     double beta, double eps) {
    *mean_square = times(beta, *mean_square) + times(1 - beta, square);
    return lr / (sqrt(*mean_square / (1 - pow(beta, count + 1))) + eps);
}
