"""Small chains: loss and gradient of a whole evaluation in one compiled call.

With W = W_N ... W_1, cut between W_{cut+1} and W_cut into P Q, the thin products on both sides (``gemm``), the
residuals and their products with Q^T and P (gathers over the entries, ``sampled``, or full products around ``dense``)
and the way back through both sides are one call. For matrices of a few hundred rows the calls would cost more than the
arithmetic. Factors lie in one flat buffer a run, W_1 stored transposed; a batch of runs shares the mask.
"""

from itertools import pairwise

import numpy as np
from numba import njit, prange

from fastdmf.kernels.cpu.dense import dense_cells
from fastdmf.kernels.cpu.entry_index import PAD
from fastdmf.kernels.cpu.gemm import gemm, gemm_work
from fastdmf.kernels.cpu.sampled import sampled_gather, sampled_matvec, sampled_reorder, sampled_residuals
from fastdmf.kernels.cpu.vectors import (
    VECTOR_BYTES,
    fma,
    load,
    load_first,
    load_row,
    loss_numbers,
    row_width,
    splat,
    splat_at,
    store,
    store_first,
    sum1,
    zero,
    zero_row,
)

__all__ = [
    "chain_halves",
    "chain_loss",
    "chain_padded",
    "chain_places",
    "chain_power",
    "chain_route",
    "chain_runs",
    "chain_runs_parallel",
]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"dense": "7392af601ab0", "gemm": "b1cbab42c746", "sampled": "2540be60a739", "vectors": "fda00a159f57"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


def chain_loss(code, delta):
    """Return an elementwise loss as ``chain_runs`` takes it, four numbers."""
    return np.array(loss_numbers(code, delta))


