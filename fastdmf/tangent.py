"""The tangent space of the rank-r matrices, ridge regressions in it, and Gauss-Newton steps along it.

At X = U diag(s) V^T the tangent vectors are T g = U C V^T + M V^T + U Z^T with C (r, r), M (n1, r), Z (n2, r),
U^T M = 0 and V^T Z = 0. T is an isometry, so that norms of g are norms of matrices. A vector g is kept as one array
(r + n1 + n2, r): C above M above Z.

U, V, tangent vectors and all that has rows or entries live where the backend computes; s and what is decided by, and
cores of the size of the rank, on the host.
"""

from dataclasses import dataclass

import numpy as np

from fastdmf.arrays import as_host, as_native

__all__ = [
    "SETTLED",
    "LowRank",
    "Measurements",
    "Tangent",
    "degrees_of_freedom",
    "gauss_newton",
    "ridge_solve",
    "thin_svd",
]

SETTLED = 3e-3  # relative residual from which a fit without noise converges quadratically
_CG_EXACT = 1000  # conjugate gradients a step from there on
_STEPS_EXACT = 60
_PRODUCTS = 20_000  # normal products after which a start is given up
_STALL, _STALL_GAIN = 8, 1.3  # steps that must gain this factor
_END_GAIN = 1.02  # the same of two steps near the end
_STILL = 0.1  # length of a step, relative to X and in units of the residual, that changes nothing


@dataclass
class LowRank:
    """X = u diag(s) v^T with orthonormal columns, s descending and on the host."""

    u: np.ndarray
    s: np.ndarray
    v: np.ndarray

    @classmethod
    def of(cls, parts, xp):
        """Return what ``parts`` were taken of, as arrays of ``xp``."""
        u, s, v = parts
        return cls(xp.asarray(u), s, xp.asarray(v))

    @property
    def rank(self):
        return len(self.s)

    def truncated(self, rank):
        """Return the best approximation of this rank."""
        return LowRank(self.u[:, :rank].copy(), self.s[:rank], self.v[:, :rank].copy())

    def parts(self):
        """Return (u, s, v) on the host."""
        return as_host(self.u), self.s, as_host(self.v)

    def distance(self, other):
        """Return ||X - Y||_F / ||X||_F."""
        left = np.concatenate([scaled(self.u, self.s), scaled(-other.u, other.s)], axis=1)
        difference = thin_svd(left, np.concatenate([self.v, other.v], axis=1).T)
        return float(np.linalg.norm(difference.s) / max(np.linalg.norm(self.s), 1e-300))

    def balanced(self):
        """Return [W_1, W_2] with W_2 W_1 = X and W_1 W_1^T = W_2^T W_2."""
        root = np.sqrt(self.s)
        return [scaled(self.v, root).T.copy(), scaled(self.u, root)]


def scaled(u, s):
    """Return u diag(s) for ``s`` of the host."""
    xp, u = as_native(u)
    return u * xp.asarray(s)


def degrees_of_freedom(shape, rank):
    """Return r (n1 + n2 - r), the dimension of the set of rank-r matrices."""
    return rank * (shape[0] + shape[1] - rank)


def thin_svd(left, right):
    """Return left @ right, (n1, h) and (h, n2), as a :class:`LowRank` of rank h at most."""
    u, a = np.linalg.qr(left)
    v, b = np.linalg.qr(right.T)
    inner, s, outer = np.linalg.svd(as_host(a) @ as_host(b).T)
    k, (xp, _) = len(s), as_native(u)
    return LowRank(u @ xp.asarray(inner[:, :k]), s, v @ xp.asarray(outer[:k].T))


