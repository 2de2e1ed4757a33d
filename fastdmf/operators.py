"""Linear maps R^(n1 x n2) -> R^m and their bound forms.

An :class:`Operator` is the map alone: ``apply``, ``adjoint`` and the squared norms of its measurements. Binding it to
data gives a :class:`Bound`, which owns y and the weights in the order of its kernels and answers the one question
of a descent: the loss at W = P Q and the two thin products G Q^T and G^T P of its gradient
G = A*(w psi(A(W) - y)). It never sees depth, factors or rule.

Shapes: ``p`` is (B, n1, h), ``qt`` = Q^T is (B, n2, h), with a leading batch axis that is always there; y and the
weights are (1, m) when the batch shares them, (B, m) when not.

The methods of the base classes go through ``apply`` and ``adjoint``: they serve any scipy LinearOperator and are the
oracle that every override is tested against.
"""

import numpy as np

from fastdmf.losses import as_loss

# Not a seed that measurements are likely to have been drawn with: probes must be independent of them.
_PROBE_SEED = 0x66617374646D66

__all__ = ["Bound", "EntryMask", "GaussianDense", "Operator", "RankOne", "as_operator"]


def _check_shape(shape):
    """Return ``shape`` as two positive Python integers."""
    try:
        n1, n2 = shape
        if int(n1) != n1 or int(n2) != n2:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"shape must be two integers (n1, n2), got {shape!r}") from None
    if n1 < 1 or n2 < 1:
        raise ValueError(f"shape must be positive in both directions, got {tuple(shape)}")
    return int(n1), int(n2)


def _check_real(name, array, ndims):
    """Return ``array`` as a finite float32 or float64 C-contiguous array with one of the ``ndims``."""
    array = np.asarray(array)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    if array.ndim not in ndims:
        wanted = " or ".join(str(n) for n in ndims)
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {array.shape}")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if not np.isfinite(array.sum()) and not np.isfinite(array).all():
        raise ValueError(f"{name} contains NaN or infinite values")
    return np.ascontiguousarray(array)


class Operator:
    """A linear map from n1 x n2 matrices to m numbers.

    A subclass sets ``shape`` and ``size`` and supplies :meth:`apply`, :meth:`adjoint`, :meth:`restrict` and
    :meth:`squared_norms`; one with a faster way than through the full matrix also supplies a :class:`Bound`.

    Attributes
    ----------
    shape : tuple of int
        (n1, n2) of the matrix.
    size : int
        Number of measurements m.
    """

    shape: tuple
    size: int
    # Ratio between the top curvature of the data term near a low-rank matrix and its mean over all directions:
    # the constants that the self-tuned rule starts from (it raises them by itself where they are too small).
    curvature_factor = 2.0

    def apply(self, x):
        """Return A(x), shape (m,), for ``x`` of shape (n1, n2)."""
        raise NotImplementedError

    def adjoint(self, r):
        """Return A*(r), shape (n1, n2), for ``r`` of shape (m,)."""
        raise NotImplementedError

    def restrict(self, index):
        """Return the operator of the measurements ``index`` alone."""
        raise NotImplementedError

    def squared_norms(self):
        """Return ||A_i||_F^2 of every measurement matrix, shape (m,), float64."""
        raise NotImplementedError

    @property
    def dtype(self):
        """The precision of the operator's own numbers; None when it has none."""
        return None

    def bind(self, backend, y, *, weights=None, loss="squared", dtype=np.float64, width=None, batch=1):
        """Return the operator with its data, ready for ``backend``.

        Parameters
        ----------
        backend : fastdmf.backend.Backend
        y : ndarray of shape (1, m) or (B, m)
        weights : ndarray of shape (1, m) or (B, m), optional
        loss : ElementwiseLoss or its name
        dtype : numpy dtype, float32 or float64
        width : int, optional
            The inner width h that will be asked for; a hint for the choice of the route.
        batch : int
            Number of slices B that will be asked for; likewise a hint.
        """
        return self._bound(self, backend, y, weights, as_loss(loss), np.dtype(dtype), width, batch)

    @property
    def _bound(self):
        """The class of the bound form."""
        return Bound