def chain_padded(h, dtype):
    """Return h rounded up to whole vectors: the numbers between rows of P and of Q^T in the scratch."""
    lanes = VECTOR_BYTES // np.dtype(dtype).itemsize
    return -(-h // lanes) * lanes


def chain_places(dims, cut, residuals, dtype):
    """Return where the parts of one run's scratch begin, and its length.

    Parameters
    ----------
    dims : sequence of int
        d_0, ..., d_N with N >= 2.
    cut : int
        1 <= cut <= N - 1.
    residuals : int
        Number of observed entries; n1 n2 for a dense mask.

    Returns
    -------
    places : (N + 6,) int64
        Number j of 1, ..., cut is (W_j ... W_1)^T and of cut + 1, ..., N is W_N ... W_j, but for the ends, which are
        factors; number cut is Q^T and cut + 1 is P, also where one is a factor whose rows must be padded to whole
        vectors. Behind them G Q^T, G^T P, the residuals by rows, the residuals by columns, and what ``gemm`` packs.
    length : int
    """
    dims = [int(d) for d in dims]
    depth, n1, n2 = len(dims) - 1, dims[-1], dims[0]
    h = chain_padded(dims[cut], dtype)

    def size(j):
        if j in (cut, cut + 1):
            return h * (n2 if j == cut else n1)
        return (n2 * dims[j] if j < cut else n1 * dims[j - 1]) if 1 < j < depth else 0

    sizes = [size(j) for j in range(depth + 1)]
    sizes += [n1 * dims[cut], n2 * dims[cut], residuals + PAD, residuals + PAD]
    sizes.append(max(gemm_work(n, k, dtype) for n in dims for k in dims))
    # Each begins on a cache line, so that no vector of P and Q^T straddles two.
    places = np.append(0, np.cumsum([-(-size // PAD) * PAD for size in sizes]))
    return places[:-1].astype(np.int64), int(places[-1])


def chain_halves(flat, offsets, dims, cut, places, work):
    """Return P (B, n1, h) and Q^T (B, n2, h) of the last evaluation, as views: of factors that have whole vectors."""
    depth, h = len(dims) - 1, dims[cut]
    padded = chain_padded(h, flat.dtype)
    halves = []
    for n, number, is_factor, factor in ((dims[-1], cut + 1, cut == depth - 1, depth), (dims[0], cut, cut == 1, 1)):
        whole = is_factor and padded == h
        start = offsets[factor - 1] if whole else places[number]
        half = (flat if whole else work)[:, start : start + n * padded].reshape(len(flat), n, padded)
        halves.append(half[:, :, :h])
    return halves


# flops a ns of ``gemm`` and ns of a cell by the size of a number; ns of an entry (its residual and both gathers), and
# more for each byte of its row while the gathered tile stays in L1, and beyond; from bench/chain.py.
_FLOPS = {4: 70.0, 8: 41.0}
_CELL_NS = {4: 0.6, 8: 0.9}
_ENTRY_NS, _NEAR_NS, _FAR_NS = 4.0, 0.027, 0.05
_TILE_BYTES, _NEAR_BYTES = 256, 50_000
_SERIAL_NS = 50_000  # work of all runs under which a parallel region costs more than it saves


def chain_route(dims, cut, nnz, batch, dtype):
    """Choose by a cost model: whether to go through full matrices, and whether runs go in parallel."""
    itemsize = np.dtype(dtype).itemsize
    n1, n2, h = dims[-1], dims[0], dims[cut]
    near = max(n1, n2) * min(h * itemsize, _TILE_BYTES) <= _NEAR_BYTES
    sparse = nnz * (_ENTRY_NS + (_NEAR_NS if near else _FAR_NS) * h * itemsize)
    dense = n1 * n2 * (6 * h / _FLOPS[itemsize] + _CELL_NS[itemsize])
    products = n2 * sum(a * b for a, b in pairwise(dims[1 : cut + 1]))
    products += n1 * sum(a * b for a, b in pairwise(dims[cut:-1]))
    work = min(sparse, dense) + 6 * products / _FLOPS[itemsize]
    return dense < sparse, batch > 1 and batch * work > _SERIAL_NS


@njit(**_SETTINGS)
def _pad(out, at, width, x, x_at, columns, rows):
    """Copy a matrix into rows of ``width`` numbers, whole vectors, with zeros behind its columns."""
    for i in range(rows):
        for c in range(0, width, row_width(x, (0,))):
            store(out, at + i * width + c, load_first(x, x_at + i * columns + c, columns - c))


@njit(**_SETTINGS)
def _matvec(out, at, g, g_at, row, column, v, m, k, factor):
    """Overwrite ``out`` (m,), which begins at out[at], with ``factor`` times a matrix of m rows times v (k,)."""
    for i in range(m):
        total = 0.0
        for t in range(k):
            total += g[g_at + i * row + t * column] * v[t]
        out[at + i] = factor * total


@njit(**_SETTINGS)
def _halves(flat, offsets, dims, cut, places, work):
    """Return (array, place) of P and of Q^T: factors that have whole vectors serve where they lie."""
    depth, h = dims.shape[0] - 1, dims[cut]
    whole = h % row_width(work, (0,)) == 0
    p, p_at, q, q_at = work, places[cut + 1], work, places[cut]
    if whole and cut == depth - 1:
        p, p_at = flat, offsets[depth - 1]
    if whole and cut == 1:
        q, q_at = flat, offsets[0]
    return p, p_at, q, q_at


@njit(**_SETTINGS)
def _run(
    grad,
    flat,
    offsets,
    dims,
    cut,
    places,
    indptr,
    indices,
    colptr,
    rows,
    order,
    y,
    w,
    loss,
    weighted,
    dense,
    factor,
    u,
    v,
    probing,
    work,
):
    """Evaluate one run: write its gradient and return its loss."""
    depth = dims.shape[0] - 1
    n1, n2, h = dims[depth], dims[0], dims[cut]
    first, last = offsets[0], offsets[depth - 1]
    gp_at, gq_at, r_at, c_at, pack = (
        places[depth + 1],
        places[depth + 2],
        places[depth + 3],
        places[depth + 4],
        places[depth + 5],
    )
    lanes = row_width(work, (0,))
    padded = (h + lanes - 1) // lanes * lanes
    # Numba would compile every callee once more for each pattern of literal arguments.
    none, one = np.int64(0), np.int64(1)
    p, p_at, q, q_at = _halves(flat, offsets, dims, cut, places, work)
    # Q^T: R_j = R_{j-1} W_j^T from R_1 = W_1^T. P: L_j = L_{j+1} W_j from L_N = W_N.
    if cut == 1 and padded > h:
        _pad(work, q_at, padded, flat, first, h, n2)
    x, x_at = flat, first
    for j in range(2, cut + 1):
        d, e, f = dims[j], dims[j - 1], offsets[j - 1]
        ld = padded if j == cut else d
        gemm(work, places[j], ld, x, x_at, e, one, flat, f, one, e, n2, d, e, work, pack)
        x, x_at = work, places[j]
    if cut == depth - 1 and padded > h:
        _pad(work, p_at, padded, flat, last, h, n1)
    x, x_at = flat, last
    for j in range(depth - 1, cut, -1):
        d, e, f = dims[j], dims[j - 1], offsets[j - 1]
        ld = padded if j == cut + 1 else e
        gemm(work, places[j], ld, x, x_at, d, one, flat, f, e, one, n1, e, d, work, pack)
        x, x_at = work, places[j]
    # G Q^T and G^T P; they are gradients themselves where no factor lies behind.
    gp, gq = work, work
    if cut == depth - 1:
        gp, gp_at = grad, last
    if cut == 1:
        gq, gq_at = grad, first
    if dense:
        gemm(work, r_at, n2, p, p_at, padded, one, q, q_at, one, padded, n1, n2, h, work, pack)
        total = dense_cells(work, r_at, y, w, loss, none, n1 * n2, weighted, factor)
        gemm(gp, gp_at, h, work, r_at, n2, one, q, q_at, padded, one, n1, h, n2, work, pack)
        gemm(gq, gq_at, h, work, r_at, one, n2, p, p_at, padded, one, n2, h, n1, work, pack)
        if probing:
            _matvec(work, pack, work, r_at, n2, one, v, n1, n2, 1 / factor)
            _matvec(v, none, work, r_at, one, n2, u, n2, n1, 1 / factor)
    else:
        total = sampled_residuals(
            work, r_at, p, p_at, q, q_at, padded, n1, indptr, indices, y, w, loss, weighted, factor
        )
        sampled_gather(gp, gp_at, h, work, r_at, q, q_at, padded, n1, indptr, indices)
        sampled_reorder(work, c_at, work, r_at, order)
        sampled_gather(gq, gq_at, h, work, c_at, p, p_at, padded, n2, colptr, rows)
        if probing:
            sampled_matvec(work, pack, work, r_at, v, n1, indptr, indices, 1 / factor)
            sampled_matvec(v, none, work, c_at, u, n2, colptr, rows, 1 / factor)
    if probing:
        for i in range(n1):
            u[i] = work[pack + i]
    # Back through the left side, W_{cut+1} first: dW_j = L_{j+1}^T g, then g = g W_j^T in the place of L_{j+1}.
    for j in range(cut + 1, depth):
        d, e, f = dims[j], dims[j - 1], offsets[j - 1]
        x, x_at, into, to = work, places[j + 1], work, places[j + 1]
        if j == depth - 1:
            x, x_at, into, to = flat, last, grad, last
        gemm(grad, f, e, x, x_at, one, d, gp, gp_at, e, one, d, e, n1, work, pack)
        gemm(into, to, d, gp, gp_at, e, one, flat, f, one, e, n1, d, e, work, pack)
        gp, gp_at = into, to
    # And through the right side, W_cut first: dW_j = g^T R_{j-1}, then g = g W_j in the place of R_{j-1}.
    for j in range(cut, 1, -1):
        d, e, f = dims[j], dims[j - 1], offsets[j - 1]
        x, x_at, into, to = work, places[j - 1], work, places[j - 1]
        if j == 2:
            x, x_at, into, to = flat, first, grad, first
        gemm(grad, f, e, gq, gq_at, one, d, x, x_at, e, one, d, e, n2, work, pack)
        gemm(into, to, e, gq, gq_at, d, one, flat, f, e, one, n2, e, d, work, pack)
        gq, gq_at = into, to
    return total


@njit(**_SETTINGS)
def chain_runs(
    grad,
    losses,
    flat,
    factors,
    offsets,
    dims,
    cut,
    places,
    indptr,
    indices,
    colptr,
    rows,
    order,
    y,
    w,
    loss,
    weighted,
    dense,
    u,
    v,
    probing,
    work,
):
    """Evaluate loss and gradient of small chains, one run after the other.

    Parameters
    ----------
    grad, flat : (B, D)
        Factor j has dims[j] dims[j - 1] numbers from offsets[j - 1]; W_1 is stored transposed (dims[0], dims[1]).
        ``grad`` is overwritten where factors lie and nowhere else.
    losses : (B,) float64
        Overwritten with sum w rho.
    factors : (B,)
        The gradient is that of factor_b sum w rho / 2.
    offsets, dims : (N,) and (N + 1,) int64
        N >= 2.
    cut, places : int and int64 array
        As for, and from ``chain_places``.
    indptr, indices, colptr, rows, order
        The entries by rows (``entry_sort``) and by columns (``entry_blocks`` with one block). Not read when ``dense``.
    y, w : (1 or B, nnz + PAD), or (1 or B, n1 n2) when ``dense``
        Data and weights; w = 0 and a finite y at the holes of a dense mask. ``w`` is not read unless ``weighted``.
    loss : (4,) float64
        From ``chain_loss``.
    u, v : (B, n1) and (B, n2)
        If ``probing``, replaced by G v and G^T u, where G is the gradient of sum w rho / 2; else not read.
    work : (B, length from ``chain_places``)
        Scratch, overwritten; P and Q^T stay where ``places`` says.
    """
    for b in range(flat.shape[0]):
        losses[b] = _run(
            grad[b],
            flat[b],
            offsets,
            dims,
            cut,
            places,
            indptr,
            indices,
            colptr,
            rows,
            order,
            y[b % y.shape[0]],
            w[b % w.shape[0]],
            loss,
            weighted,
            dense,
            factors[b],
            u[b],
            v[b],
            probing,
            work[b],
        )


@njit(parallel=True, **_SETTINGS)
def chain_runs_parallel(
    grad,
    losses,
    flat,
    factors,
    offsets,
    dims,
    cut,
    places,
    indptr,
    indices,
    colptr,
    rows,
    order,
    y,
    w,
    loss,
    weighted,
    dense,
    u,
    v,
    probing,
    work,
):
    """Evaluate as ``chain_runs`` does, runs in parallel."""
    for b in prange(flat.shape[0]):
        losses[b] = _run(
            grad[b],
            flat[b],
            offsets,
            dims,
            cut,
            places,
            indptr,
            indices,
            colptr,
            rows,
            order,
            y[b % y.shape[0]],
            w[b % w.shape[0]],
            loss,
            weighted,
            dense,
            factors[b],
            u[b],
            v[b],
            probing,
            work[b],
        )


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
    p, p_at, q, q_at = _halves(flat, offsets, dims, cut, places, work)
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


@njit(parallel=True, **_SETTINGS)
def chain_power(norms, v, flat, offsets, dims, cut, places, steps, work):
    """Improve ``v`` (B, n2) by power steps on W^T W, in place, at the point that was evaluated last.

    ``norms`` (B,) float64 is overwritten with ||W v||; the other arguments are those of the evaluation, whose P and
    Q^T are read in ``work``. Four products of a thin matrix and a vector a step, a zero one leaves v as it is.
    """
    if flat.shape[0] == 1:
        norms[0] = _power(v[0], flat[0], offsets, dims, cut, places, steps, work[0])
    else:
        for b in prange(flat.shape[0]):
            norms[b] = _power(v[b], flat[b], offsets, dims, cut, places, steps, work[b])
