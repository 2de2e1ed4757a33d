"""The columns' means and full covariance of a table with holes, by expectation maximisation under shrinkage.

Rows are z ~ N(m, C). This is the matrix factorization Z = P L^T of full width with the rows of P integrated out
exactly, C = L L^T: where columns are few, nothing need be truncated, and no posterior need be taken for a product of
its factors, which prunes too much on dense data. Expectation maximisation (Dempster, Laird and Rubin 1977; Little and
Rubin 2019, chapter 11) runs under an inverse Wishart prior of the strength of nu rows,

    C <- (sum_i E[(z_i - m)(z_i - m)^T] + nu T) / (n + nu).

The target T has the present variances and correlations of a simple kind: one for all pairs (Ledoit and Wolf 2004) or,
for columns in an order, like pixels or times, one for each distance. The units of the columns do not matter.

A step costs the inverse of every row's observed block of C, or of the block of its holes in C^-1, whichever is smaller.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import toeplitz

from fastdmf.row_models import GaussianRows, blocks_of_rows, inverse, scatter, submatrices

__all__ = ["TOL", "Shrinkage", "estimate_covariance"]

TOL = 5e-3  # on the largest change of a correlation in one step
_LEAST_CORRELATION = 1e-4  # of a target's eigenvalues: mean correlations by distance may be indefinite
_LEAST_VARIANCE = 1e-12  # of the mean variance, for columns that never vary
_JITTER = 1e-9  # of the variances: columns may be multiples of each other


@dataclass(frozen=True)
class Shrinkage:
    """Prior of the covariance.

    Attributes
    ----------
    strength : float
        nu, in rows.
    by_distance : bool
        Whether the target has one correlation for each distance of columns, else one for all pairs.
    """

    strength: float
    by_distance: bool = False

    def target(self, covariance):
        """Return T, with the variances of ``covariance``."""
        p = len(covariance)
        deviations = np.sqrt(np.diag(covariance))
        correlation = covariance / deviations / deviations[:, None]
        if self.by_distance:
            values, vectors = np.linalg.eigh(toeplitz([np.trace(correlation, k) / (p - k) for k in range(p)]))
            shape = (vectors * np.maximum(values, _LEAST_CORRELATION)) @ vectors.T
        else:
            shape = np.full((p, p), (correlation.sum() - p) / max(p * (p - 1), 1))
            np.fill_diagonal(shape, 1.0)
        return shape * deviations * deviations[:, None]


def estimate_covariance(z, seen, shrinkage, *, start=None, tol=TOL, max_iter=200, blocks=None):
    """Return the :class:`~fastdmf.row_models.GaussianRows` of a table and the largest change of each step.

    Parameters
    ----------
    z : ndarray of shape (n, p), float64
        What stands in the holes is not read.
    seen : ndarray of bool, shape (n, p)
        Every column has an observed entry.
    shrinkage : Shrinkage
    start : GaussianRows, optional
        Default: the observed means and variances.
    tol : float
        The steps end when no correlation changes by more.
    max_iter : int
    blocks : list, optional
        Of ``blocks_of_rows(seen)``, which several calls may share.
    """
    n, p = z.shape
    count = seen.sum(axis=0)
    mean = np.where(seen, z, 0.0).sum(axis=0) / count
    variance = np.where(seen, (z - mean) ** 2, 0.0).sum(axis=0) / count
    least = _LEAST_VARIANCE * (variance.mean() or 1.0)
    covariance = np.diag(np.maximum(variance, least))
    if start is not None:
        mean, covariance = start.mean, start.covariance
    blocks = list(blocks_of_rows(seen)) if blocks is None else blocks
    changes, diagonal = [], np.diag_indices(p)
    for _ in range(max_iter):
        deviation, scatter_matrix = _expect(z, seen, mean, covariance, blocks)
        shift = deviation.mean(axis=0)
        deviation -= shift
        scatter_matrix += deviation.T @ deviation
        scatter_matrix[diagonal] = np.maximum(scatter_matrix[diagonal], n * least)
        updated = scatter_matrix + shrinkage.strength * shrinkage.target(scatter_matrix / n)
        updated = (updated + updated.T) / (2 * (n + shrinkage.strength))
        updated[diagonal] *= 1 + _JITTER
        deviations = np.sqrt(np.diag(updated))
        changes.append(float(np.abs((updated - covariance) / deviations / deviations[:, None]).max()))
        mean, covariance = mean + shift, updated
        if changes[-1] < tol:
            break
    return GaussianRows(mean, covariance), np.array(changes)


def _expect(z, seen, mean, covariance, blocks):
    """Return E[z_i - m], (n, p), and the sum of the rows' conditional covariances."""
    p = len(mean)
    precision = inverse(covariance[None])[0]
    deviation = np.where(seen, z - mean, 0.0)
    pulled, weights = deviation @ precision, np.zeros(z.shape)
    # Over rows of few holes: their conditional covariances; over the others: their observed blocks' inverses.
    spread, inverses, many = np.zeros((p, p)), np.zeros((p, p)), np.zeros(len(z), bool)
    for rows, index, few in blocks:
        inverted = inverse(submatrices(precision if few else covariance, index))
        at = rows[:, None], index
        solved = (inverted @ (pulled if few else deviation)[at][:, :, None])[:, :, 0]
        if few:
            deviation[at] = -solved
        else:
            weights[at] = solved
            many[rows] = True
        scatter(spread if few else inverses, index, inverted)
    deviation[many] = np.where(seen[many], deviation[many], weights[many] @ covariance)
    return deviation, spread + many.sum() * covariance - covariance @ inverses @ covariance
