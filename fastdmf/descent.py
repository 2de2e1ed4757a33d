"""Descent on the factors: ``solve``."""

import warnings
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real

import numpy as np

from fastdmf.arrays import is_on_device, same_home
from fastdmf.backend import compile_clock, get_backend, thread_limits
from fastdmf.chain import INITS, Layout, initial_factors
from fastdmf.checkpoint import CheckpointFile, digest
from fastdmf.checks import check_count, check_data, check_number, check_real, check_seed
from fastdmf.device_chain import PersistentChain
from fastdmf.diagnostics import Tracker, as_track, as_truth
from fastdmf.engine import SettingWarning, Solution, Stop, drive, warn_unless_success
from fastdmf.forecast import forecast_data, forecast_rule, forecast_truth
from fastdmf.losses import as_loss
from fastdmf.operators import Operator, as_operator
from fastdmf.penalties import as_penalties
from fastdmf.problem import NORMALISATIONS, Problem
from fastdmf.rules import RULES, as_rule

__all__ = ["chain_layout", "solve"]

_LEAP = 10_000  # most steps at once: less than a second, by arithmetic, so that Ctrl-C is heard
# ||truth - truth^T||_F / ||truth||_F up to which it is rounding, of float32 too.
_SYMMETRIC = 1e-5


