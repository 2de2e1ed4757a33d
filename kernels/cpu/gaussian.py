"""Dense measurements: residuals of A x and their adjoint with A read ONCE.

With r_i = a_i . x - y_i the kernels return loss = sum_i w_i rho(r_i) and g = sum_i w_i psi(r_i) a_i. Two BLAS passes
(A x, then A^T r) read A twice; here a block of rows is worked on at once, r first, then g, while it is in cache.

Layout. ``a`` (m, d) holds one measurement a row; ``x`` and ``g`` are (B, d), B right-hand sides that share the read;
``y`` and ``w`` are (1 or B, m). All are C-contiguous of one dtype, float32 or float64; no padding is needed. Beside
float32, ``a`` may be uint16 that holds the bits of float16: half the bytes, the same arithmetic. Offsets are 64 bits
wide. A number of A costs 4 flops a right-hand side and is loaded from memory once.

Structure. A tile is four rows and ``_RHS`` right-hand sides, whose 4 x ``_RHS`` sums stay in registers; right-hand
sides that are left go one by one. Few take four whole rows at a time: A comes from memory for r and from the cache for
g. Many take blocks of more rows, in chunks of columns: x, g and A of a chunk stay in L1 while all tiles of the block
use them, and x and g, as long as all right-hand sides together, come from the outer caches once a block.
Sums are over fixed ranges of rows, added in order: the bits do not depend on the threads.
"""

import numpy as np
from numba import njit, prange

from fastdmf.kernels.cpu.vectors import (
    SQUARED,
    VECTOR_BYTES,
    add,
    first,
    fma,
    load,
    load4,
    load4_strided_first,
    load_first,
    load_strided,
    load_strided_first,
    loss_numbers,
    mul,
    pointer,
    prefetch,
    rho_psi,
    row_width,
    splat4_loss,
    splat_lane,
    store,
    store_strided,
    store_strided_first,
    sub,
    sum4,
    widen,
    zero_row,
)

__all__ = [
    "gaussian_forward",
    "gaussian_forward_serial",
    "gaussian_loss_pull",
    "gaussian_loss_pull_serial",
    "gaussian_pull",
    "gaussian_pull_serial",
]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "0f2ca2dd1947"}

_RHS = 4 if VECTOR_BYTES == 64 else 2  # 16 sums fit where there are 32 registers, 8 where there are 16
_SOME = (0,) * _RHS
_ONE = (0,)
_PIECES = 16  # ranges of predictions

# Right-hand sides whose x and g do not stay in the cache of a core use blocks of many rows, in chunks of columns; fewer
# than eight gained nothing by it. bench/test_gaussian.py -k blocks compares the two.
_MANY = 8  # right-hand sides
_NEAR = 1 << 19  # bytes of x and g
_CHUNK = 2048  # bytes of a right-hand side in a chunk
_MOST_QUADS = 8  # rows of a block, in fours

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}
# Calls around a few rows of 10 to 100 numbers cost as much as their arithmetic.
_INSIDE = {**_SETTINGS, "forceinline": True}


@njit(**_INSIDE)
def _predict(like, r, at, a, rows, x, start, d, begin, end, ahead):
    """Add a_i . x_b over the columns begin..end to four lanes of r for each right-hand side.

    Arrays come as addresses. Right-hand side k is at x[start + k d:], its lanes at r[at + 4 k:]. With several, the line
    of A at ``ahead`` is asked for meanwhile.
    """
    o0, o1, o2, o3 = rows
    lanes = row_width(x, _ONE)
    whole = begin + (end - begin) // lanes * lanes
    s0, s1, s2, s3 = zero_row(x, like), zero_row(x, like), zero_row(x, like), zero_row(x, like)
    for c in range(begin, whole, lanes):
        xc = load_strided(x, start + c, d, like)
        s0 = fma(load(a, o0 + c), xc, s0)
        s1 = fma(load(a, o1 + c), xc, s1)
        s2 = fma(load(a, o2 + c), xc, s2)
        s3 = fma(load(a, o3 + c), xc, s3)
        if len(like) > 1:
            prefetch(a, ahead + c)
    if whole < end:
        left = end - whole
        xc = load_strided_first(x, start + whole, d, like, left)
        s0 = fma(load_first(a, o0 + whole, left), xc, s0)
        s1 = fma(load_first(a, o1 + whole, left), xc, s1)
        s2 = fma(load_first(a, o2 + whole, left), xc, s2)
        s3 = fma(load_first(a, o3 + whole, left), xc, s3)
    before = load4_strided_first(r, at, 4, like, 4)
    store_strided(r, at, 4, add(before, sum4(s0, s1, s2, s3)))


