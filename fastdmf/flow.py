"""Gradient flow dW_j/dt = -grad_j by an embedded Runge-Kutta pair: the continuous path, to a relative tolerance."""

from dataclasses import dataclass

import numpy as np

from fastdmf.rule import Rule, State, start

__all__ = ["Flow"]

# Dormand and Prince 1980: order 5 with an error estimate of order 4; the last stage is the next step's first.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_ORDER = 5
_SAFETY, _LEAST, _MOST = 0.9, 0.2, 5.0  # of the next step, relative to this one
_FIRST = 1e-3  # of the factors' norm: length of the first step
_TINY = 1e-14  # of the time reached, or of the first step: a step that moves nothing any more


@dataclass
class _Path(State):
    """``slopes`` are the gradients of the stages behind the first; ``time`` (B,) is where the point is."""

    trial: np.ndarray = None
    drift: np.ndarray = None
    slopes: list = None
    time: np.ndarray = None
    dissipated: np.ndarray = None
    at_start: np.ndarray = None
    least: np.ndarray = None

    def take(self, keep):
        taken = super().take(keep)
        taken.slopes = [slope[keep] for slope in self.slopes]
        return taken

    def records(self):
        gap = self.at_start - self.objective - self.dissipated
        return {"time": self.time.copy(), "energy_gap": gap / np.where(self.at_start != 0, self.at_start, 1)}


@dataclass(frozen=True)
class Flow(Rule):
    """Gradient flow, integrated with an adaptive step: what gradient descent follows as its step goes to zero.

    Parameters
    ----------
    rtol : float
        Of the error of a step, as the norm over all factors relative to the norm of the factors. There is no absolute
        tolerance: the escape from a small start is resolved like everything else.

    Notes
    -----
    A step takes six evaluations, and one that is refused is repeated shorter. Records have ``time``, and
    ``energy_gap``, (phi(0) - phi(t) - int_0^t sum_j ||grad_j||^2) / phi(0): it would be zero on the exact path, as
    d phi / dt = -sum_j ||grad_j||^2. ``imbalance`` is constant on the exact path, too (Arora, Cohen, Hu, Luo 2019,
    theorem 1 in 1905.13655; Du, Hu, Lee 2018). All coefficients are scalars, so the path does not depend on the basis
    of the hidden layers.

    Once a mode has been fitted stability bounds the step, to about 3.3 / (kappa N s1^(2 - 2/N)): the flow costs more
    than ``auto`` and is for theory.
    """

    rtol: float = 1e-6

    fixed_step = False
    max_iter = 20_000
    check_every = 1
    evaluations = 6

    def __post_init__(self):
        self._require("rtol", 0, 1)

    def init(self, problem, x):
        begun = start(problem, x, 0.0)
        trial, drift, *slopes = (problem.layout.allocate(len(x), x.dtype, problem.xp) for _ in range(8))
        state = _Path(**begun, trial=trial, drift=drift, slopes=slopes, time=np.zeros(len(x)))
        state.dissipated, state.at_start = np.zeros(len(x)), state.objective.copy()
        norm = np.sqrt(problem.squared_norm(x) / np.maximum(problem.squared_norm(state.grad), 1e-300))
        state.step_size = _FIRST * norm
        state.least = _TINY * state.step_size
        return state

    def step(self, problem, state):
        h, slopes = state.step_size, (state.grad, *state.slopes)
        for k, weights in enumerate(_STAGES):
            state.trial[:] = state.x
            _combine(problem, state.trial, -h, weights, slopes)
            losses, objective = problem.evaluate(state.trial, slopes[k + 1])
        state.drift[:] = 0
        _combine(problem, state.drift, h, _ERROR, slopes)
        size = np.sqrt(np.maximum(problem.squared_norm(state.x), problem.squared_norm(state.trial)))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            error = np.sqrt(problem.squared_norm(state.drift)) / (self.rtol * size)
            error[~np.isfinite(error) | ~np.isfinite(objective)] = np.inf
            factor = np.clip(_SAFETY * error ** (-1 / _ORDER), _LEAST, _MOST)
        accepted = error <= 1
        norms = sum(weight * problem.squared_norm(slope) for weight, slope in zip(_STAGES[-1], slopes))
        state.time = state.time + np.where(accepted, h, 0)
        state.dissipated = state.dissipated + np.where(accepted, h * norms, 0)
        np.copyto(state.x, state.trial, where=accepted[:, None])
        np.copyto(state.grad, slopes[-1], where=accepted[:, None])
        state.losses = np.where(accepted, losses, state.losses)
        state.objective = np.where(accepted, objective, state.objective)
        state.step_size = h * factor
        state.failed = state.failed | ~(state.step_size > np.maximum(state.least, _TINY * state.time))


def _combine(problem, out, h, weights, slopes):
    """Add h times the weighted slopes to ``out``, slice by slice."""
    for weight, slope in zip(weights, slopes):
        if weight:
            problem.kernels.slices_move(out, out, h * weight, slope)
