// Entry masks: predictions, losses and both products of the residual at the observed entries of P Q.
//
//     loss = sum_ij w_ij rho(p_i . q_j - y_ij),   (G Q^T)_i = sum_j g_ij q_j,   g_ij = w_ij psi(p_i . q_j - y_ij)
//
// are one pass over the entries by row. G^T P is the same pass over the entries by column with P and Q exchanged: the
// dot is computed again, which costs less than to store residuals and gather them, needs no atomics and gives the same
// bits on every device. ``entry_evaluate`` is that pass, ``entry_pull`` the same with given g_ij, ``entry_forward`` the
// predictions alone; ``entry_join`` adds up rows that are cut.
//
// Layout. p (B, n1, H), q (B, n2, H) STORED, gradients REAL, all C-contiguous, H fixed when compiling (-DH=...), every
// H from 1 to 256; a multiple of 16 bytes loads fastest. Entries are sorted by row; ``indices`` are the columns (INDEX,
// int or long long), ``y``, ``w`` and residuals REAL in the same order, one row of them for all runs (stride 0) or one
// for each. Item k of the work is the entries begin[k] .. begin[k + 1] of the row row[k], a whole row or a piece of a
// long one, of less than 2^31 entries. A whole one (slot[k] < 0) goes to its row of g, a piece to the row slot[k] of
// ``parts`` (B, slots, H). Offsets are 64 bits wide.
//
// Structure. One warp an item, gridDim.y runs. Each group of lanes takes entries of its own, TOGETHER at once
// (rows.cu): their rows of q are loaded, dotted with the row of p that stays in registers, and added to the sum while
// they are there. The groups' sums meet at the end of the item. Bits depend on the cut into items alone, not on the
// grid.
//
// An entry costs 2 H flops for its prediction and 2 H for the sum in each of the two passes, and H numbers of q, an
// index, y and w read: bound by the gather of q, from L2 where q fits.

// Blocks that a multiprocessor should have at once: more would leave too few registers, for the rows, or for sums,
// losses and places in double.
constexpr int BLOCKS = sizeof(REAL) > 4 || SHARE * PACK > 4 ? 2 : 3;

// One pass over all items for one run. GIVEN: y holds the g_ij. Overwrites g, parts, and losses[k] for each item.
template <bool GIVEN>
__device__ void sweep(REAL* g, REAL* parts, double* losses, const STORED* p, const STORED* q, const long long* begin,
                      const INDEX* row, const int* slot, const INDEX* indices, const REAL* y, const REAL* w,
                      long long items, Loss shape) {
    int lane = threadIdx.x % WARP, member = lane % GROUP, group = lane / GROUP;
    long long warps = (long long)gridDim.x * (blockDim.x / WARP);
    for (long long item = (long long)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; item < items;
         item += warps) {
        long long i = row[item], lo = begin[item];
        int count = (int)(begin[item + 1] - lo), last = count - 1;
        const INDEX* columns = indices + lo;
        const REAL *data = y + lo, *weights = w ? w + lo : w;
        Row x = GIVEN ? zero_row() : load_row(p + i * H, member), sum = zero_row();
        double loss = 0;
        // Places behind the last entry stand for it, with the factor zero. The columns are known one step ahead: the
        // gather waits for memory once, not twice.
        INDEX j[TOGETHER];
#pragma unroll
        for (int u = 0; u < TOGETHER; u++) j[u] = count ? columns[min(u * GROUPS + group, last)] : 0;
#pragma unroll 1
        for (int k = group; k < count + group; k += STEP) {
            Row r[TOGETHER];
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) r[u] = load_row(q + (long long)j[u] * H, member);
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) j[u] = columns[min(k + STEP + u * GROUPS, last)];
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) {
                int e = min(k + u * GROUPS, last);
                REAL t = data[e];
                if (!GIVEN) {
                    REAL rho = rho_psi(dot(x, r[u]) - t, shape, &t), weight = weights ? weights[e] : REAL(1);
                    t *= weight;
                    if (member == 0 && k + u * GROUPS < count) loss += (double)weight * rho;
                }
                add(sum, k + u * GROUPS < count ? t : REAL(0), r[u]);
            }
        }
        sum = sum_groups(sum);
        if (group == 0) store_row(slot[item] < 0 ? g + i * H : parts + (long long)slot[item] * H, sum, member);
        if (!GIVEN && losses) {
            loss = sum_lanes(loss, 1, WARP);
            if (lane == 0) losses[item] = loss;
        }
    }
}

