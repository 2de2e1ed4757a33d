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
    splat_loss,
    store,
    store_first,
    sub,
    sum1,
    widen,
    zero_sum,
)

__all__ = ["dense_residual", "dense_residual_serial"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "267ec34b5971"}

_DENSE_CHUNK = 8192  # cells of a dense mask whose losses are one partial sum

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


@njit(**_SETTINGS)
def _dense_chunk(g, y, w, loss, begin, end, weighted):
    """Replace g by w psi(g - y) on the flat cells begin..end and return their loss."""
    lanes = row_width(g, (0,))
    shape = splat_loss(g, loss)
    total = zero_sum()
    for k in range(begin, end, lanes):
        left = end - k
        if left >= lanes:
            rho, psi = rho_psi(sub(load(g, k), load(y, k)), shape)
        else:
            rho, psi = rho_psi(sub(load_first(g, k, left), load_first(y, k, left)), shape)
        if weighted:
            weight = load(w, k) if left >= lanes else load_first(w, k, left)
            rho, psi = mul(weight, rho), mul(weight, psi)
        if left >= lanes:
            store(g, k, psi)
        else:
            rho = first(rho, left)
            store_first(g, k, psi, left)
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
        partial[b, k] = _dense_chunk(g[b], yb, wb, loss, k * _DENSE_CHUNK, end, weighted)
    for b in range(runs):
        losses[b] = 0.0
        for k in range(chunks):
            losses[b] += partial[b, k]


@njit(**_SETTINGS)
def _dense_serial(g, losses, y, w, loss, weighted):
    cells = g.shape[1] * g.shape[2]
    for b in range(g.shape[0]):
        losses[b] = _dense_chunk(g[b], y[b % y.shape[0]], w[b % w.shape[0]], loss, 0, cells, weighted)


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
