"""Entry masks: predictions, losses and both products of the residual at the observed entries of P Q.

With predictions (P Q)_ij = p_i . q_j at the observed (i, j) and g_ij = w_ij psi(p_i . q_j - y_ij), one evaluation is

    loss = sum_ij w_ij rho(p_i . q_j - y_ij),      (G Q^T)_i = sum_j g_ij q_j,      (G^T P)_j = sum_i g_ij p_i.

Layout. ``p`` (B, n1, h), ``qt`` (B, n2, h) and the gradients ``gp``, ``gqt`` are C-contiguous; B runs share one mask.
h is a multiple of ``row_multiple(dtype)``: a row is whole cache lines on every machine, whatever its registers, so
factors move between machines as they are; columns of padding that are zero stay exactly zero. Entries are sorted by
row, then column (``entry_sort``); ``indices``, ``y``, ``w`` and residuals carry ``PAD`` zeros behind the last entry,
so that a group of four and the prefetch ahead of it may read past the end. ``y`` and ``w`` are (1 or B, nnz + PAD).
``indptr`` is int64, indices int32 unless a dimension needs int64; every offset inside is 64 bits wide.

Structure. A group of four entries of a row is worked on at once: four dots whose lanes are summed by one shuffle
tree, one four-lane residual, one four-lane float64 loss sum; while the gathered rows are in L1 they are used again
for G Q^T (kept in registers until the row ends) and, in the one-pass route, the row of P goes to their places in
G^T P. Rows of up to four registers stay there, one compiled version a width; all wider rows share one version that
runs over cache lines. Sums are over fixed ranges and in order: the bits do not depend on the number of threads.

An entry costs 2 h flops for its prediction and 2 h for each product, h numbers of q read, and in the one-pass route
h numbers of G^T P read and written, in the two-pass route h of p read and the dot computed again.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload, register_jitable

from fastdmf.kernels.cpu.entry_index import LINE, entry_column_cuts, row_multiple
from fastdmf.kernels.cpu.vectors import (
    SQUARED,
    VECTOR_BYTES,
    add,
    dot,
    first,
    fma,
    fold,
    load4,
    load_four,
    load_index,
    load_row,
    loss_numbers,
    mul,
    prefetch,
    prefetch_row,
    rho_psi,
    row_width,
    splat4_loss,
    splat_lane,
    store,
    store_first,
    sub,
    sum1,
    sum4,
    widen,
    zero_row,
    zero_sum,
)

__all__ = [
    "entry_forward",
    "entry_forward_serial",
    "entry_one_pass",
    "entry_one_pass_serial",
    "entry_product",
    "entry_pull",
    "entry_pull_serial",
    "entry_two_pass",
]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "0f2ca2dd1947"}

# Bytes of the widest row that is kept in registers. With AVX2 and factors in L2 four of them took 6.2 ns an entry at
# h = 32 float32 against 7.6 by lines, eight 12.9 at h = 64 against 10.4. With AVX-512 three took 4.7 at h = 48 far
# against 7.6 by lines, four 11.7 at h = 64 far against 9.7 (near 4.1 against 4.9).
_NARROW = min(4 * VECTOR_BYTES, 192)
AHEAD = 8  # entries between a prefetch and its use; 8 and 12 were equal, 4 was 40 % slower (AVX2, h = 32)
NEAR = 1 << 15  # numbers of a gathered factor that a core's own cache holds, beside its gradient: no prefetch
PIECES = 16  # ranges of work whose sums do not depend on the cut
WIDE = (0,) * (LINE // VECTOR_BYTES)  # the token of one cache line, the step through a wide row

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


def check_width(h, dtype):
    """Return the width ``h``; the kernels read past the end of rows that are no whole cache lines."""
    if h % row_multiple(dtype):
        raise ValueError(f"p and qt: width {h} is not a multiple of {row_multiple(dtype)} for {dtype}")
    return h


def token(h, dtype, widest=_NARROW):
    """Return what selects the compiled version: a row token up to ``widest`` bytes, the width itself for more."""
    size = check_width(h, dtype) * dtype.itemsize
    return (0,) * (size // VECTOR_BYTES) if size <= widest else h


# One row after another -----------------------------------------------------------------------------------------
# Inside these loops arrays meet intrinsics only: an array that is handed to a compiled function is reference-counted
# there, and the calls and the spills around them took 6.1 ns an entry to where 3.6 are now (h = 16 float32, near).
#
# The loops are pipelined by hand: a turn takes the dots of one group and the updates of the group before it. In one
# turn a group's updates wait some 50 cycles for its dots, the shuffles that sum them and the loss, and fill the
# scheduler meanwhile: 3.1, 5.6 and 8.1 ns an entry in L1 at h = 16, 32 and 64 float32, pipelined 2.3, 4.2 and 7.4.
# It also keeps LLVM from loading a row of Q once for both uses, which spills it: 7.7 against 9.5 far, h = 32.


@register_jitable(**_SETTINGS)
def _judge(r, weight, shape, plain, weighted, left):
    """Return w rho(r) and w psi(r), zero in the lanes from ``left`` on; ``plain`` is the squared loss.

    The short way for the squared loss took h = 16 float32 from 2.3 to 2.1 ns an entry, h = 32 from 4.2 to 4.0.
    """
    rho, psi = mul(r, r), r
    if not plain:
        rho, psi = rho_psi(r, shape)
    if weighted:
        rho, psi = mul(weight, rho), mul(weight, psi)
    if left < 4:
        rho, psi = first(rho, left), first(psi, left)
    return rho, psi


def sweep(like, g, s, p, q, indptr, indices, y, w, loss, begin, end, weighted, scatter, accumulate, given):
    """Work through the rows begin..end of ``p`` and return their loss.

    g[i] = sum_j g_ij q_j is overwritten (added to if ``accumulate``); s[j] += g_ij p_i if ``scatter``. ``given``
    says that y holds the g_ij themselves. The flags are the same for every entry, so their branches are free.
    """
    raise NotImplementedError


def _sweep_narrow(like, g, s, p, q, indptr, indices, y, w, loss, begin, end, weighted, scatter, accumulate, given):
    h = row_width(p, like)
    shape, plain = splat4_loss(y, loss), loss[0] == np.inf
    total = zero_sum()
    far = q.size > NEAR
    for i in range(begin, end):
        lo = load_index(indptr, i)
        hi = load_index(indptr, i + 1)
        x = load_row(p, i * h, like)
        gi = load_row(g, i * h, like) if accumulate else zero_row(p, like)
        # t, j: the group before, to be updated; u, n: this one.
        t = u = load4(y, lo)
        j0 = j1 = j2 = j3 = n0 = n1 = n2 = n3 = lo
        for k in range(lo, hi + 4, 4):
            if k < hi:
                left = hi - k
                n0, n1, n2, n3 = load_four(indices, k, hi - 1, h)
                if far:
                    for e in range(AHEAD, AHEAD + 4):
                        ahead = load_index(indices, k + e) * h
                        prefetch_row(q, ahead, like)
                        if scatter:
                            prefetch_row(s, ahead, like)
                if given:
                    u = load4(y, k)
                    if left < 4:
                        u = first(u, left)
                else:
                    prediction = sum4(
                        dot(x, load_row(q, n0, like)),
                        dot(x, load_row(q, n1, like)),
                        dot(x, load_row(q, n2, like)),
                        dot(x, load_row(q, n3, like)),
                    )
                    rho, u = _judge(sub(prediction, load4(y, k)), load4(w, k), shape, plain, weighted, left)
                    total = add(total, widen(rho))
            if k > lo:
                t0, t1, t2, t3 = splat_lane(t, 0), splat_lane(t, 1), splat_lane(t, 2), splat_lane(t, 3)
                gi = fma(t0, load_row(q, j0, like), gi)
                gi = fma(t1, load_row(q, j1, like), gi)
                gi = fma(t2, load_row(q, j2, like), gi)
                gi = fma(t3, load_row(q, j3, like), gi)
                if scatter:
                    # One after the other: the last entry may stand here several times.
                    store(s, j0, fma(t0, x, load_row(s, j0, like)))
                    store(s, j1, fma(t1, x, load_row(s, j1, like)))
                    store(s, j2, fma(t2, x, load_row(s, j2, like)))
                    store(s, j3, fma(t3, x, load_row(s, j3, like)))
            t = u
            j0, j1, j2, j3 = n0, n1, n2, n3
        store(g, i * h, gi)
    return sum1(total)


def _sweep_wide(like, g, s, p, q, indptr, indices, y, w, loss, begin, end, weighted, scatter, accumulate, given):
    h = like
    step = row_width(p, WIDE)
    shape, plain = splat4_loss(y, loss), loss[0] == np.inf
    total = zero_sum()
    far = q.size > NEAR
    for i in range(begin, end):
        lo = load_index(indptr, i)
        hi = load_index(indptr, i + 1)
        x = i * h
        if not accumulate:
            for c in range(0, h, step):
                store(g, x + c, zero_row(p, WIDE))
        t = u = load4(y, lo)
        j0 = j1 = j2 = j3 = n0 = n1 = n2 = n3 = lo
        f0 = f1 = f2 = f3 = 0
        for k in range(lo, hi + 4, 4):
            if k < hi:
                left = hi - k
                # Lines of Q are asked for here, of s below: all at once took 22 and 54 ns an entry at h = 64 and 128
                # float32 far, where 20.5 and 46 are now.
                n0, n1, n2, n3 = load_four(indices, k, hi - 1, h)
                f0, f1, f2, f3 = load_four(indices, k + AHEAD, k + AHEAD + 3, h)
                if given:
                    u = load4(y, k)
                    if left < 4:
                        u = first(u, left)
                else:
                    s0, s1, s2, s3 = zero_row(p, WIDE), zero_row(p, WIDE), zero_row(p, WIDE), zero_row(p, WIDE)
                    if far:
                        for c in range(0, h, step):
                            prefetch(q, f0 + c)
                            prefetch(q, f1 + c)
                            prefetch(q, f2 + c)
                            prefetch(q, f3 + c)
                    for c in range(0, h, step):
                        xc = load_row(p, x + c, WIDE)
                        s0 = fma(xc, load_row(q, n0 + c, WIDE), s0)
                        s1 = fma(xc, load_row(q, n1 + c, WIDE), s1)
                        s2 = fma(xc, load_row(q, n2 + c, WIDE), s2)
                        s3 = fma(xc, load_row(q, n3 + c, WIDE), s3)
                    prediction = sum4(fold(s0), fold(s1), fold(s2), fold(s3))
                    rho, u = _judge(sub(prediction, load4(y, k)), load4(w, k), shape, plain, weighted, left)
                    total = add(total, widen(rho))
            if k > lo:
                t0, t1, t2, t3 = splat_lane(t, 0), splat_lane(t, 1), splat_lane(t, 2), splat_lane(t, 3)
                if far and scatter:
                    for c in range(0, h, step):
                        prefetch(s, f0 + c)
                        prefetch(s, f1 + c)
                        prefetch(s, f2 + c)
                        prefetch(s, f3 + c)
                for c in range(0, h, step):
                    gi = load_row(g, x + c, WIDE)
                    gi = fma(t0, load_row(q, j0 + c, WIDE), gi)
                    gi = fma(t1, load_row(q, j1 + c, WIDE), gi)
                    gi = fma(t2, load_row(q, j2 + c, WIDE), gi)
                    gi = fma(t3, load_row(q, j3 + c, WIDE), gi)
                    store(g, x + c, gi)
                    if scatter:
                        xc = load_row(p, x + c, WIDE)
                        store(s, j0 + c, fma(t0, xc, load_row(s, j0 + c, WIDE)))
                        store(s, j1 + c, fma(t1, xc, load_row(s, j1 + c, WIDE)))
                        store(s, j2 + c, fma(t2, xc, load_row(s, j2 + c, WIDE)))
                        store(s, j3 + c, fma(t3, xc, load_row(s, j3 + c, WIDE)))
            t = u
            j0, j1, j2, j3 = n0, n1, n2, n3
    return sum1(total)


@overload(sweep, jit_options=_SETTINGS)
def _choose_sweep(like, g, s, p, q, indptr, indices, y, w, loss, begin, end, weighted, scatter, accumulate, given):
    return _sweep_wide if isinstance(like, types.Integer) else _sweep_narrow


@register_jitable(**_SETTINGS)
def _predict(out, p, q, indptr, indices, begin, end):
    """Write the predictions of the entries of the rows begin..end.

    By cache lines for every width: rows in registers, one compiled version a width, took 0.74 ns an entry to where
    0.97 are (AVX-512, h = 32 float32, near), and a half of an evaluation is seldom asked for alone.
    """
    h, step = np.int64(p.shape[1]), row_width(p, WIDE)
    far = q.size > NEAR
    for i in range(begin, end):
        hi = load_index(indptr, i + 1)
        for k in range(load_index(indptr, i), hi, 4):
            j0, j1, j2, j3 = load_four(indices, k, hi - 1, h)
            if far:
                f0, f1, f2, f3 = load_four(indices, k + AHEAD, k + AHEAD + 3, h)
                for c in range(0, h, step):
                    prefetch(q, f0 + c)
                    prefetch(q, f1 + c)
                    prefetch(q, f2 + c)
                    prefetch(q, f3 + c)
            s0, s1, s2, s3 = zero_row(p, WIDE), zero_row(p, WIDE), zero_row(p, WIDE), zero_row(p, WIDE)
            for c in range(0, h, step):
                xc = load_row(p, i * h + c, WIDE)
                s0 = fma(xc, load_row(q, j0 + c, WIDE), s0)
                s1 = fma(xc, load_row(q, j1 + c, WIDE), s1)
                s2 = fma(xc, load_row(q, j2 + c, WIDE), s2)
                s3 = fma(xc, load_row(q, j3 + c, WIDE), s3)
            prediction = sum4(fold(s0), fold(s1), fold(s2), fold(s3))
            if hi - k < 4:
                store_first(out, k, prediction, hi - k)
            else:
                store(out, k, prediction)


# Routes --------------------------------------------------------------------------------------------------------


@njit(parallel=True, **_SETTINGS)
def _one_pass(like, gp, gqt, losses, partial, p, qt, indptr, indices, y, w, loss, cuts, copies, weighted, given):
    runs, ranges = partial.shape
    for item in prange(runs * ranges):
        b, k = item // ranges, item % ranges
        copies[b, k] = 0
        partial[b, k] = sweep(
            like,
            gp[b],
            copies[b, k],
            p[b],
            qt[b],
            indptr,
            indices,
            y[b % y.shape[0]],
            w[b % w.shape[0]],
            loss,
            cuts[k],
            cuts[k + 1],
            weighted,
            True,
            False,
            given,
        )
    n2 = qt.shape[1]
    for item in prange(runs * PIECES):
        b, piece = item // PIECES, item % PIECES
        for j in range(n2 * piece // PIECES, n2 * (piece + 1) // PIECES):
            for c in range(gqt.shape[2]):
                gqt[b, j, c] = copies[b, 0, j, c]
            for k in range(1, ranges):
                for c in range(gqt.shape[2]):
                    gqt[b, j, c] += copies[b, k, j, c]
    for b in range(runs):
        losses[b] = 0.0
        for k in range(ranges):
            losses[b] += partial[b, k]


@njit(**_SETTINGS)
def _one_pass_serial(like, gp, gqt, losses, p, qt, indptr, indices, y, w, loss, weighted, given):
    gqt[:] = 0
    for b in range(p.shape[0]):
        losses[b] = sweep(
            like,
            gp[b],
            gqt[b],
            p[b],
            qt[b],
            indptr,
            indices,
            y[b % y.shape[0]],
            w[b % w.shape[0]],
            loss,
            0,
            p.shape[1],
            weighted,
            True,
            False,
            given,
        )


@njit(parallel=True, **_SETTINGS)
def _two_pass(
    like,
    gp,
    gqt,
    losses,
    partial,
    p,
    qt,
    indptr,
    indices,
    y,
    w,
    bptr,
    brows,
    yb,
    wb,
    loss,
    row_cuts,
    col_cuts,
    weighted,
):
    runs, ranges = partial.shape
    for item in prange(runs * ranges):
        b, k = item // ranges, item % ranges
        partial[b, k] = sweep(
            like,
            gp[b],
            gp[b],
            p[b],
            qt[b],
            indptr,
            indices,
            y[b % y.shape[0]],
            w[b % w.shape[0]],
            loss,
            row_cuts[k],
            row_cuts[k + 1],
            weighted,
            False,
            False,
            False,
        )
    n2 = qt.shape[1]
    pieces = col_cuts.shape[0] - 1
    for item in prange(runs * pieces):
        b, k = item // pieces, item % pieces
        for block in range((bptr.shape[0] - 1) // n2):
            sweep(
                like,
                gqt[b],
                gqt[b],
                qt[b],
                p[b],
                bptr[block * n2 : (block + 1) * n2 + 1],
                brows,
                yb[b % y.shape[0]],
                wb[b % w.shape[0]],
                loss,
                col_cuts[k],
                col_cuts[k + 1],
                weighted,
                False,
                block > 0,
                False,
            )
    for b in range(runs):
        losses[b] = 0.0
        for k in range(ranges):
            losses[b] += partial[b, k]


def pieces_of(indptr):
    """Return the rows at which ``PIECES`` ranges of about equally many entries begin, and the number of rows."""
    cuts = np.searchsorted(indptr[:-1], int(indptr[-1]) * np.arange(PIECES + 1) // PIECES)
    cuts[-1] = len(indptr) - 1
    return cuts


@njit(parallel=True, **_SETTINGS)
def _forward(out, p, qt, indptr, indices, cuts):
    for item in prange(p.shape[0] * PIECES):
        b, piece = item // PIECES, item % PIECES
        _predict(out[b], p[b], qt[b], indptr, indices, cuts[piece], cuts[piece + 1])


@njit(**_SETTINGS)
def _forward_serial(out, p, qt, indptr, indices):
    for b in range(p.shape[0]):
        _predict(out[b], p[b], qt[b], indptr, indices, 0, p.shape[1])


@njit(parallel=True, **_SETTINGS)
def _product(like, out, r, v, indptr, indices, loss, cuts):
    for piece in prange(PIECES):
        begin, end = cuts[piece], cuts[piece + 1]
        sweep(like, out, out, out, v, indptr, indices, r, r, loss, begin, end, False, False, False, True)


def entry_one_pass(gp, gqt, losses, p, qt, indptr, indices, y, w, code, delta, cuts, copies):
    """Evaluate loss, G Q^T and G^T P in one pass over the rows, in parallel.

    Overwrites ``gp`` (B, n1, h), ``gqt`` (B, n2, h), ``losses`` (B,) float64 and the scratch ``copies``
    (B, R, n2, h): range k of the rows, cuts[k]..cuts[k + 1], adds to a copy of G^T P of its own, and the copies are
    added in order. ``w`` may be None. Reads h and reads and writes h numbers an entry; 6 h flops.
    """
    partial = np.empty(copies.shape[:2])
    weighted = w is not None
    _one_pass(
        token(p.shape[2], p.dtype),
        gp,
        gqt,
        losses,
        partial,
        p,
        qt,
        indptr,
        indices,
        y,
        w if weighted else y,
        loss_numbers(code, delta),
        cuts,
        copies,
        weighted,
        False,
    )


def entry_one_pass_serial(gp, gqt, losses, p, qt, indptr, indices, y, w, code, delta):
    """Evaluate as ``entry_one_pass`` does, on the calling thread and without copies."""
    weighted = w is not None
    shape = loss_numbers(code, delta)
    weights = w if weighted else y
    _one_pass_serial(
        token(p.shape[2], p.dtype), gp, gqt, losses, p, qt, indptr, indices, y, weights, shape, weighted, False
    )


def entry_two_pass(
    gp, gqt, losses, p, qt, indptr, indices, y, w, bptr, brows, yb, wb, code, delta, row_cuts, col_cuts=None
):
    """Evaluate loss and G Q^T over the rows, then G^T P over the columns in row blocks, both in parallel.

    ``bptr``, ``brows`` come from ``entry_blocks``; ``yb``, ``wb`` are y and w in its order, padded. Overwrites
    ``gp``, ``gqt``, ``losses``. The loss is summed range by range of ``row_cuts``; ``col_cuts`` (from
    ``entry_column_cuts``, computed when None) moves no bit. Reads 2 h numbers an entry; 8 h flops.
    """
    if col_cuts is None:
        col_cuts = entry_column_cuts(bptr, qt.shape[1], PIECES)
    partial = np.empty((p.shape[0], row_cuts.shape[0] - 1))
    weighted = w is not None
    _two_pass(
        token(p.shape[2], p.dtype),
        gp,
        gqt,
        losses,
        partial,
        p,
        qt,
        indptr,
        indices,
        y,
        w if weighted else y,
        bptr,
        brows,
        yb,
        wb if weighted else yb,
        loss_numbers(code, delta),
        row_cuts,
        col_cuts,
        weighted,
    )


def entry_forward(out, p, qt, indptr, indices):
    """Overwrite ``out`` (B, nnz) with the predictions p_i . q_j in sorted order, in parallel."""
    check_width(p.shape[2], p.dtype)
    _forward(out, p, qt, indptr, indices, pieces_of(indptr))


def entry_forward_serial(out, p, qt, indptr, indices):
    """Predict as ``entry_forward`` does, on the calling thread."""
    check_width(p.shape[2], p.dtype)
    _forward_serial(out, p, qt, indptr, indices)


def entry_pull(gp, gqt, r, p, qt, indptr, indices, cuts, copies):
    """Overwrite ``gp`` with R Q^T and ``gqt`` with R^T P for given entries ``r`` (B, nnz + PAD) of R, in parallel.

    ``cuts`` and ``copies`` as for ``entry_one_pass``.
    """
    partial = np.empty(copies.shape[:2])
    losses = np.empty(p.shape[0])
    loss = loss_numbers(SQUARED, 0.0)
    _one_pass(
        token(p.shape[2], p.dtype),
        gp,
        gqt,
        losses,
        partial,
        p,
        qt,
        indptr,
        indices,
        r,
        r,
        loss,
        cuts,
        copies,
        False,
        True,
    )


def entry_pull_serial(gp, gqt, r, p, qt, indptr, indices):
    """Pull as ``entry_pull`` does, on the calling thread and without copies."""
    losses = np.empty(p.shape[0])
    loss = loss_numbers(SQUARED, 0.0)
    _one_pass_serial(token(p.shape[2], p.dtype), gp, gqt, losses, p, qt, indptr, indices, r, r, loss, False, True)


def entry_product(out, r, v, indptr, indices):
    """Overwrite ``out`` (n1, h) with R v in parallel, R with the entries ``r`` (nnz + PAD,), ``v`` (n2, h).

    2 h flops an entry.
    """
    loss = loss_numbers(SQUARED, 0.0)
    _product(token(v.shape[1], v.dtype), out, r, v, indptr, indices, loss, pieces_of(indptr))
