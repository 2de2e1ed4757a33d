"""What a fitted row distribution says of the holes of any row: conditional means and variances.

A row z ~ N(m, C) with observed columns o and holes h is filled with

    z_h = m_h + C_ho C_oo^-1 (z_o - m_o),      var(z_h) = diag(C_hh - C_ho C_oo^-1 C_oh).

:class:`GaussianRows` holds a full covariance, :class:`LowRankRows` C = L L^T + sigma^2 I with r loadings a column.
Every row has products and factorizations of its own, so that its bits do not depend on the rows beside it. All in
float64.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import lapack

__all__ = ["GaussianRows", "LowRankRows", "blocks_of_rows", "inverse", "scatter", "submatrices"]

_BLOCK = 4_000_000  # numbers in the largest temporary array (32 MB)
# Blocks from which a loop over LAPACK's Cholesky inverse beats NumPy's batched one, which is by LU.
_LOOP = 24


@dataclass
class GaussianRows:
    """The distribution of a row.

    Attributes
    ----------
    mean : ndarray of shape (p,)
    covariance : ndarray of shape (p, p)
    """

    mean: np.ndarray
    covariance: np.ndarray

    def __post_init__(self):
        self._precision = inverse(self.covariance[None])[0]

    @property
    def noise(self):
        """Mean variance of a column when all others are known."""
        return float(np.mean(1 / np.diag(self._precision)))

    def fill(self, z, seen, variances=False):
        """Return the rows of ``z`` with holes filled, and optionally the variances of what was filled in.

        Every row has products and an inverse of its own, so that its bits do not depend on the rows beside it.

        Parameters
        ----------
        z : ndarray of shape (n, p)
            What stands in the holes is not read.
        seen : ndarray of bool, shape (n, p)
        variances : bool
            Also return the conditional variances, (n, p), zero where ``seen``.
        """
        out, variance = np.where(seen, z, 0.0), np.zeros(z.shape if variances else (0, 0))
        for rows, index, few in blocks_of_rows(seen):
            residual = np.where(seen[rows], z[rows] - self.mean, 0.0)[:, None, :]
            at = rows[:, None], index
            if few:
                inverted = inverse(submatrices(self._precision, index))
                pulled = np.take_along_axis((residual @ self._precision)[:, 0], index, axis=1)
                out[at] = self.mean[index] - (inverted @ pulled[:, :, None])[:, :, 0]
                if variances:
                    variance[at] = np.einsum("ijj->ij", inverted)
                continue
            inverted = inverse(submatrices(self.covariance, index))
            weights = np.zeros(residual.shape)
            weights[np.arange(len(rows))[:, None], 0, index] = (
                inverted @ np.take_along_axis(residual[:, 0], index, axis=1)[:, :, None]
            )[:, :, 0]
            holes = ~seen[rows]
            filled = self.mean + (weights @ self.covariance)[:, 0]
            out[rows] = np.where(holes, filled, out[rows])
            if variances:
                across = self.covariance[index]
                explained = np.einsum("bkp,bkp->bp", inverted @ across, across)
                left = np.diag(self.covariance) - explained
                variance[rows] = np.where(holes, np.maximum(left, 0.0), 0.0)
        return (out, variance) if variances else out

    def leave_one_out(self, z, seen):
        """Return each observed entry less its conditional mean given the rest of its row, (n, p); zeros in the holes.

        With K = C_oo^-1 of a row's observed columns these errors are [K (z_o - m_o)]_j / K_jj.
        """
        pulled = np.where(seen, z - self.mean, 0.0) @ self._precision
        weights, bends = pulled.copy(), np.tile(np.diag(self._precision), (len(z), 1))
        for rows, index, few in blocks_of_rows(seen):
            if few:
                across = self._precision[index]
                solved = inverse(submatrices(self._precision, index)) @ across
                here = np.take_along_axis(pulled[rows], index, axis=1)
                weights[rows] -= np.einsum("bk,bkp->bp", here, solved)
                bends[rows] -= np.einsum("bkp,bkp->bp", across, solved)
            else:
                inverted, at = inverse(submatrices(self.covariance, index)), (rows[:, None], index)
                weights[at] = (inverted @ (z[at] - self.mean[index])[:, :, None])[:, :, 0]
                bends[at] = np.einsum("bjj->bj", inverted)
        return np.where(seen, weights / np.where(seen, bends, 1.0), 0.0)


@dataclass
class LowRankRows:
    """The distribution of a row of few factors: z = m + L c + noise, c ~ N(0, I).

    The coefficients of a row are c = (L_o^T L_o + (sigma^2 + |o| u) I)^-1 L_o^T (z_o - m_o), u for each column of L:
    what is not known of the loadings themselves weighs like noise that grows with the entries.

    Attributes
    ----------
    mean : ndarray of shape (p,)
    loadings : ndarray of shape (p, r)
    noise : float
        sigma^2.
    doubt : ndarray of shape (r,)
        u, the mean posterior variance of the loadings; zeros where they count as known.
    """

    mean: np.ndarray
    loadings: np.ndarray
    noise: float
    doubt: np.ndarray

    def fill(self, z, seen, variances=False):
        """Return what :meth:`GaussianRows.fill` does."""
        out, variance = np.where(seen, z, 0.0), np.zeros(z.shape if variances else (0, 0))
        holed = np.flatnonzero(~seen.all(axis=1))
        for start, gram, right in self.systems(z, seen, holed):
            rows = holed[start : start + len(gram)]
            # Noise that vanishes leaves dependent loadings singular: no less than rounding.
            least = np.finfo(gram.dtype).eps * np.trace(gram, axis1=1, axis2=2)
            system = gram + np.maximum(self.noise, least)[:, None, None] * np.eye(gram.shape[1])
            coefficients = np.linalg.solve(system, right)[:, :, 0]
            filled = self.mean + (coefficients[:, None, :] @ self.loadings.T)[:, 0]
            out[rows] = np.where(seen[rows], out[rows], filled)
            if variances:
                spread = self.noise * np.linalg.inv(system)
                spread = np.einsum("pi,bij,pj->bp", self.loadings, spread, self.loadings, optimize=True)
                variance[rows] = np.where(seen[rows], 0.0, spread + self.noise)
        return (out, variance) if variances else out

    def systems(self, z, seen, rows):
        """Yield (first position in ``rows``, L_o^T L_o + |o| u, L_o^T (z_o - m_o)) for blocks of these rows."""
        p, r = self.loadings.shape
        block = max(1, _BLOCK // (p * max(r, 1)))
        for start in range(0, len(rows), block):
            here = rows[start : start + block]
            residual = np.where(seen[here], z[here] - self.mean, 0.0)
            loadings = (self.loadings * seen[here][:, :, None]).swapaxes(1, 2)
            gram = loadings @ self.loadings
            gram[:, np.arange(r), np.arange(r)] += seen[here].sum(axis=1)[:, None] * self.doubt
            yield start, gram, loadings @ residual[:, :, None]


def blocks_of_rows(seen):
    """Yield (rows, index, few) for blocks of rows with equally many holes.

    ``index`` (rows, k) are the columns of the holes where they are the fewer (``few``), else the observed columns.
    Rows without holes are left out.
    """
    p = seen.shape[1]
    holes = p - seen.sum(axis=1)
    for count in np.unique(holes[holes > 0]):
        few = count <= p // 2
        rows = np.flatnonzero(holes == count)
        step = max(1, _BLOCK // max(1, count if few else p - count) ** 2)
        for k in range(0, len(rows), step):
            block = rows[k : k + step]
            chosen = ~seen[block] if few else seen[block]
            yield block, np.nonzero(chosen)[1].reshape(len(block), -1), few


def submatrices(matrix, index):
    """Return the square blocks of ``matrix`` at the rows and columns ``index`` (r, k), shape (r, k, k)."""
    return matrix[index[:, :, None], index[:, None, :]]


def scatter(out, index, blocks):
    """Add every block to ``out`` at its rows and columns ``index``."""
    p, k = len(out), index.shape[1]
    if k >= _LOOP:
        for i, block in zip(index, blocks):
            out[np.ix_(i, i)] += block
    else:
        flat = (index[:, :, None] * p + index[:, None, :]).ravel()
        out += np.bincount(flat, blocks.ravel(), minlength=p * p).reshape(p, p)


def inverse(a):
    """Return the inverses of symmetric positive definite matrices, (b, k, k)."""
    if a.shape[-1] < _LOOP:
        return np.linalg.inv(a)
    out = np.empty_like(a)
    for k, matrix in enumerate(a):
        factor, failed = lapack.dpotrf(matrix, lower=1)
        if failed:
            out[k] = np.linalg.pinv(matrix, hermitian=True)
            continue
        lower = np.tril(lapack.dpotri(factor, lower=1)[0])
        out[k] = lower + np.tril(lower, -1).T
    return out
