"""Terms that are added to the objective: one class each, given to ``solve(penalty=...)``."""

from dataclasses import dataclass

import numpy as np

from fastdmf.chain import Sweep
from fastdmf.checks import check_number
from fastdmf.second_order import hessian_vector

__all__ = ["GradientNorm", "NuclearRatio", "Penalty", "as_penalties"]

# Singular values below this part of the largest count as zero: their vectors are rounding.
_ZERO = np.sqrt(np.finfo(np.float64).eps)


class Penalty:
    """What a term supplies: subclasses are frozen dataclasses of their settings."""

    # Whether the term is a function of the gradient that the loss and l2 alone have.
    must_be_first = False

    def add(self, problem, x, grad):
        """Return the term's values at ``x`` (B, D), shape (B,) float64, and add its gradient to ``grad`` (B, D).

        ``grad`` holds the gradient of the terms before it: the loss, l2, and the penalties given earlier.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class GradientNorm(Penalty):
    """weight * ||grad E||^2, E the loss and the l2 term: explicit gradient regularization (Barrett and Dherin 2021).

    Gradient descent with step h on E stays to second order in h on the path of the gradient flow of
    E + (h/4) ||grad E||^2 (1 in [1]_: there the penalty is h m / 4 times the mean over the m parameters); with
    ``weight`` = h/4 a smaller step keeps the regularization of the step h.

    Parameters
    ----------
    weight : float
        At least 0; in units of a learning rate, so that it depends on the normalisation of the loss.

    Notes
    -----
    The gradient is 2 weight H grad E with the Hessian H of E: one exact Hessian-vector product an evaluation
    (:func:`fastdmf.second_order.hessian_vector`), no difference quotient. Given with other penalties it must come
    first; those are then no part of E.

    References
    ----------
    .. [1] D. G. T. Barrett, B. Dherin, "Implicit Gradient Regularization", 2021, arXiv:2009.11162.
    """

    weight: float
    must_be_first = True

    def __post_init__(self):
        check_number("GradientNorm(weight=...)", self.weight, 0, closed=True)

    def add(self, problem, x, grad):
        real = x.dtype.type
        values = self.weight * problem.squared_norm(grad)
        change = hessian_vector(problem, x, grad)
        change += real(problem.l2) * grad
        change *= real(2 * self.weight)
        grad += change
        return values


@dataclass(frozen=True)
class NuclearRatio(Penalty):
    """weight * ||W||_* / ||W||_F of the end-to-end matrix (Zhao 2023).

    The ratio is the same for every multiple of W and lies in [1, sqrt(rank W)]: one for rank one. It drives even a
    single factor, trained by Adam, to low rank [1]_.

    Parameters
    ----------
    weight : float
        At least 0. With 0.1, loss "mse" and entries of size one a single factor ends at the rank of the truth
        (``tests/test_penalties.py``).

    Notes
    -----
    With W = U S V^T the gradient in W is U V^T / ||W||_F - ||W||_* W / ||W||_F^3, where U V^T leaves out singular
    values below 1.5e-8 of the largest; by the chain rule it goes to all factors. At W = 0 the term and its gradient
    count as zero.

    The gradient grows like 1 / ||W||_F near zero and jumps where a singular value vanishes. Adam does not mind; a rule
    with a fixed learning rate is thrown far out by a small start, and the step and the line search of ``"auto"`` are
    made for the loss.

    An evaluation takes a singular value decomposition in float64, of size h for chains of width h with
    2 h < min(n1, n2), where W is never formed, and of W else.

    References
    ----------
    .. [1] D. Zhao, "Combining Explicit and Implicit Regularization for Efficient Learning in Deep Networks", 2023,
       arXiv:2306.00342.
    """

    weight: float

    def __post_init__(self):
        check_number("NuclearRatio(weight=...)", self.weight, 0, closed=True)

    def add(self, problem, x, grad):
        layout, batch = problem.layout, len(x)
        # The ratio does not see the scale: factors of size one neither overflow nor underflow in their product. LAPACK
        # refuses slices that are not finite; their objective is not finite anyway.
        x = np.where(np.isfinite(x).all(axis=1, keepdims=True), x, 0).astype(np.float64, copy=False)
        sizes = [_size(w) for w in layout.stored(x)]
        for w, size in zip(layout.stored(x), sizes):
            w /= size
        term = layout.allocate(batch, np.float64, problem.xp)
        if layout.depth == 1:
            u, s, v = _svd(layout.stored(x)[0])
        else:
            sweep = Sweep(layout, batch, np.float64, problem.xp)
            p, qt = sweep.products(x)
            u, s, v = _thin_svd(p, qt)
        frobenius = np.sqrt((s**2).sum(axis=1, keepdims=True))
        frobenius[frobenius == 0] = 1
        ratio = s.sum(axis=1, keepdims=True) / frobenius
        # The term's gradient in W is U diag(slopes) V^T.
        slopes = self.weight * ((s > _ZERO * s[:, :1]) - ratio * s / frobenius) / frobenius
        u = u * slopes[:, None, :]
        if layout.depth == 1:
            np.matmul(u, v.swapaxes(1, 2), out=layout.stored(term)[0])
        else:
            gp, gqt = sweep.outputs(term)
            np.matmul(u, v.swapaxes(1, 2) @ qt, out=gp)
            np.matmul(v, u.swapaxes(1, 2) @ p, out=gqt)
            sweep.gradients(term)
        for g, size in zip(layout.stored(term), sizes):
            g /= size
        grad += term.astype(grad.dtype, copy=False)
        return self.weight * ratio[:, 0]


def _size(w):
    """Return the largest entry of every slice, (B, 1, 1); one where all are zero."""
    size = np.abs(w).max(axis=(1, 2), keepdims=True)
    return np.where(size > 0, size, 1)


def _svd(w):
    """Return (U, s, V) of every slice."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return u, s, vt.swapaxes(1, 2)


def _thin_svd(p, qt):
    """Return (U, s, V) of P Q for every slice; P Q is not formed where it is thin."""
    if 2 * p.shape[2] >= min(p.shape[1], qt.shape[1]):
        return _svd(p @ qt.swapaxes(1, 2))
    (u, left), (v, right) = np.linalg.qr(p), np.linalg.qr(qt)
    inner, s, outer = _svd(left @ right.swapaxes(1, 2))
    return u @ inner, s, v @ outer


def as_penalties(penalty):
    """Return ``penalty``, one object or a sequence of them, as a tuple.

    Raises
    ------
    TypeError
        If one of them is no :class:`Penalty`.
    ValueError
        If one that must be the first is not.
    """
    penalties = (penalty,) if isinstance(penalty, Penalty) else tuple(penalty)
    for place, one in enumerate(penalties):
        if not isinstance(one, Penalty):
            raise TypeError(f"penalty must be an object of fastdmf.penalties, or several, got {type(one).__name__}")
        if one.must_be_first and place > 0:
            raise ValueError(
                f"penalty holds {type(one).__name__} at place {place}: it is a function of the gradient of the loss "
                "and l2 alone, so give it first, and once"
            )
    return penalties
