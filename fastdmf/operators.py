"""The operators: entry masks, dense, seeded and rank-one measurements, and any scipy LinearOperator."""

from copy import copy

import numpy as np

from fastdmf.arrays import as_host, as_native
from fastdmf.contract import Bound, Operator, check_real, check_shape
from fastdmf.masks import EntryMask
from fastdmf.seeded import GaussianSeeded

__all__ = ["EntryMask", "GaussianDense", "GaussianSeeded", "Operator", "RankOne", "as_operator"]

# Not a seed that measurements are likely to have been drawn with: probes must be independent of them.
_PROBE_SEED = 0x66617374646D66


def _rows(a, index):
    """Return ``a[index]`` for an index array of the host, wherever ``a`` lives."""
    xp, a = as_native(a)
    return a[xp.asarray(index)]


class GaussianDense(Operator):
    """Dense measurements <A_i, X>, usually with Gaussian A_i (matrix sensing).

    Parameters
    ----------
    a : array of shape (m, n1, n2), or (m, n1 * n2) with ``shape``
        The measurement matrices; float32 and float64 are kept as they are.
    shape : tuple of int, optional
        (n1, n2), needed when ``a`` is flat.
    storage : {None, "float16"}
        ``"float16"`` keeps a copy of ``a`` rounded to half precision, for half of float32's memory and time; whatever
        is computed with it is float32.

    Raises
    ------
    TypeError, ValueError
        If ``a`` is not real and finite, does not fit ``shape``, or has numbers too large or too small for float16.

    Notes
    -----
    One evaluation reads A once: four rows at a time, r = A vec(W) - y, then G += A^T (w psi) while they are in cache.

    Rounded to float16, N(0, 1) numbers change by 2e-4 of their norm. The matrix of rank 3 that descent recovers from
    1,200 of its 40 x 40 measurements is then wrong by 1.5e-4 of its norm, where float32 leaves 1.0e-4
    (``bench/test_gaussian.py -k rounding``).
    """

    # Rounding to float16 leaves 2e-4 of the norm where its normal numbers, from 6e-5 on, hold the weight.
    _MOST_ROUNDING = 1e-3
    _BLOCK = 1 << 20  # numbers that are converted at once

    def __init__(self, a, shape=None, *, storage=None):
        if storage not in (None, "float16"):
            raise ValueError(f"storage must be None or 'float16', got {storage!r}")
        a = check_real("a", a, (2, 3)) if storage is None else self._rounded(np.asarray(a))
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
        self.storage = storage

    @classmethod
    def _rounded(cls, a):
        """Return ``a`` as float16, checked and converted a block at a time."""
        check_real("a", a[:0] if a.ndim in (2, 3) else a, (2, 3))
        out = np.empty(a.shape, np.float16)
        step = max(cls._BLOCK // max(a[:1].size, 1), 1)
        error = total = 0.0
        for i in range(0, len(a), step):
            block, half = check_real("a", a[i : i + step], (2, 3)), out[i : i + step]
            with np.errstate(over="ignore"):
                half[:] = block
            if not np.isfinite(half).all():
                raise ValueError(
                    f"a holds {np.abs(block).max():.3g}, float16 ends at 65504: scale a and y down, "
                    "or leave storage=None"
                )
            error += np.sum((block - half) ** 2, dtype=np.float64)
            total += np.sum(block**2, dtype=np.float64)
        if error > cls._MOST_ROUNDING**2 * total:
            raise ValueError(
                f"a loses {np.sqrt(error / total):.1e} of its norm in float16, which has few digits below 6e-5: "
                "scale a and y up, or leave storage=None"
            )
        return out

    @property
    def dtype(self):
        return np.dtype(np.float32) if self.storage else self.a.dtype

    def _blocks(self):
        """Yield slices of measurements and A there, in the precision of the computation."""
        step = max(self._BLOCK // self.a.shape[1], 1) if self.storage else max(self.size, 1)
        for i in range(0, self.size, step):
            yield slice(i, i + step), self.a[i : i + step].astype(self.dtype, copy=False)

    def apply(self, x):
        out = np.zeros(self.size, np.result_type(x, self.dtype))
        for at, a in self._blocks():
            out[at] = a @ x.ravel()
        return out

    def adjoint(self, r):
        out = np.zeros(self.a.shape[1], np.result_type(r, self.dtype))
        for at, a in self._blocks():
            out += r[at] @ a
        return out.reshape(self.shape)

    def restrict(self, index):
        part = copy(self)
        part.a = _rows(self.a, index)
        part.size = len(part.a)
        return part

    def squared_norms(self):
        out = np.zeros(self.size)
        for at, a in self._blocks():
            out[at] = as_host(np.einsum("ij,ij->i", a, a, dtype=np.float64))
        return out

    def _bound_on(self, backend):
        if backend.name == "cpu":
            return _BoundGaussian
        from fastdmf.device_bounds import DeviceGaussian

        return DeviceGaussian


class _BoundGaussian(Bound):
    """Dense measurements: the fused kernel, which shares one read of A among the batch."""

    compiled = True
    # Row ranges with a gradient of their own, added in order: the same bits for any number of threads.
    _N_RANGES = 8
    # Multiply-adds under which the parallel region costs more than it saves.
    _SERIAL_BELOW = 200_000

    def __init__(self, operator, backend, y, weights, loss, dtype, width=None, batch=1):
        super().__init__(operator, backend, y, weights, loss, dtype, width, batch)
        if operator.storage is None:
            self._a = backend.asarray(operator.a, dtype)
        elif dtype == np.float32:
            self._a = np.ascontiguousarray(operator.a).view(np.uint16)  # the kernels' form of float16
        else:
            raise ValueError(f"storage='float16' computes in float32, not in {dtype}: pass dtype='float32'")

    def _run(self, name, out, *arguments, scratch=True):
        """Call a kernel, or its serial variant where the work is small; ``out`` has a row for each of the batch."""
        m, d = self._a.shape
        kernels, batch = self.backend.kernels, len(out)
        if batch * m * d < self._SERIAL_BELOW:
            getattr(kernels, f"{name}_serial")(out, *arguments)
        elif scratch:
            ranges = min(self._N_RANGES, max(m // 4, 1))
            getattr(kernels, name)(out, *arguments, self._buffer("partial", (ranges, batch, d)))
        else:
            getattr(kernels, name)(out, *arguments)

    def loss_and_adjoint(self, x, out):
        batch, d = len(x), self._a.shape[1]
        losses = np.empty(batch)
        # Out of place, then over: the kernel reads x while it writes.
        g = self._buffer("g", (batch, d))
        x = np.ascontiguousarray(x.reshape(batch, d))
        data = self.y, self.weights, self.loss.code, self.loss.delta
        self._run("gaussian_loss_pull", g, losses, self._a, x, *data)
        out[:] = g.reshape(out.shape)
        return losses

    def forward(self, p, qt):
        x = np.matmul(p, qt.swapaxes(1, 2)).reshape(len(p), -1)
        out = np.empty((len(p), self.operator.size), self.dtype)
        self._run("gaussian_forward", out, self._a, x, scratch=False)
        return out

    def pull(self, r, p, qt):
        g = self._buffer("g", (len(r), self._a.shape[1]))
        self._run("gaussian_pull", g, self._a, np.ascontiguousarray(r, self.dtype))
        g = g.reshape(len(r), *self.operator.shape)
        return np.matmul(g, qt), np.matmul(g.swapaxes(1, 2), p)


class RankOne(Operator):
    """Rank-one measurements a_i^T X b_i, never formed as matrices.

    Parameters
    ----------
    a : array of shape (m, n1)
    b : array of shape (m, n2), optional
        Default ``a``: x_i^T X x_i, the quadratic networks of Li, Ma and Zhang 2018 and phase retrieval.

    Raises
    ------
    TypeError, ValueError
        If they are not real and finite, or differ in length.

    Notes
    -----
    A(P Q)_i = sum_h (a P)_ih (b Q^T)_ih; G Q^T = a^T (g o b Q^T): 4 m (n1 + n2) h flops an evaluation and no
    n1 x n2 matrix; half of them for U U^T with b = a, where both products are one.
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
        a = _rows(self.a, index)
        return RankOne(a, a if self.b is self.a else _rows(self.b, index))

    def squared_norms(self):
        a2 = np.einsum("ij,ij->i", self.a, self.a, dtype=np.float64)
        return as_host(a2 * np.einsum("ij,ij->i", self.b, self.b, dtype=np.float64))

    def _bound_on(self, backend):
        return _BoundRankOne


class _BoundRankOne(Bound):
    """Rank-one measurements through the thin products a P and b Q^T."""

    def __init__(self, operator, backend, y, weights, loss, dtype, width=None, batch=1):
        super().__init__(operator, backend, y, weights, loss, dtype, width, batch)
        self._a = backend.asarray(operator.a, dtype)
        self._b = self._a if operator.b is operator.a else backend.asarray(operator.b, dtype)

    def _products(self, p, qt, keep=False):
        """Return (a P, b Q^T), one array where they are one product; with ``keep`` in scratch memory."""

        def product(name, a, x):
            return np.matmul(a, x, out=self._buffer(name, (len(x), len(a), x.shape[2])) if keep else None)

        ap = product("ap", self._a, p)
        return ap, ap if qt is p and self._b is self._a else product("bq", self._b, qt)

    def forward(self, p, qt):
        return np.einsum("bmh,bmh->bm", *self._products(p, qt))

    def pull(self, r, p, qt):
        gp, gqt = np.empty_like(p), np.empty_like(qt)
        self._pull(r, *self._products(p, qt), gp, gqt)
        return gp, gqt

    def _pull(self, r, ap, bq, gp, gqt):
        """Write a^T (r o b Q^T) and b^T (r o a P); the products are overwritten."""
        bq *= r[:, :, None]
        np.matmul(self._a.T, bq, out=gp)
        if bq is ap:
            gqt[:] = gp
            return
        ap *= r[:, :, None]
        np.matmul(self._b.T, ap, out=gqt)

    def loss_and_pull(self, p, qt, gp, gqt, probe=None):
        ap, bq = self._products(p, qt, keep=True)
        predictions = np.einsum("bmh,bmh->bm", ap, bq)
        r = self.psi(predictions)
        self._pull(r, ap, bq, gp, gqt)
        if probe is not None:
            u, v = probe
            gv, gu = self.pull(r, u[:, :, None], v[:, :, None])
            u[:], v[:] = gv[:, :, 0], gu[:, :, 0]
        return self._weighted_sum(self.loss.rho(predictions - self.y, self.y))


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
