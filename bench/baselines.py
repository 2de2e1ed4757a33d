"""What the papers compare with: the smallest nuclear norm, gradient on the PSD cone, greedy low-rank learning.

``operator`` is an EntryMask or a GaussianDense of fastdmf; the methods use its entries or its matrix alone.
"""

from dataclasses import dataclass

import numpy as np

import fastdmf

__all__ = ["Convex", "greedy_low_rank", "nuclear_norm", "psd_projected_gradient"]


@dataclass(frozen=True)
class Convex:
    """A solution of min ||X||_* subject to A(X) = y.

    Attributes
    ----------
    matrix : ndarray
        Meets the measurements to rounding.
    gap : float
        (||X||_* - dual bound) / ||X||_*: how far from the minimum it can be at most.
    iterations : int
    """

    matrix: np.ndarray
    gap: float
    iterations: int


class _Affine:
    """Projection on A(X) = y, the multiplier that it took, and A^T."""

    def __init__(self, operator, y):
        self.shape, self.y = operator.shape, np.asarray(y, np.float64)
        self.mask = isinstance(operator, fastdmf.EntryMask)
        if self.mask:
            self.at = operator.rows, operator.cols
        else:
            self.a = operator.a.astype(np.float64)
            self.factor = np.linalg.cholesky(self.a @ self.a.T)

    def project(self, v):
        """Return (projection of v, w) with projection = v + A^T w."""
        if self.mask:
            w = self.y - v[self.at]
        else:
            half = np.linalg.solve(self.factor, self.y - self.a @ v.ravel())
            w = np.linalg.solve(self.factor.T, half)
        return v + self.adjoint(w), w

    def adjoint(self, w):
        if self.mask:
            out = np.zeros(self.shape)
            out[self.at] = w
            return out
        return (w @ self.a).reshape(self.shape)


def _shrink(v, t, psd):
    """Return the minimiser of t ||X||_* + ||X - v||_F^2 / 2, over the PSD cone if asked."""
    if psd:
        values, vectors = np.linalg.eigh((v + v.T) / 2)
        return (vectors * np.maximum(values - t, 0)) @ vectors.T
    left, s, right = np.linalg.svd(v, full_matrices=False)
    return (left * np.maximum(s - t, 0)) @ right


def nuclear_norm(operator, y, *, psd=False, tol=1e-6, max_iter=20_000):
    """Minimise the nuclear norm over the matrices that meet the measurements, by ADMM.

    X = shrink(Z - U), Z = projection of X + U on A(X) = y, U <- U + X - Z, with the step's weight rho kept where both
    residuals fall alike (Boyd, Parikh, Chu, Peleato, Eckstein 2011, sections 3.3 and 3.4.1). U is A^T of a multiplier,
    which after scaling is feasible for the dual, max <y, z> subject to ||A^T z||_2 <= 1 (PSD: eigenvalues <= 1).

    Parameters
    ----------
    operator : EntryMask or GaussianDense
    y : ndarray of shape (m,)
    psd : bool
        Over the positive semidefinite matrices, where the nuclear norm is the trace.
    tol : float
        On the relative duality gap.
    max_iter : int

    Returns
    -------
    Convex
    """
    affine = _Affine(operator, y)
    z, w = affine.project(np.zeros(affine.shape))
    u, rho = np.zeros(affine.shape), 1.0 / max(np.linalg.norm(z, 2), 1e-300)
    for iteration in range(1, max_iter + 1):
        x = _shrink(z - u, 1 / rho, psd)
        before, (z, w) = z, affine.project(x + u)
        u = x + u - z  # = -A^T w
        primal, dual = np.linalg.norm(x - z), np.linalg.norm(z - before)
        if iteration % 10 == 0:
            gap = _gap(affine, z, rho * w, psd)
            if gap <= tol and primal <= tol * np.linalg.norm(z):
                break
            scale = 2.0 if primal > 5 * dual else 0.5 if dual > 5 * primal else 1.0
            rho, u = rho * scale, u / scale
    return Convex(z, gap, iteration)