class Bound:
    """An operator with its data. The base class works for every operator, through the full matrix."""

    def __init__(self, operator, backend, y, weights, loss, dtype, width=None, batch=1):
        self.operator, self.backend, self.loss, self.dtype = operator, backend, loss, dtype
        self.width, self.batch = width, batch
        self._work = {}
        self._own(y, weights)

    def _own(self, y, weights):
        """Keep the data; in the order of the measurements unless a subclass keeps them otherwise."""
        self.y = np.ascontiguousarray(y, self.dtype)
        self.weights = None if weights is None else np.ascontiguousarray(weights, self.dtype)

    # --- what a subclass may do better -----------------------------------------------------------------------

    def loss_and_adjoint(self, x, out):
        """Return sum w rho(A(x) - y), (B,) float64, and write G = A*(w psi) into ``out``; both (B, n1, n2).

        ``out`` may be ``x`` itself.
        """
        losses = np.empty(len(x))
        for b in range(len(x)):
            losses[b], g = self._loss_and_psi(b, self.operator.apply(x[b]))
            out[b] = self.operator.adjoint(g)
        return losses

    def loss_and_pull(self, p, qt, gp, gqt, probe=None):
        """Return sum w rho(A(P Q) - y), (B,) float64, and write G Q^T and G^T P.

        Parameters
        ----------
        p, qt : ndarray of shape (B, n1, h) and (B, n2, h)
        gp, gqt : ndarray of the same shapes, overwritten
        probe : tuple of ndarray (u, v), optional
            Vectors (B, n1) and (B, n2), replaced by G v and G^T u.
        """
        x = np.matmul(p, qt.swapaxes(1, 2), out=self._buffer("x", (len(p), *self.operator.shape)))
        losses = self.loss_and_adjoint(x, x)
        np.matmul(x, qt, out=gp)
        np.matmul(x.swapaxes(1, 2), p, out=gqt)
        if probe is not None:
            u, v = probe
            u[:], v[:] = (
                np.matmul(x, v[:, :, None])[:, :, 0],
                np.matmul(x.swapaxes(1, 2), u[:, :, None])[:, :, 0],
            )
        return losses

    def forward(self, p, qt):
        """Return A(P Q), shape (B, m), in the order of the operator's measurements."""
        x = np.matmul(p, qt.swapaxes(1, 2))
        return np.stack([self.operator.apply(xb) for xb in x]).astype(self.dtype, copy=False)

    def pull(self, r, p, qt):
        """Return (G Q^T, G^T P) for G = A*(r), with ``r`` of shape (B, m)."""
        g = np.stack([self.operator.adjoint(rb) for rb in r]).astype(self.dtype, copy=False)
        return np.matmul(g, qt), np.matmul(g.swapaxes(1, 2), p)

    def fuse_chain(self, layout):
        """Return a compiled evaluation of whole chains of this layout, or None where there is none.

        The one place where the operator's side knows the chain: for small matrices the calls cost more than the
        arithmetic. The result is called with (x, grad, probe), flat (B, D) buffers and a probe as above; it returns
        (losses, P, Q^T) and overwrites ``grad`` with the gradient of sum w rho / 2.
        """
        return None

    # --- what follows from those -----------------------------------------------------------------------------

    def psi(self, predictions):
        """Return w psi(prediction - y), shape (B, m): what the adjoint is applied to."""
        g = self.loss.psi(predictions - self.y)
        return g if self.weights is None else g * self.weights

    def losses(self, p, qt):
        """Return sum w rho(A(P Q) - y), shape (B,), float64: a forward pass alone."""
        return self._weighted_sum(self.loss.rho(self.forward(p, qt) - self.y))

    def null_losses(self):
        """Return sum w rho(y), the loss of W = 0: shape (1,) or (B,), float64."""
        return self._weighted_sum(self.loss.rho(self.y))

    def weight_sums(self):
        """Return sum w (m without weights), shape (1,) or (B,), float64: the divisor of a mean."""
        if self.weights is None:
            return np.array([float(self.operator.size)])
        return self.weights.sum(axis=1, dtype=np.float64)

    def curvature(self):
        """Return an estimate of the top curvature of sum w r^2 / 2 along low-rank directions, (1,) or (B,).

        kappa = f sum_i w_i ||A_i||_F^2 / (n1 n2): the mean curvature over all directions, times the operator's
        factor f for the directions that matter.
        """
        norms = self.operator.squared_norms()
        total = np.array([norms.sum()]) if self.weights is None else self.weights.astype(np.float64) @ norms
        n1, n2 = self.operator.shape
        return self.operator.curvature_factor * total / (n1 * n2)

    def take(self, keep):
        """Return the bound form of the batch's slices ``keep`` (an index array)."""

        def pick(a):
            return a if a is None or len(a) == 1 else a[keep]

        data = pick(self.y), pick(self.weights)
        return type(self)(self.operator, self.backend, *data, self.loss, self.dtype, self.width, len(keep))

    # --- helpers ---------------------------------------------------------------------------------------------

    def _row(self, array, b):
        return array[0 if len(array) == 1 else b]

    def _loss_and_psi(self, b, prediction):
        r = prediction - self._row(self.y, b)
        rho, psi = self.loss.rho(r), self.loss.psi(r)
        if self.weights is None:
            return rho.sum(dtype=np.float64), psi
        w = self._row(self.weights, b)
        return np.dot(w, rho.astype(np.float64)), w * psi

    def _weighted_sum(self, values):
        if self.weights is not None:
            values = values * self.weights
        return values.sum(axis=1, dtype=np.float64)

    def _buffer(self, name, shape):
        """Return scratch memory that is kept between calls; its content is arbitrary."""
        key = (name, shape)
        if key not in self._work:
            self._release(name)  # one shape a name
            self._work[key] = self.backend.kernels.aligned_empty(shape, self.dtype)
        return self._work[key]

    def _release(self, name):
        """Give the scratch memory ``name`` back."""
        for key in [k for k in self._work if k[0] == name]:
            del self._work[key]


