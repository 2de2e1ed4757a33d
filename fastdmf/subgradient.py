"""Subgradient descent with steps that shrink with the residuals: for the absolute loss, data with outliers."""

from dataclasses import dataclass

import numpy as np

from fastdmf.rule import ScalarStep

__all__ = ["Subgradient"]

_SCHEDULES = ("polyak", "median", "geometric")


@dataclass(frozen=True)
class Subgradient(ScalarStep):
    """W_j <- W_j - eta_t grad_j, with a step eta_t that shrinks as the fit improves.

    ============= =========================================================
    schedule      eta_t
    ============= =========================================================
    ``polyak``    lr sum w |r| / sum w, the mean absolute residual
    ``median``    lr times the ``quantile`` of the |r| that have a weight
    ``geometric`` lr decay^t, t = 0, 1, ...
    ============= =========================================================

    Parameters
    ----------
    lr : float
    schedule : {"polyak", "median", "geometric"}
        ``polyak`` is for clean data. Where some measurements are wrong the mean residual does not go to zero:
        ``median``, which goes to zero while less than half of them are wrong, or ``geometric``.
    quantile : float
        In (0, 1), for ``median``; interpolated between residuals as :func:`numpy.quantile` does.
    decay : float
        In (0, 1), for ``geometric``.

    Notes
    -----
    Meant for ``elementwise_loss="absolute"``, rho(r) = |r|: the objective is c sum w |r| with c of the named
    normalisation, its subgradient in W is G = c A*(w sign r), with sign 0 = 0, and that in the factors follows from it
    (for W = U U^T it is (G + G^T) U). The papers', with A_i symmetric and W = U U^T:

    - Ma and Fattahi 2023 (JMLR 22-0233), f = (1/m) sum |r|: U <- U - (eta/2) f(U) D with D a subgradient of f is
      ``loss="mse"``, ``schedule="polyak"``, lr = eta/2; for corrupted data they use ``"geometric"``.
    - Ding, Jiang, Chen, Qu, Zhu 2021, f = (1/2m) sum |r|: U <- U - c median|r| (1/m) sum sign(r_i) A_i U is
      ``loss="mse/2"``, ``schedule="median"``, lr = c.

    Both start from :func:`fastdmf.spectral_factors`. ``median``, and ``polyak`` with another loss than the absolute
    one, take a forward pass besides the evaluation. One scalar multiplies all factors, so the path does not depend on
    the basis of the hidden layers.
    """

    lr: float = 0.1
    schedule: str = "polyak"
    quantile: float = 0.5
    decay: float = 0.99

    def __post_init__(self):
        self._require("lr", 0)
        self._require("quantile", 0, 1)
        self._require("decay", 0, 1)
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"Subgradient(schedule=...) must be one of {list(_SCHEDULES)}, got {self.schedule!r}")

    def _adapt(self, problem, state):
        match self.schedule:
            case "polyak":
                state.step_size[:] = self.lr * _mean(problem, state)
            case "median":
                state.step_size[:] = self.lr * _quantile(problem, state, self.quantile)
            case _:
                state.step_size[:] = self.lr * self.decay**state.count


def _mean(problem, state):
    """Return sum w |r| / sum w, (B,)."""
    bound = problem.bound
    if bound.loss.name == "absolute":
        return state.losses / problem.weight_sums
    absolute = np.abs(problem.residuals(state.x))
    if bound.weights is not None:
        absolute = absolute * bound.weights
    return absolute.sum(axis=1, dtype=np.float64) / problem.weight_sums


def _quantile(problem, state, quantile):
    """Return the quantile of the |r| whose weight is not zero, (B,)."""
    absolute, weights = np.abs(problem.residuals(state.x)).astype(np.float64), problem.bound.weights
    if weights is None:
        return np.quantile(absolute, quantile, axis=1)
    weighted = np.broadcast_to(weights > 0, absolute.shape)
    return np.array([np.quantile(row[chosen], quantile) for row, chosen in zip(absolute, weighted)])