def solve(
    operator,
    y,
    *,
    weights=None,
    depth=None,
    width=None,
    factors=None,
    symmetric=False,
    init="gaussian",
    init_scale=1e-3,
    rule="auto",
    loss="mse",
    elementwise_loss="squared",
    l2=0.0,
    penalty=(),
    max_iter=None,
    tol=1e-6,
    check_every=None,
    track=(),
    truth=None,
    validation=None,
    patience=25,
    callback=None,
    checkpoint=None,
    device="auto",
    n_threads=None,
    dtype=None,
    random_state=None,
    on_failure="warn",
):
    """Minimise the loss of W = W_N ... W_1 on measurements by descent on the factors.

    min over W_1, ..., W_N of  c sum_i w_i rho(A(W_N ... W_1)_i - y_i) + l2/2 sum_j ||W_j||_F^2, from a small start:
    depth and the small start give the implicit low-rank bias of [1]_, in the symmetric form that of [2]_.

    Parameters
    ----------
    operator : Operator
        :class:`EntryMask`, :class:`GaussianDense`, :class:`RankOne`, or ``fastdmf.operators.as_operator(op, shape)``
        for a scipy LinearOperator on vec(W).
    y : array of shape (m,), or (B, m) for a batch
        Measurements; taken in absolute units.
    weights : array of shape (m,) or (B, m), optional
        Non-negative; zero leaves a measurement out.
    depth : int, default 3
        Number of factors N >= 1; 2 for a symmetric chain.
    width : int or tuple of int, optional
        Inner width, or the N - 1 inner widths d_1, ..., d_{N-1}. Default full, min(n1, n2).
    factors : list of array, optional
        Start from [W_1, ..., W_N], W_j of shape (d_j, d_{j-1}), or [U] for a symmetric chain; a leading axis B makes a
        batch. Replaces ``depth``, ``width``, ``init`` and ``init_scale``.
    symmetric : bool
        W = U U^T with one factor U of shape (n, width).
    init : {"gaussian", "imbalanced", "identity", "orthogonal", "balanced"}
    init_scale : float
        End-to-end scale alpha: E ||W||_F^2 = alpha^2 n1; per-factor standard deviation alpha^(1/N) / sqrt(d_{j-1}).
    rule : str or Rule
        ``"auto"`` (nothing to tune), ``"gd"``, ``"momentum"``, ``"nesterov"``, ``"group_rmsprop"``, ``"adam"``,
        ``"flow"`` (gradient flow), ``"normalised"``, ``"subgradient"``, ``"scaled"`` and ``"preconditioned"`` (depth 2
        and symmetric), ``"mirror"`` (depth 1), ``"rescaled"`` (quadratic networks), or an object of
        :mod:`fastdmf.rules` with settings.
    loss : {"mse", "mse/2", "sse", "sse/2"}
        Normalisation c = 1/sum w, 1/(2 sum w), 1, 1/2. Papers differ, and a learning rate means nothing without it.
    elementwise_loss : str or tuple
        ``"squared"``, ``"absolute"``, ``("huber", delta)``, ``("truncated", delta)``, or, for :class:`RankOne` and
        scipy operators, ``("truncated_prediction", delta)``.
    l2 : float
    penalty : object or sequence of objects of :mod:`fastdmf.penalties`, optional
        Added to the objective: ``GradientNorm(weight)``, ``NuclearRatio(weight)``.
    max_iter : int, optional
        Steps. Default 2000 for ``"auto"``, 100,000 for the others.
    tol : float
        Stop when sum w rho(r) / sum w rho(y) <= tol (for squared loss sum w r^2 / sum w y^2).
    check_every : int, optional
        Steps between records and stop tests. Default 1 for ``"auto"``, 10 for the others.
    track : str, or sequence of str and :class:`fastdmf.diagnostics.Entries`
        What else to record; see Notes.
    truth : array of shape (n1, n2), or (B, n1, n2) with one for each slice, optional
        Adds ``"error"``, ||W - truth||_F^2 / ||truth||_F^2, to the records. Symmetric if the chain is.
    validation : float or array of int, optional
        Fraction of the measurements, or their indices, held out from the fit: their mean loss is recorded as
        ``"validation"``, the factors with the lowest one are returned, and the run stops ``patience`` evaluations
        after it.
    patience : int
    callback : callable, optional
        Called with a :class:`fastdmf.engine.Progress` at every record; a true value stops the run.
    checkpoint : path or :class:`fastdmf.Checkpoint`, optional
        File to which the state is written every minute (or as the ``Checkpoint`` says), and at the end, Ctrl-C
        included. Where the file is there already the run goes on from it, and ends with the same bits as one that was
        never interrupted.
    device : {"auto", "cpu", "cuda"}
        "auto" is the CPU, or the GPU where ``y`` or the operator's matrix are there already; then factors are arrays of
        the device. "cuda" serves ``auto``, ``gd``, ``momentum``, ``nesterov``, ``group_rmsprop`` and ``adam``, without
        penalties, and all operators but scipy's.
    n_threads : int, optional
        Threads of the kernels. The result does not depend on it, bit for bit.
    dtype : {float32, float64}, optional
        Precision of the factors. Default that of ``y`` and the operator, float64 if either has it.
    random_state : int or sequence of int, optional
        Seed; B seeds make a batch of B runs that share the operator. None draws a fresh one.
    on_failure : {"warn", "ignore"}
        What to do when a run ends neither converged nor early stopped nor by the callback (its status says so anyway),
        or when the settings show beforehand that it cannot do what is asked.

    Returns
    -------
    Solution
        Factors, status, history. For a batch every array has a leading axis and ``solution[b]`` is one run.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or the start cannot move; the message names the argument and the fix.
    RuntimeError
        If ``device`` is not there.

    Warns
    -----
    SolveWarning
        If the run fails in that sense and ``on_failure="warn"``.
    SettingWarning
        Before the run, if ``on_failure="warn"``: a fixed step beyond the limit of stability, or one that ends on the
        plateau of the start; a chain that cannot become ``truth`` (too narrow, the other sign of the determinant,
        negative eigenvalues); measurements of which a symmetric W sees only a part, or cannot meet both of a pair.

    Notes
    -----
    A run with one seed gives the same bits every time and for any number of threads. A start that is so small that its
    updates are rounded away in float32 is refused.

    What ``track`` knows; s are the singular values of W, and what needs all of them costs a decomposition a record:

    - ``"singular_values"``: the 10 largest.
    - ``"top_singular_values"``: the same to about 1e-3 of each (or 1e-9 of the largest) by subspace iteration from
      record to record, which takes a few thin products; for widths up to 100 by the decomposition, which is as quick.
    - ``"nuclear_norm"``: sum s. ``"effective_rank"``: exp(-sum p log p) with p = s / sum s.
    - ``"schatten"``: sum s^(2/N), which is sum_j ||W_j||_F^2 / N at balance.
    - ``"imbalance"``: max_j ||W_{j+1}^T W_{j+1} - W_j W_j^T||_F / ||W_j||_F^2.
    - ``"alignment_diagonal"``, ``"alignment_offdiagonal"``: mean and standard deviation of the absolute values on and
      off the diagonal of U^T G V, where W = U S V^T and G is the gradient of the loss there (figure 3 of [1]_).
      Forms n1 x n2 matrices.
    - ``("entries", rows, cols)``: the values of W there, recorded as ``"entries"``.
    - ``"subspace_angle"``, ``"error_norm"``, ``"signal_min"``, for a symmetric chain with ``truth`` = U* U*^T: signal
      Z_t = P_{S_t} U_t and error E_t = U_t - Z_t of the proof in [2]_ (section 3; S_t starts as span(U*) and moves with
      the descent). The sine of the largest principal angle between S_t and span(U*), ||E_t||_2, and the smallest
      singular value of Q^T Z_t with an orthonormal basis Q of span(U*). From a start U_0 narrower than W, S_t is not
      determined: there it stays span(U*), and the angle is that of the leading left singular vectors of U_t.

    References
    ----------
    .. [1] S. Arora, N. Cohen, W. Hu, Y. Luo, "Implicit Regularization in Deep Matrix Factorization", 2019,
       arXiv:1905.13655.
    .. [2] Y. Li, T. Ma, H. Zhang, "Algorithmic Regularization in Over-parameterized Matrix Sensing and Neural Networks
       with Quadratic Activations", 2018, arXiv:1712.09203.

    Examples
    --------
    >>> import numpy as np, fastdmf
    >>> rng = np.random.default_rng(0)
    >>> truth = rng.standard_normal((40, 2)) @ rng.standard_normal((2, 30))
    >>> rows, cols = np.nonzero(rng.random(truth.shape) < 0.4)
    >>> mask = fastdmf.EntryMask(rows, cols, truth.shape)
    >>> solution = fastdmf.solve(mask, truth[rows, cols], random_state=0)
    >>> solution.status
    <Status.CONVERGED>
    >>> bool(np.linalg.norm(solution.matrix() - truth) < 0.01 * np.linalg.norm(truth))
    True
    """
    backend = get_backend(device, y, getattr(operator, "a", None))
    rule = as_rule(rule)
    if not isinstance(operator, Operator):
        operator = as_operator(operator)
    _check_device(backend, rule, penalty)
    home = y  # results go where the data came from
    y, weights, dtype = check_data(operator, y, weights, dtype)
    elementwise_loss = as_loss(elementwise_loss)
    if loss not in NORMALISATIONS:
        raise ValueError(f"loss must be one of {sorted(NORMALISATIONS)}, got {loss!r}")
    check_number("init_scale", init_scale, 0)
    check_number("tol", tol, 0)
    check_number("l2", l2, 0, closed=True)
    max_iter = check_count("max_iter", rule.max_iter if max_iter is None else max_iter, 0)
    check_every = check_count("check_every", rule.check_every if check_every is None else check_every)
    patience = check_count("patience", patience)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    if init not in INITS:
        raise ValueError(f"init must be one of {sorted(INITS)}, got {init!r}")
    if on_failure not in ("warn", "ignore"):
        raise ValueError(f"on_failure must be 'warn' or 'ignore', got {on_failure!r}")
    penalties = as_penalties(penalty)
    track = as_track(track, operator.shape)
    truth_given, truth = truth, as_truth(truth, operator.shape)

    if symmetric and truth is not None:
        _check_symmetric(truth)

    seeds, several_seeds = _check_seeds(random_state)
    given = None if factors is None else _check_factors(factors, operator.shape, symmetric)
    layout = chain_layout(operator.shape, depth, width, symmetric, given)
    sizes = {
        "y": len(y) if y.ndim == 2 else None,
        "weights": len(weights) if weights is not None and weights.ndim == 2 else None,
        "factors": len(given[0]) if given is not None and given[0].ndim == 3 else None,
        "random_state": len(seeds) if several_seeds else None,
        "truth": len(truth) if np.ndim(truth_given) == 3 else None,
    }
    batch, batched = _batch_size(sizes)
    if len(seeds) == 1:
        seeds = seeds * batch

    y = y.reshape(-1, operator.size)
    weights = None if weights is None else weights.reshape(-1, operator.size)
    held_out = None
    if validation is not None:
        held_out, weights, w_out = _split(validation, operator.size, weights, seeds)

    with compile_clock(backend) as clock, thread_limits(n_threads), backend.session():
        bound = operator.bind(
            backend, y, weights=weights, loss=elementwise_loss, dtype=dtype, width=layout.width, batch=batch
        )
        if (bound.weight_sums() <= 0).any():
            raise ValueError("weights are zero for every measurement (after the held-out ones, if any)")
        problem = Problem(bound, layout, batch, loss=loss, l2=float(l2), penalties=penalties)
        monitor = None
        if held_out is not None:
            monitor = operator.restrict(held_out).bind(
                backend,
                y[:, held_out],
                weights=w_out,
                loss=elementwise_loss,
                dtype=dtype,
                width=layout.width,
                batch=batch,
            )
        x = layout.allocate(batch, dtype)
        for b in range(batch):
            if given is None:
                start = initial_factors(layout, init, float(init_scale), seeds[b])
            else:
                start = [w if w.ndim == 2 else w[b] for w in given]
            layout.write(x, start, b)
        x = backend.asarray(x)
        with np.errstate(over="ignore", invalid="ignore"):  # the start's objective says it, if it is too far away
            process = _Descent(problem, rule, x, monitor, Tracker(track, truth, problem, x), checkpoint is None)
        _check_start(process, rule, init_scale, given is not None)
        if on_failure == "warn":
            start = None if given is not None else float(init_scale)
            told = forecast_truth(layout, truth, layout.factors(backend.host(x)))
            told += forecast_rule(problem, rule, x, operator, weights, start, max_iter)
            told += forecast_data(operator, y, weights) if symmetric else []
            for sentence in told:
                warnings.warn(sentence, SettingWarning, stacklevel=2)
        stop = Stop(
            max_iter=max_iter,
            check_every=check_every,
            tol=float(tol),
            patience=patience if held_out is not None else None,
            watch=rule.fixed_step,
        )
        file = None
        if checkpoint is not None:
            # The start's gradient is the operator's and the data's.
            start, settings = (
                process.state,
                (layout, rule, loss, elementwise_loss, float(l2), penalties, stop, track, seeds),
            )
            made = backend.host(start.x), backend.host(start.grad), backend.host(start.losses)
            file = CheckpointFile(checkpoint, digest("solve", *settings, *made, truth))
        statuses, n_iter, history = drive(process, batch, stop, callback, file)
        result = layout.factors(backend.host(process.result))
        factors = same_home([np.array(w) for w in result], home)
    if on_failure == "warn":
        warn_unless_success(statuses)

    if not batched:
        factors, statuses, n_iter = [w[0] for w in factors], statuses[0], int(n_iter[0])
        history = {k: v if k == "iteration" else v[:, 0] for k, v in history.items()}
    times = {"seconds": clock.seconds, "compile_seconds": clock.compile_seconds}
    return Solution(factors, statuses, n_iter, process.n_eval, history, symmetric, backend.name, **times)


