"""Products of small dense matrices at any place of flat buffers, on explicit vectors.

C (m x n) = A (m x k) B (k x n), each in rows or in columns of its own leading dimension, so that factors that lie in
one buffer and rows that are padded to whole vectors need no copies. B is copied into panels of two vectors' width
(the last one of one where that is enough), then strips of six rows of A meet one panel after the other: twelve sums
stay in registers, A is read a number at a time, B in whole vectors. Every sum runs over k in order, whatever the
number of threads or the library beside it.

SciPy's BLAS through ``np.dot`` took 51 us for 100 x 100 x 100 in float64 and 29 in float32, this 46 and 25, and less
at every size to 500 and for every transposition (two cores of a Zen 3 with AVX2, one thread, bench/test_small.py); the
peak of the same core is 39 and 19 us. What lost: panels outside and strips inside, 49 and 27; A^T read where it lies,
up to 25 % from k = 128 on, where its columns share few places of the cache. There is no blocking over k: matrices are
meant to have a few hundred rows.
"""

import numpy as np
from numba import njit
from numba.extending import register_jitable

from fastdmf.kernels.cpu.entry_index import row_multiple
from fastdmf.kernels.cpu.vectors import (
    fma,
    load,
    load_first,
    load_row,
    load_transposed,
    row_width,
    splat_at,
    store,
    store_first,
    store_strided,
    zero_row,
)

__all__ = ["gemm", "gemm_work"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "0f2ca2dd1947"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}

# Rows of A that meet a panel at once. Two vectors each are twelve of AVX2's sixteen registers; two hold the panel's
# row, one the number of A.
_ROWS = 6


def gemm_work(n, k, dtype):
    """Return the length of the scratch that ``gemm`` needs for B (k x n)."""
    multiple = row_multiple(dtype)
    return (-(-n // multiple) + 1) * multiple * k


@njit(inline="always", **_SETTINGS)
def _pack_panels(work, place, b, at, row, column, k, n):
    """Copy B into panels: column j of the panel that begins with column i lies at i k + j, rows one after another."""
    lanes = row_width(b, (0,))
    for i in range(0, n, 2 * lanes):
        width = lanes if n - i <= lanes else 2 * lanes
        for c in range(0, width, lanes):
            to, left = place + i * k + c, n - i - c
            source = at + (i + c) * column
            whole = 0
            if column == 1:
                if left >= lanes:
                    for _ in range(k):
                        store(work, to, load(b, source))
                        source += row
                        to += width
                    whole = k
            elif left >= lanes:
                for _ in range(k // lanes):
                    store_strided(work, to, width, load_transposed(b, source, column))
                    source += lanes * row
                    to += lanes * width
                whole = k - k % lanes
            for _ in range(whole, k):
                if column == 1:
                    store(work, to, load_first(b, source, left))
                else:
                    for e in range(lanes):
                        work[to + e] = b[source + e * column] if e < left else 0
                source += row
                to += width


@njit(inline="always", **_SETTINGS)
def _pack_strip(work, place, a, at, column, k, left, width):
    """Copy ``width`` rows of a matrix that lies in columns, zeros behind the first ``left``: a column after another."""
    lanes = row_width(a, (0,))
    for _ in range(k):
        for e in range(0, width, lanes):
            if left - e >= lanes:
                store(work, place + e, load(a, at + e))
            else:
                store(work, place + e, load_first(a, at + e, left - e))
        at += column
        place += width


@register_jitable(forceinline=True, **_SETTINGS)
def _strip(like, c, at, ldc, room, a, rows, step, work, panels, begin, end, left, k):
    """Multiply six rows of A (``left`` of them count) with the panels of ``like``'s width in columns begin..end."""
    width = row_width(work, like)
    a0, a1, a2, a3, a4, a5 = rows
    for j in range(begin, end, width):
        c0 = c1 = c2 = c3 = c4 = c5 = zero_row(work, like)
        q, t = panels + j * k, 0
        for _ in range(k):
            b = load_row(work, q, like)
            c0 = fma(splat_at(a, a0 + t), b, c0)
            c1 = fma(splat_at(a, a1 + t), b, c1)
            c2 = fma(splat_at(a, a2 + t), b, c2)
            c3 = fma(splat_at(a, a3 + t), b, c3)
            c4 = fma(splat_at(a, a4 + t), b, c4)
            c5 = fma(splat_at(a, a5 + t), b, c5)
            q += width
            t += step
        to, columns = at + j, room - j
        if columns >= width and left >= _ROWS:
            store(c, to, c0)
            store(c, to + ldc, c1)
            store(c, to + 2 * ldc, c2)
            store(c, to + 3 * ldc, c3)
            store(c, to + 4 * ldc, c4)
            store(c, to + 5 * ldc, c5)
        else:
            store_first(c, to, c0, columns)
            if left > 1:
                store_first(c, to + ldc, c1, columns)
            if left > 2:
                store_first(c, to + 2 * ldc, c2, columns)
            if left > 3:
                store_first(c, to + 3 * ldc, c3, columns)
            if left > 4:
                store_first(c, to + 4 * ldc, c4, columns)
            if left > 5:
                store_first(c, to + 5 * ldc, c5, columns)


@njit(inline="always", **_SETTINGS)
def gemm(c, c_at, ldc, a, a_at, a_row, a_column, b, b_at, b_row, b_column, m, n, k, work, work_at):
    """Overwrite C (m x n), which begins at c[c_at] with rows ``ldc`` apart, with A B.

    Parameters
    ----------
    c, a, b, work : (length,) contiguous, one dtype
        May be one array, as long as the places do not overlap.
    a_row, a_column, b_row, b_column : int
        Numbers between rows and between columns of A (m x k) and B (k x n); one of each two is 1.
    work, work_at
        Scratch of ``gemm_work(n, k, dtype)`` from ``work_at``.

    Where rows of C have room for whole vectors (``ldc``), zeros are written behind column n. 2 m n k flops.
    """
    lanes = row_width(work, (0,))
    padded = (n + lanes - 1) // lanes * lanes
    room = padded if ldc >= padded else n
    _pack_panels(work, work_at, b, b_at, b_row, b_column, k, n)
    pairs = padded // (2 * lanes) * (2 * lanes)
    strip, wide = work_at + padded * k, (_ROWS + lanes - 1) // lanes * lanes
    none, one = np.int64(0), np.int64(1)  # of one type with what is not literal: one compiled version
    for i in range(0, m, _ROWS):
        left, to = m - i, c_at + i * ldc
        if a_column == 1:
            # Rows behind the last one repeat it; their sums are not stored.
            source, x, apart, step, last = a, a_at + i * a_row, a_row, one, left - 1
        else:
            _pack_strip(work, strip, a, a_at + i, a_column, k, left, wide)
            source, x, apart, step, last = work, strip, one, wide, np.int64(_ROWS)
        rows = (
            x,
            x + min(1, last) * apart,
            x + min(2, last) * apart,
            x + min(3, last) * apart,
            x + min(4, last) * apart,
            x + min(5, last) * apart,
        )
        _strip((0, 0), c, to, ldc, room, source, rows, step, work, work_at, none, pairs, left, k)
        _strip((0,), c, to, ldc, room, source, rows, step, work, work_at, pairs, padded, left, k)