class Measurements:
    """An operator with its data in float64, and with zeros in their place: what tangent vectors are measured by.

    Parameters
    ----------
    operator : Operator
    y : ndarray of shape (m,)
        On the host, as the weights.
    weights : ndarray of shape (m,) or None
        With mean 1.
    backend : Backend

    Attributes
    ----------
    unit : float
        Mean squared norm of a measurement: curvature of the data term along its own direction.
    curvature : float
        Mean curvature over all directions, m unit / (n1 n2).
    """

    def __init__(self, operator, y, weights, backend):
        self.operator, self.y, self.weights, self.backend, self.xp = operator, y, weights, backend, backend.xp
        weights = None if weights is None else weights[None]
        self.bound = operator.bind(backend, y[None], weights=weights, width=16)
        self.homogeneous = self.bound.homogeneous()
        self.null = max(float(self.bound.null_losses()[0]), 1e-300)
        n1, n2 = operator.shape
        self.unit = float(operator.squared_norms().mean())
        self.curvature = operator.size * self.unit / (n1 * n2)
        self.n_eval = 0

    def restrict(self, index):
        """Return the measurements ``index`` alone."""
        weights = None if self.weights is None else self.weights[index]
        return Measurements(self.operator.restrict(index), self.y[index], weights, self.backend)

    def buffers(self, width):
        """Return P, Q^T, G Q^T and G^T P, zeros in rows as wide as the kernels take them without a copy.

        On a device, four widths an octave: its kernels are compiled for each.
        """
        kernels = self.backend.kernels
        multiple = kernels.row_multiple(np.dtype(float))
        if self.backend.name != "cpu":
            multiple = max(multiple, 1 << max((width - 1).bit_length() - 3, 0))
        arrays = []
        for n in 2 * self.operator.shape:
            arrays.append(kernels.aligned_empty((1, n, -(-width // multiple) * multiple), np.dtype(float)))
            arrays[-1][:] = 0
        return arrays

    def loss(self, x):
        """Return sum w (A(X) - y)^2 / sum w y^2 for a :class:`LowRank`."""
        u, v = self.xp.asarray(x.u), self.xp.asarray(x.v)
        return float(self.bound.losses(scaled(u, x.s)[None], v[None])[0]) / self.null


class Tangent:
    """Tangent vectors at u diag(s) v^T and their measurements.

    One pass over P = [U C + M, U], Q^T = [V, Z] gives A(P Q) - y and, with G its adjoint image, G V among the columns
    of G Q^T and G^T U among those of G^T P: a product with T^T A* A T costs one fused evaluation of width 2 r.

    Parameters
    ----------
    data : Measurements
    x : LowRank
    """

    def __init__(self, data, x):
        self.data, self.xp, self.u, self.v = data, data.xp, x.u, x.v
        self.rank = r = x.rank
        self.shape = (r + len(x.u) + len(x.v), r)
        self._p, self._qt, self._gp, self._gqt = data.buffers(2 * r)
        self._p[0, :, r : 2 * r], self._qt[0, :, :r] = x.u, x.v
        self.point = self.xp.zeros(self.shape)
        self.point[:r] = self.xp.asarray(np.diag(x.s))

    def parts(self, g):
        """Return views of C, M and Z."""
        r, n1 = self.rank, len(self.u)
        return g[:r], g[r : r + n1], g[r + n1 :]

    def halves(self, g):
        """Return P and Q^T, of width 2 r, with P Q = T g."""
        c, m, z = self.parts(g)
        return np.concatenate([m + self.u @ c, self.u], axis=1), np.concatenate([self.v, z], axis=1)

    def _place(self, g):
        """Write P and Q^T for T g."""
        c, m, z = self.parts(g)
        r = self.rank
        np.add(self.u @ c, m, out=self._p[0, :, :r])
        self._qt[0, :, r : 2 * r] = z

    def _pass(self, bound, g):
        r = self.rank
        self._place(g)
        loss = bound.loss_and_pull(self._p, self._qt, self._gp, self._gqt)[0]
        self.data.n_eval += 1
        gv, gu = self._gp[0, :, :r], self._gqt[0, :, r : 2 * r]
        out = self.xp.empty(self.shape)
        c, m, z = self.parts(out)
        np.matmul(self.u.T, gv, out=c)
        np.subtract(gv, self.u @ c, out=m)
        np.subtract(gu, self.v @ c.T, out=z)
        return loss, out

    def residual(self, g):
        """Return sum w (A(T g) - y)^2 / sum w y^2, where g lives, and T^T A*(w (A(T g) - y))."""
        loss, slope = self._pass(self.data.bound, g)
        return loss / self.data.null, slope

    def normal(self, g):
        """Return T^T A* w A T g."""
        return self._pass(self.data.homogeneous, g)[1]

    def predict(self, g):
        """Return A(T g), (1, m)."""
        self._place(g)
        # Behind 2 r are zeros; on a device kernels have been compiled for the whole width.
        h = 2 * self.rank if self.data.backend.name == "cpu" else self._p.shape[2]
        return self.data.bound.forward(self._p[:, :, :h], self._qt[:, :, :h])

    def svd(self, g):
        """Return T g, of rank 2 r at most, as a :class:`LowRank`."""
        c, m, z = self.parts(g)
        r = self.rank
        left, a = np.linalg.qr(np.concatenate([self.u, m], axis=1))
        right, b = np.linalg.qr(np.concatenate([self.v, z], axis=1))
        a, b, c = self.data.backend.host(a, b, c)
        core = np.zeros((2 * r, 2 * r))
        core[:r, :r] = c
        core[r:, :r] = core[:r, r:] = np.eye(r)
        u, s, vt = np.linalg.svd(a @ core @ b.T)
        return LowRank(left @ self.xp.asarray(u), s, right @ self.xp.asarray(vt.T))


def ridge_solve(tangent, b, ridge, tol, max_iter):
    """Return the g with (T^T A* w A T + ridge) g = b, and the iterations it took.

    Conjugate gradients, preconditioned by 1 / (mean curvature + ridge). The host waits once an iteration, for the three
    numbers that end them; a step that these refuse is not kept.

    Parameters
    ----------
    tangent : Tangent
    b : ndarray of the shape of g
    ridge : ndarray of the shape of g, or float
    tol : float
        On the norm of the residual relative to that of b.
    max_iter : int
    """
    host = tangent.data.backend.host
    inverse = 1 / (tangent.data.curvature + ridge)
    x, r = np.zeros_like(b), b
    z = inverse * r
    d, rz = z, np.vdot(r, z)
    size, left = host(np.vdot(r, r), rz)
    stop, floor = tol**2 * size, 1e-28 * left
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        for iteration in range(max_iter):
            if size <= stop or left <= floor:
                return x, iteration
            q = tangent.normal(d)
            q += ridge * d
            bend = np.vdot(d, q)
            step = rz / bend
            moved, r = x + step * d, r - step * q
            z = inverse * r
            before, rz = rz, np.vdot(r, z)
            d = z + (rz / before) * d
            bend, size, left = host(bend, np.vdot(r, r), rz)
            if not bend > 0:  # nothing was left of d but rounding
                return x, iteration
            x = moved
    return x, max_iter


def gauss_newton(data, x, steps, tol, max_cg, *, damping=1e-3, penalty=0.0):
    """Fit a matrix of the rank of ``x`` to the data by damped Gauss-Newton steps along the tangent space.

    min over X of rank r of  sum w (A(X) - y)^2 / 2 + penalty curvature ||X||_F^2 / 2. A step solves the linear
    problem in the tangent space with a ridge on the step (Levenberg and Marquardt), by conjugate gradients, and returns
    to rank r by truncation. The ridge shrinks with the residual, so that the end converges quadratically.

    Parameters
    ----------
    data : Measurements
    x : LowRank
        The start.
    steps : int
        At most; more are allowed once the residual is so small that the end is near.
    tol : float
        On the relative residual sqrt(sum w r^2 / sum w y^2).
    max_cg : int
        Conjugate gradients a step.
    damping, penalty : float
        In units of the mean curvature.

    Returns
    -------
    x : LowRank
    residual : float
    """
    tangent = Tangent(data, x)
    weight = penalty * data.curvature
    size = data.null  # of the data term, to which the penalty is relative
    host = data.backend.host

    def measure(at):
        loss, slope = at.residual(at.point)
        if weight:
            loss += weight * np.vdot(at.point, at.point) / size
            slope += weight * at.point
        return host(np.sqrt(loss))[()], slope

    residual, slope = measure(tangent)
    path, last = [residual], data.n_eval + _PRODUCTS
    while residual >= tol and data.n_eval < last and len(path) <= (steps if residual > SETTLED else _STEPS_EXACT):
        if residual < SETTLED:
            max_cg = max(max_cg, _CG_EXACT)
        for _ in range(6):
            ridge = damping * data.curvature + weight
            g, _ = ridge_solve(tangent, -slope, ridge, max(1e-12, min(1e-3, 0.1 * residual)), max_cg)
            trial = tangent.svd(tangent.point + g).truncated(x.rank)
            at = Tangent(data, trial)
            new, new_slope = measure(at)
            if new < residual:
                break
            damping = max(10 * damping, 1e-8)
        else:
            break
        damping /= 10 if new < 0.5 * residual else 2
        if new < 1e-3:
            damping = min(damping, new**2)
        x, tangent, residual, slope = trial, at, new, new_slope
        path.append(residual)
        settled = host(np.vdot(g, g)) < (_STILL * residual) ** 2 * np.vdot(x.s, x.s)
        if residual < SETTLED and settled and path[-min(3, len(path))] < _END_GAIN * residual:
            break  # noise that small; in a flat valley on the way to an exact fit the steps would be longer
        if len(path) > _STALL + 1 and path[-1 - _STALL] < _STALL_GAIN * residual:
            if residual > SETTLED or len(path) > 25:
                break
    return x, residual