class _Linear(Operator):
    """Any scipy LinearOperator that maps vec(X) (C order, n1 n2 numbers) to m numbers."""

    _N_PROBES = 16

    def __init__(self, op, shape):
        from scipy.sparse.linalg import aslinearoperator

        self.op = aslinearoperator(op)
        self.shape = _check_shape(shape)
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
        a = _check_real("a", a, (2, 3))
        if a.ndim == 3 and shape is None:
            shape = a.shape[1:]
        if shape is None:
            raise ValueError(f"a of shape {a.shape} needs shape=(n1, n2)")
        self.shape = _check_shape(shape)
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
        self.a = _check_real("a", a, (2,))
        self.b = self.a if b is None else _check_real("b", b, (2,))
        if len(self.a) != len(self.b):
            raise ValueError(f"a and b must hold as many vectors, got {len(self.a)} and {len(self.b)}")
        self.shape = _check_shape((self.a.shape[1], self.b.shape[1]))
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


def _check_indices(name, index, n):
    """Return ``index`` as a 1-d array of whole numbers in [0, n)."""
    index = np.asarray(index)
    if index.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {index.shape}")
    if index.size == 0:
        return np.zeros(0, np.int64)
    if index.dtype.kind == "f" and (index == np.floor(index)).all():
        index = index.astype(np.int64)
    if index.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold whole numbers, got dtype {index.dtype}")
    low, high = index.min(), index.max()
    if low < 0:
        raise ValueError(f"{name} must not be negative, got {low} (indices count from 0)")
    if high >= n:
        raise ValueError(f"{name} must be below {n}, the matrix's size in that direction, got {high}")
    return index


