"""Grids of runs: ``sweep`` puts them through the batch axis of ``solve`` on all cores; the table that comes out.

Two ways to fill the cores, by what the operator costs:

- Dense and seeded Gaussian measurements are read, or made, once for a whole batch, and their kernels use all cores: one
  batch after another, each as large as memory allows.
- Everything else costs as much in a batch as alone, but for the steps' overhead, which counts where matrices are small.
  There batches are short, and several run at a time in worker processes: one long batch leaves a part of the cores
  idle, the more so where each run has a mask of its own.

Which runs share a batch depends on the grid alone, so that no bit depends on the number of processes.
"""

import inspect
import itertools
import logging
import os
import warnings
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Integral
from types import SimpleNamespace

import numpy as np

from fastdmf.backend import get_backend, thread_limits
from fastdmf.chain import INITS, Layout, initial_factors
from fastdmf.checks import check_count, check_number, check_real, check_seed
from fastdmf.descent import chain_layout, solve
from fastdmf.diagnostics import TRACKS, as_truth
from fastdmf.engine import Status, numerical_ranks, singular_values
from fastdmf.masks import EntryMask
from fastdmf.operators import GaussianDense, GaussianSeeded, Operator, RankOne, as_operator
from fastdmf.rules import as_rule
from fastdmf.sweep_table import SweepTable

__all__ = ["sweep"]

logger = logging.getLogger("fastdmf")

_SOLVE = inspect.signature(solve).parameters
# Keywords that may be axes whatever the instance takes.
_AXES = ("seed", "depth", "width", "init", "init_scale", "rule", "l2")
_RESULTS = ("status", "n_iter", "n_eval", "loss", "error", "rank", "effective_rank", "nuclear_norm", "seconds")
_REFUSED = {
    "operator": "it comes from the instance",
    "y": "it comes from the instance",
    "truth": "let the instance return (operator, y, truth)",
    "factors": "starts are drawn: use init, init_scale and seed",
    "random_state": "use seed",
    "checkpoint": "let callback store the rows as they end",
    "on_failure": "the column status says how each run ended",
}
# With these a run on the union of several masks would not be the run on its own.
_KEEPS_APART = ("weights", "validation", "penalty")


@dataclass(frozen=True)
class _Budget:
    """What a batch may be.

    Attributes
    ----------
    runs, numbers : int
        Most runs of a batch, and numbers that all their factors hold.
    union_cells : int
        Cells of a matrix up to which runs with different masks go as one batch, on the union of the masks with weights
        0 and 1.
    memory : float
        Bytes that batches which run at a time may take.
    """

    runs: int
    numbers: int
    union_cells: int
    memory: float


# On the CPU the steps' overhead is small beside the arithmetic beyond, and the memory of L-BFGS falls out of the cache;
# a union saves more overhead at 30 x 30 than the cells of the others cost, at 50 x 50 no more (pytest
# tests/test_sweep.py -k cost -s). A GPU is filled by hundreds of small matrices, which go as full ones anyway: its
# numbers follow from the arithmetic, and were measured nowhere yet.
_BUDGETS = {"cpu": _Budget(16, 60_000, 1000, 1e9), "cuda": _Budget(1024, 1 << 28, 1 << 16, 8e9)}
# Bytes of a run, numbers for each of its factors' ("auto" keeps eight pairs and a place for the next, the point, the
# trial and scratch) and for each cell of the matrix.
_PER_FACTOR, _PER_CELL = 24, 12
# Seconds that the rest should take here for processes to be started, which takes about one.
_WORTH = 2.0
_WINDOW = 16  # batches for each process that are made at a time: the instances of no more are held


