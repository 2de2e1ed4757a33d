"""Seeded measurements: residuals of A x and their adjoint, the entries of A drawn when they are needed.

With r_i = a_i . x - y_i the kernels return loss = sum_i w_i rho(r_i) and g = sum_i w_i psi(r_i) a_i, as the dense ones
do, without A: entry c of a_i is what ``philox.py`` defines for the row rows[i] and the column c. The same seed is the
same matrix for any choice of rows, batch, precision, vectors or threads.

Layout. ``x`` and ``g`` are (B, d), B right-hand sides that share the entries, float32 or float64; d is
what ``seeded_width`` pads to. Where the matrix ends before d, x must be zero and g means nothing. ``y`` and ``w`` are
(1 or B, m), ``rows`` is (m,) uint32; all are C-contiguous. A ``stream`` is (problem, low half of the seed, high half),
each uint32. The scratch of ``seeded_scratch`` chooses the ensemble by its type.

Structure. Every entry is drawn once an evaluation. Two measurements go through the columns together: the entries of
the two before them, which lie in the scratch, are pulled into g, new ones are drawn over them, and their products with
x are summed. Drawing keeps the arithmetic busy while pull and dot wait for memory. Loops of their own for the three
took 1.16 ns an entry against 1.06 at d = 1e4 and 1.5 against 1.2 at d = 2.5e5, where the scratch is in the shared
cache; one measurement at a time took 1.08 times as long. ``_RHS`` right-hand sides ride that loop, the others go
through the scratch. Sums are over fixed ranges of rows, added in order: the bits do not depend on the threads.

An entry costs 4 flops a right-hand side, a write and two reads of the scratch, and half of two reads and a write of
vectors of length d. Drawing it takes 7.7 instructions on a lane, 4.9 of them for Philox; a sign takes 0.2.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from fastdmf.kernels.cpu.entry_index import aligned_empty
from fastdmf.kernels.cpu.philox import LANES, columns, holds_signs, load_entries, normals, own_frame, store_words, words
from fastdmf.kernels.cpu.vectors import (
    SQUARED,
    first,
    fma,
    load4_strided_first,
    load_strided,
    loss_numbers,
    mul,
    rho_psi,
    row_width,
    splat4_loss,
    splat_lane,
    store,
    store_first,
    store_strided,
    store_strided_first,
    sub,
    sum1,
    sum4,
    widen,
    zero_row,
)

__all__ = [
    "seeded_adjoint",
    "seeded_adjoint_serial",
    "seeded_entries",
    "seeded_forward",
    "seeded_forward_serial",
    "seeded_loss_pull",
    "seeded_loss_pull_serial",
    "seeded_scratch",
    "seeded_squared_norms",
    "seeded_stream",
    "seeded_width",
]

# Heads of sha256 of the kernel files this one compiles: numba's disk cache watches this file only.
BUILT_ON = {"philox": "f29dc6ce233e", "vectors": "0f2ca2dd1947"}

_MULTIPLE = 64  # columns of one step with the widest vectors
_STEP = 4 * LANES  # columns whose samples are drawn at once
_SIGNS = 128 * LANES  # columns whose signs are drawn at once
_WORDS_MULTIPLE = 64  # words of that many with the widest vectors
_RHS = 2  # 4 gained 5 % at B = 8 and took as much longer to compile
_ONE = (0,)

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


def seeded_scratch(ranges, d, ensemble):
    """Return scratch for ``ranges`` ranges of measurements of width d.

    Samples of two rows, (ranges, 1, 2, d) float32, for ``"gaussian"``; for ``"rademacher"`` signs in the bits of
    (ranges, 2, 2, words) uint32: they are drawn many at once, so new ones cannot lie over those still to be pulled.
    """
    if ensemble == "gaussian":
        return aligned_empty((ranges, 1, 2, d), np.float32)
    width = -(-d // (32 * _WORDS_MULTIPLE)) * _WORDS_MULTIPLE
    return aligned_empty((ranges, 2, 2, width), np.uint32)


@njit(**_SETTINGS)
def _row_entries(a):
    """Return the number of entries that a row of the scratch has room for."""
    return np.int64(a.shape[1]) * (32 if holds_signs(a) else 1)


def _draw(a, far, c, row0, row1, stream):
    """Draw the entries of two rows for ``_STEP`` columns, c a multiple of it, to the places c and far + c of a."""
    raise NotImplementedError


def _draw_normals(a, far, c, row0, row1, stream):
    z0, z1 = normals(words(c // 4, row0, stream), words(c // 4, row1, stream))
    store(a, c, z0)
    store(a, far + c, z1)


def _draw_signs(a, far, c, row0, row1, stream):
    if c % _SIGNS == 0:
        store_words(a, c // 32, columns(words(c // 128, row0, stream)))
        store_words(a, (far + c) // 32, columns(words(c // 128, row1, stream)))


@overload(_draw, jit_options={**_SETTINGS, "forceinline": True})
def _choose_draw(a, far, c, row0, row1, stream):
    return _draw_signs if a.dtype == types.uint32 else _draw_normals


@njit(**_SETTINGS)
def _sweep(like, g, old, new, x, t0, t1, b, row0, row1, stream, pulling, drawing, dotting):
    """Go through the columns of two measurements once, for the right-hand sides from b on.

    Add t0 old_0 + t1 old_1 to g; draw the entries of ``row0`` and ``row1`` into ``new``; return their products with x
    as vectors of partial sums. Each of the three is done where its flag says so.
    """
    own_frame()
    d = np.int64(x.shape[1])
    # Asked in this way, LLVM does not make a version of the loop for each set of flags: three times the compilation.
    pull_to, draw_to, dot_to = d if pulling else 0, d if drawing else 0, d if dotting else 0
    far = _row_entries(new)
    lanes = row_width(x, _ONE)
    s0, s1 = zero_row(x, like), zero_row(x, like)
    for c in range(0, d, _STEP):
        if c < pull_to:
            for e in range(c, c + _STEP, lanes):
                gb = load_strided(g, b * d + e, d, like)
                gb = fma(load_entries(x, old, e), t0, gb)
                gb = fma(load_entries(x, old, far + e), t1, gb)
                store_strided(g, b * d + e, d, gb)
        if c < draw_to:
            _draw(new, far, c, row0, row1, stream)
        if c < dot_to:
            for e in range(c, c + _STEP, lanes):
                xb = load_strided(x, b * d + e, d, like)
                s0 = fma(load_entries(x, new, e), xb, s0)
                s1 = fma(load_entries(x, new, far + e), xb, s1)
    return s0, s1


@njit(**_SETTINGS)
def _sums(like, s0, s1, x):
    """Return the products of two measurements, in lanes 0 and 1 of four, for each right-hand side."""
    none = zero_row(x, like)
    return sum4(s0, s1, none, none)


@njit(**_SETTINGS)
def _factors(like, s0, s1, losses, y, w, loss, b, i, end, weighted, given):
    """Return what the entries of the rows i and i + 1 (before ``end``) are pulled with, and add their losses."""
    m = np.int64(y.shape[1])
    left = min(end - i, 2)
    stride = m if y.shape[0] > 1 else 0
    t = load4_strided_first(y, b * stride + i, stride, like, left)
    if not given:
        rho, t = rho_psi(sub(_sums(like, s0, s1, y), t), splat4_loss(y, loss))
        if weighted:
            stride = m if w.shape[0] > 1 else 0
            weight = load4_strided_first(w, b * stride + i, stride, like, left)
            rho, t = mul(weight, rho), mul(weight, t)
        t = first(t, left)
        parts = sum1(widen(first(rho, left)))
        for k in range(len(like)):
            losses[b + k] += parts[k]
    return splat_lane(t, 0), splat_lane(t, 1)


@njit(**_SETTINGS)
def _through_scratch(like, g, losses, new, x, y, w, loss, b, i, end, weighted, given):
    """Evaluate the rows i and i + 1, whose entries are drawn, for the right-hand sides from b on."""
    none = zero_row(x, like)
    zero = np.uint32(0)
    s0, s1 = _sweep(like, g, new, new, x, none, none, b, zero, zero, (zero, zero, zero), False, False, not given)
    t0, t1 = _factors(like, s0, s1, losses, y, w, loss, b, i, end, weighted, given)
    _sweep(like, g, new, new, x, t0, t1, b, zero, zero, (zero, zero, zero), True, False, False)


@njit(**_SETTINGS)
def _range(like, g, losses, scratch, x, y, w, loss, rows, begin, end, stream, weighted, given):
    """Overwrite ``g`` and ``losses`` with the pull and the loss of the measurements begin..end.

    ``given`` says that y holds what the measurements are pulled with.
    """
    runs = x.shape[0]
    copies = scratch.shape[0]
    g[:] = 0
    losses[:] = 0.0
    t0, t1 = zero_row(x, like), zero_row(x, like)
    for i in range(begin, end, 2):
        old, new = scratch[(i // 2 + 1) % copies], scratch[i // 2 % copies]
        row0, row1 = rows[i], rows[min(i + 1, end - 1)]
        b = np.int64(0)
        s0, s1 = _sweep(like, g, old, new, x, t0, t1, b, row0, row1, stream, i > begin, True, not given)
        t0, t1 = _factors(like, s0, s1, losses, y, w, loss, b, i, end, weighted, given)
        b += len(like)
        while b + len(like) <= runs:
            _through_scratch(like, g, losses, new, x, y, w, loss, b, i, end, weighted, given)
            b += len(like)
        while b < runs:
            _through_scratch(like[:1], g, losses, new, x, y, w, loss, b, i, end, weighted, given)
            b += 1
    if end > begin:
        old = scratch[(end - 1) // 2 % copies]
        b = np.int64(0)
        _sweep(like, g, old, old, x, t0, t1, b, rows[begin], rows[begin], stream, True, False, False)


@njit(**_SETTINGS)
def _cut(m, k, ranges):
    """Return where range k of the measurements begins; ranges hold pairs."""
    return min(2 * ((m + 1) // 2 * k // ranges), m)


@njit(parallel=True, **_SETTINGS)
def _ranges(like, partial, losses, scratch, x, y, w, loss, rows, stream, weighted, given):
    m, count = rows.shape[0], partial.shape[0]
    for k in prange(count):
        begin, end = _cut(m, k, count), _cut(m, k + 1, count)
        _range(like, partial[k], losses[k], scratch[k], x, y, w, loss, rows, begin, end, stream, weighted, given)


@njit(**_SETTINGS)
def _predict(like, out, scratch, x, b, row0, row1, i, end, stream, drawing):
    none = zero_row(x, like)
    s0, s1 = _sweep(like, x, scratch, scratch, x, none, none, b, row0, row1, stream, False, drawing, True)
    m = np.int64(out.shape[1])
    store_strided_first(out, b * m + i, m, _sums(like, s0, s1, x), min(end - i, 2))


@njit(**_SETTINGS)
def _forward_range(like, out, scratch, x, rows, begin, end, stream):
    runs = x.shape[0]
    for i in range(begin, end, 2):
        row0, row1 = rows[i], rows[min(i + 1, end - 1)]
        _predict(like, out, scratch, x, 0, row0, row1, i, end, stream, True)
        b = len(like)
        while b + len(like) <= runs:
            _predict(like, out, scratch, x, b, row0, row1, i, end, stream, False)
            b += len(like)
        while b < runs:
            _predict(like[:1], out, scratch, x, b, row0, row1, i, end, stream, False)
            b += 1


@njit(parallel=True, **_SETTINGS)
def _forward(like, out, x, rows, stream, scratch):
    ranges = scratch.shape[0]
    for k in prange(ranges):
        begin, end = _cut(rows.shape[0], k, ranges), _cut(rows.shape[0], k + 1, ranges)
        _forward_range(like, out, scratch[k, 0], x, rows, begin, end, stream)


@njit(**_SETTINGS)
def _draw_pair(scratch, x, rows, i, stream):
    """Draw the entries of the rows i and i + 1 of ``rows`` for the columns that x has."""
    none = zero_row(x, _ONE)
    row0, row1 = rows[i], rows[min(i + 1, rows.shape[0] - 1)]
    _sweep(_ONE, x, scratch, scratch, x, none, none, 0, row0, row1, stream, False, True, False)


@njit(**_SETTINGS)
def _write(out, scratch, x, rows, stream):
    d = np.int64(out.shape[1])
    lanes = row_width(out, _ONE)
    far = _row_entries(scratch)
    for i in range(0, rows.shape[0], 2):
        _draw_pair(scratch, x, rows, i, stream)
        for k in range(min(rows.shape[0] - i, 2)):
            for e in range(0, d, lanes):
                store_first(out, (i + k) * d + e, load_entries(out, scratch, k * far + e), d - e)


@njit(parallel=True, **_SETTINGS)
def _squared_norms(out, x, rows, d, stream, scratch):
    ranges = scratch.shape[0]
    lanes = row_width(out, _ONE)
    far = _row_entries(scratch[0, 0])
    for k in prange(ranges):
        begin, end = _cut(rows.shape[0], k, ranges), _cut(rows.shape[0], k + 1, ranges)
        for i in range(begin, end, 2):
            _draw_pair(scratch[k, 0], x, rows, i, stream)
            for q in range(min(end - i, 2)):
                total = zero_row(out, _ONE)
                for e in range(0, d, lanes):
                    z = first(load_entries(out, scratch, (2 * k + q) * far + e), d - e)
                    total = fma(z, z, total)
                out[i + q] = sum1(total)[0]


def _token(x):
    """Return the token of the right-hand sides that ride the drawing."""
    return (0,) * min(len(x), _RHS)


def seeded_stream(seed, problem):
    """Return what the kernels take as ``stream``, for a seed of 64 bits and a problem of 32."""
    return np.uint32(problem), np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)


def seeded_loss_pull(g, losses, x, y, w, code, delta, rows, stream, partial, scratch):
    """Evaluate losses and pulls, in parallel over fixed ranges of measurements.

    Overwrites ``g`` (B, d), ``losses`` (B,) float64, the scratch and ``partial`` (R, B, d), one pull for each of the R
    ranges, which are added in order. ``w`` may be None.
    """
    weighted = w is not None
    weights = w if weighted else y
    parts = np.empty(partial.shape[:2])
    shape = loss_numbers(code, delta)
    _ranges(_token(x), partial, parts, scratch, x, y, weights, shape, rows, stream, weighted, False)
    np.sum(parts, axis=0, out=losses)
    np.sum(partial, axis=0, out=g)


def seeded_loss_pull_serial(g, losses, x, y, w, code, delta, rows, stream, scratch):
    """Evaluate as ``seeded_loss_pull`` does, on the calling thread and as one range."""
    weighted = w is not None
    weights = w if weighted else y
    shape = loss_numbers(code, delta)
    _range(_token(x), g, losses, scratch[0], x, y, weights, shape, rows, 0, len(rows), stream, weighted, False)


def seeded_adjoint(g, r, rows, stream, partial, scratch):
    """Overwrite ``g`` (B, d) with sum_i r_i a_i for ``r`` (B, m), as ``seeded_loss_pull`` does its pull."""
    parts, shape = np.empty(partial.shape[:2]), loss_numbers(SQUARED, 0.0)
    _ranges(_token(g), partial, parts, scratch, g, r, r, shape, rows, stream, False, True)
    np.sum(partial, axis=0, out=g)


def seeded_adjoint_serial(g, r, rows, stream, scratch):
    """Pull as ``seeded_adjoint`` does, on the calling thread and as one range."""
    losses, shape = np.empty(len(g)), loss_numbers(SQUARED, 0.0)
    _range(_token(g), g, losses, scratch[0], g, r, r, shape, rows, 0, len(rows), stream, False, True)


def seeded_forward(out, x, rows, stream, scratch):
    """Overwrite ``out`` (B, m) with a_i . x_b, in parallel over as many ranges as the scratch has."""
    _forward(_token(x), out, x, rows, stream, scratch)


def seeded_forward_serial(out, x, rows, stream, scratch):
    """Predict as ``seeded_forward`` does, on the calling thread."""
    _forward_range(_token(x), out, scratch[0, 0], x, rows, 0, len(rows), stream)


def seeded_width(columns):
    """Return the padded width d of ``columns`` columns."""
    return -(-columns // _MULTIPLE) * _MULTIPLE


def seeded_entries(out, rows, stream, scratch):
    """Overwrite ``out`` (m, columns) float32 with the entries themselves."""
    _write(out, scratch[0, 0], np.empty((1, seeded_width(out.shape[1])), np.float32), rows, stream)


def seeded_squared_norms(out, columns, rows, stream, scratch):
    """Overwrite ``out`` (m,) float64 with sum_c a_ic^2 of samples over the first ``columns``, in parallel."""
    _squared_norms(out, np.empty((1, seeded_width(columns)), np.float32), rows, columns, stream, scratch)
