"""The contract of the operators: linear maps R^(n1 x n2) -> R^m and their bound forms.

An :class:`Operator` is the map alone: ``apply``, ``adjoint`` and the squared norms of its measurements. Binding it to
data gives a :class:`Bound`, which owns y and the weights in the order of its kernels and answers the one question
of a descent: the loss at W = P Q and the two thin products G Q^T and G^T P of its gradient
G = A*(w psi(A(W) - y)). It never sees depth, factors or rule.

Shapes: ``p`` is (B, n1, h), ``qt`` = Q^T is (B, n2, h), with a leading batch axis that is always there; y and the
weights are (1, m) when the batch shares them, (B, m) when not.

The methods of the base classes go through ``apply`` and ``adjoint``: they serve any scipy LinearOperator and are the
oracle that every override is tested against.

Losses of an evaluation and vectors are the backend's arrays; numbers that a fit needs once come as NumPy's.
"""

import copy

import numpy as np

from fastdmf.arrays import as_native
from fastdmf.losses import as_loss

__all__ = ["Bound", "Operator", "check_real", "check_shape"]


def check_shape(shape):
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


def check_real(name, array, ndims):
    """Return ``array`` as a finite float32 or float64 C-contiguous array with one of the ``ndims``."""
    xp, array = as_native(array)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    if array.ndim not in ndims:
        wanted = " or ".join(str(n) for n in ndims)
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {array.shape}")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum()  # one pass; large numbers may overflow in it
    if not np.isfinite(total) and not np.isfinite(array).all():
        raise ValueError(f"{name} contains NaN or infinite values")
    return xp.ascontiguousarray(array)


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

    def coverage(self):
        """Return how many measurements touch each row, (n1,), and each column, (n2,)."""
        n1, n2 = self.shape
        return np.full(n1, self.size), np.full(n2, self.size)

    def hold_out(self, fraction, rng):
        """Return sorted indices of about this fraction of the measurements, to be left out of a fit.

        Parameters
        ----------
        fraction : float
            In (0, 1).
        rng : numpy.random.Generator
        """
        count = min(max(round(fraction * self.size), 1), self.size - 1)
        return np.sort(rng.permutation(self.size)[:count])

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
        loss : ElementwiseLoss or what ``as_loss`` takes
        dtype : numpy dtype, float32 or float64
        width : int, optional
            The inner width h that will be asked for; a hint for the choice of the route.
        batch : int
            Number of slices B that will be asked for; likewise a hint.

        Raises
        ------
        ValueError
            If the bound form hands the loss to kernels, and they do not know it.
        """
        loss = as_loss(loss)
        bound = self._bound_on(backend)
        if loss.code is None and bound.compiled:
            raise ValueError(
                f"elementwise_loss={loss.name!r} is for RankOne and scipy operators: the kernels of "
                f"{type(self).__name__} know losses of the residual alone, like ('truncated', delta)"
            )
        return bound(self, backend, y, weights, loss, np.dtype(dtype), width, batch)

    def _bound_on(self, backend):
        """The class of the bound form on a backend: by default the base class, which computes on the host.

        Raises
        ------
        ValueError
            If there is none.
        """
        if backend.name != "cpu":
            raise ValueError(f"{type(self).__name__.lstrip('_')} operators compute on the CPU alone: pass device='cpu'")
        return Bound


class Bound:
    """An operator with its data. The base class works for every operator, through the full matrix."""

    # Whether the loss goes to kernels by its code, so that it must have one.
    compiled = False

    def __init__(self, operator, backend, y, weights, loss, dtype, width=None, batch=1):
        self.operator, self.backend, self.loss, self.dtype = operator, backend, loss, dtype
        self.width, self.batch = width, batch
        self._work = {}
        self._own(y, weights)

    def _own(self, y, weights):
        """Keep the data; in the order of the measurements unless a subclass keeps them otherwise."""
        self.y = self.backend.asarray(y, self.dtype)
        self.weights = None if weights is None else self.backend.asarray(weights, self.dtype)

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
        arithmetic. The result is called with (x, grad, factors, probe), flat (B, D) buffers, (B,) numbers and a probe
        as above; it returns sum w rho and overwrites ``grad`` with the gradient of factors / 2 times that. Its
        ``halves()`` are P and Q^T of the point of the last call.
        """
        return None

    # --- what follows from those -----------------------------------------------------------------------------

    def residuals(self, p, qt):
        """Return A(P Q) - y, shape (B, m), in the order of the measurements."""
        return self.forward(p, qt) - self.y

    def psi(self, predictions):
        """Return w psi(prediction - y), shape (B, m): what the adjoint is applied to."""
        g = self.loss.psi(predictions - self.y, self.y)
        return g if self.weights is None else g * self.weights

    def losses(self, p, qt):
        """Return sum w rho(A(P Q) - y), shape (B,), float64, on the host: a forward pass alone."""
        return self.backend.host(self._weighted_sum(self.loss.rho(self.forward(p, qt) - self.y, self.y)))

    def null_losses(self):
        """Return sum w rho(-y), the loss of W = 0: shape (1,) or (B,), float64."""
        return self.backend.host(self._weighted_sum(self.loss.rho(-self.y, self.y)))

    def weight_sums(self):
        """Return sum w (m without weights), shape (1,) or (B,), float64: the divisor of a mean."""
        if self.weights is None:
            return np.array([float(self.operator.size)])
        return self.backend.host(self.weights.sum(axis=1, dtype=np.float64))

    def curvature(self):
        """Return an estimate of the top curvature of sum w r^2 / 2 along low-rank directions, (1,) or (B,).

        kappa = f sum_i w_i ||A_i||_F^2 / (n1 n2): the mean curvature over all directions, times the operator's
        factor f for the directions that matter.
        """
        norms = self.operator.squared_norms()
        total = np.array([norms.sum()])
        if self.weights is not None:
            total = self.backend.host(self.weights).astype(np.float64) @ norms
        n1, n2 = self.operator.shape
        return self.operator.curvature_factor * total / (n1 * n2)

    def take(self, keep):
        """Return the bound form of the batch's slices ``keep`` (an index array)."""
        keep = self.backend.asarray(keep)

        def pick(a):
            return a if a is None or len(a) == 1 else a[keep]

        data = pick(self.y), pick(self.weights)
        return type(self)(self.operator, self.backend, *data, self.loss, self.dtype, self.width, len(keep))

    def homogeneous(self):
        """Return the bound form with y = 0: the same map and weights, shared, not copied."""
        other = copy.copy(self)
        other._work = {}
        other._forget_data()
        return other

    def _forget_data(self):
        self.y = self.backend.xp.zeros_like(self.y)

    # --- helpers ---------------------------------------------------------------------------------------------

    def _row(self, array, b):
        return array[0 if len(array) == 1 else b]

    def _loss_and_psi(self, b, prediction):
        y = self._row(self.y, b)
        r = prediction - y
        rho, psi = self.loss.rho(r, y), self.loss.psi(r, y)
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