// Overwrite g (B, n1, H), parts (B, slots, H) and, where it is not null, losses (B, items). w may be null.
extern "C" __global__ void __launch_bounds__(256, BLOCKS)
    entry_evaluate(REAL* g, REAL* parts, double* losses, const STORED* __restrict__ p, const STORED* __restrict__ q,
                   const long long* __restrict__ begin, const INDEX* __restrict__ row, const int* __restrict__ slot,
                   const INDEX* __restrict__ indices, const REAL* __restrict__ y, const REAL* __restrict__ w,
                   long long n1, long long n2, long long items, long long slots, long long y_stride, long long w_stride,
                   int code, REAL delta) {
    long long b = blockIdx.y;
    sweep<false>(g + b * n1 * H, parts + b * slots * H, losses ? losses + b * items : losses, p + b * n1 * H,
                 q + b * n2 * H, begin, row, slot, indices, y + b * y_stride, w ? w + b * w_stride : w, items,
                 loss_numbers(code, delta));
}

// Overwrite g (B, n1, H) and parts (B, slots, H) with sum_j r_ij q_j; r has r_stride numbers a run.
extern "C" __global__ void __launch_bounds__(256, BLOCKS)
    entry_pull(REAL* g, REAL* parts, const REAL* __restrict__ r, const STORED* __restrict__ q,
               const long long* __restrict__ begin, const INDEX* __restrict__ row, const int* __restrict__ slot,
               const INDEX* __restrict__ indices, long long n1, long long n2, long long items, long long slots,
               long long r_stride) {
    long long b = blockIdx.y;
    sweep<true>(g + b * n1 * H, parts + b * slots * H, nullptr, nullptr, q + b * n2 * H, begin, row, slot, indices,
                r + b * r_stride, nullptr, items, Loss());
}

// Overwrite the row row[k] of g with the sum of the parts first[k] .. first[k + 1], in order, for ``count`` cut rows.
extern "C" __global__ void __launch_bounds__(256, BLOCKS)
    entry_join(REAL* g, const REAL* __restrict__ parts, const INDEX* __restrict__ row, const int* __restrict__ first,
               long long n1, long long slots, long long count) {
    long long b = blockIdx.y;
    for (long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x; c < count * H;
         c += (long long)gridDim.x * blockDim.x) {
        long long k = c / H, column = c % H;
        REAL total = 0;
        for (long long s = first[k]; s < first[k + 1]; s++) total += parts[(b * slots + s) * H + column];
        g[(b * n1 + row[k]) * H + column] = total;
    }
}

// Overwrite out (B, stride), in the order of the entries, with the predictions p_i . q_j. 2 H flops an entry.
extern "C" __global__ void __launch_bounds__(256, BLOCKS)
    entry_forward(REAL* out, const STORED* __restrict__ p, const STORED* __restrict__ q,
                  const long long* __restrict__ begin, const INDEX* __restrict__ row, const INDEX* __restrict__ indices,
                  long long n1, long long n2, long long items, long long stride) {
    long long b = blockIdx.y;
    int lane = threadIdx.x % WARP, member = lane % GROUP, group = lane / GROUP;
    long long warps = (long long)gridDim.x * (blockDim.x / WARP);
    for (long long item = (long long)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; item < items;
         item += warps) {
        long long lo = begin[item];
        int count = (int)(begin[item + 1] - lo), last = count - 1;
        Row x = load_row(p + (b * n1 + row[item]) * H, member);
#pragma unroll 1
        for (int k = group; k < count + group; k += STEP) {
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) {
                long long j = indices[lo + min(k + u * GROUPS, last)];
                REAL t = dot(x, load_row(q + (b * n2 + j) * H, member));
                if (member == 0 && k + u * GROUPS < count) out[b * stride + lo + k + u * GROUPS] = t;
            }
        }
    }
}
