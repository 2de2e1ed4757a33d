"""The operators: entry masks, dense, seeded and rank-one measurements, and any scipy LinearOperator."""

import numpy as np

from fastdmf.contract import Bound, Operator, check_real, check_shape
from fastdmf.masks import EntryMask
from fastdmf.seeded import GaussianSeeded

__all__ = ["EntryMask", "GaussianDense", "GaussianSeeded", "Operator", "RankOne", "as_operator"]

# Not a seed that measurements are likely to have been drawn with: probes must be independent of them.
_PROBE_SEED = 0x66617374646D66


class GaussianDense(Operator):
    """Dense measurements <A_i, X>, usually with Gaussian A_i (matrix sensing).

    Parameters
    ----------
    a : array of shape (m, n1, n2), or (m, n1 * n2) with ``shape``
        The measurement matrices; float32 and float64 are kept as they are.
    shape : tuple of int, optional
        (n1, n2), needed when ``a`` is flat.

    Raises
    ------
    TypeError, ValueError
        If ``a`` is not real and finite, or does not fit ``shape``.

    Notes
    -----
    One evaluation reads A once: four rows at a time, r = A vec(W) - y, then G += A^T (w psi) while they are in cache.
    """

    def __init__(self, a, shape=None):
        a = check_real("a", a, (2, 3))
        if a.ndim == 3 and shape is None:
            shape = a.shape[1:]
        if shape is None:
            raise ValueError(f"a of shape {a.shape} needs shape=(n1, n2)")
        self.shape = check_shape(shape)
        n1, n2 = self.shape
        if a[0:1].size != (n1 * n2 if len(a) else 0) or (a.ndim == 3 and a.shape[1:] != self.shape):
            raise ValueError(f"a of shape {a.shape} does not fit shape={self.shape} ({n1 * n2} entries)")
        self.a = a.reshape(len(a), n1 * n2)
        self.size = len(a)

    @property
    def dtype(self):
        return self.a.dtype

    def apply(self, x):
        return self.a @ x.ravel()

    def adjoint(self, r):
        return (r @ self.a).reshape(self.shape)

    def restrict(self, index):
        return GaussianDense(self.a[index], self.shape)

    def squared_norms(self):
        return np.einsum("ij,ij->i", self.a, self.a, dtype=np.float64)

    @property
    def _bound(self):
        return _BoundGaussian


