"""Predictions at pairs (i, j) in any order, and how uncertain they are.

    mean_k = x_i . y_j,      spread_k = sum_h (x_ih^2 + V_ih) W_jh + V_ih y_jh^2,
    V_ih = 1 / (c_i a_h + e_h),      W_jh = 1 / (d_j b_h + f_h),

for the pairs (i, j) = (rows[k], cols[k]) and variances that are functions of the counts c and d of a row and a column
alone, so that none are stored; e_h = inf is a column without any.

Layout as in ``entry``: ``x`` (n1, H) and ``y`` (n2, H) are C-contiguous, H a multiple of ``row_multiple(dtype)``. Four
pairs are worked on at once, line by line of their rows, whatever the width: one compiled version a dtype. A pair costs
2 H flops and the reading of 2 H numbers from wherever its rows lie, with the spread 10 H flops and 2 H divisions more.
"""

import numpy as np
from numba import njit, prange
from numba.extending import register_jitable

from fastdmf.kernels.cpu.entry import AHEAD, PIECES, WIDE
from fastdmf.kernels.cpu.vectors import (
    div,
    fma,
    fold,
    load_four,
    load_index,
    load_row,
    mul,
    prefetch,
    row_width,
    splat,
    store,
    store_first,
    sum4,
    zero_row,
)

__all__ = ["pair_moments", "pair_predict"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"entry": "dd99fa3b3ce0", "vectors": "0f2ca2dd1947"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


@register_jitable(inline="always")
def _write(out, k, sums, left):
    if left < 4:
        store_first(out, k, sums, left)
    else:
        store(out, k, sums)


@register_jitable(inline="always")
def _add_spread(total, x, y, c, d, a, e, b, f, one):
    v, w = div(one, fma(c, a, e)), div(one, fma(d, b, f))
    return fma(v, mul(y, y), fma(w, fma(x, x, v), total))


@njit(parallel=True, **_SETTINGS)
def _pairs(means, spreads, x, y, rows, cols, counts, a, e, others, b, f, with_spread):
    n, h = rows.shape[0], np.int64(x.shape[1])
    for piece in prange(PIECES):
        step = row_width(x, WIDE)
        one = splat(x, 1.0)
        # Whole groups of four, so that no bit depends on where a piece begins.
        begin, end = (n * piece // PIECES) & ~3, n if piece == PIECES - 1 else (n * (piece + 1) // PIECES) & ~3
        for k in range(begin, end, 4):
            i0, i1, i2, i3 = load_four(rows, k, end - 1, h)
            j0, j1, j2, j3 = load_four(cols, k, end - 1, h)
            for ahead in range(k + AHEAD, min(k + AHEAD + 4, end)):
                i, j = load_index(rows, ahead) * h, load_index(cols, ahead) * h
                for c in range(0, h, step):
                    prefetch(x, i + c)
                    prefetch(y, j + c)
            s0, s1, s2, s3 = zero_row(x, WIDE), zero_row(x, WIDE), zero_row(x, WIDE), zero_row(x, WIDE)
            for c in range(0, h, step):
                s0 = fma(load_row(x, i0 + c, WIDE), load_row(y, j0 + c, WIDE), s0)
                s1 = fma(load_row(x, i1 + c, WIDE), load_row(y, j1 + c, WIDE), s1)
                s2 = fma(load_row(x, i2 + c, WIDE), load_row(y, j2 + c, WIDE), s2)
                s3 = fma(load_row(x, i3 + c, WIDE), load_row(y, j3 + c, WIDE), s3)
            _write(means, k, sum4(fold(s0), fold(s1), fold(s2), fold(s3)), end - k)
            if with_spread:
                c0, c1 = splat(x, counts[i0 // h]), splat(x, counts[i1 // h])
                c2, c3 = splat(x, counts[i2 // h]), splat(x, counts[i3 // h])
                d0, d1 = splat(x, others[j0 // h]), splat(x, others[j1 // h])
                d2, d3 = splat(x, others[j2 // h]), splat(x, others[j3 // h])
                s0, s1, s2, s3 = zero_row(x, WIDE), zero_row(x, WIDE), zero_row(x, WIDE), zero_row(x, WIDE)
                for c in range(0, h, step):
                    ac, ec, bc, fc = (
                        load_row(a, c, WIDE),
                        load_row(e, c, WIDE),
                        load_row(b, c, WIDE),
                        load_row(f, c, WIDE),
                    )
                    s0 = _add_spread(
                        s0, load_row(x, i0 + c, WIDE), load_row(y, j0 + c, WIDE), c0, d0, ac, ec, bc, fc, one
                    )
                    s1 = _add_spread(
                        s1, load_row(x, i1 + c, WIDE), load_row(y, j1 + c, WIDE), c1, d1, ac, ec, bc, fc, one
                    )
                    s2 = _add_spread(
                        s2, load_row(x, i2 + c, WIDE), load_row(y, j2 + c, WIDE), c2, d2, ac, ec, bc, fc, one
                    )
                    s3 = _add_spread(
                        s3, load_row(x, i3 + c, WIDE), load_row(y, j3 + c, WIDE), c3, d3, ac, ec, bc, fc, one
                    )
                _write(spreads, k, sum4(fold(s0), fold(s1), fold(s2), fold(s3)), end - k)


def pair_predict(means, x, y, rows, cols):
    """Overwrite ``means`` (k,) with x_i . y_j in parallel.

    ``rows`` and ``cols`` (k,) are int64 and not validated; all other arrays are of one dtype.
    """
    none = x[0]
    _pairs(means, means, x, y, rows, cols, none, none, none, none, none, none, False)


def pair_moments(means, spreads, x, y, rows, cols, row_counts, a, e, column_counts, b, f):
    """Overwrite ``means`` and ``spreads`` (k,) with both sums in parallel.

    Parameters
    ----------
    means, spreads : (k,)
    x, y : (n1, H) and (n2, H)
    rows, cols : (k,) int64
        Not validated.
    row_counts, column_counts : (n1,) and (n2,)
        c and d.
    a, e, b, f : (H,)
        Of the variances of rows and columns.
    """
    _pairs(means, spreads, x, y, rows, cols, row_counts, a, e, column_counts, b, f, True)
