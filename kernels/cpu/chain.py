"""Small chains: loss and gradient of a whole evaluation in one compiled call, BLAS inside.

With W = W_N ... W_1, cut between W_{cut+1} and W_cut into P Q, the thin products on both sides, the pass over the
observed entries (``entry``) and the way back through both sides are one call. For matrices of a few hundred rows the
calls would cost more than the arithmetic. Factors lie in one flat buffer a run, W_1 stored transposed.
"""

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  np.dot below calls SciPy's BLAS; limits on its threads miss it until loaded
from numba import njit, prange

from fastdmf.kernels.cpu.entry import sweep, token
from fastdmf.kernels.cpu.entry_index import row_multiple
from fastdmf.kernels.cpu.vectors import load, load_first, loss_numbers, row_width, store, store_first

__all__ = ["chain_entry", "chain_entry_work"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"entry": "56fe193ee51e", "vectors": "267ec34b5971"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


def chain_entry_work(dims, cut, dtype):
    """Return the length of the scratch that one run of ``chain_entry`` needs."""
    n1, n2 = dims[-1], dims[0]
    multiple = row_multiple(dtype)
    padded = -(-(dims[cut] + 2) // multiple) * multiple
    products = n2 * sum(dims[2 : cut + 1]) + n1 * sum(dims[cut:-2])
    return -(-2 * (padded * (n1 + n2) + products) // multiple) * multiple


@njit(**_SETTINGS)
def _matrix(buffer, place, rows, columns):
    return buffer[place : place + rows * columns].reshape(rows, columns)


@njit(**_SETTINGS)
def _pad(out, x):
    """Copy x into the first columns of ``out``, whose rows are whole vectors, and clear the others."""
    columns, width = np.int64(x.shape[1]), np.int64(out.shape[1])
    for i in range(x.shape[0]):
        for c in range(0, width, row_width(x, (0,))):
            store(out, i * width + c, load_first(x, i * columns + c, columns - c))


@njit(**_SETTINGS)
def _unpad(out, x):
    """Copy the first columns of x."""
    columns, width = np.int64(out.shape[1]), np.int64(x.shape[1])
    for i in range(out.shape[0]):
        for c in range(0, columns, row_width(x, (0,))):
            store_first(out, i * columns + c, load(x, i * width + c), columns - c)


@njit(**_SETTINGS)
def _chain(
    like, grad, flat, offsets, dims, cut, padded, indptr, indices, y, w, loss, weighted, u, v, gv, gtu, probing, work
):
    """Evaluate one run: write its gradient and return its loss."""
    depth = dims.shape[0] - 1
    n1, n2, h = dims[depth], dims[0], dims[cut]
    p = _matrix(work, 0, n1, padded)
    qt = _matrix(work, n1 * padded, n2, padded)
    gp = _matrix(work, (n1 + n2) * padded, n1, padded)
    gqt = _matrix(work, (2 * n1 + n2) * padded, n2, padded)
    products = 2 * (n1 + n2) * padded
    # Places of the products in the scratch: right ones 2..cut, then left ones N-2..cut; their pulls lie behind them.
    place = products
    right = _matrix(flat, offsets[0], n2, dims[1])
    for j in range(2, cut + 1):
        wj = _matrix(flat, offsets[j - 1], dims[j], dims[j - 1])
        step = _matrix(work, place, n2, dims[j])
        np.dot(right, wj.T, step)
        right = step
        place += n2 * dims[j]
    left = _matrix(flat, offsets[depth - 1], n1, dims[depth - 1])
    for j in range(depth - 1, cut, -1):
        wj = _matrix(flat, offsets[j - 1], dims[j], dims[j - 1])
        step = _matrix(work, place, n1, dims[j - 1])
        np.dot(left, wj, step)
        left = step
        place += n1 * dims[j - 1]
    mirror = place - products
    _pad(p, left)
    _pad(qt, right)
    if probing:
        for i in range(n1):
            p[i, h + 1] = u[i]
        for i in range(n2):
            qt[i, h] = v[i]
    gqt[:] = 0
    total = sweep(like, gp, gqt, p, qt, indptr, indices, y, w, loss, 0, n1, weighted, True, False, False)
    if probing:
        for i in range(n1):
            gv[i] = gp[i, h]
        for i in range(n2):
            gtu[i] = gqt[i, h + 1]
    # Back through the left side, W_{cut+1} first: dW_j = L_j^T gl_{j-1}, gl_j = gl_{j-1} W_j^T, L_{j-1} = L_j W_j.
    if cut == depth - 1:
        pull = _matrix(grad, offsets[depth - 1], n1, h)
    else:
        place -= n1 * h
        pull = _matrix(work, place + mirror, n1, h)
    _unpad(pull, gp)
    for j in range(cut + 1, depth):
        wj = _matrix(flat, offsets[j - 1], dims[j], dims[j - 1])
        if j == depth - 1:
            left = _matrix(flat, offsets[j], n1, dims[j])
            step = _matrix(grad, offsets[j], n1, dims[j])
        else:
            place -= n1 * dims[j]
            left = _matrix(work, place, n1, dims[j])
            step = _matrix(work, place + mirror, n1, dims[j])
        np.dot(left.T, pull, _matrix(grad, offsets[j - 1], dims[j], dims[j - 1]))
        np.dot(pull, wj.T, step)
        pull = step
    # And through the right side, W_cut first: dW_j = gq_j^T Q_{j-1}^T, gq_{j-1} = gq_j W_j; W_1 is stored transposed.
    if cut == 1:
        pull = _matrix(grad, offsets[0], n2, h)
    else:
        place -= n2 * h
        pull = _matrix(work, place + mirror, n2, h)
    _unpad(pull, gqt)
    for j in range(cut, 1, -1):
        wj = _matrix(flat, offsets[j - 1], dims[j], dims[j - 1])
        if j == 2:
            right = _matrix(flat, offsets[0], n2, dims[1])
            step = _matrix(grad, offsets[0], n2, dims[1])
        else:
            place -= n2 * dims[j - 1]
            right = _matrix(work, place, n2, dims[j - 1])
            step = _matrix(work, place + mirror, n2, dims[j - 1])
        np.dot(pull.T, right, _matrix(grad, offsets[j - 1], dims[j], dims[j - 1]))
        np.dot(pull, wj, step)
        pull = step
    return total


@njit(parallel=True, **_SETTINGS)
def _chain_batched(
    like,
    grad,
    losses,
    flat,
    offsets,
    dims,
    cut,
    padded,
    indptr,
    indices,
    y,
    w,
    loss,
    weighted,
    u,
    v,
    gv,
    gtu,
    probing,
    work,
):
    for b in prange(flat.shape[0]):
        losses[b] = _chain(
            like,
            grad[b],
            flat[b],
            offsets,
            dims,
            cut,
            padded,
            indptr,
            indices,
            y[b % y.shape[0]],
            w[b % w.shape[0]],
            loss,
            weighted,
            u[b],
            v[b],
            gv[b],
            gtu[b],
            probing,
            work[b],
        )


def chain_entry(grad, losses, flat, offsets, dims, cut, indptr, indices, y, w, code, delta, probe, probe_out, work):
    """Evaluate loss and gradient of whole small chains in one compiled call, BLAS inside.

    With W = W_N ... W_1, cut between W_{cut+1} and W_cut, all thin products, the entry pass and the way back through
    both sides are one call that costs the dispatch of one product. Several runs go in parallel: limit BLAS to one
    thread around them. The gradient is that of half the loss: what psi = rho'/2 gives.

    Parameters
    ----------
    grad, flat : (B, D)
        Factor j has dims[j] dims[j - 1] numbers from offsets[j - 1]; W_1 is stored transposed (dims[0], dims[1]).
        ``grad`` is overwritten where factors lie and nowhere else.
    losses : (B,) float64
        Overwritten.
    offsets, dims : (N,) and (N + 1,) int64 arrays
        N >= 2.
    cut : int
        1 <= cut <= N - 1.
    indptr, indices, y, w, code, delta
        As for ``entry_one_pass``.
    probe : pair of arrays (u (B, n1), v (B, n2)), or None
        Two more columns, P' = [P, 0, u] and Q'^T = [Q^T, v, 0], leave P Q as it is and carry G v and G^T u through
        the same pass.
    probe_out : pair of arrays (B, n1) and (B, n2), or None
        Overwritten with G v and G^T u.
    work : (B, chain_entry_work(dims, cut, dtype))
        Scratch, overwritten.
    """
    probing = probe is not None
    weighted = w is not None
    multiple = row_multiple(flat.dtype)
    padded = -(-(int(dims[cut]) + 2 * probing) // multiple) * multiple
    like, loss = token(padded, flat.dtype), loss_numbers(code, delta)
    w = w if weighted else y
    u, v = probe if probing else (flat, flat)
    gv, gtu = probe_out if probing else (flat, flat)
    chain, entries = (offsets, dims, cut, padded), (indptr, indices)
    if flat.shape[0] == 1:
        data = (y[0], w[0], loss, weighted, u[0], v[0], gv[0], gtu[0], probing, work[0])
        losses[0] = _chain(like, grad[0], flat[0], *chain, *entries, *data)
    else:
        data = (y, w, loss, weighted, u, v, gv, gtu, probing, work)
        _chain_batched(like, grad, losses, flat, *chain, *entries, *data)
