"""Power steps at the point that ``chain_runs`` evaluated last: leading singular vectors of W = P Q and of G.

P, Q^T and the residuals lie in its scratch; W and G are never formed. A batch goes one run after the other: a step is a
few passes over what is in cache.
"""

import numpy as np
from numba import njit

from fastdmf.kernels.cpu.chain import places_of_halves
from fastdmf.kernels.cpu.dense import dense_matvec
from fastdmf.kernels.cpu.sampled import sampled_matvec
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

__all__ = ["chain_gradient_power", "chain_power"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"chain": "908c8e055518", "dense": "7c3f1bb44af0", "sampled": "6e0326bf03df", "vectors": "fda00a159f57"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


@njit(**_SETTINGS)
def _rows_times(out, at, x, x_at, h, rows, t, t_at):
    """Overwrite ``out`` (rows,), from out[at] on, with the inner products of the rows (h,) of a matrix with t."""
    lanes = row_width(x, (0,))
    for i in range(rows):
        total = zero(x)
        for c in range(0, h, lanes):
            total = fma(load(x, x_at + i * h + c), load(t, t_at + c), total)
        store_first(out, at + i, splat(x, sum1(total)), 1)


@njit(**_SETTINGS)
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
def _power(v, flat, offsets, dims, cut, places, steps, work):
    """Do one run's power steps; return its norm."""
    depth = dims.shape[0] - 1
    n1, n2, h, pack = dims[depth], dims[0], dims[cut], places[depth + 5]
    p, p_at, q, q_at = places_of_halves(flat, offsets, dims, cut, places, work)
    none, lanes = np.int64(0), row_width(work, (0,))
    padded = (h + lanes - 1) // lanes * lanes
    t, u = pack, pack + padded
    for step in range(steps + 1):
        _sum_of_rows(work, t, q, q_at, padded, n2, v, none)
        _rows_times(work, u, p, p_at, padded, n1, work, t)
        if step == steps:
            break
        _sum_of_rows(work, t, p, p_at, padded, n1, work, u)
        _rows_times(work, u, q, q_at, padded, n2, work, t)
        total = 0.0
        for j in range(n2):
            total += np.float64(work[u + j]) * np.float64(work[u + j])
        if total > 0:
            for j in range(n2):
                v[j] = work[u + j] / np.sqrt(total)
    total = 0.0
    for i in range(n1):
        total += np.float64(work[u + i]) * np.float64(work[u + i])
    return np.sqrt(total)


@njit(**_SETTINGS)
def chain_power(norms, v, flat, offsets, dims, cut, places, steps, work):
    """Improve ``v`` (B, n2) by power steps on W^T W, in place; a zero product leaves it as it is.

    ``norms`` (B,) float64 is overwritten with ||W v||; the other arguments are those of the evaluation. Four products
    of a thin matrix and a vector a step.
    """
    for b in range(flat.shape[0]):
        norms[b] = _power(v[b], flat[b], offsets, dims, cut, places, steps, work[b])


@njit(**_SETTINGS)
def _unit(out, x, at):
    """Write x / ||x||, which begins at x[at], unless it is zero; return the norm."""
    total = 0.0
    for i in range(out.shape[0]):
        total += np.float64(x[at + i]) * np.float64(x[at + i])
    if total > 0:
        for i in range(out.shape[0]):
            out[i] = x[at + i] / np.sqrt(total)
    return np.sqrt(total)


@njit(**_SETTINGS)
def chain_gradient_power(norms, u, v, factors, dims, places, indptr, indices, colptr, rows, dense, steps, work):
    """Improve ``u`` (B, n1) and ``v`` (B, n2) towards the leading singular pair of G, in place.

    G is the gradient of sum w rho / 2. A step is u, v = unit(G v), unit(G^T u); ``norms`` (B,) float64 is overwritten
    with the last ||G v||. The other arguments are those of the evaluation.
    """
    depth = dims.shape[0] - 1
    n1, n2 = dims[depth], dims[0]
    r_at, c_at, at = places[depth + 3], places[depth + 4], places[depth + 5]
    one = np.int64(1)
    for b in range(u.shape[0]):
        scratch, factor = work[b], 1 / np.float64(factors[b])
        for _ in range(steps):
            if dense:
                dense_matvec(scratch, at, scratch, r_at, n2, one, v[b], n1, n2, factor)
                dense_matvec(scratch, at + n1, scratch, r_at, one, n2, u[b], n2, n1, factor)
            else:
                sampled_matvec(scratch, at, scratch, r_at, v[b], n1, indptr, indices, factor)
                sampled_matvec(scratch, at + n1, scratch, c_at, u[b], n2, colptr, rows, factor)
            norms[b] = _unit(u[b], scratch, at)
            _unit(v[b], scratch, at + n1)
