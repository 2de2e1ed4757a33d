"""Dense masks: the residual of a full product, in place, between the products that BLAS does."""

import numpy as np
from numba import njit, prange

from fastdmf.kernels.cpu.vectors import (
    add,
    first,
    load,
    load_first,
    loss_numbers,
    mul,
    rho_psi,
    row_width,
    splat,
    splat_loss,
    store,
    store_first,
    sub,
    sum1,
    widen,
    zero_sum,
)

__all__ = ["dense_cells", "dense_residual", "dense_residual_serial"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "0f2ca2dd1947"}

_DENSE_CHUNK = 8192  # cells of a dense mask whose losses are one partial sum

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


@njit(inline="always", **_SETTINGS)
def dense_cells(g, at, y, w, loss, begin, end, weighted, factor):
    """Replace g, which begins at g[at], by factor w psi(g - y) on the flat cells begin..end; return sum w rho."""
    lanes = row_width(g, (0,))
    shape, scale = splat_loss(g, loss), splat(g, factor)
    total = zero_sum()
    for k in range(begin, end, lanes):
        left = end - k
        if left >= lanes:
            rho, psi = rho_psi(sub(load(g, at + k), load(y, k)), shape)
        else:
            rho, psi = rho_psi(sub(load_first(g, at + k, left), load_first(y, k, left)), shape)
        if weighted:
            weight = load(w, k) if left >= lanes else load_first(w, k, left)
            rho, psi = mul(weight, rho), mul(weight, psi)
        psi = mul(scale, psi)
        if left >= lanes:
            store(g, at + k, psi)
        else:
            rho = first(rho, left)
            store_first(g, at + k, psi, left)
        total = add(total, widen(rho))
    return sum1(total)


@njit(parallel=True, **_SETTINGS)
def _dense(g, losses, partial, y, w, loss, weighted):
    runs, chunks = partial.shape
    cells = g.shape[1] * g.shape[2]
    for item in prange(runs * chunks):
        b, k = item // chunks, item % chunks
        end = min((k + 1) * _DENSE_CHUNK, cells)
        yb, wb = y[b % y.shape[0]], w[b % w.shape[0]]
        partial[b, k] = dense_cells(g[b], 0, yb, wb, loss, k * _DENSE_CHUNK, end, weighted, 1.0)
    for b in range(runs):
        losses[b] = 0.0
        for k in range(chunks):
            losses[b] += partial[b, k]


@njit(**_SETTINGS)
def _dense_serial(g, losses, y, w, loss, weighted):
    cells = g.shape[1] * g.shape[2]
    for b in range(g.shape[0]):
        losses[b] = dense_cells(g[b], 0, y[b % y.shape[0]], w[b % w.shape[0]], loss, 0, cells, weighted, 1.0)


def dense_residual(g, losses, y, w, code, delta):
    """Turn products into pulls on a dense mask, in parallel: g <- w psi(g - y), losses_b = sum w rho(g - y).

    ``g`` (B, n1, n2) holds P Q^T on entry; ``y`` and ``w`` are (1 or B, n1, n2) with w = 0 and a finite y at the
    holes, or w None. Overwrites ``g`` and ``losses`` (B,) float64. About 8 flops and 4 numbers moved a cell.
    """
    cells = g.shape[1] * g.shape[2]
    partial = np.empty((g.shape[0], -(-cells // _DENSE_CHUNK)))
    weighted = w is not None
    _dense(g, losses, partial, y, w if weighted else y, loss_numbers(code, delta), weighted)


def dense_residual_serial(g, losses, y, w, code, delta):
    """Work as ``dense_residual`` does, on the calling thread."""
    weighted = w is not None
    _dense_serial(g, losses, y, w if weighted else y, loss_numbers(code, delta), weighted)