def _check_device(backend, rule, penalty):
    """Refuse what the backend cannot do."""
    if backend.name == "cpu":
        return
    if not rule.on_device:
        able = ", ".join(repr(name) for name, kind in RULES.items() if kind.on_device)
        raise ValueError(
            f"rule {type(rule).__name__} computes on the CPU alone: pass device='cpu', or one of {able}, which run "
            f"on {backend.name!r}"
        )
    if as_penalties(penalty):
        raise ValueError(f"penalty= computes on the CPU alone: pass device='cpu' instead of {backend.name!r}")


@dataclass
class _Descent:
    """A rule at work on a problem, as the loop drives it (``engine.Process``)."""

    problem: Problem
    rule: object
    x: np.ndarray
    monitor: object
    tracker: Tracker
    leaps: bool = False  # whether it may take many steps at once, which leave no state to go on from in another process

    def __post_init__(self):
        self.n_eval = 1
        self.result = np.zeros_like(self.x)
        self.best = self._update = None
        self.state = self.rule.init(self.problem, self.x)
        self._chain = PersistentChain.of(self.problem, self.rule, self.state) if self.leaps else None

    def step(self, most):
        if self._chain is not None:
            done = min(most, _LEAP)
            self._chain(self.state, done)
        else:
            done = 1
            if self._update is None:
                update = partial(self.rule.step, self.problem, self.state)
                self._update = self.problem.backend.captured(update) if self.rule.capturable else update
            self._update()
        self.n_eval += done * self.rule.evaluations
        return done

    def failed(self):
        return self.state.failed

    def record(self):
        problem, state = self.problem, self.state
        numbers = state.losses, state.objective, problem.squared_norm(state.grad), state.step_size
        losses, objective, squared_norm, step_size = problem.backend.host(*numbers)
        values = {
            "relative_loss": problem.relative(losses),
            "null_objective": problem.null_objective,
            "loss": problem.scale * losses,
            "objective": objective,
            "grad_norm": np.sqrt(squared_norm),
            "step_size": step_size.copy(),
            **state.records(),
        }
        if self.monitor is not None:
            p, qt = problem.halves(state.x)
            values["validation"] = self.monitor.losses(p, qt) / self.monitor.weight_sums()
        return values | self.tracker.record(problem, state.x)

    def keep_best(self, slices):
        if self.best is None:
            self.best = np.zeros_like(self.state.x)
        if slices.all():
            self.best[:] = self.state.x
        else:
            chosen = self.problem.backend.asarray(np.flatnonzero(slices))
            self.best[chosen] = self.state.x[chosen]

    def finish(self, position, slice_, best):
        self.result[slice_] = (self.best if best else self.state.x)[position]

    def take(self, keep):
        if len(keep) == len(self.state.x):
            return
        self.state, self._update = self.state.take(keep), None
        if self.best is not None:
            self.best = self.best[self.problem.backend.asarray(keep)]
        if self.monitor is not None:
            self.monitor = self.monitor.take(keep)
        self.tracker.take(keep)
        self.problem = self.problem.take(keep)
        if self._chain is not None:
            self._chain = self._chain.take(keep, self.problem, self.state)

    def factors(self):
        return [np.array(w) for w in self.problem.layout.factors(self.problem.backend.host(self.state.x))]

    def snapshot(self):
        host = self.problem.backend.host

        def on_host(value):
            return [host(part) for part in value] if isinstance(value, list) else host(value)

        state = {f.name: on_host(getattr(self.state, f.name)) for f in fields(self.state)}
        kept = {"n_eval": self.n_eval, "result": host(self.result), "best": host(self.best)}
        # The last record is made again.
        return {**kept, "block": self.tracker.block_before, "state": state}

    def resume(self, snapshot, active):
        self.take(active)
        self.n_eval, backend = snapshot["n_eval"], self.problem.backend
        self.result, self.best = (
            None if (value := snapshot[name]) is None else backend.asarray(value) for name in ("result", "best")
        )
        self.tracker.block = snapshot["block"]
        for name, value in snapshot["state"].items():
            # What is larger than a few numbers a slice is the backend's; so is what the start has there.
            there = is_on_device(getattr(self.state, name)) or name in self.state.vectors
            if isinstance(value, np.ndarray):
                value = self._placed(value, there)
            elif isinstance(value, list):
                value = [self._placed(part, there) for part in value]
            setattr(self.state, name, value)

    def _placed(self, value, there):
        """Return a copy where the kernels want it: on a cache line, or ``there``, on the device."""
        problem = self.problem
        if there:
            return problem.backend.asarray(value)
        place = get_backend("cpu").kernels.aligned_empty(value.shape, value.dtype)
        place[...] = value
        return place


