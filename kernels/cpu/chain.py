"""Small chains: loss and gradient of a whole evaluation in one compiled call.

With W = W_N ... W_1, cut between W_{cut+1} and W_cut into P Q, the thin products on both sides (``gemm``), the
residuals and their products with Q^T and P (gathers over the entries, ``sampled``, or full products around ``dense``)
and the way back through both sides are one call. For matrices of a few hundred rows the calls would cost more than the
arithmetic. Factors lie in one flat buffer a run, W_1 stored transposed; a batch of runs shares the mask.
"""

from itertools import pairwise

import numpy as np
from numba import njit, prange

from fastdmf.kernels.cpu.dense import dense_cells, dense_matvec
from fastdmf.kernels.cpu.entry_index import PAD
from fastdmf.kernels.cpu.gemm import gemm, gemm_work
from fastdmf.kernels.cpu.sampled import sampled_gather, sampled_matvec, sampled_reorder, sampled_residuals
from fastdmf.kernels.cpu.vectors import VECTOR_BYTES, load_first, loss_numbers, row_width, store

__all__ = [
    "chain_halves",
    "chain_loss",
    "chain_padded",
    "chain_places",
    "chain_route",
    "chain_runs",
    "chain_runs_parallel",
]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"dense": "7c3f1bb44af0", "gemm": "ac2cb20f21e7", "sampled": "6e0326bf03df", "vectors": "fda00a159f57"}

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
def places_of_halves(flat, offsets, dims, cut, places, work):
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
    begin,
    end,
):
    """Evaluate loss and gradient of the small chains begin..end of a batch, one after the other.

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
        Scratch, overwritten; P, Q^T and the residuals stay where ``places`` says.
    begin, end : int
        The runs to evaluate.
    """
    depth = dims.shape[0] - 1
    n1, n2, h = dims[depth], dims[0], dims[cut]
    first, last = offsets[0], offsets[depth - 1]
    r_at, c_at, pack = places[depth + 3], places[depth + 4], places[depth + 5]
    lanes = row_width(work, (0,))
    padded = (h + lanes - 1) // lanes * lanes
    # Numba would compile every callee once more for each pattern of literal arguments.
    none, one = np.int64(0), np.int64(1)
    for b in range(begin, end):
        g0, x0, scratch, factor = grad[b], flat[b], work[b], factors[b]
        yb, wb = y[b % y.shape[0]], w[b % w.shape[0]]
        p, p_at, q, q_at = places_of_halves(x0, offsets, dims, cut, places, scratch)
        # Q^T: R_j = R_{j-1} W_j^T from R_1 = W_1^T. P: L_j = L_{j+1} W_j from L_N = W_N.
        if cut == 1 and padded > h:
            _pad(scratch, q_at, padded, x0, first, h, n2)
        x, x_at = x0, first
        for j in range(2, cut + 1):
            d, e, f = dims[j], dims[j - 1], offsets[j - 1]
            ld = padded if j == cut else d
            gemm(scratch, places[j], ld, x, x_at, e, one, x0, f, one, e, n2, d, e, scratch, pack)
            x, x_at = scratch, places[j]
        if cut == depth - 1 and padded > h:
            _pad(scratch, p_at, padded, x0, last, h, n1)
        x, x_at = x0, last
        for j in range(depth - 1, cut, -1):
            d, e, f = dims[j], dims[j - 1], offsets[j - 1]
            ld = padded if j == cut + 1 else e
            gemm(scratch, places[j], ld, x, x_at, d, one, x0, f, e, one, n1, e, d, scratch, pack)
            x, x_at = scratch, places[j]
        # G Q^T and G^T P; they are gradients themselves where no factor lies behind.
        gp, gp_at, gq, gq_at = scratch, places[depth + 1], scratch, places[depth + 2]
        if cut == depth - 1:
            gp, gp_at = g0, last
        if cut == 1:
            gq, gq_at = g0, first
        if dense:
            gemm(scratch, r_at, n2, p, p_at, padded, one, q, q_at, one, padded, n1, n2, h, scratch, pack)
            total = dense_cells(scratch, r_at, yb, wb, loss, none, n1 * n2, weighted, factor)
            gemm(gp, gp_at, h, scratch, r_at, n2, one, q, q_at, padded, one, n1, h, n2, scratch, pack)
            gemm(gq, gq_at, h, scratch, r_at, one, n2, p, p_at, padded, one, n2, h, n1, scratch, pack)
            if probing:
                dense_matvec(scratch, pack, scratch, r_at, n2, one, v[b], n1, n2, 1 / factor)
                dense_matvec(v[b], none, scratch, r_at, one, n2, u[b], n2, n1, 1 / factor)
        else:
            total = sampled_residuals(
                scratch, r_at, p, p_at, q, q_at, padded, n1, indptr, indices, yb, wb, loss, weighted, factor
            )
            sampled_gather(gp, gp_at, h, scratch, r_at, q, q_at, padded, n1, indptr, indices)
            sampled_reorder(scratch, c_at, scratch, r_at, order)
            sampled_gather(gq, gq_at, h, scratch, c_at, p, p_at, padded, n2, colptr, rows)
            if probing:
                sampled_matvec(scratch, pack, scratch, r_at, v[b], n1, indptr, indices, 1 / factor)
                sampled_matvec(v[b], none, scratch, c_at, u[b], n2, colptr, rows, 1 / factor)
        if probing:
            for i in range(n1):
                u[b, i] = scratch[pack + i]
        # Back through the left side, W_{cut+1} first: dW_j = L_{j+1}^T g, then g = g W_j^T in the place of L_{j+1}.
        for j in range(cut + 1, depth):
            d, e, f = dims[j], dims[j - 1], offsets[j - 1]
            x, x_at, into, to = scratch, places[j + 1], scratch, places[j + 1]
            if j == depth - 1:
                x, x_at, into, to = x0, last, g0, last
            gemm(g0, f, e, x, x_at, one, d, gp, gp_at, e, one, d, e, n1, scratch, pack)
            gemm(into, to, d, gp, gp_at, e, one, x0, f, one, e, n1, d, e, scratch, pack)
            gp, gp_at = into, to
        # And through the right side, W_cut first: dW_j = g^T R_{j-1}, then g = g W_j in the place of R_{j-1}.
        for j in range(cut, 1, -1):
            d, e, f = dims[j], dims[j - 1], offsets[j - 1]
            x, x_at, into, to = scratch, places[j - 1], scratch, places[j - 1]
            if j == 2:
                x, x_at, into, to = x0, first, g0, first
            gemm(g0, f, e, gq, gq_at, one, d, x, x_at, e, one, d, e, n2, scratch, pack)
            gemm(into, to, e, gq, gq_at, d, one, x0, f, e, one, n2, e, d, scratch, pack)
            gq, gq_at = into, to
        losses[b] = total


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
    """Evaluate all runs as ``chain_runs`` does, in parallel."""
    for b in prange(flat.shape[0]):
        chain_runs(
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
            b,
            b + 1,
        )
