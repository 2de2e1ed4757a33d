"""What a step rule is. A rule is a frozen bag of settings; its state is a separate value.

``init(problem, x) -> state`` evaluates the start; ``step(problem, state)`` moves ``state.x`` and evaluates the new
point. The state always describes one evaluated point *before* the update that leaves it: ``losses``, ``objective``,
``grad`` and the ``step_size`` that the next update will use, so that a record is a plain read. ``take(keep)`` on a
state keeps some slices of a batch. Everything a rule decides, it decides for each slice alone.

A rule that multiplies all factors' gradients by one scalar follows the path of the gradient flow in another clock and
keeps the implicit low-rank bias; one with a number for each coordinate (Adam) does not.
"""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np

from fastdmf.arrays import is_on_device, same_home

__all__ = ["Counted", "Rule", "ScalarStep", "State", "start"]


@dataclass
class State:
    """An evaluated point. Subclasses add what their rule remembers; arrays have the batch axis first.

    ``failed`` marks slices in which the rule can make no progress any more.
    """

    x: np.ndarray
    grad: np.ndarray
    losses: np.ndarray
    objective: np.ndarray
    step_size: np.ndarray
    failed: np.ndarray

    # Fields that are made later, and then hold arrays of the backend.
    vectors: ClassVar = ()

    def records(self):
        """Return what the rule adds to a record: name -> array over the slices."""
        return {}

    def take(self, keep):
        """Return the state of the slices ``keep`` (an index array)."""
        kept = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray):
                kept[f.name] = value[keep]
            elif is_on_device(value):
                (index,) = same_home([keep], value)
                kept[f.name] = value[index]
        return replace(self, **kept)


@dataclass(frozen=True)
class Rule:
    """Base of the rules: parameters can be read and set as scikit-learn's tools expect."""

    def get_params(self, deep=True):
        """Return the settings as a dict."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def set_params(self, **params):
        """Set settings in place, as ``sklearn.model_selection.GridSearchCV`` does on a clone."""
        unknown = set(params) - {f.name for f in fields(self)}
        if unknown:
            raise ValueError(f"{type(self).__name__} has no parameters {sorted(unknown)}")
        for name, value in params.items():
            object.__setattr__(self, name, value)
        self.__post_init__()
        return self

    def __post_init__(self):
        """Check the settings."""

    def _require(self, name, low, high=np.inf, *, closed=False):
        value = getattr(self, name)
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        inside = number and np.isfinite(value) and (low <= value if closed else low < value) and value < high
        if not inside:
            bound = f"{'>=' if closed else '>'} {low:g}" + ("" if high == np.inf else f" and < {high:g}")
            raise ValueError(f"{type(self).__name__}({name}=...) must be a number {bound}, got {value!r}")

    # What the driver needs to know of a rule.
    fixed_step = True  # may diverge or stand still; the driver watches for both
    max_iter = 100_000  # default number of steps
    check_every = 10  # default number of steps between records
    evaluations = 1  # of a step
    on_device = False  # whether it computes with the arrays of any backend
    # Whether a step can be noted as a graph and replayed: it changes its state in place and tells the host nothing.
    capturable = False
    persistent = None  # its name among the kernels that take many steps of small chains at a time, if it has one

    def init(self, problem, x):
        """Evaluate the start ``x`` (B, D), which the state takes over."""
        raise NotImplementedError

    def step(self, problem, state):
        """Move ``state`` by one update and evaluate the new point."""
        raise NotImplementedError


def start(problem, x, step_size):
    """Evaluate the start of a fixed-step rule; return the fields of its State."""
    grad = problem.layout.allocate(len(x), x.dtype, problem.xp)
    losses, objective = problem.evaluate(x, grad)
    return {
        "x": x,
        "grad": grad,
        "losses": losses,
        "objective": objective,
        "step_size": problem.xp.full(len(x), float(step_size)),
        "failed": np.zeros(len(x), bool),
    }


@dataclass
class Counted(State):
    """A state that knows how many steps its slices have taken, (B,) float64 of the backend."""

    count: object = None


@dataclass(frozen=True)
class ScalarStep(Rule):
    """Base of the rules W_j <- W_j - eta_t grad_j with one number eta_t for all factors, known after an evaluation."""

    def init(self, problem, x):
        state = self._begin(problem, x)
        self._adapt(problem, state)
        return state

    def step(self, problem, state):
        problem.kernels.update_gd(state.x, state.grad, state.step_size, count=state.count)
        state.losses, state.objective = problem.evaluate(state.x, state.grad)
        self._adapt(problem, state)

    def _begin(self, problem, x):
        """Return the state at the start."""
        return Counted(**start(problem, x, self.lr), count=problem.xp.zeros(len(x)))

    def _adapt(self, problem, state):
        """Overwrite ``state.step_size`` for the point just evaluated, after ``state.count`` steps."""
        raise NotImplementedError