class EntryMask(Operator):
    """Observed entries X[rows, cols] (matrix completion).

    Parameters
    ----------
    rows, cols : array of int, shape (m,)
        Indices from 0, in any order; every entry at most once.
    shape : tuple of int
        (n1, n2).

    Raises
    ------
    TypeError, ValueError
        If an index is negative, fractional or out of range, the lengths differ, there is no entry, or an entry comes
        twice.

    Notes
    -----
    Kept sorted by row and column (8 + 4 bytes an entry with int32 columns). Nothing of size n1 x n2 is formed unless
    the mask is so dense that the products of full matrices are quicker.
    """

    curvature_factor = 1.3

    def __init__(self, rows, cols, shape):
        self.shape = _check_shape(shape)
        n1, n2 = self.shape
        rows, cols = _check_indices("rows", rows, n1), _check_indices("cols", cols, n2)
        if len(rows) != len(cols):
            raise ValueError(f"rows and cols must have the same length, got {len(rows)} and {len(cols)}")
        if len(rows) == 0:
            raise ValueError("rows and cols are empty: at least one observed entry is needed")
        self.size = len(rows)
        from fastdmf.kernels.cpu import entry_sort

        self.indptr, self.indices, order = entry_sort(np.ascontiguousarray(rows), np.ascontiguousarray(cols), n1, n2)
        self._refuse_duplicates()
        # None stands for "came sorted".
        self.order = None if bool((order[1:] > order[:-1]).all()) else order

    def _refuse_duplicates(self):
        again = np.zeros(self.size + 1, bool)
        again[1:-1] = self.indices[1 : self.size] == self.indices[: self.size - 1]
        again[self.indptr] = False  # the first entry of a row repeats nothing
        count = int(again.sum())
        if count:
            k = int(again.argmax())
            row = int(np.searchsorted(self.indptr, k, side="right")) - 1
            raise ValueError(
                f"{count} entries occur more than once, the first at row {row}, column {self.indices[k]}: "
                "combine duplicate entries (sum, mean or last) before"
            )

    @property
    def rows(self):
        """Row indices in the order they were given, shape (m,)."""
        return self.unsort(np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)))

    @property
    def cols(self):
        """Column indices in the order they were given, shape (m,)."""
        return self.unsort(self.indices[: self.size])

    def sort(self, values):
        """Bring values (..., m) from the order of the measurements into sorted order."""
        return values if self.order is None else values[..., self.order]

    def unsort(self, values):
        """Bring values (..., m) from sorted order into the order of the measurements."""
        if self.order is None:
            return values
        out = np.empty_like(values)
        out[..., self.order] = values
        return out

    def apply(self, x):
        return x[self.rows, self.cols]

    def adjoint(self, r):
        g = np.zeros(self.shape, r.dtype)
        g[self.rows, self.cols] = r
        return g

    def restrict(self, index):
        return EntryMask(self.rows[index], self.cols[index], self.shape)

    def squared_norms(self):
        return np.ones(self.size)

    @property
    def _bound(self):
        return _BoundMask


