"""Steps and inner products of a batch: one pass over (B, D) buffers, a scalar a slice.

What a rule does besides an evaluation is memory traffic: the same in array expressions takes a pass for every
operation, and a buffer. Buffers are C-contiguous. Sums are taken in ranges of ``_RANGE`` numbers and added in order in
float64, so that their bits do not depend on the number of threads.
"""

import numpy as np
from numba import njit, prange

from fastdmf.kernels.cpu.vectors import (
    add,
    fma,
    fold,
    load,
    load_first,
    load_row,
    mul,
    row_width,
    splat,
    store,
    store_first,
    sum1,
    zero_row,
)

__all__ = ["slices_dot", "slices_move", "slices_unit"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "fda00a159f57"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}

_RANGE = 4096  # numbers of one partial sum, and of one item of parallel work
_SERIAL = 1 << 18  # numbers in all under which a parallel region costs more than it saves


@njit(**_SETTINGS)
def _move(out, x, step, direction, begin, end):
    lanes = row_width(x, (0,))
    t = splat(x, step)
    for c in range(begin, end - lanes + 1, lanes):
        store(out, c, fma(t, load(direction, c), load(x, c)))
    c = end - (end - begin) % lanes
    if c < end:
        store_first(out, c, fma(t, load_first(direction, c, end - c), load_first(x, c, end - c)), end - c)


@njit(**_SETTINGS)
def _dot(a, b, begin, end):
    step, lanes = row_width(a, (0,) * 4), row_width(a, (0,))
    total = zero_row(a, (0,) * 4)
    whole = begin + (end - begin) // step * step
    for c in range(begin, whole, step):
        total = fma(load_row(a, c, (0,) * 4), load_row(b, c, (0,) * 4), total)
    rest = fold(total)
    for c in range(whole, end, lanes):
        rest = add(rest, mul(load_first(a, c, end - c), load_first(b, c, end - c)))
    return np.float64(sum1(rest))


@njit(parallel=True, **_SETTINGS)
def slices_move(out, x, steps, direction):
    """Overwrite ``out`` with x_b + steps_b direction_b; it may be ``x``. All (B, D), ``steps`` (B,) float64.

    2 flops and 3 numbers moved an element.
    """
    runs, size = x.shape
    if x.size < _SERIAL:
        for b in range(runs):
            _move(out[b], x[b], steps[b], direction[b], 0, size)
    else:
        ranges = -(-size // _RANGE)
        for item in prange(runs * ranges):
            b, k = item // ranges, item % ranges
            _move(out[b], x[b], steps[b], direction[b], k * _RANGE, min((k + 1) * _RANGE, size))


@njit(parallel=True, **_SETTINGS)
def slices_dot(out, a, b):
    """Overwrite ``out`` (B,) float64 with the inner products of the slices of ``a`` and ``b``, both (B, D)."""
    runs, size = a.shape
    ranges = -(-size // _RANGE)
    if a.size < _SERIAL:
        for i in range(runs):
            out[i] = 0.0
            for k in range(ranges):
                out[i] += _dot(a[i], b[i], k * _RANGE, min((k + 1) * _RANGE, size))
    else:
        partial = np.empty((runs, ranges))
        for item in prange(runs * ranges):
            i, k = item // ranges, item % ranges
            partial[i, k] = _dot(a[i], b[i], k * _RANGE, min((k + 1) * _RANGE, size))
        for i in range(runs):
            out[i] = 0.0
            for k in range(ranges):
                out[i] += partial[i, k]


@njit(**_SETTINGS)
def slices_unit(out, norms, a, chosen):
    """Write a_b / ||a_b|| to the slices of ``out`` that are ``chosen`` and whose a_b is not zero; all norms to (B,)."""
    runs, size = a.shape
    for b in range(runs):
        norms[b] = np.sqrt(_dot(a[b], a[b], 0, size))
        if chosen[b] and norms[b] > 0:
            for c in range(size):
                out[b, c] = a[b, c] / norms[b]