def _check_start(process, rule, init_scale, given):
    """Refuse a start that cannot move: a critical point, or an update that rounding swallows."""
    state = process.state
    culprit = "factors" if given else f"init_scale={init_scale:g}"
    problem = process.problem
    losses, sizes, steps = problem.backend.host(state.losses, problem.squared_norm(state.grad), state.step_size)
    waiting = problem.relative(losses) > 0
    flat = waiting & (sizes == 0)
    if flat.any():
        raise ValueError(
            f"the start cannot move: its gradient is exactly zero ({culprit}). Factors of zeros are a saddle point, "
            f"and products of very small factors underflow in {state.x.dtype}: use a larger start or dtype='float64'"
        )
    if not rule.fixed_step:
        return
    for b in np.flatnonzero(waiting):
        intended = state.x.dtype.type(steps[b]) * state.grad[b]
        realised = state.x[b] - (state.x[b] - intended)
        size = float(np.vdot(intended, intended))
        # Half of the update lost to rounding: the mode that should grow does not (papers' float32 stagnation).
        if size == 0 or float(np.vdot(realised, intended)) < 0.5 * size:
            raise ValueError(
                f"the start cannot move: its updates are rounded away in {state.x.dtype} ({culprit}, step size "
                f"{steps[b]:g}). Use dtype='float64', a larger start, a larger learning rate or rule='auto'"
            )