@njit(**_INSIDE)
def _pull(like, g, start, t, at, a, rows, d, begin, end, ahead):
    """Add sum_i t_i a_i over four rows to the columns begin..end of g, for each right-hand side as ``_predict``."""
    o0, o1, o2, o3 = rows
    lanes = row_width(g, _ONE)
    whole = begin + (end - begin) // lanes * lanes
    tile = load4_strided_first(t, at, 4, like, 4)
    t0, t1, t2, t3 = splat_lane(tile, 0), splat_lane(tile, 1), splat_lane(tile, 2), splat_lane(tile, 3)
    for c in range(begin, whole, lanes):
        gc = load_strided(g, start + c, d, like)
        gc = fma(load(a, o0 + c), t0, gc)
        gc = fma(load(a, o1 + c), t1, gc)
        gc = fma(load(a, o2 + c), t2, gc)
        gc = fma(load(a, o3 + c), t3, gc)
        store_strided(g, start + c, d, gc)
        if len(like) > 1:
            prefetch(a, ahead + c)
    if whole < end:
        left = end - whole
        gc = load_strided_first(g, start + whole, d, like, left)
        gc = fma(load_first(a, o0 + whole, left), t0, gc)
        gc = fma(load_first(a, o1 + whole, left), t1, gc)
        gc = fma(load_first(a, o2 + whole, left), t2, gc)
        gc = fma(load_first(a, o3 + whole, left), t3, gc)
        store_strided_first(g, start + whole, d, gc, left)


