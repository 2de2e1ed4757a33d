"""Symmetric parts of measurements: <A_i, W> of a symmetric W sees (A_i + A_i^T)/2 alone."""

import numpy as np

from fastdmf.contract import Bound, Operator
from fastdmf.masks import EntryMask
from fastdmf.operators import GaussianDense, RankOne

__all__ = ["antisymmetric_share", "symmetric_part", "symmetric_squared_norms"]

# Not a seed that measurements are likely to have been drawn with: probes must be independent of them.
_PROBE_SEED = 0x66617374646D66
_N_PROBES = 16


def symmetric_part(operator):
    """Return the operator of the measurements (A_i + A_i^T)/2.

    It gives a symmetric W the same numbers, and every other W those of its symmetric part.

    Parameters
    ----------
    operator : Operator
        Of square matrices.

    Returns
    -------
    Operator
        Dense measurements as a :class:`GaussianDense` with the averaged matrices, in the storage of the given one;
        rank-one measurements with a_i = b_i as they are; any other through W's symmetric part, at the cost of forming
        W.

    Raises
    ------
    TypeError, ValueError
        If it is no operator, or not of square matrices.

    Examples
    --------
    >>> import numpy as np, fastdmf
    >>> a = np.random.default_rng(0).standard_normal((3, 4, 4))
    >>> part = fastdmf.symmetric_part(fastdmf.GaussianDense(a)).a.reshape(3, 4, 4)
    >>> bool(np.allclose(part, (a + a.swapaxes(1, 2)) / 2))
    True
    """
    n = _size(operator)
    if isinstance(operator, GaussianDense):
        a = operator.a.reshape(operator.size, n, n)
        if operator.storage is None:
            return GaussianDense((a + a.swapaxes(1, 2)) * a.dtype.type(0.5))
        out = np.empty_like(a)
        for i, one in enumerate(a.astype(np.float32)):
            out[i] = (one + one.T) * np.float32(0.5)
        return GaussianDense(out, storage=operator.storage)
    if isinstance(operator, RankOne) and operator.b is operator.a:
        return operator
    return _Symmetrised(operator)


def antisymmetric_share(operator):
    """Return sqrt(sum_i ||A_i - A_i^T||_F^2 / 4 / sum_i ||A_i||_F^2): what of the measurements no symmetric W sees.

    Parameters
    ----------
    operator : Operator
        Of square matrices.

    Returns
    -------
    float
        From 0 (all symmetric) to 1; about 0.7 for independent entries. Exact for entry masks, dense and rank-one
        measurements, else estimated by :func:`symmetric_squared_norms`' probes.

    Raises
    ------
    TypeError, ValueError
        If it is no operator, or not of square matrices.
    """
    hidden, seen = (float(np.sum(_part_squared_norms(operator, sign))) for sign in (-1, 1))
    return float(np.sqrt(hidden / (hidden + seen))) if hidden > 0 else 0.0


def symmetric_squared_norms(operator):
    """Return ||(A_i + A_i^T)/2||_F^2 of every measurement.

    Parameters
    ----------
    operator : Operator
        Of square matrices.

    Returns
    -------
    ndarray of shape (m,), float64
        Exact for entry masks, dense and rank-one measurements; else the mean of <A_i, S>^2 over 16 symmetric parts S of
        standard normal matrices, of which E <A_i, S>^2 is the squared norm.

    Raises
    ------
    TypeError, ValueError
        If it is no operator, or not of square matrices.
    """
    return _part_squared_norms(operator, 1)


def _size(operator):
    if not isinstance(operator, Operator):
        raise TypeError(f"operator must be a fastdmf operator, got {type(operator).__name__}")
    n1, n2 = operator.shape
    if n1 != n2:
        raise ValueError(f"only square matrices have a symmetric part, the operator's are {operator.shape}")
    return n1


def _part_squared_norms(operator, sign):
    """Return ||(A_i + sign A_i^T)/2||_F^2, (m,) float64."""
    n = _size(operator)
    if isinstance(operator, EntryMask):
        return np.where(operator.rows == operator.cols, 1.0 if sign > 0 else 0.0, 0.5)
    if isinstance(operator, GaussianDense):
        out = np.empty(operator.size)
        for i, a in enumerate(operator.a.reshape(-1, n, n)):
            a = a.astype(np.float64)
            part = a + sign * a.T
            out[i] = 0.25 * np.vdot(part, part)
        return out
    if isinstance(operator, RankOne):
        if operator.b is operator.a:
            return operator.squared_norms() if sign > 0 else np.zeros(operator.size)
        cross = np.einsum("ij,ij->i", operator.a, operator.b, dtype=np.float64)
        return 0.5 * (operator.squared_norms() + sign * cross**2)
    rng = np.random.default_rng(_PROBE_SEED)
    total = np.zeros(operator.size)
    for _ in range(_N_PROBES):
        x = rng.standard_normal(operator.shape)
        total += operator.apply(0.5 * (x + sign * x.T)).astype(np.float64) ** 2
    return total / _N_PROBES


class _Symmetrised(Operator):
    """The symmetric part of an operator that has no cheaper way to it."""

    def __init__(self, operator):
        self.operator, self.shape, self.size = operator, operator.shape, operator.size
        self.curvature_factor = operator.curvature_factor

    @property
    def dtype(self):
        return self.operator.dtype

    def apply(self, x):
        return self.operator.apply(_symmetric(x))

    def adjoint(self, r):
        return _symmetric(self.operator.adjoint(r))

    def restrict(self, index):
        return _Symmetrised(self.operator.restrict(index))

    def squared_norms(self):
        return symmetric_squared_norms(self.operator)

    def coverage(self):
        rows, cols = self.operator.coverage()
        return rows + cols, rows + cols

    @property
    def _bound(self):
        return _BoundSymmetrised


class _BoundSymmetrised(Bound):
    """Through the full matrix and the operator's own fused evaluation of it."""

    def __init__(self, operator, backend, y, weights, loss, dtype, width=None, batch=1):
        super().__init__(operator, backend, y, weights, loss, dtype, width, batch)
        self._inner = operator.operator.bind(
            backend, y, weights=weights, loss=loss, dtype=dtype, width=width, batch=batch
        )

    def loss_and_adjoint(self, x, out):
        g = self._buffer("g", x.shape)
        losses = self._inner.loss_and_adjoint(_symmetric(x), g)
        out[:] = _symmetric(g)
        return losses

    def _forget_data(self):
        super()._forget_data()
        self._inner = self._inner.homogeneous()


def _symmetric(x):
    """Return the symmetric part of the last two axes."""
    return 0.5 * (x + np.swapaxes(x, -1, -2))