class _BoundGaussian(Bound):
    """Dense measurements: the fused kernel, which shares one read of A among the batch."""

    # Row ranges with a gradient of their own, added in order: the same bits for any number of threads.
    _N_RANGES = 8
    # Multiply-adds under which the parallel region costs more than it saves.
    _SERIAL_BELOW = 200_000

    def __init__(self, operator, backend, y, weights, loss, dtype, width=None, batch=1):
        super().__init__(operator, backend, y, weights, loss, dtype, width, batch)
        self._a = np.ascontiguousarray(operator.a, dtype)

    def loss_and_adjoint(self, x, out):
        batch, (m, d) = len(x), self._a.shape
        losses = np.empty(batch)
        # Out of place, then over: the kernel reads x while it writes.
        g = self._buffer("g", (batch, d))
        kernels, loss = self.backend.kernels, self.loss
        x = np.ascontiguousarray(x.reshape(batch, d))
        arguments = (g, losses, self._a, x, self.y, self.weights, loss.code, loss.delta)
        if batch * m * d < self._SERIAL_BELOW:
            kernels.gaussian_loss_pull_serial(*arguments)
        else:
            ranges = min(self._N_RANGES, max(m // 4, 1))
            kernels.gaussian_loss_pull(*arguments, self._buffer("partial", (ranges, batch, d)))
        out[:] = g.reshape(out.shape)
        return losses

    def forward(self, p, qt):
        x = np.matmul(p, qt.swapaxes(1, 2)).reshape(len(p), -1)
        out = np.empty((len(p), self.operator.size), self.dtype)
        self.backend.kernels.gaussian_forward(out, self._a, x)
        return out


class RankOne(Operator):
    """Rank-one measurements a_i^T X b_i, never formed as matrices.

    Parameters
    ----------
    a : array of shape (m, n1)
    b : array of shape (m, n2), optional
        Default ``a``: x_i^T X x_i, the quadratic networks of Li, Ma and Zhang 2018 (section 5) and phase retrieval.

    Raises
    ------
    TypeError, ValueError
        If they are not real and finite, or differ in length.

    Notes
    -----
    A(P Q)_i = sum_h (a P)_ih (b Q^T)_ih; G Q^T = a^T (g o b Q^T): 4 m (n1 + n2) h flops an evaluation and no
    n1 x n2 matrix.
    """

    def __init__(self, a, b=None):
        self.a = check_real("a", a, (2,))
        self.b = self.a if b is None else check_real("b", b, (2,))
        if len(self.a) != len(self.b):
            raise ValueError(f"a and b must hold as many vectors, got {len(self.a)} and {len(self.b)}")
        self.shape = check_shape((self.a.shape[1], self.b.shape[1]))
        self.size = len(self.a)

    @property
    def dtype(self):
        return np.result_type(self.a, self.b)

    def apply(self, x):
        return np.einsum("ij,ij->i", self.a @ x, self.b)

    def adjoint(self, r):
        return (self.a * r[:, None]).T @ self.b

    def restrict(self, index):
        a = self.a[index]
        return RankOne(a, a if self.b is self.a else self.b[index])

    def squared_norms(self):
        a2 = np.einsum("ij,ij->i", self.a, self.a, dtype=np.float64)
        return a2 * np.einsum("ij,ij->i", self.b, self.b, dtype=np.float64)

    @property
    def _bound(self):
        return _BoundRankOne


class _BoundRankOne(Bound):
    """Rank-one measurements through the thin products a P and b Q^T."""

    def __init__(self, operator, backend, y, weights, loss, dtype, width=None, batch=1):
        super().__init__(operator, backend, y, weights, loss, dtype, width, batch)
        self._a = np.ascontiguousarray(operator.a, dtype)
        self._b = self._a if operator.b is operator.a else np.ascontiguousarray(operator.b, dtype)

    def forward(self, p, qt):
        return np.einsum("bmh,bmh->bm", self._a @ p, self._b @ qt)

    def pull(self, r, p, qt):
        r = r[:, :, None]
        return self._a.T @ (r * (self._b @ qt)), self._b.T @ (r * (self._a @ p))

    def loss_and_pull(self, p, qt, gp, gqt, probe=None):
        ap, bq = self._a @ p, self._b @ qt
        predictions = np.einsum("bmh,bmh->bm", ap, bq)
        r = self.psi(predictions)
        np.matmul(self._a.T, r[:, :, None] * bq, out=gp)
        np.matmul(self._b.T, r[:, :, None] * ap, out=gqt)
        if probe is not None:
            u, v = probe
            gv, gu = self.pull(r, u[:, :, None], v[:, :, None])
            u[:], v[:] = gv[:, :, 0], gu[:, :, 0]
        return self._weighted_sum(self.loss.rho(predictions - self.y))


class _Linear(Operator):
    """Any scipy LinearOperator that maps vec(X) (C order, n1 n2 numbers) to m numbers."""

    _N_PROBES = 16

    def __init__(self, op, shape):
        from scipy.sparse.linalg import aslinearoperator

        self.op = aslinearoperator(op)
        self.shape = check_shape(shape)
        self.size = self.op.shape[0]
        if np.dtype(self.op.dtype or float).kind == "c":
            raise TypeError(f"operator must be real, got dtype {self.op.dtype}")
        if self.op.shape[1] != self.shape[0] * self.shape[1]:
            raise ValueError(
                f"operator takes vectors of length {self.op.shape[1]}, but shape={self.shape} has "
                f"{self.shape[0] * self.shape[1]} entries"
            )

    def apply(self, x):
        return np.asarray(self.op.matvec(x.ravel()))

    def adjoint(self, r):
        return np.asarray(self.op.rmatvec(r)).reshape(self.shape)

    def restrict(self, index):
        return _Restricted(self, index)

    def squared_norms(self):
        """Estimate by E (A(X)_i)^2 = ||A_i||_F^2 for X of independent standard normals, 16 draws, fixed seed."""
        rng = np.random.default_rng(_PROBE_SEED)
        total = np.zeros(self.size)
        for _ in range(self._N_PROBES):
            total += self.apply(rng.standard_normal(self.shape)).astype(np.float64) ** 2
        return total / self._N_PROBES


class _Restricted(Operator):
    """Some of the measurements of an operator that has no cheaper way to leave the others out."""

    def __init__(self, operator, index):
        self.operator, self.index = operator, np.asarray(index)
        self.shape, self.size = operator.shape, len(self.index)

    def apply(self, x):
        return self.operator.apply(x)[self.index]

    def adjoint(self, r):
        full = np.zeros(self.operator.size, r.dtype)
        full[self.index] = r
        return self.operator.adjoint(full)

    def restrict(self, index):
        return _Restricted(self.operator, self.index[index])

    def squared_norms(self):
        return self.operator.squared_norms()[self.index]


def as_operator(op, shape=None):
    """Return ``op`` as an :class:`Operator`.

    Parameters
    ----------
    op : Operator, scipy LinearOperator, ndarray or sparse matrix
        Anything but an Operator must map vec(X), in C order, to the measurements.
    shape : tuple of int, optional
        (n1, n2); needed for anything but an Operator.

    Raises
    ------
    TypeError, ValueError
        If ``op`` is not linear algebra, or its width is not n1 n2.
    """
    if isinstance(op, Operator):
        return op
    if shape is None:
        raise TypeError(
            f"operator must be a fastdmf operator, or come through fastdmf.operators.as_operator(op, shape); "
            f"got {type(op).__name__}"
        )
    try:
        return _Linear(op, shape)
    except TypeError as error:
        raise TypeError(f"operator of type {type(op).__name__} is not a linear operator: {error}") from None
