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

__all__ = ["slices_dot", "slices_move"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "0f2ca2dd1947"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}

_RANGE = 4096  # numbers of one partial sum, and of one item of parallel work
_SERIAL = 1 << 18  # numbers in all under which a parallel region costs more than it saves


@njit(inline="always", **_SETTINGS)
def _move(out, x, steps, direction, item, ranges):
    """Move one range of one slice."""
    b, begin = item // ranges, item % ranges * _RANGE
    size, lanes = x.shape[1], row_width(x, (0,))
    end, at = min(begin + _RANGE, size), b * size
    t = splat(x, steps[b])
    for c in range(at + begin, at + end - lanes + 1, lanes):
        store(out, c, fma(t, load(direction, c), load(x, c)))
    left = (end - begin) % lanes
    if left:
        c = at + end - left
        store_first(out, c, fma(t, load_first(direction, c, left), load_first(x, c, left)), left)


@njit(inline="always", **_SETTINGS)
def _dot(partial, a, b, item):
    """Write one range's part of the inner product of one slice."""
    ranges = partial.shape[1]
    i, begin = item // ranges, item % ranges * _RANGE
    size, step, lanes = a.shape[1], row_width(a, (0,) * 4), row_width(a, (0,))
    end, at = min(begin + _RANGE, size), i * size
    total = zero_row(a, (0,) * 4)
    whole = begin + (end - begin) // step * step
    for c in range(at + begin, at + whole, step):
        total = fma(load_row(a, c, (0,) * 4), load_row(b, c, (0,) * 4), total)
    rest = fold(total)
    for c in range(whole, end, lanes):
        rest = add(rest, mul(load_first(a, at + c, end - c), load_first(b, at + c, end - c)))
    partial[i, item % ranges] = sum1(rest)


@njit(inline="always", **_SETTINGS)
def _sum(out, partial):
    """Add the parts of every slice in order."""
    for b in range(partial.shape[0]):
        out[b] = 0.0
        for k in range(partial.shape[1]):
            out[b] += partial[b, k]


@njit(**_SETTINGS)
def _move_serial(out, x, steps, direction):
    ranges = -(-x.shape[1] // _RANGE)
    for item in range(x.shape[0] * ranges):
        _move(out, x, steps, direction, item, ranges)


@njit(parallel=True, **_SETTINGS)
def _move_parallel(out, x, steps, direction):
    ranges = -(-x.shape[1] // _RANGE)
    for item in prange(x.shape[0] * ranges):
        _move(out, x, steps, direction, item, ranges)


@njit(**_SETTINGS)
def _dot_serial(out, partial, a, b):
    for item in range(partial.size):
        _dot(partial, a, b, item)
    _sum(out, partial)


@njit(parallel=True, **_SETTINGS)
def _dot_parallel(out, partial, a, b):
    for item in prange(partial.size):
        _dot(partial, a, b, item)
    _sum(out, partial)


def slices_move(out, x, steps, direction):
    """Overwrite ``out`` with x_b + steps_b direction_b; it may be ``x``. All (B, D), ``steps`` (B,) float64.

    2 flops and 3 numbers moved an element.
    """
    (_move_serial if x.size < _SERIAL else _move_parallel)(out, x, steps, direction)


def slices_dot(out, a, b):
    """Overwrite ``out`` (B,) float64 with the inner products of the slices of ``a`` and ``b``, both (B, D)."""
    partial = np.empty((a.shape[0], -(-a.shape[1] // _RANGE)))
    (_dot_serial if a.size < _SERIAL else _dot_parallel)(out, partial, a, b)