def _gap(affine, z, multiplier, psd):
    """Return the relative gap between ||Z||_* (feasible up to the cone) and the scaled multiplier's bound."""
    bound = affine.adjoint(multiplier)
    size = np.linalg.eigvalsh((bound + bound.T) / 2)[-1] if psd else np.linalg.norm(bound, 2)
    norm = np.linalg.norm(z, "nuc")
    return abs(norm - affine.y @ multiplier / max(size, 1.0)) / norm


def psd_projected_gradient(operator, y, *, lr=None, max_iter=10_000, tol=1e-3, accelerated=False, start=None):
    """Minimise (1/m) ||A(X) - y||^2 over the PSD cone by projected gradient steps.

    Parameters
    ----------
    operator : GaussianDense
    y : ndarray of shape (m,)
    lr : float, optional
        Step; default 1/L, L the top eigenvalue of the Hessian by power steps.
    max_iter : int
    tol : float
        Stop at ||A(X) - y|| <= tol ||y||.
    accelerated : bool
        Nesterov's momentum, restarted where the loss rises (O'Donoghue and Candes 2015).
    start : ndarray of shape (n, n), optional
        Default zero.

    Returns
    -------
    ndarray of shape (n, n)
    """
    a, (n, _), m = operator.a, operator.shape, operator.size
    y = np.asarray(y, a.dtype)
    if lr is None:
        v = np.random.default_rng(0).standard_normal(n * n).astype(a.dtype)
        for _ in range(50):
            v = (a @ v) @ a
            v /= np.linalg.norm(v)
        lr = m / (2 * np.linalg.norm(a @ v) ** 2)
    x = np.zeros((n, n), a.dtype) if start is None else np.asarray(start, a.dtype)
    point, momentum, best = x, 1.0, np.inf
    for _ in range(max_iter):
        r = a @ point.ravel() - y
        loss = r @ r
        if loss <= tol**2 * (y @ y):
            return point
        if accelerated and loss > best:
            point, momentum, best = x, 1.0, np.inf
            continue
        best = loss
        g = (r @ a).reshape(n, n)
        step = point - lr / m * (g + g.T)  # (2/m) A^T r, its symmetric part
        values, vectors = np.linalg.eigh(step)
        new = (vectors * np.maximum(values, 0)) @ vectors.T
        after = (1 + np.sqrt(1 + 4 * momentum**2)) / 2 if accelerated else 1.0
        point = new + (momentum - 1) / after * (new - x)
        x, momentum = new, after
    return x


def greedy_low_rank(operator, y, *, tol=1e-6, eps=1e-6, max_rank=None):
    """Greedy low-rank learning (Li, Luo, Lyu 2020, 2012.09839): the limit of gradient flow on U U^T from U -> 0.

    From W = 0: add the top eigenvector of minus the gradient, times a tiny number, as a column of U; descend; repeat
    until no eigenvalue is positive.

    Parameters
    ----------
    operator : Operator
        Square and symmetric.
    y : ndarray of shape (m,)
    tol : float
        Relative to the first eigenvalue.
    eps : float
        Squared norm of a new column, relative to the first eigenvalue.
    max_rank : int, optional

    Returns
    -------
    list of ndarray
        W after each stage, of rank 1, 2, ...
    """
    n = operator.shape[0]
    u, w, stages, first = np.zeros((n, 0)), np.zeros(operator.shape), [], None
    while len(stages) < (n if max_rank is None else max_rank):
        g = operator.adjoint(operator.apply(w) - y)
        values, vectors = np.linalg.eigh(-(g + g.T) / 2)
        first = first or values[-1]
        if values[-1] <= tol * first:
            break
        u = np.hstack([u, np.sqrt(eps) * vectors[:, -1:]])
        fit = fastdmf.solve(operator, y, symmetric=True, factors=[u], tol=1e-20, max_iter=5000, on_failure="ignore")
        u, w = fit.factors[0], fit.matrix()
        stages.append(w)
    return stages
