"""Spectral features of a mask: what the pattern of observed entries says of its rows and columns.

With counts c_i, d_j, B = diag(c)^(-1/2) mask diag(d)^(-1/2) = U S V^T. The leading singular pair is trivial (the counts
themselves) and left out; rows get sqrt(n1) U S, columns sqrt(n2) V S, beside the logarithm of the count and a constant.
Which items somebody rated says much of the taste: as the prior mean of the factors these features give the accuracy of
SVD++ (Koren 2008) for two more sparse products a fit instead of two a sweep.
"""

from dataclasses import dataclass

import numpy as np

from fastdmf.backend import get_backend

__all__ = ["Regression", "mask_features"]

_POWER_STEPS = 2  # of the randomized SVD (Halko, Martinsson and Tropp 2011, algorithm 4.4)
_LEAST_VARIANCE = 1e-8


def mask_features(kernels, rows, columns, count, rng, dtype):
    """Return the features of rows and columns, (n1, f) and (n2, f), and what those of new rows and columns follow from.

    Parameters
    ----------
    kernels : module
        ``entry_product`` is used.
    rows, columns : tuple of ndarray (indptr, indices, counts)
        The mask in both orders.
    count : int
        Vectors of the randomized SVD; at most the smaller side.
    rng : numpy.random.Generator
    dtype : numpy dtype

    Returns
    -------
    row_features, column_features : ndarray
    left, right : ndarray of shape (n1, f - 2) and (n2, f - 2)
        sqrt(n2) diag(c)^(-1/2) U and sqrt(n1) diag(d)^(-1/2) V: a new row's features are those of its count, and
        c^(-1/2) times the sum of the rows of ``right`` at its observed columns.
    """
    n1, n2 = len(rows[2]), len(columns[2])
    count = min(count, n1, n2)
    row_scale, column_scale = (1 / np.sqrt(np.maximum(counts, 1)) for *_, counts in (rows, columns))
    ones = np.ones(len(rows[1]), dtype)

    def times(side, scale, x, other_scale):
        """Return B x, or B^T x for the other side."""
        multiple = kernels.row_multiple(dtype)
        padded = -(-x.shape[1] // multiple) * multiple
        v = kernels.aligned_empty((len(x), padded), dtype)
        v[:, : x.shape[1]] = x * other_scale[:, None]
        v[:, x.shape[1] :] = 0
        out = kernels.aligned_empty((len(scale), padded), dtype)
        kernels.entry_product(out, ones, v, *side[:2])
        return out[:, : x.shape[1]] * scale[:, None].astype(dtype)

    v = rng.standard_normal((n2, count)).astype(dtype)
    for _ in range(_POWER_STEPS):
        u = np.linalg.qr(times(rows, row_scale, v, column_scale))[0]
        v = np.linalg.qr(times(columns, column_scale, u, row_scale))[0]
    u, s, small = np.linalg.svd(times(rows, row_scale, v, column_scale), full_matrices=False)
    v = v @ small.T

    def features(counts, vectors):
        logs = np.log1p(counts)
        size = np.sqrt(len(counts))
        head = [logs - logs.mean(), np.ones(len(logs))]
        return np.column_stack([*head, size * (vectors * s)[:, 1:]]).astype(dtype)

    left = (np.sqrt(n2) * row_scale[:, None] * u)[:, 1:].astype(dtype)
    right = (np.sqrt(n1) * column_scale[:, None] * v)[:, 1:].astype(dtype)
    return features(rows[2], u), features(columns[2], v), left, right


@dataclass
class Regression:
    """Empirical-Bayes regression of a side's factors on its features, one ridge for each component.

    Attributes
    ----------
    features : array of shape (n, f)
        On the host, or on a device, which then gives the prior means too; all else is on the host.
    variance : ndarray of shape (H,)
        Prior variance t_k of the coefficients of each component; kept between calls.
    coefficients : ndarray of shape (f, H)
        Of the last call: prior means are ``features @ coefficients``.
    divergence : ndarray of shape (H,)
        Of the last call's coefficients from their prior, 1/2 sum (z^2 + v) / t - 1 - log(v / t), v their posterior
        variance: what the evidence pays for them.
    """

    features: np.ndarray
    variance: np.ndarray
    coefficients: np.ndarray | None = None
    divergence: np.ndarray | None = None

    def fit(self, x, trust, prior):
        """Return the prior means F Z, (n, H).

        Parameters
        ----------
        x : array of shape (n, H)
            Factors, where the features are.
        trust : array of shape (n,)
            Weight of each row, 1 / (1 + posterior over prior variance); there as well.
        prior : ndarray of shape (H,)
            Prior variance g_k of the factors around their mean.

        Notes
        -----
        With F^T diag(trust) F = E diag(e) E^T, z_k = E (E^T F^T diag(trust) x_k) / (e + g_k / t_k), and t_k becomes
        the mean over features of the squared coefficient in E's basis plus its posterior variance.
        """
        backend = get_backend("auto", self.features)
        weighted = self.features * trust[:, None].astype(self.features.dtype)
        gram, product = backend.host(weighted.T @ self.features, weighted.T @ x)
        values, vectors = np.linalg.eigh(gram.astype(np.float64))
        projected = vectors.T @ product.astype(np.float64)
        shrunk = np.maximum(values, 0)[:, None] + prior / self.variance
        inside = projected / shrunk
        self.coefficients = vectors @ inside
        variance = prior / shrunk
        self.variance = np.maximum((inside**2 + variance).mean(axis=0), _LEAST_VARIANCE)
        ratio = variance / self.variance
        self.divergence = 0.5 * (inside**2 / self.variance + ratio - 1 - np.log(ratio)).sum(axis=0)
        return self.features @ backend.asarray(self.coefficients, x.dtype)

    def select(self, keep):
        """Keep the components ``keep``."""
        self.variance = self.variance[keep]
        if self.coefficients is not None:
            self.coefficients, self.divergence = self.coefficients[:, keep], self.divergence[keep]
