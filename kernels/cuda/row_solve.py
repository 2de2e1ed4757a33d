"""Ridge regressions of rows on the device: which rows get how many warps, and the launches."""

import numpy as np

from fastdmf.kernels.cuda.checks import check_arguments, table
from fastdmf.kernels.cuda.entry import entry_options
from fastdmf.kernels.cuda.slices import check_scratch, slices_sum

__all__ = ["row_solve", "row_solve_lists", "row_solve_options"]

row_solve_options = entry_options

_LONG = 256  # entries from which a row gets many warps
_WARPS = 8
_MOST_BLOCKS = 1 << 20

_TABLE = table(
    total="float64 1",
    a="REAL n1 H",
    b="STORED n2 H",
    mean="REAL? n1 H",
    indptr="int64 n1+1",
    indices="INDEX nnz",
    y="REAL nnz",
    w="REAL? nnz",
    scale="REAL n1",
    **dict.fromkeys(("scaled_ridge", "ridge", "moment", "free"), "REAL H"),
    **{"lists[0]": "INDEX short", "lists[1]": "INDEX long", "squares[0]": "float64 1 n1"},
)


def row_solve_lists(indptr, dtype, long=_LONG):
    """Return the rows of up to ``long`` entries and the longer ones, as ``dtype``: what ``row_solve`` takes."""
    short = np.diff(indptr) <= long
    return np.flatnonzero(short).astype(dtype), np.flatnonzero(~short).astype(dtype)


def row_solve(
    module,
    sums,
    total,
    a,
    b,
    mean,
    indptr,
    lists,
    indices,
    y,
    w,
    scale,
    scaled_ridge,
    ridge,
    moment,
    free,
    steps,
    tol,
    squares,
):
    """Improve every row of ``a`` against ``b`` by preconditioned conjugate gradients.

    Parameters
    ----------
    module, sums
        The families ``row_solve`` and ``slices``.
    total : (1,) float64
        Overwritten with sum w (y - a . b)^2 before the call.
    lists : tuple of two arrays
        From ``row_solve_lists``.
    squares : tuple of arrays
        Scratch: (1, n1) float64, and behind it that of ``slices_sum`` for this shape.

    Notes
    -----
    All else is as for the kernel of the CPU, without zeros behind the entries.
    """
    check_arguments(
        _TABLE,
        **{"total": total, "a": a, "b": b, "mean": mean, "indptr": indptr, "indices": indices, "y": y, "w": w},
        **{"scale": scale, "scaled_ridge": scaled_ridge, "ridge": ridge, "moment": moment, "free": free},
        **{"lists[0]": lists[0], "lists[1]": lists[1], "squares[0]": squares[0]},
    )
    if len(lists) != 2 or len(lists[0]) + len(lists[1]) != len(a):
        raise ValueError(f"lists must be two with {len(a)} rows in all, got {[len(rows) for rows in lists]}")
    check_scratch("squares[1:]", squares[1:], 1, len(a))
    vectors = scale, scaled_ridge, ridge, moment, free
    limit = a.dtype.type(max(tol, np.finfo(a.dtype).eps ** 2))
    for rows, warps in zip(lists, (1, _WARPS)):
        if len(rows):
            data = a, squares[0], b, mean, indptr, rows, indices, y, w, *vectors
            shared = warps * (a.shape[1] * a.dtype.itemsize + 16) if warps > 1 else 0
            grid = (min(len(rows), _MOST_BLOCKS),)
            scalars = np.int64(len(rows)), np.int32(steps), limit
            module.launch("row_solve", grid, (32 * warps,), (*data, *scalars), shared=shared)
    slices_sum(sums, total, *squares)
