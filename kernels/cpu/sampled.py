"""Entry masks of small matrices: the residuals at the entries, then G Q^T and G^T P by gathering rows.

The entry pass of ``entry`` goes through the entries once, which suits factors that are far from the core. Those of a
few hundred rows are near: what counts is the number of loads and stores, and whether the rows that are met again are
still in L1. So the residuals g_ij are written down (rows times columns is small, and they are few), and each product
is a gather

    out_i = sum_k r_k q_(j_k)     over the entries k of row i,

whose sums stay in registers over the row: a tile of up to eight vectors of all rows is worked on before the next, so
that the gathered tile stays in L1 and no row of the result is read. G^T P is the same with the entries by columns.

With 2000 entries in 100 x 100 that took 48 us at width 100 in float64 and 36 in float32, where the one pass of
``entry`` took 82 and 44; at width 20, 15 and 14 against 24 and 17 (two cores of a Zen 3 with AVX2, one thread).

Factors lie in one flat buffer ``x``, padded to whole vectors with zeros; entries are sorted as for ``entry``.
"""

import numpy as np
from numba import njit
from numba.extending import register_jitable

from fastdmf.kernels.cpu.vectors import (
    add,
    first,
    fma,
    fold,
    load,
    load4,
    load_four,
    load_index,
    load_row,
    mul,
    rho_psi,
    row_width,
    splat4,
    splat4_loss,
    splat_at,
    store,
    store_first,
    sub,
    sum1,
    sum4,
    widen,
    zero_row,
    zero_sum,
)

__all__ = ["sampled_gather", "sampled_reorder", "sampled_residuals"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "0f2ca2dd1947"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


@njit(**_SETTINGS)
def sampled_residuals(r, r_at, p, p_at, q, q_at, h, n1, indptr, indices, y, w, loss, weighted, factor):
    """Write r_k = factor w_k psi(p_i . q_j - y_k) from r[r_at] on; return sum_k w_k rho.

    P (n1, h) and Q^T (n2, h) begin at p[p_at] and q[q_at]; h is a multiple of a vector. Up to three numbers
    behind the last r_k are overwritten. 2 h flops and h numbers read an entry.
    """
    step, lanes = row_width(p, (0, 0)), row_width(p, (0,))
    pairs = h // step * step
    shape, plain = splat4_loss(y, loss), loss[0] == np.inf
    scale = splat4(y, factor)
    total = zero_sum()
    for i in range(n1):
        k, hi = load_index(indptr, i), load_index(indptr, i + 1)
        at = p_at + i * h
        while k < hi:
            j0, j1, j2, j3 = load_four(indices, k, hi - 1, h)
            s0 = s1 = s2 = s3 = zero_row(p, (0, 0))
            for c in range(0, pairs, step):
                xc = load_row(p, at + c, (0, 0))
                s0 = fma(xc, load_row(q, q_at + j0 + c, (0, 0)), s0)
                s1 = fma(xc, load_row(q, q_at + j1 + c, (0, 0)), s1)
                s2 = fma(xc, load_row(q, q_at + j2 + c, (0, 0)), s2)
                s3 = fma(xc, load_row(q, q_at + j3 + c, (0, 0)), s3)
            t0, t1, t2, t3 = fold(s0), fold(s1), fold(s2), fold(s3)
            for c in range(pairs, h, lanes):
                xc = load(p, at + c)
                t0 = fma(xc, load(q, q_at + j0 + c), t0)
                t1 = fma(xc, load(q, q_at + j1 + c), t1)
                t2 = fma(xc, load(q, q_at + j2 + c), t2)
                t3 = fma(xc, load(q, q_at + j3 + c), t3)
            d = sub(sum4(t0, t1, t2, t3), load4(y, k))
            rho, psi = mul(d, d), d
            if not plain:
                rho, psi = rho_psi(d, shape)
            if weighted:
                weight = load4(w, k)
                rho, psi = mul(weight, rho), mul(weight, psi)
            if hi - k < 4:
                rho = first(rho, hi - k)
            total = add(total, widen(rho))
            # The next row overwrites what lies behind the last entry of this one.
            store(r, r_at + k, mul(scale, psi))
            k += 4
    return sum1(total)


@register_jitable(forceinline=True, **_SETTINGS)
def _tile(like, out, at, width, count, r, r_at, x, q_at, h, rows, indptr, indices):
    """Gather the vectors ``like`` of all rows and write their first ``count`` numbers."""
    whole = row_width(x, like) <= count
    for i in range(rows):
        g = zero_row(x, like)
        for k in range(load_index(indptr, i), load_index(indptr, i + 1)):
            g = fma(splat_at(r, r_at + k), load_row(x, q_at + load_index(indices, k) * h, like), g)
        if whole:
            store(out, at + i * width, g)
        else:
            store_first(out, at + i * width, g, count)


@njit(inline="always", **_SETTINGS)
def sampled_gather(out, at, width, r, r_at, x, q_at, h, rows, indptr, indices):
    """Overwrite ``out`` (rows, width), which begins at out[at], with sum_k r_k q_(j_k) over the entries k of each row.

    ``q`` (any, h) begins at x[q_at]; h is ``width`` rounded up to whole vectors. 2 h flops and h numbers read an entry.
    Tiles have 8, 4, 2 or 1 vectors: each width is compiled. Eight widths, chosen to be equal, took twice as long to
    compile and 25 % less at five vectors, 15 % more at 13, and as long at 12, 16 and 25.
    """
    lanes = row_width(x, (0,))
    left = h // lanes
    while left > 0:
        c = h - left * lanes
        head, tail = (out, at + c, width, width - c), (r, r_at, x, q_at + c, h, rows, indptr, indices)
        if left >= 8:
            vectors = 8
            _tile((0,) * 8, *head, *tail)
        elif left >= 4:
            vectors = 4
            _tile((0,) * 4, *head, *tail)
        elif left >= 2:
            vectors = 2
            _tile((0,) * 2, *head, *tail)
        else:
            vectors = 1
            _tile((0,), *head, *tail)
        left -= vectors


@njit(inline="always", **_SETTINGS)
def sampled_reorder(out, at, r, r_at, order):
    """Write r[r_at + order_k] to out[at + k] for all k."""
    for k in range(order.shape[0]):
        # Unsigned indices spare numba's test for negative ones: 1.0 against 2.4 us for 2000 entries.
        out[np.uint64(at + k)] = r[np.uint64(r_at + load_index(order, k))]
