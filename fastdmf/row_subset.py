"""A start from some of the rows: where there are entries in plenty, a fraction of them tells where the columns lie.

The first sweeps of a fit move all factors far and need no more entries than it takes to tell a column's factors. They
are done on rows drawn at random; then all rows follow, from the columns, prior variances and noise of that fit. 20
million entries took 2.5 s and 7 to 9 sweeps instead of 3.3 s and 9 or 10 (``bench/scale.py --start``).
"""

from mmap import mmap

import numpy as np

from fastdmf.alternating import HeldSide, Solvers, Sweeps
from fastdmf.backend import get_backend

__all__ = ["fit_some_rows"]

# For every number of the columns' factors. With 3, one start of four ended at an error of 0.7328 instead of 0.7315.
_ENTRIES = 5
_SHARE = 0.25  # of all entries: more than this, and the sweeps of all are as soon there
_ROWS = 8  # for every component
_SWEEPS = 4
_CHUNK = 1 << 12  # rows that are copied at a time


def fit_some_rows(backend, rows, n2, settings, rng, dtype, most=np.inf):
    """Return :class:`Sweeps` that were fitted to some of the rows, without entries, or None where that does not pay.

    Parameters
    ----------
    backend : Backend
        That computes; copying and sorting are the CPU's work.
    rows : HeldSide, or an object with its methods
        All rows.
    n2 : int
        Columns.
    settings : Settings
    rng : numpy.random.Generator
        Draws the rows, then the start.
    dtype : numpy dtype
    most : float
        Entries that may be copied, 16 bytes each in float32 and 24 in float64, with weights 24 and 40.
    """
    n1, total = len(rows.indptr) - 1, int(rows.indptr[-1])
    wanted = _ENTRIES * n2 * settings.width
    if not 0 < wanted <= min(_SHARE * total, most):
        return None
    order = rng.permutation(n1)
    entries = np.cumsum(np.diff(rows.indptr)[order])
    drawn = np.sort(order[: np.searchsorted(entries, wanted) + 1])
    if len(drawn) < _ROWS * settings.width:
        return None
    kernels = get_backend().kernels
    part = _copied(rows, drawn, kernels.PAD)
    columns = HeldSide(*kernels.entry_columns(*part.arrays(), n2))
    solvers = (Solvers(backend.kernels, side) for side in (part, columns))
    sweeps = Sweeps(backend, *solvers, settings, rng, dtype)
    sweeps.start()
    for _ in range(_SWEEPS):
        sweeps.step()
    for side in sweeps.sides:
        side.finish()
    return sweeps


def _copied(entries, rows, pad):
    """Return the entries of ``rows``, ascending, as a :class:`HeldSide`."""
    indptr = np.concatenate([[0], np.cumsum(np.diff(entries.indptr)[rows])])
    arrays = None
    for block, pointers, *values in entries.blocks():
        first, last = np.searchsorted(rows, (block.start, block.stop))
        if arrays is None:
            arrays = [None if a is None else _zeros(int(indptr[-1]) + pad, a.dtype) for a in values]
        for k in range(first, last, _CHUNK):
            end = min(k + _CHUNK, last)
            to = slice(indptr[k], indptr[end])
            shifts = pointers[rows[k:end] - block.start] - indptr[k:end]
            places = np.arange(to.start, to.stop) + np.repeat(shifts, np.diff(indptr[k : end + 1]))
            for out, a in zip(arrays, values):
                if out is not None:
                    out[to] = a[places]
    return HeldSide(indptr, *arrays)


def _zeros(count, dtype):
    """Return zeros that go back to the system when they are freed.

    The C library keeps blocks up to 32 MB, in which these would lie: 28 MB stayed with a fit of 20 million entries.
    """
    return np.frombuffer(mmap(-1, count * dtype.itemsize), dtype)
