"""Observed entries in memory, as the variational solver sweeps over them."""

import numpy as np

from fastdmf.alternating import HeldSide
from fastdmf.backend import get_backend
from fastdmf.checks import check_data

__all__ = ["HeldEntries"]


class HeldEntries:
    """Entries by row, less their mean; by column when that is asked for.

    ``vbmf`` makes them of a mask and its values. Who has no other use for the two makes this instead, lets them go, and
    gives it to ``vbmf`` in their place: the order in which the entries came, and the values, are gone during the fit.

    Parameters
    ----------
    mask : EntryMask
    y : array of shape (m,)
    weights : array of shape (m,), optional
    dtype : numpy dtype, optional
        float32 or float64; default that of ``y``.

    Attributes
    ----------
    shape : tuple of int
    size : int
    mean : float
    dtype : numpy dtype
    rows : HeldSide

    Raises
    ------
    TypeError, ValueError
        If values or weights are not what they should be; the message names them.
    """

    def __init__(self, mask, y, *, weights=None, dtype=None):
        y, weights, self.dtype = check_data(mask, y, weights, dtype, ndims=(1,))
        if weights is not None and not weights.any():
            raise ValueError("weights are zero everywhere: at least one entry must count")
        self.shape, self.size = mask.shape, mask.size

        def padded(values):
            out = np.zeros(mask.size + get_backend().kernels.PAD, self.dtype)
            out[: mask.size] = values
            return out

        by_row = padded(mask.sort(y))
        w = None if weights is None else padded(mask.sort(weights))
        inside = by_row[: mask.size]
        self.mean = float(inside.mean(dtype=np.float64) if w is None else np.average(inside, weights=w[: mask.size]))
        inside -= self.dtype.type(self.mean)
        self.rows = HeldSide(mask.indptr, mask.indices, by_row, w)

    def columns(self):
        """Return the entries by column, a new :class:`HeldSide`."""
        return HeldSide(*get_backend().kernels.entry_columns(*self.rows.arrays(), self.shape[1]))
