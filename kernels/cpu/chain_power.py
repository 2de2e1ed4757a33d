"""Power steps at the point that ``chain_runs`` evaluated last: the leading singular vectors of W = P Q.

P and Q^T lie in its scratch; W is never formed. A batch goes one run after the other: a step is a few passes over what
is in cache.
"""

import numpy as np
from numba import njit

from fastdmf.kernels.cpu.vectors import (
    fma,
    load,
    load_row,
    row_width,
    splat,
    splat_at,
    store,
    store_first,
    sum1,
    zero,
    zero_row,
)

__all__ = ["chain_power"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "0f2ca2dd1947"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


@njit(inline="always", **_SETTINGS)
def _rows_times(out, at, x, x_at, h, rows, t, t_at):
    """Overwrite ``out`` (rows,), from out[at] on, with the inner products of the rows (h,) of a matrix with t."""
    lanes = row_width(x, (0,))
    for i in range(rows):
        total = zero(x)
        for c in range(0, h, lanes):
            total = fma(load(x, x_at + i * h + c), load(t, t_at + c), total)
        store_first(out, at + i, splat(x, sum1(total)), 1)


@njit(inline="always", **_SETTINGS)
def _sum_of_rows(out, at, x, x_at, h, rows, v, v_at):
    """Overwrite ``out`` (h,), from out[at] on, with the sum of v_i times row i (h,) of a matrix."""
    like = (0, 0, 0, 0)
    step, lanes = row_width(x, like), row_width(x, (0,))
    whole = h // step * step
    for c in range(0, whole, step):
        total = zero_row(x, like)
        for i in range(rows):
            total = fma(splat_at(v, v_at + i), load_row(x, x_at + i * h + c, like), total)
        store(out, at + c, total)
    for c in range(whole, h, lanes):
        rest = zero(x)
        for i in range(rows):
            rest = fma(splat_at(v, v_at + i), load(x, x_at + i * h + c), rest)
        store(out, at + c, rest)


@njit(**_SETTINGS)
def chain_power(norms, v, flat, ends, sizes, steps, work):
    """Improve ``v`` (B, n2) by power steps on W^T W, in place; a zero product leaves it as it is.

    ``norms`` (B,) float64 is overwritten with ||W v||; ``ends`` and ``sizes`` are those of the plan, ``work`` is the
    scratch of the evaluation. Four products of a thin matrix and a vector a step.
    """
    _, n1, n2, _, padded, pack = sizes
    t, u = pack, pack + padded
    for b in range(flat.shape[0]):
        scratch, buffers = work[b], (flat[b], flat[b], work[b])
        # W v, then W^T of that, and so on: through one side into t, through the other side out of it.
        for half in range(2 * steps + 1):
            side = half % 2
            rows, others = (n2, n1) if side == 0 else (n1, n2)
            x, x_at = (v[b], scratch)[side], u if side == 1 else 0
            _sum_of_rows(scratch, t, buffers[ends[side, 3]], ends[side, 4], padded, rows, x, x_at)
            _rows_times(scratch, u, buffers[ends[1 - side, 3]], ends[1 - side, 4], padded, others, scratch, t)
            total = 0.0
            for i in range(others):
                total += np.float64(scratch[u + i]) * np.float64(scratch[u + i])
            norms[b] = np.sqrt(total)
            if side == 1 and total > 0:
                for i in range(n2):
                    v[b, i] = scratch[u + i] / norms[b]
