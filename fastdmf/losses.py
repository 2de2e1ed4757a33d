"""Elementwise losses: a code and a parameter, the same in the kernels and here.

With r = prediction - y a loss is rho(r), and psi = rho'/2 is what the adjoint is applied to, so that squared
loss has psi = r. The kernels sum w rho(r) in float64 and pull w psi(r).

========= ============================ ============================
name      rho(r)                       psi(r)
========= ============================ ============================
squared   r^2                          r
huber     r^2, |r| <= d;               clip(r, -d, d)
          d (2 |r| - d) outside
truncated min(r^2, d^2)                r 1{|r| <= d}
absolute  |r|                          sign(r) / 2
========= ============================ ============================

The truncated loss is the one of Li, Ma and Zhang 2018 (section 5) with the threshold on the residual.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["ElementwiseLoss", "as_loss"]

_CODES = {"squared": 0, "huber": 1, "truncated": 2, "absolute": 3}
_NEEDS_DELTA = ("huber", "truncated")


@dataclass(frozen=True)
class ElementwiseLoss:
    """One loss: its name and, for ``huber`` and ``truncated``, the threshold ``delta`` in units of y."""

    name: str = "squared"
    delta: float = 0.0

    @property
    def code(self):
        """The number by which the kernels know the loss."""
        return _CODES[self.name]

    def rho(self, r):
        """Return rho(r), elementwise."""
        match self.name:
            case "squared":
                return r * r
            case "huber":
                a = np.abs(r)
                return np.where(a <= self.delta, r * r, self.delta * (2 * a - self.delta))
            case "truncated":
                return np.minimum(r * r, self.delta**2)
            case _:
                return np.abs(r)

    def psi(self, r):
        """Return psi(r) = rho'(r) / 2, elementwise."""
        match self.name:
            case "squared":
                return r
            case "huber":
                return np.clip(r, -self.delta, self.delta)
            case "truncated":
                return np.where(np.abs(r) <= self.delta, r, 0)
            case _:
                return np.sign(r) / 2


def as_loss(loss):
    """Turn ``"squared"``, ``"absolute"``, ``("huber", delta)``, ``("truncated", delta)`` into a loss."""
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