def sweep(instance, *, n_jobs=None, batch_size=None, keep=None, verbose=False, callback=None, **grid):
    """Run ``solve`` on a grid of seeds, depths, starts, rules and instances; return a table with a row for each run.

    Parameters
    ----------
    instance : tuple or callable
        (operator, y) or (operator, y, truth), as :func:`fastdmf.solve` takes them, for all runs; or a function that
        returns such a tuple, called once for each combination of the keywords in its signature.
    n_jobs : int, optional
        Worker processes, joblib's; 1: all in this process; -1: as many as there are cores. Default: processes where
        the rest of the sweep takes long enough and the operator's own kernels cannot use the cores (entry masks,
        rank-one measurements). The results do not depend on it, bit for bit. With ``device="cuda"`` all is one process.
    batch_size : int, optional
        Most runs in one batch. Default by the size of the factors, with at most about 1 GB in all (8 GB on a GPU).
    keep : {None, "histories", "solutions"}
        What to keep of each run beside its row: its records, or all that ``solve`` returns. Either adds ``"error"`` to
        the records where there is a truth.
    verbose : bool or int
        Whether to log a line for each batch, at level INFO of the logger ``"fastdmf"``.
    callback : callable, optional
        Called as ``callback(done, total, row)`` for each run when its batch has ended, with its row as a dict; a true
        value ends the sweep.
    **grid
        Axes and settings, each handed to whom it concerns. A list, tuple, range or 1-d array is an axis where the name
        is ``seed`` (of the start; default 0), ``depth``, ``width`` (inner widths in tuples: ``width=[5, (5, 7)]``),
        ``init``, ``init_scale``, ``rule``, ``l2``, or a keyword of the instance; a single value holds for all runs.
        Everything else is a keyword of :func:`fastdmf.solve`: ``loss``, ``max_iter``, ``tol``, ``track``, ...

    Returns
    -------
    SweepTable
        Rows in the order of ``itertools.product`` over the axes as they were given: the last one changes fastest.

    Raises
    ------
    TypeError, ValueError
        If a name is unknown, an axis is empty, the instance returns something else, or ``solve`` refuses a run: the
        message says which. Rows that have ended by then went to the callback.

    Notes
    -----
    Every row is what ``solve(operator, y, random_state=seed, ...)`` alone gives, to rounding at first and in final
    quality later, and each run stops when it has ended, whatever others do. Runs go in one batch if they have the
    operator object, depth, width, rule and other settings in common; starts and data may differ. Runs on *different*
    masks of one shape share a batch if the matrix has at most 1000 cells, or 65,536 on a GPU.

    Ctrl-C, and a callback that returns a true value, end the sweep with the rows that have ended; the others have the
    status ``"INTERRUPTED"`` or ``"STOPPED"``, no iterations and NaN.

    The start is drawn from ``default_rng(seed)``. An instance that takes ``seed`` should draw from another stream, such
    as ``default_rng([seed, 1])``: its numbers would else be those of the start.

    Examples
    --------
    >>> import numpy as np, fastdmf
    >>> def instance(seed, count):
    ...     rng = np.random.default_rng([seed, 1])
    ...     truth = rng.standard_normal((30, 2)) @ rng.standard_normal((2, 30))
    ...     rows, cols = np.divmod(rng.choice(900, count, replace=False), 30)
    ...     return fastdmf.EntryMask(rows, cols, truth.shape), truth[rows, cols], truth
    >>> table = fastdmf.sweep(instance, count=[150, 400], depth=[2, 3], seed=range(3))
    >>> len(table)
    12
    >>> recovered = table.group(["count", "depth"], "error")
    >>> recovered.columns
    ('count', 'depth', 'median', 'min', 'max', 'runs')
    >>> bool((recovered.where(count=400)["median"] < 1e-2).all())
    True
    """
    if n_jobs is not None and (not isinstance(n_jobs, Integral) or isinstance(n_jobs, bool) or n_jobs == 0):
        raise ValueError(f"n_jobs must be None or an integer other than 0, got {n_jobs!r}")
    batch_size = None if batch_size is None else check_count("batch_size", batch_size)
    if keep not in (None, "histories", "solutions"):
        raise ValueError(f"keep must be None, 'histories' or 'solutions', got {keep!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    grid = _Grid.of(instance, grid)
    if "track" in grid.fixed and keep is None:
        raise ValueError("track records what a run does over time, which keep='histories' or 'solutions' returns")

    done, total, outcomes = 0, len(grid.points), {}
    unfinished = Status.INTERRUPTED
    if grid.device == "cuda":
        n_jobs = 1
    results = _results(_batches(grid, batch_size, keep), total, n_jobs, grid.fixed.get("n_threads"))
    try:
        for ended, whole in results:
            outcomes |= {outcome.row: outcome for outcome in ended}
            for outcome in ended:
                done += 1
                if callback is not None and callback(done, total, grid.points[outcome.row] | outcome.values):
                    unfinished, whole = Status.STOPPED, False
                    break
            if verbose and ended:
                _log(done, total, grid, ended[-1])
            if not whole:
                break
    except KeyboardInterrupt:
        pass
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib tells how much of its work is thrown away
            results.close()

    blank = dict.fromkeys(_RESULTS, np.nan) | {"status": unfinished.name, "n_iter": 0, "n_eval": 0}
    found = [outcomes.get(k) for k in range(total)]
    rows = [point | (one.values if one else blank) for point, one in zip(grid.points, found)]
    return SweepTable(
        {name: [row[name] for row in rows] for name in (*grid.axes, *_RESULTS)},
        axes=tuple(grid.axes),
        singular_values=[one.singular_values if one else np.empty(0) for one in found],
        histories=None if keep is None else [one and one.history for one in found],
        solutions=[one and one.solution for one in found] if keep == "solutions" else None,
    )


# --- the grid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Instance:
    """A problem, as the user's function made it; ``truth`` (n1, n2) float64 or None."""

    operator: Operator
    y: np.ndarray
    truth: np.ndarray | None


@dataclass(frozen=True)
class _Run:
    """One row: where it stands, its place on the axes, its start, and its keywords of ``solve``."""

    row: int
    point: dict
    seed: int
    init: str
    init_scale: float
    settings: dict


@dataclass(frozen=True)
class _Grid:
    """The axes, name -> values; what holds for all runs; the instance and the keywords that it takes."""

    axes: dict
    fixed: dict
    make: object
    asked: tuple
    points: list = field(init=False)

    def __post_init__(self):
        points = [dict(zip(self.axes, values)) for values in itertools.product(*self.axes.values())]
        object.__setattr__(self, "points", points)

    @classmethod
    def of(cls, make, grid):
        """Sort keywords into axes and settings; refuse what nobody knows."""
        asked, needed = _signature(make)
        axes, fixed = {}, {}
        for name, value in grid.items():
            if name in _REFUSED and name not in asked:
                raise TypeError(f"sweep takes no {name}: {_REFUSED[name]}")
            if name not in asked and name not in _AXES and name not in _SOLVE:
                raise TypeError(
                    f"{name!r} is neither an axis ({', '.join(_AXES)}) nor a keyword of fastdmf.solve, and the "
                    f"instance takes {', '.join(asked) or 'no keywords'}: an axis of its own needs a function that "
                    "names it, such as def instance(seed, count)"
                )
            if (name in _AXES or name in asked) and _is_sequence(value):
                axes[name] = _axis(name, value)
            else:
                fixed[name] = value
        if "seed" not in axes:
            fixed.setdefault("seed", 0)
        missing = [name for name in needed if name not in axes and name not in fixed]
        if missing:
            raise TypeError(f"the instance takes {missing[0]}, which sweep was not given: add {missing[0]}=[...]")
        for name, check in _CHECKS.items():
            for value in axes.get(name, [fixed[name]] if name in fixed else []):
                check(value)
        weights = fixed.get("weights")
        if weights is not None and np.ndim(weights) != 1:
            raise ValueError(f"weights must have shape (m,), the same for all runs, got {np.shape(weights)}")
        return cls(axes, fixed, make, asked)

    @property
    def device(self):
        """Where the runs are done: "cpu" or "cuda"."""
        return get_backend(self.fixed.get("device", "auto")).name

    def instances(self):
        """Yield (instance, its runs) in the order of their first rows; each is made when it is asked for."""
        concerned = [name for name in self.axes if name in self.asked]
        groups = {}
        for row, point in enumerate(self.points):
            groups.setdefault(tuple(point[name] for name in concerned), []).append(self._run(row, point))
        fixed = {name: value for name, value in self.fixed.items() if name in self.asked}
        for values, runs in groups.items():
            yield self._made(fixed | dict(zip(concerned, values))), runs

    def _made(self, chosen):
        made, name = self.make, "instance"
        if callable(made):
            made, name = made(**chosen), f"instance({_named(chosen)})"
        if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
            what = f"{len(made)} items" if isinstance(made, (tuple, list)) else type(made).__name__
            raise TypeError(f"{name} must be (operator, y) or (operator, y, truth), got {what}")
        truth = made[2] if len(made) == 3 else None
        try:
            operator = as_operator(made[0])
            y = check_real("y", made[1], (1,))
            if len(y) != operator.size:
                raise ValueError(f"y has {len(y)} measurements, the operator {operator.size}")
            if truth is not None:
                truth = as_truth(check_real("truth", truth, (2,)), operator.shape)[0]
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        return _Instance(operator, y, truth)

    def _run(self, row, point):
        everything = {name: _SOLVE[name].default for name in ("init", "init_scale")} | self.fixed | point
        settings = {name: value for name, value in everything.items() if name in _SOLVE and name not in _REFUSED}
        return _Run(row, point, everything["seed"], settings.pop("init"), settings.pop("init_scale"), settings)


def _signature(make):
    """Return the keywords that the instance takes, and those that it must be given."""
    if isinstance(make, (tuple, list)):
        return (), ()
    if not callable(make):
        raise TypeError(
            "instance must be (operator, y), (operator, y, truth) or a function that returns one, got "
            f"{type(make).__name__}"
        )
    taken, needed = [], []
    for name, parameter in inspect.signature(make).parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"instance is called with keywords, its argument {name!r} takes none")
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        taken.append(name)
        if parameter.default is parameter.empty:
            needed.append(name)
    return tuple(taken), tuple(needed)