# --- arguments -------------------------------------------------------------------------------------------------------


def _check_symmetric(truth):
    """Refuse a truth that no symmetric W can be."""
    if truth.shape[1] != truth.shape[2]:
        return  # the layout says so
    gaps = np.linalg.norm(truth - truth.swapaxes(1, 2), axis=(1, 2)) / np.linalg.norm(truth, axis=(1, 2))
    if gaps.max() > _SYMMETRIC:
        raise ValueError(
            f"truth is not symmetric, ||truth - truth^T|| is {gaps.max():.2g} of its norm, and W = U U^T is: pass "
            "(truth + truth.T) / 2, or symmetric=False"
        )


def _check_seeds(random_state):
    """Return (list of seeds, whether they make a batch)."""
    if np.ndim(random_state) == 0:
        return [check_seed(random_state)], False
    seeds = list(random_state)
    if not seeds:
        raise ValueError("random_state is empty: give a seed, or one seed for each run of a batch")
    return [check_seed(seed) for seed in seeds], True


def _check_factors(factors, shape, symmetric):
    """Return the user's start as arrays that fit together, end to end."""
    try:
        factors = list(factors)
    except TypeError:
        raise TypeError(f"factors must be a list of arrays, got {type(factors).__name__}") from None
    if not factors:
        raise ValueError("factors is empty: give [W_1, ..., W_N]")
    factors = [check_real(f"factors[{j}]", w, (2, 3)) for j, w in enumerate(factors)]
    if symmetric:
        if len(factors) != 1:
            raise ValueError(f"a symmetric chain W = U U^T has one factor, got {len(factors)}")
        if factors[0].shape[-2] != shape[0]:
            raise ValueError(f"factors[0] has {factors[0].shape[-2]} rows, the matrix {shape[0]}")
        return factors
    for j in range(1, len(factors)):
        if factors[j].shape[-1] != factors[j - 1].shape[-2]:
            raise ValueError(
                f"factors[{j}] of shape {factors[j].shape} does not fit on factors[{j - 1}] of shape "
                f"{factors[j - 1].shape}: W_j must be d_j x d_(j-1)"
            )
    ends = factors[-1].shape[-2], factors[0].shape[-1]
    if ends != shape:
        raise ValueError(f"factors multiply to a {ends} matrix, the operator's is {shape}")
    if len({w.shape[0] for w in factors if w.ndim == 3}) > 1:
        raise ValueError("factors have batch axes of different lengths")
    return factors


