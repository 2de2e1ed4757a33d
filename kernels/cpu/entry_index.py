"""What a mask problem needs before its kernels run: padded rows, orders of the entries, cuts, and the route.

Entries are sorted by row, then column, with ``PAD`` zeros behind the last index, so that a group of four and the
prefetch ahead of it may read past the end; the column pass has them by row block, then column. Pointers are int64,
indices int32 unless a dimension needs int64.
"""

import numpy as np
from numba import njit

__all__ = [
    "BLOCK_ROWS",
    "LINE",
    "PAD",
    "aligned_empty",
    "entry_blocks",
    "entry_column_cuts",
    "entry_columns",
    "entry_cuts",
    "entry_route",
    "entry_sort",
    "index_type",
    "row_multiple",
]

PAD = 16
LINE = 64  # bytes of a cache line

# Entries under which NumPy orders them, which leaves nothing to compile for a first fit on a table.
_COMPILED = 1 << 15

_SETTINGS = {"cache": True, "error_model": "numpy", "boundscheck": False}


def row_multiple(dtype):
    """Return the multiple to which the width of the factors is padded: one cache line of ``dtype``."""
    return LINE // np.dtype(dtype).itemsize


def aligned_empty(shape, dtype):
    """Return an uninitialised C-contiguous array that starts on a cache line.

    NumPy aligns to 16 bytes, so that half of the vectors of a row would straddle two lines.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + size].view(dtype).reshape(shape)


def index_type(largest):
    """Return int32, or int64 where ``largest`` needs it."""
    return np.int32 if largest <= np.iinfo(np.int32).max else np.int64


@njit(**_SETTINGS)
def _count(pointers, keys):
    """Fill pointers[k + 1] with the number of keys below or equal to k."""
    pointers[:] = 0
    for k in range(keys.shape[0]):
        pointers[keys[k] + 1] += 1
    for k in range(1, pointers.shape[0]):
        pointers[k] += pointers[k - 1]


@njit(**_SETTINGS)
def _is_sorted(rows, cols):
    for k in range(1, rows.shape[0]):
        if rows[k] < rows[k - 1] or (rows[k] == rows[k - 1] and cols[k] < cols[k - 1]):
            return False
    return True


@njit(**_SETTINGS)
def _sort(indptr, indices, order, sorted_rows, sorted_order, colptr, rows, cols):
    # Both passes read in order and carry along what the next one needs: 1.0 s for 20 million entries where gathering
    # rows and columns through the permutation took 1.6.
    _count(colptr, cols)
    for k in range(cols.shape[0]):
        place = colptr[cols[k]]
        sorted_rows[place] = rows[k]
        sorted_order[place] = k
        colptr[cols[k]] = place + 1
    _count(indptr, rows)
    s = 0
    for j in range(colptr.shape[0] - 1):
        while s < colptr[j]:
            i = sorted_rows[s]
            place = indptr[i]
            indices[place] = j
            order[place] = sorted_order[s]
            indptr[i] = place + 1
            s += 1
    # Every pointer has moved to the start of the next row.
    for i in range(indptr.shape[0] - 1, 0, -1):
        indptr[i] = indptr[i - 1]
    indptr[0] = 0


def entry_sort(rows, cols, n1, n2):
    """Sort entries by row, then column, keeping the order of equal ones: two stable counting sorts.

    Parameters
    ----------
    rows, cols : (nnz,) integers in [0, n1) and [0, n2)
        Not validated.

    Returns
    -------
    indptr : (n1 + 1,) int64
    indices : (nnz + PAD,) int32, or int64 where n2 needs it; zeros behind the last entry
    order : (nnz,) int32, or int64 where nnz needs it
        order[k] is the place in the input of sorted entry k.
    """
    rows, cols = np.ascontiguousarray(rows), np.ascontiguousarray(cols)
    if rows.dtype != cols.dtype or rows.dtype not in (np.int32, np.int64):
        rows, cols = rows.astype(np.int64, copy=False), cols.astype(np.int64, copy=False)
    nnz = rows.shape[0]
    indptr = np.empty(n1 + 1, np.int64)
    indices = np.zeros(nnz + PAD, index_type(n2))
    order = np.empty(nnz, index_type(nnz))
    if nnz < _COMPILED:
        order[:] = np.lexsort((cols, rows))
        indices[:nnz] = cols[order]
        indptr[0], indptr[1:] = 0, np.cumsum(np.bincount(rows, minlength=n1))
    elif _is_sorted(rows, cols):
        _count(indptr, rows)
        indices[:nnz], order[:] = cols, np.arange(nnz, dtype=order.dtype)
    else:
        work = np.empty(nnz, index_type(n1)), np.empty_like(order), np.empty(n2 + 1, np.int64)
        _sort(indptr, indices, order, *work, rows, cols)
    return indptr, indices, order


@njit(**_SETTINGS)
def _blocks(bptr, brows, border, indptr, indices, n2, block_rows):
    n1 = indptr.shape[0] - 1
    bptr[:] = 0
    for i in range(n1):
        base = i // block_rows * n2
        for k in range(indptr[i], indptr[i + 1]):
            bptr[base + indices[k] + 1] += 1
    for s in range(1, bptr.shape[0]):
        bptr[s] += bptr[s - 1]
    for i in range(n1):
        base = i // block_rows * n2
        for k in range(indptr[i], indptr[i + 1]):
            segment = base + indices[k]
            place = bptr[segment]
            brows[place] = i
            border[place] = k
            bptr[segment] = place + 1
    for s in range(bptr.shape[0] - 1, 0, -1):
        bptr[s] = bptr[s - 1]
    bptr[0] = 0


def entry_blocks(indptr, indices, n1, n2, block_rows):
    """Order sorted entries for the column pass: by block of ``block_rows`` rows, then column, then row.

    Returns
    -------
    bptr : (nblocks n2 + 1,) int64
        Column j of block b holds bptr[b n2 + j] to bptr[b n2 + j + 1].
    brows : (nnz + PAD,) int32, or int64 where n1 needs it; zeros behind the last entry
    border : (nnz,) int32, or int64 where nnz needs it
        border[k] is the place in the row order of entry k: ``yb[:nnz] = y[border]``.
    """
    nnz = int(indptr[-1])
    bptr = np.empty(-(-n1 // block_rows) * n2 + 1, np.int64)
    brows = np.zeros(nnz + PAD, index_type(n1))
    border = np.empty(nnz, index_type(nnz))
    if nnz < _COMPILED:
        rows = np.repeat(np.arange(n1), np.diff(indptr))
        segments = rows // block_rows * n2 + indices[:nnz]
        border[:] = np.argsort(segments, kind="stable")
        brows[:nnz] = rows[border]
        bptr[0], bptr[1:] = 0, np.cumsum(np.bincount(segments, minlength=len(bptr) - 1))
    else:
        _blocks(bptr, brows, border, indptr, indices, n2, block_rows)
    return bptr, brows, border


@njit(**_SETTINGS)
def _columns(colptr, rows, yc, wc, indptr, indices, y, w, weighted):
    _count(colptr, indices[: indptr[-1]])
    for i in range(indptr.shape[0] - 1):
        for k in range(indptr[i], indptr[i + 1]):
            place = colptr[indices[k]]
            rows[place], yc[place] = i, y[k]
            if weighted:
                wc[place] = w[k]
            colptr[indices[k]] = place + 1
    for j in range(colptr.shape[0] - 1, 0, -1):
        colptr[j] = colptr[j - 1]
    colptr[0] = 0


def entry_columns(indptr, indices, y, w, n2):
    """Bring sorted entries into the order of columns, then rows, with their values: no permutation is kept or gathered.

    Parameters
    ----------
    indptr, indices
        From ``entry_sort``.
    y, w : (nnz + PAD,)
        Values and weights in sorted order, zeros behind the last; ``w`` may be None.

    Returns
    -------
    colptr : (n2 + 1,) int64
    rows : (nnz + PAD,) int32, or int64 where the number of rows needs it
    y, w : (nnz + PAD,)
    """
    nnz, n1 = int(indptr[-1]), len(indptr) - 1
    colptr = np.empty(n2 + 1, np.int64)
    rows, yc = np.zeros(nnz + PAD, index_type(n1)), np.zeros(nnz + PAD, y.dtype)
    wc = None if w is None else np.zeros_like(yc)
    if nnz < _COMPILED:
        order = np.argsort(indices[:nnz], kind="stable")
        rows[:nnz] = np.repeat(np.arange(n1), np.diff(indptr))[order]
        for out, values in ((yc, y), (wc, w)):
            if out is not None:
                out[:nnz] = values[:nnz][order]
        colptr[0], colptr[1:] = 0, np.cumsum(np.bincount(indices[:nnz], minlength=n2))
    else:
        weighted = w is not None
        _columns(colptr, rows, yc, wc if weighted else yc, indptr, indices, y, w if weighted else y, weighted)
    return colptr, rows, yc, wc


def entry_cuts(indptr, ranges):
    """Cut the rows into ``ranges`` runs with about equally many entries: (ranges + 1,) int64."""
    targets = np.arange(1, ranges) * (int(indptr[-1]) / ranges)
    return np.concatenate(([0], np.searchsorted(indptr, targets), [indptr.shape[0] - 1])).astype(np.int64)


def entry_column_cuts(bptr, n2, ranges):
    """Cut the columns of ``entry_blocks`` into runs with about equally many entries: (ranges + 1,) int64."""
    counts = np.diff(bptr).reshape(-1, n2).sum(axis=0)
    return entry_cuts(np.concatenate(([0], np.cumsum(counts))), ranges)


# Choice of the route -------------------------------------------------------------------------------------------
# ns an entry on one core by the bytes of a padded row, the smaller of both dtypes; from bench/test_entry.py on two
# cores of a Zen 3 with AVX2 (512 KB L2), 400,000 entries in 2000 x 2000 (near) and 5M in 138,000 x 27,000 (far).
_ROW_BYTES = (64, 128, 256, 512)
_ONE_PASS_NS = {"near": (2.6, 4.5, 11.1, 22.6), "far": (3.5, 6.8, 17.2, 54.7)}
_TWO_PASS_NS = {"near": (3.3, 5.3, 13.5, 24.8), "far": (7.2, 12.5, 28.3, 58.2)}
_ROW_NS = 25  # more for each row: its tail group and its start
_DENSE_FLOPS = {4: 75.0, 8: 36.0}  # flops a ns of the three products at n = 300 to 1000, by the size of a number
_DENSE_CELL_NS = {4: 0.28, 8: 0.43}
# Workers of the one-pass route take each other's cache when Q and two copies of G^T P fill it: 36 ns an entry on two
# cores against 25 for two passes at 512 bytes (41 MB), 12 against 13 at 256 (21 MB).
_CROWDED_BYTES, _CROWDED = 24_000_000, 1.5
_COPY_NS = 3 / 25  # ns a byte of a copy of G^T P: cleared, filled, added at 25 GB/s
_SERIAL_NS = 100_000  # a parallel region costs more than it saves on less work
_WORKERS = 8  # items of work, ranges times runs, that are worth having
BLOCK_ROWS = 16_384  # rows of one block of the column pass: segments long enough, 1 to 8 MB of p


def entry_route(n1, n2, nnz, h, batch, dtype):
    """Choose the route of an entry mask by a cost model; the answer does not depend on the number of threads.

    Parameters
    ----------
    h : int
        Width of the factors, padded or not.
    batch : int
        Number of runs that share the mask.

    Returns
    -------
    route : {"one_pass", "one_pass_serial", "two_pass", "dense"}
        "dense" asks for P Q^T by BLAS, ``dense_residual`` and two more products.
    ranges : int
        Ranges of rows for "one_pass" and "two_pass" (``entry_cuts``); 1 for the others.
    """
    itemsize = np.dtype(dtype).itemsize
    size = -(-h * itemsize // LINE) * LINE
    place = "near" if n2 * size <= 1 << 18 else "far"

    def per_entry(table):
        return float(np.interp(size, _ROW_BYTES, table[place])) * max(1.0, size / _ROW_BYTES[-1])

    one = nnz * per_entry(_ONE_PASS_NS) + n1 * _ROW_NS
    two = nnz * per_entry(_TWO_PASS_NS) + (n1 + n2) * _ROW_NS
    cells = n1 * n2
    if 6 * cells * h / _DENSE_FLOPS[itemsize] + cells * _DENSE_CELL_NS[itemsize] < one:
        return "dense", 1
    if batch * one < _SERIAL_NS:
        return "one_pass_serial", 1
    copy = n2 * size * _COPY_NS
    # As many ranges as there should be workers, while their copies stay below a fifth of the pass.
    ranges = max(1, min(-(-_WORKERS // batch), int(0.2 * one / copy)))
    crowded = _CROWDED if 3 * n2 * size > _CROWDED_BYTES else 1.0
    if ranges * batch < 2 or crowded * one + ranges * copy > two:
        return "two_pass", 2 * _WORKERS
    return "one_pass", ranges
