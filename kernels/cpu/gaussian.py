"""Dense measurements: residuals of A x and their adjoint with A read ONCE.

With r_i = a_i . x - y_i the kernels return loss = sum_i w_i rho(r_i) and g = sum_i w_i psi(r_i) a_i. Two BLAS passes
(A x, then A^T r) read A twice; here four rows are worked on at once, r first, then g, while they are in cache.

Layout. ``a`` (m, d) holds one measurement a row; ``x`` and ``g`` are (B, d), B right-hand sides that share the read;
``y`` and ``w`` are (1 or B, m). All are C-contiguous of one dtype, float32 or float64; no padding is needed. Offsets
are 64 bits wide. A number of A costs 4 flops a right-hand side and is loaded from memory once.

The right-hand sides go through the four rows in blocks of ``_RHS``, whose 4 x ``_RHS`` sums stay in registers; what
is left goes one by one. Sums are over fixed ranges of rows, added in order: the bits do not depend on the threads.
"""

import numpy as np
from numba import njit, prange

from fastdmf.kernels.cpu.vectors import (
    VECTOR_BYTES,
    first,
    fma,
    load,
    load4_strided_first,
    load_first,
    load_strided,
    load_strided_first,
    loss_numbers,
    mul,
    rho_psi,
    row_width,
    splat4_loss,
    splat_lane,
    store_strided,
    store_strided_first,
    sub,
    sum1,
    sum4,
    widen,
    zero_row,
)

__all__ = ["gaussian_forward", "gaussian_forward_serial", "gaussian_loss_pull", "gaussian_loss_pull_serial"]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"vectors": "fda00a159f57"}

_RHS = 4 if VECTOR_BYTES == 64 else 2  # 16 sums fit where there are 32 registers, 8 where there are 16
_ALL = (0,) * _RHS
_ONE = (0,)
_PIECES = 16  # ranges of work whose sums do not depend on the cut

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


@njit(**_SETTINGS)
def _rows(a, i, end):
    """Return the offsets of four rows of A; the last one stands in for those at and behind ``end``."""
    d = np.int64(a.shape[1])
    return i * d, min(i + 1, end - 1) * d, min(i + 2, end - 1) * d, min(i + 3, end - 1) * d


@njit(**_SETTINGS)
def _predict(like, a, x, b, i, end):
    """Return a_i . x_b of four rows, one four-lane vector for each right-hand side from b on."""
    d = np.int64(a.shape[1])
    o0, o1, o2, o3 = _rows(a, i, end)
    lanes = row_width(a, _ONE)
    whole = d // lanes * lanes
    s0, s1, s2, s3 = zero_row(x, like), zero_row(x, like), zero_row(x, like), zero_row(x, like)
    for c in range(0, whole, lanes):
        xc = load_strided(x, b * d + c, d, like)
        s0 = fma(load(a, o0 + c), xc, s0)
        s1 = fma(load(a, o1 + c), xc, s1)
        s2 = fma(load(a, o2 + c), xc, s2)
        s3 = fma(load(a, o3 + c), xc, s3)
    if whole < d:
        left = d - whole
        xc = load_strided_first(x, b * d + whole, d, like, left)
        s0 = fma(load_first(a, o0 + whole, left), xc, s0)
        s1 = fma(load_first(a, o1 + whole, left), xc, s1)
        s2 = fma(load_first(a, o2 + whole, left), xc, s2)
        s3 = fma(load_first(a, o3 + whole, left), xc, s3)
    return sum4(s0, s1, s2, s3)


@njit(**_SETTINGS)
def _pull(like, g, t, a, b, i, end):
    """Add sum_i t_i a_i over four rows to g, for each right-hand side from b on."""
    d = np.int64(a.shape[1])
    o0, o1, o2, o3 = _rows(a, i, end)
    lanes = row_width(a, _ONE)
    whole = d // lanes * lanes
    t0, t1, t2, t3 = splat_lane(t, 0), splat_lane(t, 1), splat_lane(t, 2), splat_lane(t, 3)
    for c in range(0, whole, lanes):
        gc = load_strided(g, b * d + c, d, like)
        gc = fma(load(a, o0 + c), t0, gc)
        gc = fma(load(a, o1 + c), t1, gc)
        gc = fma(load(a, o2 + c), t2, gc)
        gc = fma(load(a, o3 + c), t3, gc)
        store_strided(g, b * d + c, d, gc)
    if whole < d:
        left = d - whole
        gc = load_strided_first(g, b * d + whole, d, like, left)
        gc = fma(load_first(a, o0 + whole, left), t0, gc)
        gc = fma(load_first(a, o1 + whole, left), t1, gc)
        gc = fma(load_first(a, o2 + whole, left), t2, gc)
        gc = fma(load_first(a, o3 + whole, left), t3, gc)
        store_strided_first(g, b * d + whole, d, gc, left)


