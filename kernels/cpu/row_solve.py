"""Ridge regressions of all rows against one side: the half of a completion sweep that owns its rows.

With the other side B fixed, row i of A minimises

    sum_j w_ij (y_ij - a_i . b_j)^2 + sum_k L_ik (a_ik - m_ik)^2,      L_ik = scale_i scaled_ridge_k + ridge_k,

over its free columns, by a few steps of conjugate gradients with the preconditioner
D_ik = free_k / (c_i moment_k + L_ik), c_i = sum_j w_ij. The rows b_j are gathered once, for the gradient, and stay in
L1 for the steps. Rows are independent: no atomics, and the bits do not depend on the number of threads.

Layout as in ``entry``: ``a``, ``mean`` (n1, H) and ``b`` (n2, H) are C-contiguous, H a multiple of
``row_multiple(dtype)``; ``y``, ``w`` (nnz + PAD,) follow the sorted entries. An entry costs 4 H flops for the gradient
and 4 H for every step, and H numbers of B read from beyond L1 once.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload, register_jitable

from fastdmf.kernels.cpu.entry import AHEAD, NEAR, PIECES, WIDE, pieces_of, token
from fastdmf.kernels.cpu.entry_index import aligned_empty
from fastdmf.kernels.cpu.vectors import (
    VECTOR_BYTES,
    add,
    div,
    dot,
    first,
    fma,
    fold,
    load4,
    load_four,
    load_index,
    load_row,
    maximum,
    mul,
    prefetch,
    prefetch_row,
    row_width,
    splat,
    splat_lane,
    store,
    sub,
    sum1,
    sum4,
    widen,
    zero_row,
    zero_sum,
)

__all__ = ["row_solve", "row_solve_serial", "row_solver"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"entry": "dd99fa3b3ce0", "vectors": "0f2ca2dd1947"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}
# Bytes of the widest row that is kept in registers: with AVX-512 four registers took 7.9 ns an entry to where lines
# took 10.3 (h = 64 float32, far, one step), three 6.9 and 8.7.
_NARROW = 4 * VECTOR_BYTES
# Entries up to which rows are solved for on the calling thread: below, a parallel region costs more than it saves.
_SERIAL = 20_000
_LEAST = float(np.finfo(np.float32).tiny)  # below it float32 loses digits, and a step goes anywhere


@register_jitable(inline="always")
def _weigh(prediction, target, weight, squares, weights, left, residual, weighted):
    """Return t = w r, and the sums of w r^2 and w with these four lanes; r = y - x . b, or x . b alone."""
    r = sub(target, prediction) if residual else prediction
    if left < 4:
        r, weight = first(r, left), first(weight, left)
    t = mul(weight, r) if weighted else r
    if residual:
        squares = add(squares, widen(mul(t, r)))
        weights = add(weights, widen(weight))
    return t, squares, weights


def _gram(like, out, o, x, i, b, indices, y, w, lo, hi, far, residual, weighted):
    """Write sum_j t_j b_j to out[o:] for the vector at x[i:]; return w r^2 and w summed in four lanes.

    A turn takes the dots of one group and adds the group before it, as ``entry.sweep`` does.
    """
    raise NotImplementedError


def _gram_narrow(like, out, o, x, i, b, indices, y, w, lo, hi, far, residual, weighted):
    h = row_width(b, like)
    xi, g = load_row(x, i, like), zero_row(b, like)
    squares, weights = zero_sum(), zero_sum()
    t = u = load4(y, lo)
    j0 = j1 = j2 = j3 = n0 = n1 = n2 = n3 = lo
    for k in range(lo, hi + 4, 4):
        if k < hi:
            n0, n1, n2, n3 = load_four(indices, k, hi - 1, h)
            if far:
                for e in range(AHEAD, AHEAD + 4):
                    prefetch_row(b, load_index(indices, k + e) * h, like)
            prediction = sum4(
                dot(xi, load_row(b, n0, like)),
                dot(xi, load_row(b, n1, like)),
                dot(xi, load_row(b, n2, like)),
                dot(xi, load_row(b, n3, like)),
            )
            yk, wk = load4(y, k), load4(w, k)
            u, squares, weights = _weigh(prediction, yk, wk, squares, weights, hi - k, residual, weighted)
        if k > lo:
            g = fma(splat_lane(t, 0), load_row(b, j0, like), g)
            g = fma(splat_lane(t, 1), load_row(b, j1, like), g)
            g = fma(splat_lane(t, 2), load_row(b, j2, like), g)
            g = fma(splat_lane(t, 3), load_row(b, j3, like), g)
        t = u
        j0, j1, j2, j3 = n0, n1, n2, n3
    store(out, o, g)
    return squares, weights


def _gram_wide(like, out, o, x, i, b, indices, y, w, lo, hi, far, residual, weighted):
    h = like
    step = row_width(b, WIDE)
    for c in range(0, h, step):
        store(out, o + c, zero_row(b, WIDE))
    squares, weights = zero_sum(), zero_sum()
    t = u = load4(y, lo)
    j0 = j1 = j2 = j3 = n0 = n1 = n2 = n3 = lo
    for k in range(lo, hi + 4, 4):
        if k < hi:
            n0, n1, n2, n3 = load_four(indices, k, hi - 1, h)
            if far:
                f0, f1, f2, f3 = load_four(indices, k + AHEAD, k + AHEAD + 3, h)
                for c in range(0, h, step):
                    prefetch(b, f0 + c)
                    prefetch(b, f1 + c)
                    prefetch(b, f2 + c)
                    prefetch(b, f3 + c)
            s0, s1, s2, s3 = zero_row(b, WIDE), zero_row(b, WIDE), zero_row(b, WIDE), zero_row(b, WIDE)
            for c in range(0, h, step):
                xc = load_row(x, i + c, WIDE)
                s0 = fma(xc, load_row(b, n0 + c, WIDE), s0)
                s1 = fma(xc, load_row(b, n1 + c, WIDE), s1)
                s2 = fma(xc, load_row(b, n2 + c, WIDE), s2)
                s3 = fma(xc, load_row(b, n3 + c, WIDE), s3)
            prediction = sum4(fold(s0), fold(s1), fold(s2), fold(s3))
            yk, wk = load4(y, k), load4(w, k)
            u, squares, weights = _weigh(prediction, yk, wk, squares, weights, hi - k, residual, weighted)
        if k > lo:
            t0, t1, t2, t3 = splat_lane(t, 0), splat_lane(t, 1), splat_lane(t, 2), splat_lane(t, 3)
            for c in range(0, h, step):
                g = load_row(out, o + c, WIDE)
                g = fma(t0, load_row(b, j0 + c, WIDE), g)
                g = fma(t1, load_row(b, j1 + c, WIDE), g)
                g = fma(t2, load_row(b, j2 + c, WIDE), g)
                g = fma(t3, load_row(b, j3 + c, WIDE), g)
                store(out, o + c, g)
        t = u
        j0, j1, j2, j3 = n0, n1, n2, n3
    return squares, weights


@overload(_gram, jit_options=_SETTINGS, inline="always")
def _choose_gram(like, out, o, x, i, b, indices, y, w, lo, hi, far, residual, weighted):
    return _gram_wide if isinstance(like, types.Integer) else _gram_narrow


@njit(**_SETTINGS)
def _solve_rows(
    like,
    a,
    b,
    mean,
    indptr,
    indices,
    y,
    w,
    scale,
    scaled_ridge,
    ridge,
    moment,
    free,
    steps,
    tol,
    begin,
    end,
    weighted,
    centred,
    work,
):
    """Solve the rows begin..end and return the sum of w r^2 before."""
    h = np.int64(a.shape[1])
    step = row_width(a, WIDE)
    far = b.size > NEAR
    # Places in the scratch: gradient, direction, its image, ridge, preconditioner.
    g, d, v, shrink, scaling = 0, h, 2 * h, 3 * h, 4 * h
    least = splat(a, _LEAST)
    total = zero_sum()
    for i in range(begin, end):
        lo = load_index(indptr, i)
        hi = load_index(indptr, i + 1)
        x = i * h
        # One place for this and for the steps, with flags at run time, compiles sooner and runs slower in float32.
        squares, weights = _gram(like, work, g, a, x, b, indices, y, w, lo, hi, far, True, weighted)
        total = add(total, squares)
        count = sum1(weights) if weighted else np.float64(hi - lo)
        counts, scales = splat(a, count), splat(a, scale[i])
        products = zero_row(a, WIDE)
        for c in range(0, h, step):
            lc = fma(scales, load_row(scaled_ridge, c, WIDE), load_row(ridge, c, WIDE))
            away = load_row(a, x + c, WIDE)
            if centred:
                away = sub(away, load_row(mean, x + c, WIDE))
            gc = sub(load_row(work, g + c, WIDE), mul(lc, away))
            # Neither entries nor ridge: the gradient is zero as well, and stays so when divided by something.
            dc = div(load_row(free, c, WIDE), maximum(fma(counts, load_row(moment, c, WIDE), lc), least))
            zc = mul(dc, gc)
            store(work, g + c, gc)
            store(work, d + c, zc)
            store(work, shrink + c, lc)
            store(work, scaling + c, dc)
            products = fma(gc, zc, products)
        rz = sum1(fold(products))
        stop = tol * rz
        for turn in range(steps):
            if not rz > _LEAST or (turn > 0 and rz < stop):
                break
            _gram(like, work, v, work, d, b, indices, y, w, lo, hi, False, False, weighted)
            products = zero_row(a, WIDE)
            for c in range(0, h, step):
                dc = load_row(work, d + c, WIDE)
                vc = fma(load_row(work, shrink + c, WIDE), dc, load_row(work, v + c, WIDE))
                store(work, v + c, vc)
                products = fma(dc, vc, products)
            curvature = sum1(fold(products))
            if not curvature > _LEAST:
                break
            along = splat(a, rz / curvature)
            products = zero_row(a, WIDE)
            for c in range(0, h, step):
                store(a, x + c, fma(along, load_row(work, d + c, WIDE), load_row(a, x + c, WIDE)))
                gc = sub(load_row(work, g + c, WIDE), mul(along, load_row(work, v + c, WIDE)))
                zc = mul(load_row(work, scaling + c, WIDE), gc)
                store(work, g + c, gc)
                store(work, v + c, zc)
                products = fma(gc, zc, products)
            former, rz = rz, sum1(fold(products))
            keep = splat(a, rz / former)
            for c in range(0, h, step):
                store(work, d + c, fma(keep, load_row(work, d + c, WIDE), load_row(work, v + c, WIDE)))
    return sum1(total)


@njit(parallel=True, **_SETTINGS)
def _solve_parallel(
    like,
    a,
    b,
    mean,
    indptr,
    indices,
    y,
    w,
    scale,
    scaled_ridge,
    ridge,
    moment,
    free,
    steps,
    tol,
    weighted,
    centred,
    work,
    sums,
    cuts,
):
    for piece in prange(PIECES):
        sums[piece] = _solve_rows(
            like,
            a,
            b,
            mean,
            indptr,
            indices,
            y,
            w,
            scale,
            scaled_ridge,
            ridge,
            moment,
            free,
            steps,
            tol,
            cuts[piece],
            cuts[piece + 1],
            weighted,
            centred,
            work[piece],
        )


def _arguments(a, b, mean, indptr, indices, y, w, scale, scaled_ridge, ridge, moment, free, steps, tol):
    """Return the arguments that both variants share, before and after the range of rows."""
    weighted, centred = w is not None, mean is not None
    data = (a, b, mean if centred else a, indptr, indices, y, w if weighted else y)
    settings = (
        scale,
        scaled_ridge,
        ridge,
        moment,
        free,
        int(steps),
        a.dtype.type(max(tol, np.finfo(a.dtype).eps ** 2)),
    )
    return (token(a.shape[1], a.dtype, _NARROW), *data, *settings), (weighted, centred)


def row_solve(a, b, mean, indptr, indices, y, w, scale, scaled_ridge, ridge, moment, free, steps, tol):
    """Improve every row of ``a`` against ``b`` by preconditioned conjugate gradients, in parallel.

    Parameters
    ----------
    a : (n1, H)
        Start, overwritten with the result. Columns that are not free, and columns of zeros, stay as they are.
    b : (n2, H)
        The side that is fixed.
    mean : (n1, H) or None
        Prior means m; None stands for zeros.
    indptr, indices : (n1 + 1,) int64 and (nnz + PAD,)
        From ``entry_sort``.
    y, w : (nnz + PAD,)
        Data and weights >= 0 in sorted order; ``w`` may be None.
    scale : (n1,)
        Factor of ``scaled_ridge`` in each row: the counts c_i for a ridge an entry.
    scaled_ridge, ridge, moment : (H,)
        Ridge and preconditioner as above; ``moment`` is the diagonal of the entry-weighted Gram matrix of ``b``.
    free : (H,)
        1 for columns that are solved for, 0 for the others.
    steps : int
        At most so many steps a row.
    tol : float
        A row stops, after its first step, when g . D g has fallen below ``tol`` times its start, or to rounding.

    Returns
    -------
    float
        sum w (y - a . b)^2 before the call, float64.

    Notes
    -----
    All arrays but the index ones are of one dtype, float32 or float64. 4 H flops an entry for the gradient and as
    many for every step.
    """
    head, flags = _arguments(a, b, mean, indptr, indices, y, w, scale, scaled_ridge, ridge, moment, free, steps, tol)
    sums = np.zeros(PIECES)
    _solve_parallel(*head, *flags, aligned_empty((PIECES, 5 * a.shape[1]), a.dtype), sums, pieces_of(indptr))
    total = 0.0
    for part in sums:  # in order
        total += float(part)
    return total


def row_solve_serial(a, b, mean, indptr, indices, y, w, scale, scaled_ridge, ridge, moment, free, steps, tol):
    """Solve as ``row_solve`` does, on the calling thread."""
    head, flags = _arguments(a, b, mean, indptr, indices, y, w, scale, scaled_ridge, ridge, moment, free, steps, tol)
    return _solve_rows(*head, 0, a.shape[0], *flags, aligned_empty(5 * a.shape[1], a.dtype))


def row_solver(indptr, indices, y, w):
    """Return the regressions of the rows with these entries, on the calling thread where they are few.

    Parameters
    ----------
    indptr, indices, y, w : ndarray
        As for ``row_solve``.

    Returns
    -------
    callable
        (a, b, mean, scale, vectors, steps, tol) -> sum w (y - a . b)^2 before. ``vectors`` are scaled_ridge, ridge,
        moment and free; they and ``scale`` are of any precision, the rest is as for ``row_solve``.
    """
    solve = row_solve if indptr[-1] > _SERIAL else row_solve_serial

    def improve(a, b, mean, scale, vectors, steps, tol):
        scale, *vectors = (np.ascontiguousarray(v, a.dtype) for v in (scale, *vectors))
        return solve(a, b, mean, indptr, indices, y, w, scale, *vectors, steps, tol)

    return improve