def chain_layout(shape, depth=None, width=None, symmetric=False, given=None):
    """Return the chain's layout from the arguments, or from the given factors."""
    n1, n2 = shape
    if symmetric:
        if n1 != n2:
            raise ValueError(f"symmetric=True needs a square matrix, got shape {shape}")
        if depth not in (None, 2):
            raise ValueError(f"symmetric=True means W = U U^T, depth 2; got depth={depth!r}")
        if given is not None:
            return Layout((n1, given[0].shape[-1], n1), symmetric=True)
    elif given is not None:
        return Layout((n2, *(w.shape[-2] for w in given)))
    depth = (2 if symmetric else 3) if depth is None else check_count("depth", depth)
    if width is None:
        width = min(n1, n2)
    if np.ndim(width):
        widths = [check_count("width", w) for w in width]
        if len(widths) != depth - 1:
            raise ValueError(f"width must hold depth - 1 = {depth - 1} inner widths, got {len(widths)}")
    else:
        widths = [check_count("width", width)] * (depth - 1)
    return Layout((n2, *widths, n1), symmetric=bool(symmetric))


def _batch_size(sizes):
    """Return (B, whether there is a batch axis) from the lengths that the arguments bring."""
    lengths = {name: n for name, n in sizes.items() if n is not None}
    if not lengths:
        return 1, False
    if 0 in lengths.values():
        raise ValueError(f"the batch is empty: {lengths}")
    batch = max(lengths.values())
    wrong = {name: n for name, n in lengths.items() if n not in (1, batch)}
    if wrong:
        raise ValueError(f"batch axes differ in length: {lengths}")
    return batch, True