@njit(**_SETTINGS)
def _group(like, g, a, x, y, w, loss, b, i, end, weighted):
    """Add the pull of rows i..i + 3 (before ``end``) to g and return the loss of each right-hand side from b on."""
    m = np.int64(a.shape[0])
    left = end - i
    stride = m if y.shape[0] > 1 else 0
    r = sub(_predict(like, a, x, b, i, end), load4_strided_first(y, b * stride + i, stride, like, left))
    rho, t = rho_psi(r, splat4_loss(y, loss))
    if weighted:
        stride = m if w.shape[0] > 1 else 0
        weight = load4_strided_first(w, b * stride + i, stride, like, left)
        rho, t = mul(weight, rho), mul(weight, t)
    _pull(like, g, first(t, left), a, b, i, end)
    return sum1(widen(first(rho, left)))


@njit(**_SETTINGS)
def _sweep(g, losses, a, x, y, w, loss, begin, end, weighted):
    """Overwrite ``g`` and ``losses`` with the pull and the loss of the rows begin..end."""
    runs = x.shape[0]
    g[:] = 0
    losses[:] = 0.0
    for i in range(begin, end, 4):
        b = 0
        while b + _RHS <= runs:
            parts = _group(_ALL, g, a, x, y, w, loss, b, i, end, weighted)
            for k in range(_RHS):
                losses[b + k] += parts[k]
            b += _RHS
        while b < runs:
            losses[b] += _group(_ONE, g, a, x, y, w, loss, b, i, end, weighted)[0]
            b += 1


@njit(parallel=True, **_SETTINGS)
def _loss_pull(g, losses, partial_losses, a, x, y, w, loss, partial, weighted):
    ranges, runs, d = partial.shape
    groups = (a.shape[0] + 3) // 4
    for k in prange(ranges):
        begin, end = 4 * (groups * k // ranges), min(4 * (groups * (k + 1) // ranges), a.shape[0])
        _sweep(partial[k], partial_losses[k], a, x, y, w, loss, begin, end, weighted)
    for piece in prange(_PIECES):
        for b in range(runs):
            for c in range(d * piece // _PIECES, d * (piece + 1) // _PIECES):
                total = partial[0, b, c]
                for k in range(1, ranges):
                    total += partial[k, b, c]
                g[b, c] = total
    losses[:] = 0.0
    for k in range(ranges):
        for b in range(runs):
            losses[b] += partial_losses[k, b]


@njit(**_SETTINGS)
def _loss_pull_serial(g, losses, a, x, y, w, loss, weighted):
    _sweep(g, losses, a, x, y, w, loss, 0, a.shape[0], weighted)


@njit(**_SETTINGS)
def _forward_range(out, a, x, begin, end):
    m = np.int64(a.shape[0])
    runs = x.shape[0]
    for i in range(begin, end, 4):
        b = 0
        while b + _RHS <= runs:
            store_strided_first(out, b * m + i, m, _predict(_ALL, a, x, b, i, end), end - i)
            b += _RHS
        while b < runs:
            store_strided_first(out, b * m + i, m, _predict(_ONE, a, x, b, i, end), end - i)
            b += 1


@njit(parallel=True, **_SETTINGS)
def _forward(out, a, x):
    groups = (a.shape[0] + 3) // 4
    for k in prange(_PIECES):
        begin, end = 4 * (groups * k // _PIECES), min(4 * (groups * (k + 1) // _PIECES), a.shape[0])
        _forward_range(out, a, x, begin, end)


@njit(**_SETTINGS)
def _forward_serial(out, a, x):
    _forward_range(out, a, x, 0, a.shape[0])


def gaussian_loss_pull(g, losses, a, x, y, w, code, delta, partial):
    """Evaluate losses and pulls with one read of A, in parallel over fixed ranges of rows.

    Overwrites ``g`` (B, d), ``losses`` (B,) float64 and the scratch ``partial`` (R, B, d), one pull for each of the
    R ranges, which are added in order. ``w`` may be None.
    """
    partial_losses = np.empty(partial.shape[:2])
    weighted = w is not None
    weights = w if weighted else y
    _loss_pull(g, losses, partial_losses, a, x, y, weights, loss_numbers(code, delta), partial, weighted)


def gaussian_loss_pull_serial(g, losses, a, x, y, w, code, delta):
    """Evaluate as ``gaussian_loss_pull`` does, on the calling thread and without scratch."""
    weighted = w is not None
    _loss_pull_serial(g, losses, a, x, y, w if weighted else y, loss_numbers(code, delta), weighted)


def gaussian_forward(out, a, x):
    """Overwrite ``out`` (B, m) with a_i . x_b, in parallel; A is read once."""
    _forward(out, a, x)


def gaussian_forward_serial(out, a, x):
    """Predict as ``gaussian_forward`` does, on the calling thread."""
    _forward_serial(out, a, x)
