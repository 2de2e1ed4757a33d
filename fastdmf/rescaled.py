"""The rule for quadratic networks: gradient descent on U U^T whose trace term is divided out again."""

from dataclasses import dataclass

import numpy as np

from fastdmf.rule import Rule, State, start

__all__ = ["RescaledGradientDescent"]


@dataclass
class _Rescaled(State):
    target: np.ndarray = None


@dataclass(frozen=True)
class RescaledGradientDescent(Rule):
    """U <- (U - lr grad) / (1 - 4 c lr (||U||_F^2 - target)), the algorithm for quadratic networks of [1]_.

    For U U^T and measurements x_i^T U U^T x_i of inputs x_i ~ N(0, I), usually with
    ``elementwise_loss=("truncated_prediction", R)``.

    Parameters
    ----------
    lr : float
        Learning rate in the named normalisation of the loss.
    target : float, optional
        ||U*||_F^2 = tr(X*), the paper's tau. Default the weighted mean of y, whose expectation it is.

    Raises
    ------
    ValueError
        If a setting is out of range, or the chain is not symmetric.

    Notes
    -----
    Gaussian inputs are no restricted isometry: with A_i = x_i x_i^T and a symmetric X, E <A_i, X> A_i = 2 X + tr(X) I,
    as E (x^T X x) x_j x_k = 2 X_jk + tr(X) delta_jk. The gradient of c / sum(w) sum_i w_i (<A_i, U U^T> - y_i)^2 is
    4 c / sum(w) sum_i w_i <A_i, U U^T - X*> A_i U, so that in expectation

        U - lr grad = (1 - 4 c lr (||U||_F^2 - tr(X*))) U - 8 c lr (U U^T - X*) U.

    The division takes the first factor away and leaves gradient descent on ||U U^T - X*||_F^2. The paper writes M U
    for the gradient, with M the mean of <A_i, U U^T - X*> A_i: its eta is 4 c lr. Here c is 1 for ``loss="mse"``, 1/2
    for ``"mse/2"``, sum(w) and sum(w) / 2 for the sums. Inputs of another scale have to be divided by it first.

    Where the denominator is not positive the step is too large: the run stays where it is and ends as diverged.

    References
    ----------
    .. [1] Y. Li, T. Ma, H. Zhang, "Algorithmic Regularization in Over-parameterized Matrix Sensing and Neural Networks
       with Quadratic Activations", 2018, arXiv:1712.09203.
    """

    lr: float = 1e-2
    target: float | None = None

    def __post_init__(self):
        self._require("lr", 0)
        if self.target is not None:
            self._require("target", 0)

    def init(self, problem, x):
        if not problem.layout.symmetric:
            raise ValueError("rule RescaledGradientDescent is for U U^T: pass symmetric=True, or another rule")
        return _Rescaled(**start(problem, x, self.lr), target=self._targets(problem, len(x)))

    def _targets(self, problem, batch):
        if self.target is not None:
            return np.full(batch, float(self.target))
        y, w = problem.bound.y.astype(np.float64), problem.bound.weights
        return np.broadcast_to((y if w is None else w * y).sum(axis=1), (batch,)) / problem.weight_sums

    def step(self, problem, state):
        excess = problem.squared_norm(state.x) - state.target
        denominator = 1 - 4 * problem.scale * problem.weight_sums * state.step_size * excess
        state.failed |= ~(denominator > 0)
        moving = ~state.failed
        moved = np.empty_like(state.x)
        problem.kernels.slices_move(moved, state.x, -state.step_size, state.grad)
        moved /= np.where(moving, denominator, 1).astype(state.x.dtype)[:, None]
        state.x[moving] = moved[moving]
        state.losses, state.objective = problem.evaluate(state.x, state.grad)
        state.objective[state.failed] = np.inf  # what the loop takes for divergence
