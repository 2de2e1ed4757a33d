"""Small chains: loss and gradient of a whole evaluation in one compiled call.

With W = W_N ... W_1, cut between W_{cut+1} and W_cut into P Q, the thin products on both sides (``gemm``), the
residuals and their products with Q^T and P (gathers over the entries, ``sampled``, or full products around ``dense``)
and the way back through both sides are one call. For matrices of a few hundred rows the calls would cost more than the
arithmetic. Factors lie in one flat buffer a run, W_1 stored transposed; a batch of runs shares the mask.

Which products there are is not written in the kernel but in a table, ``chain_plan``: the kernel goes through its rows,
so that it holds one product and every depth and cut share one compiled version. What it calls is inlined by numba and
stands there once: with ten calls of a compiled product it took much longer to compile.
"""

from collections import namedtuple
from itertools import pairwise

import numpy as np
from numba import njit, prange

from fastdmf.kernels.cpu.dense import dense_cells
from fastdmf.kernels.cpu.entry_index import PAD
from fastdmf.kernels.cpu.gemm import gemm, gemm_work
from fastdmf.kernels.cpu.sampled import sampled_gather, sampled_reorder, sampled_residuals
from fastdmf.kernels.cpu.vectors import VECTOR_BYTES, load_first, loss_numbers, row_width, store

__all__ = [
    "ChainPlan",
    "chain_halves",
    "chain_loss",
    "chain_padded",
    "chain_plan",
    "chain_route",
    "chain_runs",
    "chain_runs_parallel",
]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"dense": "db9d2cd9b215", "gemm": "3698070e7b5a", "sampled": "5e1d5e19464e", "vectors": "0f2ca2dd1947"}

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}

FLAT, GRAD, WORK = range(3)  # the buffers of a run: its factors, their gradients, its scratch


def chain_loss(code, delta):
    """Return an elementwise loss as ``chain_runs`` takes it, four numbers."""
    return np.array(loss_numbers(code, delta))