@njit(**_INSIDE)
def _work(pulling, g, r, a, x, i, stop, last, d, runs, begin, end):
    """Predict or pull on the rows i..stop, a block, and the columns begin..end, for all right-hand sides.

    Row ``last`` - 1 stands in for those of its four behind it. While several right-hand sides use a tile, each asks
    for one row of the next tile: four rows on, or the first rows at the next columns.
    """
    for k in range(i, stop, 4):
        rows = k * d, min(k + 1, last - 1) * d, min(k + 2, last - 1) * d, min(k + 3, last - 1) * d
        next_row, next_columns = (k + 4, 0) if k + 4 < stop else (i, end - begin)
        for b in range(0, runs - _RHS + 1, _RHS):
            at = (k - i) * runs + 4 * b
            ahead = min(next_row + min(b // _RHS, 3), last - 1) * d + next_columns
            if pulling:
                _pull(_SOME, g, b * d, r, at, a, rows, d, begin, end, ahead)
            else:
                _predict(_SOME, r, at, a, rows, x, b * d, d, begin, end, ahead)
        for b in range(runs // _RHS * _RHS, runs):
            at = (k - i) * runs + 4 * b
            if pulling:
                _pull(_ONE, g, b * d, r, at, a, rows, d, begin, end, 0)
            else:
                _predict(_ONE, r, at, a, rows, x, b * d, d, begin, end, 0)


@njit(**_INSIDE)
def _judge(r, sums, y, y_stride, w, w_stride, loss, i, stop, last, runs, weighted):
    """Replace the predictions r of the rows i..stop by w psi, zero from row ``last`` on, and add w rho to ``sums``."""
    shape = splat4_loss(r, loss)
    for k in range(i, stop, 4):
        left = last - k
        for b in range(runs):
            at = (k - i) * runs + 4 * b
            target = load4_strided_first(y, b * y_stride + k, 0, _ONE, left)
            rho, psi = rho_psi(sub(load4_strided_first(r, at, 0, _ONE, 4), target), shape)
            if weighted:
                weight = load4_strided_first(w, b * w_stride + k, 0, _ONE, left)
                rho, psi = mul(weight, rho), mul(weight, psi)
            if left < 4:
                rho, psi = first(rho, left), first(psi, left)
            store(r, at, psi)
            store(sums, 4 * b, add(load4(sums, 4 * b), widen(rho)[0]))


@njit(**_SETTINGS)
def _sweep(g, sums, r, a, x, y, w, loss, begin, end, chunk, weighted, predicting, pulling):
    """Work through the rows begin..end: overwrite ``g`` with the pull and ``sums`` with four parts of each loss.

    Not pulling: write the predictions to g (B, m). Not predicting: the predictions are zero. ``r`` is scratch for the
    residuals of a block, and its size is what makes the block.
    """
    m, d, runs = np.int64(a.shape[0]), np.int64(a.shape[1]), np.int64(g.shape[0])
    block = r.shape[0] // max(runs, 1)
    y_stride, w_stride = m if y.shape[0] > 1 else 0, m if w.shape[0] > 1 else 0
    if pulling:
        g[:] = 0
    sums[:] = 0
    # Addresses from here on: an array that is handed on is counted by atomic operations, which narrow rows feel.
    to, tile, entries = pointer(g), pointer(r), pointer(a)
    points, data, weights, parts = pointer(x), pointer(y), pointer(w), pointer(sums)
    for i in range(begin, end, block):
        stop = min(i + block, end)
        for k in range(r.shape[0]):  # r[:] = 0 makes a view of it first, and counts that
            r[k] = 0.0
        # One call for both tasks: the tiles are what takes time to compile.
        for task in range(0 if predicting else 1, 2 if pulling else 1):
            if task == 1:
                _judge(tile, parts, data, y_stride, weights, w_stride, loss, i, stop, end, runs, weighted)
            for c in range(0, d, chunk):
                _work(task == 1, to, tile, entries, points, i, stop, end, d, runs, c, min(c + chunk, d))
        if not pulling:
            for k in range(i, stop, 4):
                for b in range(runs):
                    prediction = load4_strided_first(tile, (k - i) * runs + 4 * b, 0, _ONE, 4)
                    store_strided_first(to, b * m + k, 0, prediction, end - k)


@njit(parallel=True, **_SETTINGS)
def _sweep_ranges(partial, sums, r, a, x, y, w, loss, chunk, weighted, predicting, pulling):
    """Work through fixed ranges of rows; without pulls they share partial[0]."""
    ranges, m = sums.shape[0], a.shape[0]
    groups = (m + 3) // 4
    for item in prange(ranges):
        k = np.int64(item)  # of the index and other numbers numba would make floats, and another version of the sweep
        begin, end = 4 * (groups * k // ranges), min(4 * (groups * (k + 1) // ranges), m)
        to = partial[k if pulling else 0]
        _sweep(to, sums[k], r[k], a, x, y, w, loss, begin, end, chunk, weighted, predicting, pulling)


class _Shared:
    """The memory of a read-only array, for NumPy to make another array of."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _one_type(array):
    """Return a read-only array as numba types writable ones, so that both kinds share one compiled version.

    The other way around every call would wait for numba to type the read-only arrays, which it is slow at.
    """
    return array if array.flags.writeable else np.asarray(_Shared(array))


def _call(g, partial, ranges, a, x, y, w, loss, predicting, pulling):
    """Sweep over ``ranges`` ranges in parallel, or on the calling thread if 0, and return the losses."""
    runs, d = len(g), a.shape[1]
    quads, chunk = 1, max(d, 1)
    if runs >= _MANY and 2 * runs * d * g.itemsize > _NEAR:
        quads, chunk = min(runs // 2, _MOST_QUADS), _CHUNK // g.itemsize
    weighted = w is not None
    inputs = [_one_type(z) for z in (a, x, y, w if weighted else y)]
    sums = np.empty((max(ranges, 1), runs, 4))
    r = np.empty((max(ranges, 1), 4 * quads * runs), g.dtype)
    options = chunk, weighted, predicting, pulling
    if ranges:
        _sweep_ranges(partial, sums, r, *inputs, loss, *options)
        if pulling:
            np.add.reduce(partial, axis=0, out=g)
    else:
        _sweep(g, sums[0], r[0], *inputs, loss, 0, len(a), *options)
    return np.add.reduce(np.add.reduce(sums, axis=0), axis=1)


_SQUARED = loss_numbers(SQUARED, 0.0)


def gaussian_loss_pull(g, losses, a, x, y, w, code, delta, partial):
    """Evaluate losses and pulls with one read of A, in parallel over fixed ranges of rows.

    Overwrites ``g`` (B, d), ``losses`` (B,) float64 and the scratch ``partial`` (R, B, d), one pull for each of the
    R ranges, which are added in order. ``w`` may be None.
    """
    losses[:] = _call(g, partial, len(partial), a, x, y, w, loss_numbers(code, delta), True, True)


def gaussian_loss_pull_serial(g, losses, a, x, y, w, code, delta):
    """Evaluate as ``gaussian_loss_pull`` does, on the calling thread and without scratch for pulls."""
    losses[:] = _call(g, None, 0, a, x, y, w, loss_numbers(code, delta), True, True)


def gaussian_forward(out, a, x):
    """Overwrite ``out`` (B, m) with a_i . x_b, in parallel; A is read once."""
    _call(out, out[None], _PIECES, a, x, x, None, _SQUARED, True, False)


def gaussian_forward_serial(out, a, x):
    """Predict as ``gaussian_forward`` does, on the calling thread."""
    _call(out, None, 0, a, x, x, None, _SQUARED, True, False)


def gaussian_pull(g, a, r, partial):
    """Overwrite ``g`` (B, d) with sum_i r_bi a_i for ``r`` (B, m), in parallel; A is read once.

    ``partial`` (R, B, d) is scratch as in ``gaussian_loss_pull``, of which this is the half without predictions.
    """
    _call(g, partial, len(partial), a, g, np.negative(r), None, _SQUARED, False, True)


def gaussian_pull_serial(g, a, r):
    """Pull as ``gaussian_pull`` does, on the calling thread."""
    _call(g, None, 0, a, g, np.negative(r), None, _SQUARED, False, True)