def _split(validation, m, weights, seeds):
    """Return (held-out indices, training weights, held-out weights); a fraction is drawn for each seed."""
    if isinstance(validation, Real) and not isinstance(validation, (bool, Integral)):
        if not 0 < validation < 1:
            raise ValueError(f"validation must be a fraction in (0, 1) or indices, got {validation!r}")
        count = round(validation * m)
        if count < 1 or count >= m:
            raise ValueError(f"validation={validation!r} of {m} measurements leaves one side empty")
        draws = [np.random.default_rng([seed, 1]).choice(m, count, replace=False) for seed in seeds]
    else:
        index = np.asarray(validation)
        if index.ndim != 1 or index.dtype.kind not in "iu" or index.size == 0:
            raise ValueError("validation must be a fraction in (0, 1) or a 1-d array of indices")
        if index.min() < 0 or index.max() >= m or len(np.unique(index)) != len(index):
            raise ValueError(f"validation indices must be distinct and in [0, {m})")
        draws = [index]
    if all(np.array_equal(d, draws[0]) for d in draws):
        draws = draws[:1]
    held_out = np.unique(np.concatenate(draws))
    rows = max(len(draws), 1 if weights is None else len(weights))
    inside = np.ones((rows, m), bool)
    for b in range(rows):
        inside[b, draws[b if len(draws) > 1 else 0]] = False
    base = np.ones((1, m), np.float32) if weights is None else weights
    outside = ~inside[:, held_out]
    w_out = None if weights is None and outside.all() else base[:, held_out] * outside
    return held_out, base * inside, w_out
