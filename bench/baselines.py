"""What the papers compare with: the smallest nuclear norm, gradient on the PSD cone, greedy low-rank learning.

``operator`` is an EntryMask or a GaussianDense of fastdmf; the methods use its entries or its matrix alone.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve

import fastdmf

__all__ = ["Convex", "greedy_low_rank", "nuclear_norm", "psd_projected_gradient"]


@dataclass(frozen=True)
class Convex:
    """A solution of min ||X||_* subject to |A(X) - y| <= eps.

    Attributes
    ----------
    matrix : ndarray
        Meets the measurements: with eps = 0 to rounding, else to the tolerance of the solver.
    gap : float
        (||X||_* - dual bound) / ||X||_*: how far from the minimum it can be at most.
    iterations : int
    """

    matrix: np.ndarray
    gap: float
    iterations: int


class _Measured:
    """Projection on the matrices that meet the measurements, the multiplier that it took, and A^T.

    Entries meet |X - y| <= eps by themselves. Dense measurements need a slack s, |s| <= eps / unit, behind the matrix:
    A(X) - unit s = y, with the rows' norm as the unit.
    """

    def __init__(self, operator, y, eps):
        self.shape, self.y, self.eps = operator.shape, np.asarray(y, np.float64), eps
        self.size = self.shape[0] * self.shape[1]
        self.mask = isinstance(operator, fastdmf.EntryMask)
        self.n_slack = 0 if self.mask or eps == 0 else operator.size
        if self.mask:
            self.at = np.ravel_multi_index((operator.rows, operator.cols), self.shape)
        else:
            self.a = operator.a.astype(np.float64)
            gram = self.a @ self.a.T
            self.unit = np.sqrt(np.trace(gram) / len(gram))
            if self.n_slack:
                gram[np.diag_indices(len(gram))] += self.unit**2
            self.factor = np.linalg.cholesky(gram), True

    def project(self, v):
        """Return (projection of v = (X, s), w) with projection = v + (A^T w, -unit w)."""
        if self.mask:
            w = self.y - v[self.at]
            w -= np.clip(w, -self.eps, self.eps)
            return v + self.adjoint(w), w
        x, s = v[: self.size], v[self.size :]
        r = self.y - self.a @ x
        w = cho_solve(self.factor, r + self.unit * s if self.n_slack else r, check_finite=False)
        return v + np.concatenate([self.adjoint(w), -self.unit * w[: self.n_slack]]), w

    def adjoint(self, w):
        if self.mask:
            out = np.zeros(self.size)
            out[self.at] = w
            return out
        return w @ self.a

    def shrink(self, v, t, psd):
        """Return the minimiser of t ||X||_* + ||(X, s) - v||^2 / 2 over |s| <= eps / unit."""
        x = _shrink(v[: self.size].reshape(self.shape), t, psd).ravel()
        return (
            np.concatenate([x, np.clip(v[self.size :], -self.eps / self.unit, self.eps / self.unit)])
            if self.n_slack
            else x
        )

    def gap(self, x, multiplier, psd):
        """Return (norm - bound) / norm: ||X||_* against <y, z> - eps ||z||_1 of the multiplier, made feasible."""
        pull = self.adjoint(multiplier).reshape(self.shape)
        size = np.linalg.eigvalsh((pull + pull.T) / 2)[-1] if psd else np.linalg.norm(pull, 2)
        norm = np.linalg.norm(x.reshape(self.shape), "nuc")
        bound = (self.y @ multiplier - self.eps * np.abs(multiplier).sum()) / max(size, 1.0)
        return abs(norm - bound) / norm


def _shrink(v, t, psd):
    """Return the minimiser of t ||X||_* + ||X - v||_F^2 / 2, over the PSD cone if asked."""
    if psd:
        values, vectors = np.linalg.eigh((v + v.T) / 2)
        return (vectors * np.maximum(values - t, 0)) @ vectors.T
    left, s, right = np.linalg.svd(v, full_matrices=False)
    return (left * np.maximum(s - t, 0)) @ right


def nuclear_norm(operator, y, *, eps=0.0, psd=False, tol=1e-6, max_iter=20_000):
    """Minimise the nuclear norm over the matrices that meet the measurements, by ADMM.

    X = shrink(Z - U), Z = projection of X + U on |A(X) - y| <= eps, U <- U + X - Z, with the step's weight rho kept
    where both residuals fall alike (Boyd, Parikh, Chu, Peleato, Eckstein 2011, sections 3.3 and 3.4.1). U is A^T of a
    multiplier, which after scaling is feasible for the dual, max <y, z> - eps ||z||_1 subject to ||A^T z||_2 <= 1 (PSD:
    eigenvalues <= 1).

    Parameters
    ----------
    operator : EntryMask or GaussianDense
    y : ndarray of shape (m,)
    eps : float
        Largest deviation of a measurement; Arora, Cohen, Hu and Luo 2019 allow 1e-3.
    psd : bool
        Over the positive semidefinite matrices, where the nuclear norm is the trace.
    tol : float
        On the relative duality gap.
    max_iter : int

    Returns
    -------
    Convex
    """
    measured = _Measured(operator, y, eps)
    z, w = measured.project(np.zeros(measured.size + measured.n_slack))
    u, gap, iteration = np.zeros_like(z), 0.0, 0
    if not z.any():  # zero meets the measurements
        return Convex(np.zeros(measured.shape), gap, iteration)
    rho = 1.0 / np.linalg.norm(z[: measured.size].reshape(measured.shape), 2)
    for iteration in range(1, max_iter + 1):
        x = measured.shrink(z - u, 1 / rho, psd)
        before, (z, w) = z, measured.project(x + u)
        u = x + u - z  # = -(A^T w, -unit w)
        primal, dual = np.linalg.norm(x - z), np.linalg.norm(z - before)
        if iteration % 10 == 0 or iteration == max_iter:
            gap = measured.gap(z[: measured.size], rho * w, psd)
            if gap <= tol and primal <= tol * np.linalg.norm(z):
                break
            scale = 2.0 if primal > 5 * dual else 0.5 if dual > 5 * primal else 1.0
            rho, u = rho * scale, u / scale
    return Convex(z[: measured.size].reshape(measured.shape), gap, iteration)


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
            return _shrink(point, 0.0, True)  # momentum may have left the cone
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