class _BoundMask(Bound):
    """Observed entries: sparse kernels on padded rows, or the dense route where the mask is dense."""

    # Ranges of columns that threads take in turn.
    _COLUMN_RANGES = 16
    # Cells of a dense mask under which the parallel region costs more than it saves.
    _SERIAL_CELLS = 100_000

    def _own(self, y, weights):
        kernels, op = self.backend.kernels, self.operator
        n1, n2 = op.shape

        def padded(a):
            out = np.zeros((len(a), op.size + kernels.PAD), self.dtype)
            out[:, : op.size] = op.sort(np.asarray(a))
            return out

        self._y = padded(y)
        self._w = None if weights is None else padded(weights)
        width = min(n1, n2) if self.width is None else self.width
        self.route, self._n_ranges = kernels.entry_route(n1, n2, op.size, width, self.batch, self.dtype)
        self._block_rows = kernels.BLOCK_ROWS
        self._structures = {}

    @property
    def y(self):
        """Data in the order of the measurements."""
        return self.operator.unsort(self._y[:, : self.operator.size])

    @property
    def weights(self):
        """Weights in the order of the measurements, or None."""
        return None if self._w is None else self.operator.unsort(self._w[:, : self.operator.size])

    def _structure(self, name, build):
        if name not in self._structures:
            self._structures[name] = build()
        return self._structures[name]

    def _cuts(self):
        return self.backend.kernels.entry_cuts(self.operator.indptr, self._n_ranges)

    def _blocks(self):
        """Column-major copy inside row blocks: pointers, rows, data, weights, and column ranges."""
        op, kernels = self.operator, self.backend.kernels
        bptr, brows, border = kernels.entry_blocks(op.indptr, op.indices, *op.shape, self._block_rows)

        def gathered(a):
            if a is None:
                return None
            out = np.zeros_like(a)
            out[:, : op.size] = a[:, border]
            return out

        cuts = kernels.entry_column_cuts(bptr, op.shape[1], self._COLUMN_RANGES)
        return bptr, brows, gathered(self._y), gathered(self._w), cuts

    def _dense(self):
        """Data and weights as full matrices, zero at the holes."""
        op = self.operator
        rows, cols = np.repeat(np.arange(op.shape[0]), np.diff(op.indptr)), op.indices[: op.size]
        y = np.zeros((len(self._y), *op.shape), self.dtype)
        y[:, rows, cols] = self._y[:, : op.size]
        w = np.zeros((1 if self._w is None else len(self._w), *op.shape), self.dtype)
        w[:, rows, cols] = 1 if self._w is None else self._w[:, : op.size]
        return y, w

    def loss_and_adjoint(self, x, out):
        y, w = self._structure("dense", self._dense)
        # The kernel works in place and on contiguous matrices; slices of a chain's buffer have gaps between them.
        g = out if out.flags.c_contiguous else self._buffer("g", out.shape)
        if g is not x:
            g[:] = x
        losses = np.empty(len(x))
        kernels = self.backend.kernels
        residual = kernels.dense_residual_serial if g.size < self._SERIAL_CELLS else kernels.dense_residual
        residual(g, losses, y, w, self.loss.code, self.loss.delta)
        if g is not out:
            out[:] = g
        return losses

    def loss_and_pull(self, p, qt, gp, gqt, probe=None):
        if self.route == "dense":
            return super().loss_and_pull(p, qt, gp, gqt, probe)
        h = p.shape[2]
        if probe is None and self._fits(p) and self._fits(qt) and self._fits(gp) and self._fits(gqt):
            for name in ("p", "qt", "gp", "gqt"):  # left by wider calls: as much memory as the factors
                self._release(name)
            return self._sparse_loss_and_pull(p, qt, gp, gqt)
        # Two more columns, P' = [P, 0, u] and Q'^T = [Q^T, v, 0], leave P Q unchanged and bring G v and G^T u along.
        u, v = (None, None) if probe is None else probe
        pw, qw = self._staged("p", p, u, 1), self._staged("qt", qt, v, 0)
        gpw, gqw = self._buffer("gp", pw.shape), self._buffer("gqt", qw.shape)
        losses = self._sparse_loss_and_pull(pw, qw, gpw, gqw)
        gp[:], gqt[:] = gpw[:, :, :h], gqw[:, :, :h]
        if probe is not None:
            u[:], v[:] = gpw[:, :, h], gqw[:, :, h + 1]
        return losses

    def _fits(self, a):
        return a.shape[2] % self.backend.kernels.row_multiple(self.dtype) == 0 and a.flags.c_contiguous

    def _staged(self, name, a, extra=None, place=0):
        """Copy ``a`` (B, n, h) into rows padded with zeros, with ``extra`` (B, n) in column h + place."""
        batch, n, h = a.shape
        multiple = self.backend.kernels.row_multiple(self.dtype)
        wide = -(-(h + (0 if extra is None else 2)) // multiple) * multiple
        out = self._buffer(name, (batch, n, wide))
        out[:, :, :h] = a
        out[:, :, h:] = 0
        if extra is not None:
            out[:, :, h + place] = extra
        return out

    def _sparse_loss_and_pull(self, p, qt, gp, gqt):
        """One evaluation on padded rows by the route chosen in bind."""
        kernels, op = self.backend.kernels, self.operator
        losses = np.empty(len(p))
        head = (gp, gqt, losses, p, qt, op.indptr, op.indices, self._y, self._w)
        loss = (self.loss.code, self.loss.delta)
        if self.route == "one_pass_serial":
            kernels.entry_one_pass_serial(*head, *loss)
        elif self.route == "one_pass":
            copies = self._buffer("copies", (len(p), self._n_ranges, *qt.shape[1:]))
            kernels.entry_one_pass(*head, *loss, self._structure("cuts", self._cuts), copies)
        else:
            *blocks, column_cuts = self._structure("blocks", self._blocks)
            kernels.entry_two_pass(*head, *blocks, *loss, self._structure("cuts", self._cuts), column_cuts)
        return losses

    # Sums over the data in sorted order, so that no bit depends on the order in which the entries were given.

    def null_losses(self):
        rho = self.loss.rho(self._y)  # zero where y is padded with zeros
        return (rho if self._w is None else rho * self._w).sum(axis=1, dtype=np.float64)

    def weight_sums(self):
        return np.array([float(self.operator.size)]) if self._w is None else self._w.sum(axis=1, dtype=np.float64)

    def curvature(self):
        n1, n2 = self.operator.shape
        return self.operator.curvature_factor * self.weight_sums() / (n1 * n2)

    def fuse_chain(self, layout):
        if layout.symmetric or layout.depth < 2 or self.route == "dense" or max(layout.shape) > _SMALL:
            return None
        # A batch also gains its parallel loop over the slices.
        narrow = self.route == "one_pass_serial" and layout.width <= _FUSED_WIDTH
        return _FusedChain(self, layout) if narrow or self.batch > 1 else None

    def _forward_sorted(self, p, qt):
        kernels, op = self.backend.kernels, self.operator
        out = np.empty((len(p), op.size), self.dtype)
        p, qt = (a if self._fits(a) else self._staged(n, a) for n, a in (("p", p), ("qt", qt)))
        kernels.entry_forward(out, p, qt, op.indptr, op.indices)
        return out

    def forward(self, p, qt):
        return self.operator.unsort(self._forward_sorted(p, qt))

    def losses(self, p, qt):
        m = self.operator.size
        rho = self.loss.rho(self._forward_sorted(p, qt) - self._y[:, :m])
        if self._w is not None:
            rho = rho * self._w[:, :m]
        return rho.sum(axis=1, dtype=np.float64)

    def pull(self, r, p, qt):
        kernels, op = self.backend.kernels, self.operator
        h = p.shape[2]
        rs = np.zeros((len(r), op.size + kernels.PAD), self.dtype)
        rs[:, : op.size] = op.sort(r)
        pw, qw = self._staged("p", p), self._staged("qt", qt)
        gp, gqt = np.empty_like(pw), np.empty_like(qw)
        copies = self._buffer("copies", (len(p), self._n_ranges, *qw.shape[1:]))
        kernels.entry_pull(gp, gqt, rs, pw, qw, op.indptr, op.indices, self._structure("cuts", self._cuts), copies)
        return np.ascontiguousarray(gp[:, :, :h]), np.ascontiguousarray(gqt[:, :, :h])


# Rows or columns, and inner width, up to which a whole chain is evaluated in one compiled call. Its time over that of
# separate products at n = 100: 0.7 at width 20, 0.9 at 32 and 48, 0.9 to 1.0 at 64 and 100 (bench/chain.py), where the
# products are all there is.
_SMALL, _FUSED_WIDTH = 500, 32


class _FusedChain:
    """All products, residuals and gradients of one evaluation of a small mask problem in one compiled call."""

    def __init__(self, bound, layout):
        kernels = bound.backend.kernels
        self.bound, self.layout = bound, layout
        self.offsets = np.array(layout.offsets[:-1], np.int64)
        self.dims = np.array(layout.dims, np.int64)
        length = kernels.chain_entry_work(layout.dims, layout.cut, bound.dtype)
        self.work = np.zeros((bound.batch, length), bound.dtype)
        self.kernel = kernels.chain_entry_serial if bound.batch == 1 else kernels.chain_entry_batched

    def __call__(self, x, grad, probe):
        bound, layout = self.bound, self.layout
        (n1, n2), h, op = layout.shape, layout.width, bound.operator
        multiple = bound.backend.kernels.row_multiple(bound.dtype)
        padded = -(-(h + (0 if probe is None else 2)) // multiple) * multiple
        losses = np.empty(len(x))
        out = None if probe is None else tuple(a.copy() for a in probe)
        data = (op.indptr, op.indices, bound._y, bound._w, bound.loss.code, bound.loss.delta)
        self.kernel(grad, losses, x, self.offsets, self.dims, layout.cut, *data, probe, out, self.work)
        if probe is not None:
            # G v for u and G^T u for v.
            probe[0][:], probe[1][:] = out
        # P and Q^T lie at the head of the scratch, in padded rows.
        p = self.work[:, : n1 * padded].reshape(-1, n1, padded)[:, :, :h]
        qt = self.work[:, n1 * padded : (n1 + n2) * padded].reshape(-1, n2, padded)[:, :, :h]
        return losses, p, qt
