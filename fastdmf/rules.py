"""The step rules with a fixed setting, and the table of all rules by name."""

from dataclasses import dataclass

import numpy as np

from fastdmf.auto import Auto
from fastdmf.flow import Flow
from fastdmf.mirror import MirrorDescent
from fastdmf.normalised import NormalisedGD
from fastdmf.rescaled import RescaledGradientDescent
from fastdmf.rule import Counted, Rule, ScalarStep, State, start
from fastdmf.scaled import PreconditionedGD, ScaledGD
from fastdmf.subgradient import Subgradient

__all__ = [
    "RULES",
    "Adam",
    "Auto",
    "Flow",
    "GradientDescent",
    "GroupRMSprop",
    "MirrorDescent",
    "Momentum",
    "Nesterov",
    "NormalisedGD",
    "PreconditionedGD",
    "RescaledGradientDescent",
    "Rule",
    "ScaledGD",
    "Subgradient",
    "as_rule",
]


@dataclass(frozen=True)
class GradientDescent(Rule):
    """W_j <- W_j - lr grad_j with a fixed step.

    Parameters
    ----------
    lr : float
        Learning rate in the named normalisation of the loss. Stable near a balanced exact fit iff
        lr < 2 / (kappa N s1^(2 - 2/N)), kappa the curvature of the data term and s1 = ||W*||_2.

    Notes
    -----
    Satisfies D_j(t+1) = D_j(t) + lr^2 (grad_{j+1}^T grad_{j+1} - grad_j grad_j^T) for
    D_j = W_{j+1}^T W_{j+1} - W_j W_j^T exactly (l2 = 0).
    """

    lr: float = 1e-2

    on_device = capturable = True
    persistent = "gd"

    def __post_init__(self):
        self._require("lr", 0)

    def init(self, problem, x):
        return State(**start(problem, x, self.lr))

    def step(self, problem, state):
        problem.kernels.update_gd(state.x, state.grad, state.step_size)
        state.losses, state.objective = problem.evaluate(state.x, state.grad)


@dataclass
class _Velocity(State):
    velocity: np.ndarray = None


@dataclass(frozen=True)
class Momentum(Rule):
    """Heavy ball: v <- beta v + grad, W <- W - lr v.

    Parameters
    ----------
    lr : float
    beta : float
        In [0, 1). The effective step is lr / (1 - beta).
    """

    lr: float = 1e-2
    beta: float = 0.9

    on_device = capturable = True
    _nesterov, persistent = False, "momentum"

    def __post_init__(self):
        self._require("lr", 0)
        self._require("beta", 0, 1, closed=True)

    def init(self, problem, x):
        return _Velocity(**start(problem, x, self.lr), velocity=np.zeros_like(x))

    def step(self, problem, state):
        arrays = state.x, state.velocity, state.grad, state.step_size
        problem.kernels.update_momentum(*arrays, self.beta, nesterov=self._nesterov)
        state.losses, state.objective = problem.evaluate(state.x, state.grad)


@dataclass(frozen=True)
class Nesterov(Momentum):
    """Nesterov's momentum: v <- beta v + grad, W <- W - lr (grad + beta v).

    The stored factors are the extrapolated points, where the gradient is taken; records describe them.
    """

    _nesterov, persistent = True, "nesterov"


@dataclass
class _MeanSquare(Counted):
    mean_square: np.ndarray = None
    lr: np.ndarray = None


@dataclass(frozen=True)
class GroupRMSprop(ScalarStep):
    """The rule of Arora, Cohen, Hu and Luo 2019: one adaptive scalar for all factors.

    v <- beta v + (1 - beta) sum_j ||grad_j||_F^2 ; W_j <- W_j - lr / (sqrt(v / (1 - beta^t)) + eps) grad_j.

    Parameters
    ----------
    lr : float
        About the length of a step, in units of the factors.
    beta, eps : float
        The authors' runs use 0.99 and 1e-4. Where sqrt(v) falls below ``eps`` (deep chains from a tiny start) the rule
        turns into gradient descent with step lr / eps.
    """

    lr: float = 1e-3
    beta: float = 0.99
    eps: float = 1e-4

    on_device = capturable = True
    persistent = "group_rmsprop"

    def __post_init__(self):
        self._require("lr", 0)
        self._require("beta", 0, 1, closed=True)
        self._require("eps", 0)

    def _begin(self, problem, x):
        count, mean_square, lr = problem.xp.zeros((3, len(x)))
        lr += self.lr
        return _MeanSquare(**start(problem, x, self.lr), count=count, mean_square=mean_square, lr=lr)

    def _adapt(self, problem, state):
        numbers = state.step_size, state.mean_square, problem.squared_norm(state.grad), state.lr
        problem.kernels.update_group_rmsprop(*numbers, self.beta, self.eps, state.count)


@dataclass
class _Moments(Counted):
    mean: np.ndarray = None
    square: np.ndarray = None


@dataclass(frozen=True)
class Adam(Rule):
    """Adam, for comparison: its step has a number for each coordinate, which **breaks the implicit bias**.

    From a small start every entry moves by +-lr at once, a full-rank sign matrix; the path depends on the basis of
    the hidden layers.

    Parameters
    ----------
    lr, beta1, beta2, eps : float
        As in Kingma and Ba 2015, algorithm 1.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    on_device = capturable = True

    def __post_init__(self):
        self._require("lr", 0)
        self._require("beta1", 0, 1, closed=True)
        self._require("beta2", 0, 1, closed=True)
        self._require("eps", 0)

    def init(self, problem, x):
        return _Moments(
            **start(problem, x, self.lr),
            count=problem.xp.zeros(len(x)),
            mean=np.zeros_like(x),
            square=np.zeros_like(x),
        )

    def step(self, problem, state):
        arrays = state.x, state.mean, state.square, state.grad, state.step_size
        problem.kernels.update_adam(*arrays, self.beta1, self.beta2, self.eps, state.count)
        state.losses, state.objective = problem.evaluate(state.x, state.grad)


RULES = {
    "auto": Auto,
    "gd": GradientDescent,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "group_rmsprop": GroupRMSprop,
    "adam": Adam,
    "flow": Flow,
    "scaled": ScaledGD,
    "preconditioned": PreconditionedGD,
    "mirror": MirrorDescent,
    "subgradient": Subgradient,
    "normalised": NormalisedGD,
    "rescaled": RescaledGradientDescent,
}


def as_rule(rule):
    """Return the rule named ``rule``, or ``rule`` itself if it is one.

    Raises
    ------
    ValueError, TypeError
        If the name is unknown, or it is neither a name nor a rule.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {sorted(RULES)} or an object of fastdmf.rules, got {rule!r}")
        return RULES[rule]()
    raise TypeError(f"rule must be a name or an object of fastdmf.rules, got {type(rule).__name__}")
