"""Gradient descent with steps of a given length: it goes on along the minima once the data are met."""

from dataclasses import dataclass

import numpy as np

from fastdmf.rule import ScalarStep

__all__ = ["NormalisedGD"]


@dataclass(frozen=True)
class NormalisedGD(ScalarStep):
    """x <- x - lr (k + 1)^(-power) grad / ||grad||, with one norm over all factors; k counts the steps from 0.

    Parameters
    ----------
    lr : float
        Length of the first step, in units of the factors.
    power : float
        In [0, 1): the lengths still add up to infinity. 0 keeps them alike.

    Notes
    -----
    The step does not become shorter near a fit: the point hops across the valley and drifts along the minima, towards
    flat ones, which for a chain are the balanced ones (Josz 2026 shows the drift for normalised descent with slowly
    decreasing steps). Give :func:`fastdmf.solve` a tiny ``tol`` for that; the loss falls only with the square of the
    step's length. One scalar multiplies all factors, so the way to the fit is the gradient flow's,
    and it does not depend on the basis of the hidden layers.

    A point where the gradient is exactly zero is left alone.
    """

    lr: float = 0.1
    power: float = 0.5

    def __post_init__(self):
        self._require("lr", 0)
        self._require("power", 0, 1, closed=True)

    def _adapt(self, problem, state):
        norm = np.sqrt(problem.squared_norm(state.grad))
        length = self.lr * (state.count + 1) ** -self.power
        state.step_size[:] = np.divide(length, norm, out=np.zeros(len(norm)), where=norm > 0)
