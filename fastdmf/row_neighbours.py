"""Rows like one another err alike: what a row distribution gets wrong, read off the nearest rows of the table.

A Gaussian row model fills holes by one linear rule for all rows; where the rows form clusters or lie on a curved
surface, as pictures of ten digits do, its errors are alike in rows that are alike. The error in an observed entry is
known: z_lj less its conditional mean given the rest of row l. So a hole (i, j) gets a share of the mean of these errors
over the k rows nearest to row i, holes filled, among those that have column j. Held-out entries choose the share.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["SHARES", "NeighbourRows", "affordable"]

# Shares of the neighbours' mean error that are tried, and rows that it is taken over.
SHARES = (0.5, 1.0)
_NEIGHBOURS = 10
# Rows nearest to a row that are looked at for those with an entry in a column.
_POOL = 60
_PRODUCTS = 2e9  # of all rows with all rows: seconds
_FEWEST = 10 * _NEIGHBOURS  # rows: where the nearest are a tenth of all they are not near


def affordable(n, p):
    """Return whether a table has rows enough, and is small enough for each to be compared with every other."""
    return n >= _FEWEST and n * n * p <= _PRODUCTS


@dataclass
class NeighbourRows:
    """A row distribution and the table it was fitted to.

    Attributes
    ----------
    rows : GaussianRows
    table : ndarray of shape (n, p)
        The fitted rows with holes filled.
    errors : ndarray of shape (n, p)
        Entries less their conditional means given the rest of their rows; what stands in holes is not read.
    seen : ndarray of bool, shape (n, p)
    share : float
        Of the neighbours' mean error that is added.
    """

    rows: object
    table: np.ndarray
    errors: np.ndarray
    seen: np.ndarray
    share: float

    @classmethod
    def of(cls, rows, z, seen, share):
        """Return the model of a table ``z`` (n, p), known where ``seen``."""
        return cls(rows, rows.fill(z, seen), rows.leave_one_out(z, seen), seen, share)

    def __post_init__(self):
        self._squares = np.einsum("ij,ij->i", self.table, self.table)

    @property
    def noise(self):
        return self.rows.noise

    def fill(self, z, seen, variances=False):
        """Return what :meth:`GaussianRows.fill` does, less what the neighbours say it errs; variances are the same."""
        filled = self.rows.fill(z, seen, variances)
        out = filled[0] if variances else filled
        # The filled rows are compared before any of them changes; each by a product of its own, so that its bits do
        # not depend on the rows beside it.
        for i in np.flatnonzero(~seen.all(axis=1)):
            holes = np.flatnonzero(~seen[i])
            out[i, holes] += self.share * self._mean_error(out[i], holes)
        return filled

    def _mean_error(self, row, columns):
        """Return the mean error in ``columns`` of the rows nearest to ``row`` that have them; 0 where none has."""
        distances = self._squares - 2 * (self.table @ row)
        pool = min(_POOL, len(distances))
        nearest = np.argpartition(distances, pool - 1)[:pool]
        nearest = nearest[np.argsort(distances[nearest], kind="stable")]
        known = self.seen[nearest[:, None], columns]
        known &= np.cumsum(known, axis=0) <= _NEIGHBOURS
        total = np.where(known, self.errors[nearest[:, None], columns], 0.0).sum(axis=0)
        return total / np.maximum(known.sum(axis=0), 1)
