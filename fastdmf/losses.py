"""Elementwise losses: a code and a parameter, the same in the kernels and here.

With r = prediction - y a loss is rho(r, y), and psi = rho'/2 is what the adjoint is applied to, so that squared loss
has psi = r. The kernels sum w rho in float64 and pull w psi. Of the losses only ``truncated_prediction`` depends on
more than r: the kernels have no code for it.

==================== ================================ ================= ==================
name                 rho(r, y)                        psi(r, y)         slope(r, y)
==================== ================================ ================= ==================
squared              r^2                              r                 1
huber                r^2, |r| <= d;                   clip(r, -d, d)    1{|r| <= d}
                     d (2 |r| - d) outside
truncated            min(r^2, d^2)                    r 1{|r| <= d}     1{|r| <= d}
absolute             |r|                              sign(r) / 2       0
truncated_prediction r^2, |r + y| <= d;               r 1{|r + y| <= d} 1{|r + y| <= d}
                     max(d - sign(r + y) y, 0)^2
                     outside
==================== ================================ ================= ==================

``truncated`` leaves out measurements with a large residual, as in robust regression. ``truncated_prediction`` is the
loss of Li, Ma and Zhang 2018 (1712.09203) for quadratic networks, which leaves out measurements with a large
prediction: the squares of a few long inputs would rule the sum, and the restricted isometry fails for them. Its
gradient is theirs. They write (prediction - y)^2 1{prediction <= d}, which is zero for a network whose predictions are
all too large; here such a measurement keeps the value that it has at the edge, unless y itself lies beyond.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["ElementwiseLoss", "as_loss"]

# None: not in the kernels.
_CODES = {"squared": 0, "huber": 1, "truncated": 2, "absolute": 3, "truncated_prediction": None}
_NEEDS_DELTA = ("huber", "truncated", "truncated_prediction")


@dataclass(frozen=True)
class ElementwiseLoss:
    """One loss: its name and, for some, the threshold ``delta`` in units of y.

    The methods work elementwise on residuals ``r`` and data ``y`` that broadcast, and return the residuals' precision.
    """

    name: str = "squared"
    delta: float = 0.0

    @property
    def code(self):
        """The number by which the kernels know the loss; None where they do not."""
        return _CODES[self.name]

    def rho(self, r, y):
        """Return rho(r, y)."""
        match self.name:
            case "squared":
                return r * r
            case "huber":
                a = np.abs(r)
                return np.where(a <= self.delta, r * r, self.delta * (2 * a - self.delta))
            case "truncated":
                return np.minimum(r * r, self.delta**2)
            case "truncated_prediction":
                prediction = r + y
                edge = np.maximum(self.delta - np.sign(prediction) * y, 0) ** 2
                return np.where(np.abs(prediction) <= self.delta, r * r, edge)
            case _:
                return np.abs(r)

    def psi(self, r, y):
        """Return psi(r, y), half the derivative of rho along r."""
        match self.name:
            case "squared":
                return r
            case "huber":
                return np.clip(r, -self.delta, self.delta)
            case "absolute":
                return np.sign(r) / 2
            case _:
                return r * self.slope(r, y)

    def slope(self, r, y):
        """Return the derivative of psi along r: what a second-order method weights a measurement with."""
        match self.name:
            case "squared":
                return np.ones_like(r)
            case "absolute":
                return np.zeros_like(r)
            case "truncated_prediction":
                return (np.abs(r + y) <= self.delta).astype(r.dtype)
            case _:
                return (np.abs(r) <= self.delta).astype(r.dtype)


def as_loss(loss):
    """Return the loss ``"squared"``, ``"absolute"`` or (name, delta): huber, truncated, truncated_prediction.

    Raises
    ------
    ValueError
        If the name is unknown, or the threshold is missing, not positive, or not wanted.
    """
    if isinstance(loss, ElementwiseLoss):
        return loss
    name, delta = (loss, None) if isinstance(loss, str) else tuple(loss)
    if name not in _CODES:
        raise ValueError(f"elementwise_loss must be one of {sorted(_CODES)}, got {name!r}")
    if name in _NEEDS_DELTA:
        if delta is None or not np.isfinite(delta) or delta <= 0:
            raise ValueError(f"elementwise_loss={name!r} needs a positive threshold: ({name!r}, delta)")
        return ElementwiseLoss(name, float(delta))
    if delta is not None:
        raise ValueError(f"elementwise_loss={name!r} takes no threshold, got {delta!r}")
    return ElementwiseLoss(name)
