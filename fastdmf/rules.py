"""Step rules. A rule is a frozen bag of settings; its state is a separate value.

``init(problem, x) -> state`` evaluates the start; ``step(problem, state)`` moves ``state.x`` and evaluates the new
point. The state always describes one evaluated point *before* the update that leaves it: ``losses``, ``objective``,
``grad`` and the ``step_size`` that the next update will use, so that a record is a plain read. ``take(keep)`` on a
state keeps some slices of a batch. Everything a rule decides, it decides for each slice alone.

A rule that multiplies all factors' gradients by one scalar follows the path of the gradient flow in another clock and
keeps the implicit low-rank bias; one with a number for each coordinate (Adam) does not.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from fastdmf.problem import squared_norm

__all__ = [
    "RULES",
    "Adam",
    "Auto",
    "GradientDescent",
    "GroupRMSprop",
    "Momentum",
    "Nesterov",
    "Rule",
    "as_rule",
]


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

    def take(self, keep):
        """Return the state of the slices ``keep`` (an index array)."""
        return replace(
            self,
            **{f.name: value[keep] for f in fields(self) if isinstance(value := getattr(self, f.name), np.ndarray)},
        )


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

    def init(self, problem, x):
        """Evaluate the start ``x`` (B, D), which the state takes over."""
        raise NotImplementedError

    def step(self, problem, state):
        """Move ``state`` by one update and evaluate the new point."""
        raise NotImplementedError


def _start(problem, x, step_size):
    """Evaluate the start of a fixed-step rule; return the fields of its State."""
    grad = np.zeros_like(x)
    losses, objective = problem.evaluate(x, grad)
    return {
        "x": x,
        "grad": grad,
        "losses": losses,
        "objective": objective,
        "step_size": np.full(len(x), float(step_size)),
        "failed": np.zeros(len(x), bool),
    }


def _column(scalars, like):
    """Turn (B,) scalars into a column of the precision of ``like``."""
    return np.asarray(scalars).astype(like.dtype)[:, None]


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

    def __post_init__(self):
        self._require("lr", 0)

    def init(self, problem, x):
        return State(**_start(problem, x, self.lr))

    def step(self, problem, state):
        state.x -= state.x.dtype.type(self.lr) * state.grad
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

    def __post_init__(self):
        self._require("lr", 0)
        self._require("beta", 0, 1, closed=True)

    def init(self, problem, x):
        return _Velocity(**_start(problem, x, self.lr), velocity=np.zeros_like(x))

    def step(self, problem, state):
        real = state.x.dtype.type
        state.velocity *= real(self.beta)
        state.velocity += state.grad
        state.x -= real(self.lr) * self._direction(state)
        state.losses, state.objective = problem.evaluate(state.x, state.grad)

    def _direction(self, state):
        return state.velocity


@dataclass(frozen=True)
class Nesterov(Momentum):
    """Nesterov's momentum: v <- beta v + grad, W <- W - lr (grad + beta v).

    The stored factors are the extrapolated points, where the gradient is taken; records describe them.
    """

    def _direction(self, state):
        return state.grad + state.x.dtype.type(self.beta) * state.velocity


@dataclass
class _MeanSquare(State):
    mean_square: np.ndarray = None
    count: np.ndarray = None


@dataclass(frozen=True)
class GroupRMSprop(Rule):
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

    def __post_init__(self):
        self._require("lr", 0)
        self._require("beta", 0, 1, closed=True)
        self._require("eps", 0)

    def init(self, problem, x):
        zeros = np.zeros(len(x))
        state = _MeanSquare(**_start(problem, x, self.lr), mean_square=zeros, count=zeros.copy())
        self._adapt(state)
        return state

    def step(self, problem, state):
        state.x -= _column(state.step_size, state.x) * state.grad
        state.losses, state.objective = problem.evaluate(state.x, state.grad)
        self._adapt(state)

    def _adapt(self, state):
        state.count = state.count + 1
        state.mean_square = self.beta * state.mean_square + (1 - self.beta) * squared_norm(state.grad)
        root = np.sqrt(state.mean_square / (1 - self.beta**state.count))
        state.step_size = self.lr / (root + self.eps)


@dataclass
class _Moments(State):
    mean: np.ndarray = None
    square: np.ndarray = None
    count: np.ndarray = None


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

    def __post_init__(self):
        self._require("lr", 0)
        self._require("beta1", 0, 1, closed=True)
        self._require("beta2", 0, 1, closed=True)
        self._require("eps", 0)

    def init(self, problem, x):
        return _Moments(
            **_start(problem, x, self.lr),
            mean=np.zeros_like(x),
            square=np.zeros_like(x),
            count=np.zeros(len(x)),
        )

    def step(self, problem, state):
        real, g = state.x.dtype.type, state.grad
        state.count = state.count + 1
        state.mean += real(1 - self.beta1) * (g - state.mean)
        state.square += real(1 - self.beta2) * (g * g - state.square)
        mean = state.mean / _column(1 - self.beta1**state.count, g)
        root = np.sqrt(state.square / _column(1 - self.beta2**state.count, g))
        state.x -= real(self.lr) * mean / (root + real(self.eps))
        state.losses, state.objective = problem.evaluate(state.x, state.grad)


# --- the default -----------------------------------------------------------------------------------------------------

# Settings of the self-tuned rule, from the study of rules on the paper's instances (median of 5 seeds): the step
# constant of the take-off by depth (exponential separation of modes at depth 2 is blunted by coarse steps, the finite
# blow-up of deeper chains is not), the switch to acceleration, and the memory: ten pairs, fewer where they would take
# more than 256 MB (their reading would also cost more than the evaluation), never fewer than four.
_TAKE_OFF = {1: 0.5, 2: 0.1, 3: 1.0}
_TAKE_OFF_DEEPER = 1.5
_SWITCH, _SWITCH_SLOW, _SLOW = 0.1, 0.5, 0.02
_MEMORY, _MEMORY_LEAST, _MEMORY_BYTES = 10, 4, 256e6
_ARMIJO, _SHRINK, _TRIALS, _RESTARTS = 1e-4, 0.4, 8, 3


@dataclass
class _AutoState(State):
    """x, grad, losses, objective describe the accepted point; the trial has buffers of its own."""

    trial: np.ndarray = None
    trial_grad: np.ndarray = None
    u: np.ndarray = None
    v: np.ndarray = None
    right: np.ndarray = None
    s1: np.ndarray = None
    g1: np.ndarray = None
    kappa: np.ndarray = None
    decrease: np.ndarray = None
    accelerated: np.ndarray = None
    direction: np.ndarray = None
    slope: np.ndarray = None
    stretch: np.ndarray = None
    trials: np.ndarray = None
    restarts: np.ndarray = None
    base: np.ndarray = None
    pairs: np.ndarray = None
    s_y: np.ndarray = None
    y_y: np.ndarray = None
    products: np.ndarray = None
    coefficients: np.ndarray = None
    gamma: np.ndarray = None
    newest: np.ndarray = None
    held: np.ndarray = None
    fresh: np.ndarray = None
    memory: int = 0


@dataclass(frozen=True)
class Auto(Rule):
    """No learning rate: a scalar step while the modes take off, then L-BFGS over all factors jointly.

    Phase 1: one step eta = c / (kappa N s1^(2-2/N) + (N-1) g1 s1^(1-2/N)) for all factors, with s1 = ||W||_2 and
    g1 = ||G||_2 by warm-started power steps; kappa grows by 1.5 whenever the objective rises, and a trial that
    doubles it is taken back. Phase 2, from a relative objective of 0.1 (or 0.5 once it falls by less than 2 % a
    step): L-BFGS on the concatenated factors, memory up to 10, Armijo line search. One step is one evaluation, so
    that a step may be a rejected trial and leave the point where it is.

    Parameters
    ----------
    accelerate : bool
        False stays in phase 1, where the balancedness identity of gradient descent holds exactly.

    Notes
    -----
    Every quantity is a scalar that multiplies all factors, so the path does not depend on the basis of the hidden
    layers; tolerances are relative, so it does not depend on the normalisation of the loss. The step is the local
    Lipschitz bound at a balanced point of depth N, 1 / (kappa N s1^(2-2/N) + (N-1) ||G||_2 s1^(1-2/N)).
    """

    accelerate: bool = True

    fixed_step = False
    max_iter = 2000
    check_every = 1

    def __post_init__(self):
        if not isinstance(self.accelerate, (bool, np.bool_)):
            raise ValueError(f"Auto(accelerate=...) must be True or False, got {self.accelerate!r}")

    # -- phase 1 --

    def init(self, problem, x):
        batch, (n1, n2) = len(x), problem.layout.shape
        # Not a seed that data are likely to have been drawn with: the vectors must be independent of them.
        rng = np.random.default_rng(0x66617374646D66)

        def direction(n):
            v = rng.standard_normal(n)
            return np.tile((v / np.linalg.norm(v)).astype(x.dtype), (batch, 1))

        u, v, right = direction(n1), direction(n2), direction(n2)
        grad = np.zeros_like(x)
        losses, objective = problem.evaluate(x, grad)
        s1 = problem.leading_singular(right, 5)
        g1 = problem.leading_gradient(u, v, 5)
        affordable = int(_MEMORY_BYTES / (2 * x[0].nbytes))
        memory = min(_MEMORY, max(_MEMORY_LEAST, affordable)) if self.accelerate else 0

        def scalars(value, dtype=np.float64):
            return np.full(batch, value, dtype)

        state = _AutoState(
            x=x,
            grad=grad,
            losses=losses,
            objective=objective,
            step_size=scalars(0.0),
            failed=scalars(False, bool),
            trial=np.zeros_like(x),
            trial_grad=np.zeros_like(x),
            u=u,
            v=v,
            right=right,
            s1=s1,
            g1=g1,
            kappa=np.broadcast_to(problem.bound.curvature(), (batch,)).copy(),
            decrease=scalars(1.0),
            accelerated=scalars(False, bool),
            direction=np.zeros_like(x) if memory else None,
            slope=scalars(0.0),
            stretch=scalars(1.0),
            trials=scalars(0, np.int64),
            restarts=scalars(0, np.int64),
            base=scalars(0.0),
            pairs=None,
            s_y=np.zeros((batch, memory, memory)),
            y_y=np.zeros((batch, memory, memory)),
            products=np.zeros((batch, 2 * memory)),
            coefficients=np.zeros((batch, 2 * memory)),
            gamma=scalars(0.0),
            newest=scalars(0, np.int64),
            held=scalars(0, np.int64),
            fresh=scalars(True, bool),
            memory=memory,
        )
        state.step_size = self._lipschitz_step(problem, state)
        return state

    def _lipschitz_step(self, problem, state):
        n = problem.layout.depth
        c = _TAKE_OFF.get(n, _TAKE_OFF_DEEPER)
        # U U^T moves twice as fast as two balanced factors under the same gradient.
        twice = 2.0 if problem.layout.symmetric else 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            bend = (n - 1) * state.g1 * state.s1 ** (1 - 2 / n) if n > 1 else 0.0
            bound = twice * 2 * problem.scale * (state.kappa * n * state.s1 ** (2 - 2 / n) + bend) + problem.l2
            return np.where(bound > 0, c / bound, 0.0)

    def step(self, problem, state):
        if state.accelerated.any():
            self._aim(state)
        self._try(state)
        in_flow = ~state.accelerated
        probe = (state.u.copy(), state.v.copy()) if in_flow.any() else None
        losses, objective = problem.evaluate(state.trial, state.trial_grad, probe)
        accepted = np.where(in_flow, self._judge_flow(state, objective), self._judge_search(state, objective))
        decrease = np.where(accepted, 1 - _ratio(objective, state.objective), 0.0)
        if state.accelerated.any():
            self._remember(state, accepted & state.accelerated)
        self._accept(state, accepted, losses, objective)
        if in_flow.any():
            self._measure(problem, state, accepted & in_flow, probe, decrease)
        self._retreat(state, ~accepted & ~in_flow)

    def _try(self, state):
        """Write the trial point of every slice."""
        flow = ~state.accelerated
        if flow.any():
            np.multiply(state.grad, _column(-np.where(flow, state.step_size, 0), state.x), out=state.trial)
        if not flow.all():
            stretched = _column(np.where(flow, 0, state.stretch), state.x) * state.direction
            if flow.any():
                state.trial += stretched
            else:
                state.trial[:] = stretched
        state.trial += state.x

    def _judge_flow(self, state, objective):
        rose = ~(objective <= state.objective)
        state.kappa = np.where(rose & ~state.accelerated, 1.5 * state.kappa, state.kappa)
        return objective <= 2 * state.objective

    def _accept(self, state, accepted, losses, objective):
        if accepted.all():
            state.x, state.trial = state.trial, state.x
            state.grad, state.trial_grad = state.trial_grad, state.grad
        else:
            np.copyto(state.x, state.trial, where=accepted[:, None])
            np.copyto(state.grad, state.trial_grad, where=accepted[:, None])
        state.losses = np.where(accepted, losses, state.losses)
        state.objective = np.where(accepted, objective, state.objective)

    def _measure(self, problem, state, moved, probe, decrease):
        """Update the power iterations at the new point, the step, and the decision to accelerate."""
        right = state.right.copy()
        s1 = problem.leading_singular(right, 2)
        gv, gu = probe
        g1 = np.sqrt(np.maximum(squared_norm(gv), squared_norm(gu)))
        for b in np.flatnonzero(moved):
            state.right[b], state.s1[b], state.g1[b] = right[b], s1[b], g1[b]
            for into, new in ((state.u, gv), (state.v, gu)):
                size = np.sqrt(np.vdot(new[b], new[b]))
                if size > 0:
                    into[b] = new[b] / size
        state.decrease = np.where(moved, 0.9 * state.decrease + 0.1 * decrease, state.decrease)
        flow = ~state.accelerated
        step = self._lipschitz_step(problem, state)
        state.step_size = np.where(flow, step, state.step_size)
        # A zero step means a zero gradient or a flat chain; a step below rounding would repeat for ever.
        state.failed |= flow & (~(step > 0) | (state.kappa > 1e30))
        if self.accelerate:
            f = _ratio(state.objective, problem.scale * problem.null_losses)
            ready = flow & moved & ((f < _SWITCH) | ((f < _SWITCH_SLOW) & (state.decrease < _SLOW)))
            state.accelerated |= ready
            state.base = np.where(ready, step, state.base)

    # -- phase 2 --

    def _aim(self, state):
        """Give a direction to the accelerated slices that have just moved or cleared their memory."""
        if state.pairs is None:
            rows, size = 2 * state.memory, state.x.shape[1]
            state.pairs = np.zeros((len(state.x), rows, size), state.x.dtype)
        for b in np.flatnonzero(state.accelerated & state.fresh):
            self._direct(state, b)
        state.fresh &= ~state.accelerated

    def _direct(self, state, b):
        """Set the direction -H grad of slice ``b`` from the products of its memory with the gradient."""
        k, g, d = state.memory, state.grad[b], state.direction[b]
        if state.held[b]:
            oldest_first = (state.newest[b] - np.arange(state.held[b])[::-1]) % k
            state.coefficients[b], state.gamma[b] = _inverse_hessian(
                oldest_first, state.s_y[b], state.y_y[b], state.products[b]
            )
            np.matmul(-state.coefficients[b].astype(g.dtype), state.pairs[b], out=d)
            d -= g.dtype.type(state.gamma[b]) * g
            state.slope[b] = np.vdot(g, d)
        if not state.held[b] or not state.slope[b] < 0:
            state.held[b], state.coefficients[b], state.gamma[b] = 0, 0, state.base[b]
            np.multiply(g, g.dtype.type(-state.base[b]), out=d)
            state.slope[b] = np.vdot(g, d)
        state.stretch[b] = state.step_size[b] = 1.0
        state.trials[b] = 0
        if not state.slope[b] < 0:
            state.failed[b] = True

    def _judge_search(self, state, objective):
        return objective <= state.objective + _ARMIJO * state.stretch * state.slope

    def _remember(self, state, moved):
        """Store the pairs s = trial - x, y = trial_grad - grad of the slices that are about to move.

        The pairs are formed in the place of x and grad, which the move overwrites. Their inner products with the older
        pairs need no pass over the memory: Y^T s follows from the direction's coefficients, [S Y]^T y from the one
        product [S Y]^T grad that the next direction needs anyway.
        """
        k = state.memory
        for b in np.flatnonzero(moved):
            s = np.subtract(state.trial[b], state.x[b], out=state.x[b])
            y = np.subtract(state.trial_grad[b], state.grad[b], out=state.grad[b])
            old, g = state.products[b].copy(), state.trial_grad[b]
            if state.held[b]:
                state.products[b] = state.pairs[b] @ g
            s_y, y_y = float(np.vdot(s, y)), float(np.vdot(y, y))
            state.fresh[b], state.restarts[b] = True, 0
            if not s_y > 1e-16 * y_y:
                continue
            slot = (state.newest[b] + 1) % k if state.held[b] else 0
            if state.held[b]:
                in_s, in_y = state.coefficients[b, :k], state.coefficients[b, k:]
                y_d = -(in_s @ state.s_y[b] + in_y @ state.y_y[b] + state.gamma[b] * old[k:])
                state.s_y[b, slot] = state.stretch[b] * y_d
                change = state.products[b] - old
                state.s_y[b, :, slot] = change[:k]
                state.y_y[b, slot] = state.y_y[b, :, slot] = change[k:]
            state.s_y[b, slot, slot], state.y_y[b, slot, slot] = s_y, y_y
            state.pairs[b, slot], state.pairs[b, k + slot] = s, y
            state.products[b, slot], state.products[b, k + slot] = np.vdot(s, g), np.vdot(y, g)
            state.newest[b], state.held[b] = slot, min(state.held[b] + 1, k)

    def _retreat(self, state, refused):
        """Shrink the step of refused trials; after 8 clear the memory, after 3 cleared memories give up."""
        for b in np.flatnonzero(refused):
            state.trials[b] += 1
            state.stretch[b] *= _SHRINK
            if state.trials[b] >= _TRIALS:
                state.held[b], state.fresh[b] = 0, True
                state.base[b] *= 0.5
                state.restarts[b] += 1
                state.failed[b] |= state.restarts[b] >= _RESTARTS
        state.step_size = np.where(state.accelerated, state.stretch, state.step_size)


def _ratio(a, b):
    """Return a / b, and 0 for 0 / 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def _inverse_hessian(oldest_first, s_y, y_y, products):
    """Return the coefficients of H g in the memory, and gamma, by the compact form of BFGS.

    H g = gamma g + S in_s + Y in_y with R a = S^T g, in_y = -gamma a, R^T in_s = (D + gamma Y^T Y) a - gamma Y^T g,
    where R is the upper triangle of S^T Y, oldest pair first, and D its diagonal (Byrd, Nocedal and Schnabel 1994,
    eq. 2.22; the same H as the two-loop recursion).

    Parameters
    ----------
    oldest_first : ndarray of int, shape (held,)
        Slots of the pairs in the order of their age.
    s_y, y_y : ndarray of shape (k, k)
        s_i . y_j and y_i . y_j, by slot.
    products : ndarray of shape (2 k,)
        s_i . g, then y_i . g.

    Returns
    -------
    coefficients : ndarray of shape (2 k,)
        in_s, then in_y, by slot; zero for empty slots.
    gamma : float
        s . y / y . y of the newest pair.
    """
    k = len(s_y)
    inside = np.ix_(oldest_first, oldest_first)
    r, yy = np.triu(s_y[inside]), y_y[inside]
    s_g, y_g = products[:k][oldest_first], products[k:][oldest_first]
    gamma = r[-1, -1] / yy[-1, -1]
    a = np.linalg.solve(r, s_g)
    coefficients = np.zeros(2 * k)
    coefficients[oldest_first] = np.linalg.solve(r.T, np.diagonal(r) * a + gamma * (yy @ a - y_g))
    coefficients[k + oldest_first] = -gamma * a
    return coefficients, gamma


RULES = {
    "auto": Auto,
    "gd": GradientDescent,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "group_rmsprop": GroupRMSprop,
    "adam": Adam,
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