def chain_padded(h, dtype):
    """Return h rounded up to whole vectors: the numbers between rows of P and of Q^T in the scratch."""
    lanes = VECTOR_BYTES // np.dtype(dtype).itemsize
    return -(-h // lanes) * lanes


class ChainPlan(namedtuple("ChainPlan", ["steps", "ends", "sizes", "length"])):
    """What ``chain_runs`` does with the buffers of one run.

    Attributes
    ----------
    steps : (any, 14) int64
        Products C = A B, first those before the residuals, as ``gemm`` takes them: buffer, place and leading dimension
        of C; buffer, place and the two distances of A, and of B; m, n, k. Instead of a product, k = -1 copies the
        rows (n) of A to rows of whole vectors.
    ends : (2, 6) int64
        For G Q^T, then for G^T P: buffer and place of the result, place of the residuals (by rows, by columns), buffer
        and place of Q^T (of P), and the number of rows of the result.
    sizes : tuple of int
        The number of steps before the residuals; n1; n2; h, and h rounded up to whole vectors; the place of a scratch
        for ``gemm``.
    length : int
        Numbers in the scratch.
    """


def chain_plan(dims, cut, offsets, residuals, dense, dtype):
    """Plan the evaluation of a chain.

    Parameters
    ----------
    dims : sequence of int
        d_0, ..., d_N with N >= 2.
    cut : int
        1 <= cut <= N - 1.
    offsets : sequence of int
        Where the N factors begin: W_1 as (d_0, d_1), W_j as (d_j, d_{j-1}).
    residuals : int
        Number of observed entries; n1 n2 for a dense mask.
    dense : bool
        Whether residuals go through full matrices.

    Returns
    -------
    ChainPlan
    """
    d, offsets = [int(n) for n in dims], [int(o) for o in offsets]
    depth, n1, n2, h = len(d) - 1, d[-1], d[0], d[cut]
    padded = chain_padded(h, dtype)
    length, steps = 0, []

    def room(rows, columns):
        """Return a new matrix in the scratch, on a cache line: no vector of P and Q^T straddles two."""
        nonlocal length
        start, length = length, length + -(-rows * columns // PAD) * PAD
        return WORK, start, columns

    def rows(x):
        return (*x, 1)

    def columns(x):
        buffer, start, ld = x
        return buffer, start, 1, ld

    def product(c, a, b, m, n, k):
        steps.append((*c, *a, *b, m, n, k))
        return c

    def padded_half(factor, n):
        """Return P or Q^T where it is a factor: as it lies if its rows are whole vectors, else a copy."""
        return factor if padded == h else product(room(n, padded), rows(factor), rows(factor), n, h, -1)

    # Matrices are (buffer, place, leading dimension). right[j] = (W_j ... W_1)^T, left[j] = W_N ... W_j.
    factor = [None] + [(FLAT, start, d[max(j, 1)]) for j, start in enumerate(offsets)]
    grad = [None] + [(GRAD, *place) for _, *place in factor[1:]]
    right, left = {1: factor[1]}, {depth: factor[depth]}
    for j in range(2, cut + 1):
        c = room(n2, padded if j == cut else d[j])
        right[j] = product(c, rows(right[j - 1]), columns(factor[j]), n2, d[j], d[j - 1])
    for j in range(depth - 1, cut, -1):
        c = room(n1, padded if j == cut + 1 else d[j - 1])
        left[j] = product(c, rows(left[j + 1]), rows(factor[j]), n1, d[j - 1], d[j])
    q = padded_half(factor[1], n2) if cut == 1 else right[cut]
    p = padded_half(factor[depth], n1) if cut == depth - 1 else left[cut + 1]
    # G Q^T and G^T P; they are gradients themselves where no factor lies behind.
    gp = grad[depth] if cut == depth - 1 else room(n1, h)
    gq = grad[1] if cut == 1 else room(n2, h)
    r, by_column = room(1, residuals + PAD), room(1, residuals + PAD)
    if dense:
        r = r[0], r[1], n2
        product(r, rows(p), columns(q), n1, n2, h)
    before = len(steps)
    if dense:
        product(gp, rows(r), rows(q), n1, h, n2)
        product(gq, columns(r), rows(p), n2, h, n1)
    ends = [(*gp[:2], r[1], *q[:2], n1), (*gq[:2], by_column[1], *p[:2], n2)]
    # Back through the left side, W_{cut+1} first: dW_j = L_{j+1}^T g, then g = g W_j^T in the place of L_{j+1}.
    for j in range(cut + 1, depth):
        product(grad[j], columns(left[j + 1]), rows(gp), d[j], d[j - 1], n1)
        into = grad[depth] if j == depth - 1 else left[j + 1]
        gp = product(into, rows(gp), columns(factor[j]), n1, d[j], d[j - 1])
    # And through the right side, W_cut first: dW_j = g^T R_{j-1}, then g = g W_j in the place of R_{j-1}.
    for j in range(cut, 1, -1):
        product(grad[j], columns(gq), rows(right[j - 1]), d[j], d[j - 1], n2)
        into = grad[1] if j == 2 else right[j - 1]
        gq = product(into, rows(gq), rows(factor[j]), n2, d[j - 1], d[j])
    _, pack, _ = room(1, max(gemm_work(n, k, dtype) for n in d for k in d))
    table = np.array(steps, np.int64).reshape(-1, 14)
    return ChainPlan(table, np.array(ends, np.int64), (before, n1, n2, h, padded, pack), length)


def chain_halves(flat, plan, work):
    """Return P (B, n1, h) and Q^T (B, n2, h) of the last evaluation, as views."""
    _, n1, n2, h, padded, _ = plan.sizes
    halves = []
    for n, (buffer, start) in ((n1, plan.ends[1, 3:5]), (n2, plan.ends[0, 3:5])):
        half = (flat if buffer == FLAT else work)[:, start : start + n * padded]
        halves.append(half.reshape(len(flat), n, padded)[:, :, :h])
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
def chain_runs(
    grad,
    losses,
    flat,
    factors,
    steps,
    ends,
    sizes,
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
        Factor j has d_j d_{j-1} numbers where the plan says; W_1 is stored transposed (d_0, d_1). ``grad`` is
        overwritten where factors lie and nowhere else.
    losses : (B,) float64
        Overwritten with sum w rho.
    factors : (B,)
        The gradient is that of factor_b sum w rho / 2.
    steps, ends, sizes
        From ``chain_plan``.
    indptr, indices, colptr, rows, order
        The entries by rows (``entry_sort``) and by columns (``entry_blocks`` with one block). Not read when ``dense``.
    y, w : (1 or B, nnz + PAD), or (1 or B, n1 n2) when ``dense``
        Data and weights; w = 0 and a finite y at the holes of a dense mask. ``w`` is not read unless ``weighted``.
    loss : (4,) float64
        From ``chain_loss``.
    u, v : (B, n1) and (B, n2)
        If ``probing``, replaced by G v and G^T u, where G is the gradient of sum w rho / 2; else not read.
    work : (B, length of the plan)
        Scratch, overwritten; P, Q^T and the residuals stay where ``ends`` says.
    begin, end : int
        The runs to evaluate.
    """
    turn, n1, n2, h, padded, pack = sizes
    r_at, c_at = ends[0, 2], ends[1, 2]
    pointers, places, vectors = (indptr, colptr), (indices, rows), (v, u)
    for b in range(begin, end):
        buffers, scratch, factor = (flat[b], grad[b], work[b]), work[b], factors[b]
        for s in range(steps.shape[0] + 1):
            if s == turn:
                yb, wb = y[b % y.shape[0]], w[b % w.shape[0]]
                if dense:
                    losses[b] = dense_cells(scratch, r_at, yb, wb, loss, 0, n1 * n2, weighted, factor)
                else:
                    losses[b] = sampled_residuals(
                        scratch,
                        r_at,
                        buffers[ends[1, 3]],
                        ends[1, 4],
                        buffers[ends[0, 3]],
                        ends[0, 4],
                        padded,
                        n1,
                        indptr,
                        indices,
                        yb,
                        wb,
                        loss,
                        weighted,
                        factor,
                    )
                    sampled_reorder(scratch, c_at, scratch, r_at, order)
                    for side in range(2):
                        sampled_gather(
                            buffers[ends[side, 0]],
                            ends[side, 1],
                            h,
                            scratch,
                            ends[side, 2],
                            buffers[ends[side, 3]],
                            ends[side, 4],
                            padded,
                            ends[side, 5],
                            pointers[side],
                            places[side],
                        )
                if probing:
                    # Both products before either vector is overwritten.
                    for i in range(n1 + n2):
                        side, i_side = (0, i) if i < n1 else (1, i - n1)
                        x, total = vectors[side][b], 0.0
                        if dense:
                            row, column = (n2, 1) if side == 0 else (1, n2)
                            for j in range(x.shape[0]):
                                total += scratch[r_at + i_side * row + j * column] * x[j]
                        else:
                            for k in range(pointers[side][i_side], pointers[side][i_side + 1]):
                                total += scratch[ends[side, 2] + k] * x[places[side][k]]
                        scratch[pack + i] = total / factor
                    for i in range(n1):
                        u[b, i] = scratch[pack + i]
                    for i in range(n2):
                        v[b, i] = scratch[pack + n1 + i]
            if s == steps.shape[0]:
                break
            if steps[s, 13] < 0:
                at, ld, source, n = steps[s, 1], steps[s, 2], steps[s, 4], steps[s, 12]
                for i in range(steps[s, 11]):
                    for c in range(0, ld, row_width(scratch, (0,))):
                        store(scratch, at + i * ld + c, load_first(buffers[FLAT], source + i * n + c, n - c))
                continue
            gemm(
                buffers[steps[s, 0]],
                steps[s, 1],
                steps[s, 2],
                buffers[steps[s, 3]],
                steps[s, 4],
                steps[s, 5],
                steps[s, 6],
                buffers[steps[s, 7]],
                steps[s, 8],
                steps[s, 9],
                steps[s, 10],
                steps[s, 11],
                steps[s, 12],
                steps[s, 13],
                scratch,
                pack,
            )


@njit(parallel=True, **_SETTINGS)
def chain_runs_parallel(
    grad,
    losses,
    flat,
    factors,
    steps,
    ends,
    sizes,
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
            steps,
            ends,
            sizes,
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
