"""Dense masks on the device: the launch of the residual of a full product."""

import numpy as np

from fastdmf.kernels.cuda import real_name
from fastdmf.kernels.cuda.checks import check_arguments, table
from fastdmf.kernels.cuda.measurements import check_terms, stride
from fastdmf.kernels.cuda.slices import slices_sum

__all__ = ["dense_options", "dense_ranges", "dense_residual"]

_THREADS, _RANGE = 256, 4096  # as in sums.cu

_TABLE = table(g="REAL B cells", losses="float64 B", y="REAL 1|B cells", w="REAL 1|B cells")


def dense_options(dtype):
    """Return the compiler's options."""
    return [f"-DREAL={real_name(dtype)}", f"-DSTORED={real_name(dtype)}"]


def dense_ranges(cells):
    """Return how many partial sums a matrix has."""
    return max(-(-cells // _RANGE), 1)


def dense_residual(module, sums, g, losses, y, w, code, delta, terms):
    """Replace g (B, cells) by w psi(g - y) and overwrite ``losses`` (B,) float64 with sum w rho.

    Parameters
    ----------
    module, sums
        The families ``dense`` and ``slices``.
    y, w : (1 or B, cells)
        Zero at the holes.
    code, delta
        The loss, as for the kernels of the CPU.
    terms : tuple of arrays
        Scratch: (B, dense_ranges(cells)) float64, and behind it that of ``slices_sum`` for this shape.
    """
    check_arguments(_TABLE, g=g, losses=losses, y=y, w=w)
    runs, cells = g.shape
    check_terms(terms, runs, dense_ranges(cells))
    grid = dense_ranges(cells), runs
    given = np.int64(cells), stride(y), stride(w), np.int32(code), g.dtype.type(delta)
    module.launch("dense_residual", grid, (_THREADS,), (g, terms[0], y, w, *given))
    slices_sum(sums, losses, *terms)