def _is_sequence(value):
    return isinstance(value, (list, tuple, range)) or (isinstance(value, np.ndarray) and value.ndim == 1)


def _axis(name, values):
    """Return an axis as a list of values that a table can tell apart."""
    values = values.tolist() if isinstance(values, np.ndarray) else list(values)
    if not values:
        raise ValueError(f"{name} is empty: give at least one value, or leave it out")
    if name in _RESULTS:
        raise ValueError(f"the table has a column {name!r} of its own: give the axis another name")
    for value in values:
        if not isinstance(value, Hashable):
            raise TypeError(f"{name} holds a {type(value).__name__}: an axis is of numbers, names, tuples or rules")
    return values


def _check_start_seed(seed):
    if seed is None:
        raise ValueError("seed must hold integers >= 0, got None: a row must say how to run it again")
    check_seed(seed)


def _check_init(init):
    if init not in INITS:
        raise ValueError(f"init must be one of {sorted(INITS)}, got {init!r}")


_CHECKS = {
    "seed": _check_start_seed,
    "init": _check_init,
    "init_scale": lambda value: check_number("init_scale", value, 0),
    "rule": as_rule,
    "l2": lambda value: check_number("l2", value, 0, closed=True),
}


def _named(point):
    return ", ".join(f"{name}={value!r}" for name, value in point.items())


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Runs that ``solve`` takes together, and what they share.

    ``y`` and ``weights`` are (m,) or (B, m); ``weights`` only where the operator is a union of masks. ``truths`` holds
    an array or None for each run.
    """

    runs: list
    layout: Layout
    operator: Operator
    y: np.ndarray
    weights: np.ndarray | None
    truths: list
    keep: str | None

    @property
    def settings(self):
        """The keywords of ``solve`` that all have in common."""
        settings = self.runs[0].settings
        return settings if self.weights is None else settings | {"weights": self.weights}


def _batches(grid, batch_size, keep):
    """Yield the batches of a grid. Of instances that can share none, no two are held, but for small masks."""
    held, united = [], {}
    for instance, runs in grid.instances():
        if _unites(instance, grid):
            united.setdefault((instance.operator.shape, instance.y.dtype), []).append((instance, runs))
            continue
        if held and not _joins(held[-1][0], instance):
            yield from _cut(held, grid, batch_size, keep)
            held = []
        held.append((instance, runs))
    for members in (held, *united.values()):
        yield from _cut(members, grid, batch_size, keep)


def _joins(one, other):
    return one.operator is other.operator and one.y.dtype == other.y.dtype


def _unites(instance, grid):
    """Whether runs on it may go in one batch with others on other masks."""
    shape = instance.operator.shape
    most = _BUDGETS[grid.device].union_cells
    small = isinstance(instance.operator, EntryMask) and shape[0] * shape[1] <= most
    return small and not any(name in grid.fixed for name in _KEEPS_APART)


def _cut(held, grid, batch_size, keep):
    """Yield the batches of some instances' runs: those whose settings agree, in parts of equal length."""
    own = [name for name in grid.axes if name in _SOLVE and name not in ("init", "init_scale")]
    groups = {}
    for instance, runs in held:
        for run in runs:
            groups.setdefault(tuple(run.point[name] for name in own), []).append((instance, run))
    for members in groups.values():
        instance, run = members[0]
        chain = {name: run.settings[name] for name in ("depth", "width", "symmetric") if name in run.settings}
        try:
            layout = chain_layout(instance.operator.shape, **chain)
        except ValueError as error:
            raise ValueError(_at(run, error)) from error
        most = batch_size or _most_runs(layout, instance.operator, _BUDGETS[grid.device])
        for part in np.array_split(np.arange(len(members)), -(-len(members) // most)):
            instances, runs = zip(*(members[k] for k in part))
            operator, y, weights = _shared_data(instances)
            yield _Batch(list(runs), layout, operator, y, weights, [instance.truth for instance in instances], keep)


def _run_bytes(layout):
    return 8 * (_PER_FACTOR * layout.size + _PER_CELL * layout.shape[0] * layout.shape[1])


def _most_runs(layout, operator, budget):
    fit = int(budget.memory // _run_bytes(layout))
    if not isinstance(operator, (GaussianDense, GaussianSeeded)):
        fit = min(fit, budget.runs, budget.numbers // layout.size)
    return max(1, fit)


def _shared_data(instances):
    """Return (operator, y, weights) of runs on these instances; of different masks on their union."""
    first = instances[0]
    if all(instance is first for instance in instances):
        return first.operator, first.y, None
    if all(instance.operator is first.operator for instance in instances):
        return first.operator, np.stack([instance.y for instance in instances]), None
    n2 = first.operator.shape[1]
    places = [instance.operator.rows * n2 + instance.operator.cols for instance in instances]
    cells = np.unique(np.concatenate(places))
    y = np.zeros((len(instances), len(cells)), first.y.dtype)
    weights = np.zeros_like(y)
    for b, (instance, place) in enumerate(zip(instances, places)):
        at = np.searchsorted(cells, place)
        y[b, at], weights[b, at] = instance.y, 1
    return EntryMask(*np.divmod(cells, n2), first.operator.shape), y, weights


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """What is kept of a run."""

    row: int
    values: dict
    singular_values: np.ndarray
    history: dict | None
    solution: object


def _results(batches, total, n_jobs, n_threads):
    """Yield (outcomes, whether all of its runs have ended) of each batch as it ends, here or in worker processes."""
    spent, done = 0.0, 0
    for batch in batches:
        left = total - done
        jobs = _jobs(batch, n_jobs, left, spent / done * left if done else 0.0)
        if jobs > 1:
            yield from _elsewhere(itertools.chain([batch], batches), jobs, n_threads)
            return
        outcomes, whole = _solve(batch, n_threads)
        spent += sum(outcome.values["seconds"] for outcome in outcomes)
        done += len(outcomes)
        yield outcomes, whole


def _jobs(batch, n_jobs, left, seconds):
    """Return how many processes the rest deserves: ``left`` runs that should take so many seconds here."""
    if n_jobs == 1 or (n_jobs is None and seconds < _WORTH):
        return 1
    from joblib import effective_n_jobs

    if n_jobs is not None:
        return effective_n_jobs(n_jobs)
    if not isinstance(batch.operator, (EntryMask, RankOne)):
        return 1
    runs = len(batch.runs)
    fit = int(_BUDGETS["cpu"].memory // (runs * _run_bytes(batch.layout)))
    return max(1, min(effective_n_jobs(-1), -(-left // runs), fit))


def _elsewhere(batches, jobs, n_threads):
    """Yield what ``_solve`` returns, in the order in which workers are done."""
    from joblib import Parallel, cpu_count, delayed

    threads = n_threads or max(1, cpu_count() // jobs)
    # Arrays mapped into memory would be read-only ones, for which kernels would be compiled again.
    with Parallel(jobs, return_as="generator_unordered", max_nbytes=None) as pool:
        while window := list(itertools.islice(batches, _WINDOW * jobs)):
            yield from pool(delayed(_solve)(batch, threads) for batch in window)


def _solve(batch, n_threads):
    """Return (outcomes of the runs that have ended, whether all have).

    Starts and what is worked out at the end see one BLAS thread, as the solve does: no bit depends on the process.
    """
    runs = batch.runs
    with thread_limits(n_threads):
        starts = [initial_factors(batch.layout, run.init, float(run.init_scale), int(run.seed)) for run in runs]
        settings = batch.settings | {"n_threads": n_threads, "on_failure": "ignore"}
        for name in ("depth", "width"):  # the factors say it
            settings.pop(name, None)
        if batch.keep is not None and all(truth is not None for truth in batch.truths):
            same = all(truth is batch.truths[0] for truth in batch.truths)
            settings["truth"] = batch.truths[0] if same else np.stack(batch.truths)
        factors = [np.stack(factor) for factor in zip(*starts)]
        try:
            solution = solve(
                batch.operator, batch.y, factors=factors, random_state=[run.seed for run in runs], **settings
            )
        except (TypeError, ValueError) as error:
            _name_refused(batch)
            raise type(error)(_at(runs[0], error)) from error
        outcomes = _outcomes(batch, solution, n_threads)
    return outcomes, len(outcomes) == len(runs)


def _name_refused(batch):
    """Raise the error of the first run that ``solve`` refuses by itself, naming the run."""
    for b, run in enumerate(batch.runs):
        data = {"y": batch.y, "weights": batch.settings.get("weights")}
        data = {name: values[b] if np.ndim(values) == 2 else values for name, values in data.items()}
        start = {"init": run.init, "init_scale": run.init_scale, "random_state": run.seed}
        try:
            solve(batch.operator, **batch.settings | data | start | {"max_iter": 0, "on_failure": "ignore"})
        except (TypeError, ValueError) as error:
            raise type(error)(_at(run, error)) from error


def _at(run, error):
    return f"at {_named(run.point)}: {error}" if run.point else str(error)


def _spectra(solution, n_threads):
    """Return the singular values of all slices, by threads: those of hundreds take longer than their steps."""
    left, right = solution.halves()
    right = np.broadcast_to(right, (len(left), *right.shape[-2:]))
    with ThreadPoolExecutor(n_threads or os.cpu_count()) as pool:
        return np.stack(list(pool.map(singular_values, left, right)))


def _outcomes(batch, solution, n_threads):
    """Return what is kept of the runs that were not interrupted."""
    rule = as_rule(batch.settings.get("rule", _SOLVE["rule"].default))
    evaluations = 1 + solution.n_iter * rule.evaluations
    seconds = solution.seconds * evaluations / evaluations.sum()
    values = SimpleNamespace(singular_values=_spectra(solution, n_threads))
    effective_ranks, nuclear_norms = (TRACKS[name](values) for name in ("effective_rank", "nuclear_norm"))
    ranks, outcomes = numerical_ranks(values.singular_values), []
    for b, run in enumerate(batch.runs):
        if solution.status[b] is Status.INTERRUPTED:
            continue
        one = solution[b]
        one.n_eval, one.seconds = int(evaluations[b]), float(seconds[b])
        row = {
            "status": one.status.name,
            "n_iter": one.n_iter,
            "n_eval": one.n_eval,
            "loss": float(one.history["loss"][_returned(one)]),
            "error": _error(one, batch.truths[b]),
            "rank": ranks[b],
            "effective_rank": float(effective_ranks[b]),
            "nuclear_norm": float(nuclear_norms[b]),
            "seconds": one.seconds,
        }
        history = None if batch.keep is None else one.history
        kept = one if batch.keep == "solutions" else None
        outcomes.append(_Outcome(run.row, row, values.singular_values[b], history, kept))
    return outcomes


def _returned(solution):
    """Return the record whose factors a single solution has."""
    last = len(solution.history["iteration"]) - 1
    if "validation" in solution.history:
        held_out = solution.history["validation"]
        return int(np.nanargmin(held_out)) if np.isfinite(held_out).any() else last
    return max(last - 1, 0) if solution.status is Status.DIVERGED else last


def _error(solution, truth):
    if truth is None:
        return np.nan
    left, right = (half.astype(np.float64) for half in solution.halves())
    return float(np.sum((left @ right - truth) ** 2) / np.sum(truth**2))


def _log(done, total, grid, last):
    row = last.values
    logger.info(
        "sweep: %d of %d runs; %s: %s after %d steps, loss %.3g, error %.3g",
        done,
        total,
        _named(grid.points[last.row]) or "the run",
        row["status"],
        row["n_iter"],
        row["loss"],
        row["error"],
    )
