"""``sweep``: a grid of descents as batches on all cores, and the tidy table that comes out."""

import csv
import inspect
import itertools
import logging
import os
import time

import numpy as np

from fastdmf.chain import INITS, initial_factors
from fastdmf.checks import check_count, check_number, check_seed
from fastdmf.descent import chain_layout, solve
from fastdmf.engine import Status
from fastdmf.masks import EntryMask
from fastdmf.operators import as_operator
from fastdmf.rules import as_rule

__all__ = ["SweepTable", "sweep"]

logger = logging.getLogger("fastdmf")

# What a run takes when the grid does not say; None is the default of solve.
_AXES = {"seed": 0, "depth": None, "width": None, "init": "gaussian", "init_scale": 1e-3, "rule": "auto"}
_OWN = {"operator", "y", "factors", "random_state", "truth", "callback", "checkpoint", "on_failure", *_AXES}
_OPTIONS = set(inspect.signature(solve).parameters) - _OWN
_RESULTS = ("status", "n_iter", "loss", "error", "rank", "effective_rank", "nuclear_norm", "seconds")
_NOT_RUN = "NOT_RUN"
# A batch keeps some 25 buffers of the size of its factors with rule="auto", fewer with the others.
_BATCH_BYTES, _BUFFERS = 1e9, 25
# Seconds of work left from which starting worker processes, 2 to 3 s with cached kernels, is worth while.
_WORTH = 6.0


def sweep(instance, *, n_jobs=None, keep=False, callback=None, verbose=0, **settings):
    """Run :func:`fastdmf.solve` over a grid of settings; return one row for each point.

    Parameters
    ----------
    instance : tuple or callable
        (operator, y) or (operator, y, truth) for all points; or a function that returns one, called with those axes of
        the grid that its signature names, once for each combination: ``def instance(seed, count): ...``.
    n_jobs : int, optional
        Worker processes for points that share no operator; 1 keeps them all here. By default as many as there are
        cores, if the first of them shows that it is worth while. The results do not depend on it.
    keep : bool
        Keep every run's Solution, with its history, in ``table.solutions``; ``"error"`` is then recorded on the way.
    callback : callable, optional
        Called as ``callback(done, total)`` whenever runs have ended.
    verbose : int
        Above 0 the same is logged at level INFO by the logger ``"fastdmf"``.
    **settings
        The axes of the grid, sequences of values or one value: ``seed`` (of the start), ``depth``, ``width``, ``init``,
        ``init_scale``, ``rule``, and whatever ``instance`` names. Everything else goes to :func:`fastdmf.solve`.

    Returns
    -------
    SweepTable
        One row for each point of the grid, the last axis running fastest: the axes, then ``status`` (the name of a
        :class:`fastdmf.Status`), ``n_iter``, ``loss``, ``error`` (||W - truth||_F^2 / ||truth||_F^2, NaN without a
        truth), ``rank``, ``effective_rank``, ``nuclear_norm`` and ``seconds`` (an equal part of its batch's).

    Raises
    ------
    TypeError, ValueError
        If an axis is empty or belongs to neither ``instance`` nor ``solve``, or ``instance`` returns something else.

    Notes
    -----
    Runs with the same operator object, depth, width and rule are one batch: dense measurements are read once for all
    of them, and small chains run on all cores; each run stops on its own. Runs with different operators go one after
    the other, or in worker processes. (Masks of several seeds
    could be joined into one with weights of 0 and 1, whose residuals cost as many times more as it holds entries.)

    Failed runs do not warn: see ``status``. Ctrl-C ends the sweep; what was running is ``INTERRUPTED``, and what had
    not begun is ``NOT_RUN`` with NaN.

    Examples
    --------
    >>> import numpy as np, fastdmf
    >>> def instance(seed, count):
    ...     rng = np.random.default_rng(seed)
    ...     truth = rng.standard_normal((20, 1)) @ rng.standard_normal((1, 20))
    ...     rows, cols = np.divmod(rng.choice(400, count, replace=False), 20)
    ...     return fastdmf.EntryMask(rows, cols, truth.shape), truth[rows, cols], truth
    >>> table = fastdmf.sweep(instance, seed=range(3), count=(100, 200), depth=(2, 3), init_scale=1e-3)
    >>> len(table), table.where(count=200, depth=3)["error"].max() < 1e-2
    (12, np.True_)
    """
    asked, axes, options = _split_settings(instance, settings)
    if n_jobs is not None:
        n_jobs = check_count("n_jobs", n_jobs)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    batches = _batches(points, instance, asked, options, keep)
    found, progress = [None] * len(points), _Progress(len(points), callback, verbose)
    _run(batches, found, progress, n_jobs)
    columns = {name: _column([_shown(point[name]) for point in points]) for name in axes}
    blank = {name: np.nan for name in _RESULTS} | {"status": _NOT_RUN}
    rows = [blank if row is None else row for row in found]
    columns |= {name: _column([row[name] for row in rows]) for name in _RESULTS}
    solutions = [None if row is None else row.get("solution") for row in found] if keep else None
    return SweepTable(columns, solutions)


# --- the grid --------------------------------------------------------------------------------------------------------


def _split_settings(instance, settings):
    """Return (axes that the instance asks for, all axes with their values, options for solve)."""
    asked = []
    if callable(instance):
        parameters = inspect.signature(instance).parameters
        # One with a default of its own is asked for only where the grid has it.
        asked = [n for n, p in parameters.items() if n in settings or p.default is p.empty]
        missing = [name for name in asked if name not in settings and name not in _AXES]
        if missing:
            raise TypeError(f"instance asks for {', '.join(missing)}: give each as an axis, {missing[0]}=[...]")
    elif not isinstance(instance, tuple) or len(instance) not in (2, 3):
        raise TypeError(f"instance must be (operator, y[, truth]) or a function of it, got {type(instance).__name__}")
    axes, options = {}, {}
    for name, value in settings.items():
        if name in _AXES or name in asked:
            axes[name] = _values(name, value)
        elif name in _OPTIONS:
            options[name] = value
        elif name in _OWN:
            raise TypeError(f"{name} belongs to a single run and cannot be swept; see fastdmf.solve")
        else:
            here = f", and instance takes {', '.join(asked)}" if asked else ", and instance is no function of it"
            raise TypeError(f"sweep knows no {name!r}: it is no setting of solve{here}")
    for name in asked:
        axes.setdefault(name, [_AXES.get(name)])
    axes.setdefault("seed", [_AXES["seed"]])
    return asked, axes, options


def _values(name, value):
    """Return the values of an axis as a list."""
    if isinstance(value, str) or not np.iterable(value):
        value = [value]
    values = [v.item() if isinstance(v, np.generic) else v for v in value]
    if not values:
        raise ValueError(f"{name} is an axis without values")
    for v in values:
        if name == "seed":
            check_seed(v)
        elif name == "init_scale":
            check_number(name, v, 0)
        elif name == "init" and v not in INITS:
            raise ValueError(f"init must be one of {sorted(INITS)}, got {v!r}")
        elif name == "rule":
            as_rule(v)
    return values


def _batches(points, instance, asked, options, keep):
    """Return the batches: (places of the points, arguments of ``_solve``)."""
    made, groups = {}, {}
    for place, point in enumerate(points):
        arguments = {name: point[name] for name in asked}
        key = repr(arguments)
        if key not in made:
            made[key] = _checked(instance(**arguments) if asked or callable(instance) else instance)
        full = _AXES | point
        group = id(made[key][0]), full["depth"], repr(full["width"]), repr(full["rule"])
        groups.setdefault(group, []).append((place, made[key], full))
    batches = []
    for members in groups.values():
        operator, first = members[0][1][0], members[0][2]
        layout = chain_layout(operator.shape, first["depth"], first["width"], options.get("symmetric", False))
        most = max(int(_BATCH_BYTES / (_BUFFERS * 8 * layout.size)), 1)
        for i in range(0, len(members), most):
            part = members[i : i + most]
            data = [data for _, data, _ in part]
            runs = [full for _, _, full in part]
            batches.append(([place for place, _, _ in part], (operator, data, runs, layout, options, keep)))
    return batches


def _checked(made):
    """Return (operator, y, truth) of what an instance returned."""
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise TypeError(f"instance must return (operator, y) or (operator, y, truth), got {type(made).__name__}")
    operator = as_operator(made[0])
    y = np.asarray(made[1])
    if y.shape != (operator.size,):
        raise ValueError(f"instance returned y of shape {y.shape} for an operator with {operator.size} measurements")
    truth = None if len(made) == 2 or made[2] is None else np.asarray(made[2], np.float64)
    if truth is not None and truth.shape != operator.shape:
        raise ValueError(f"instance returned a truth of shape {truth.shape} for a matrix of shape {operator.shape}")
    return operator, y, truth


# --- the runs --------------------------------------------------------------------------------------------------------


def _run(batches, found, progress, n_jobs):
    """Run all batches and put their rows in place; Ctrl-C leaves the rest as it is."""
    left = list(batches)
    begin = time.perf_counter()
    while left:
        if _worth_workers(left, len(batches), time.perf_counter() - begin, n_jobs):
            break
        places, arguments = left.pop(0)
        rows = _solve(*arguments)
        _place(found, places, rows, progress)
        if any(row["status"] == Status.INTERRUPTED.name for row in rows):
            return
    if not left:
        return
    from joblib import Parallel, delayed

    work = Parallel(n_jobs=n_jobs or os.cpu_count(), return_as="generator")
    # The kernels of a worker stay on one core; the bits do not depend on it.
    runs = work(delayed(_solve)(*arguments, n_threads=1) for _, arguments in left)
    try:
        for (places, _), rows in zip(left, runs):
            _place(found, places, rows, progress)
    except KeyboardInterrupt:
        logger.info("sweep: interrupted, %d runs have not ended", sum(row is None for row in found))


def _worth_workers(left, total, spent, n_jobs):
    """Return whether the batches that are left should go to worker processes."""
    cores = os.cpu_count() if n_jobs is None else n_jobs
    # Batches as long as there are cores, and dense measurements, keep the cores busy on their own.
    small = all(isinstance(arguments[0], EntryMask) and len(places) < cores for places, arguments in left)
    if cores == 1 or len(left) < 2 or not small:
        return False
    if n_jobs is not None:
        return True
    done = total - len(left)
    return done > 0 and spent / done * len(left) * (1 - 1 / cores) > _WORTH


def _place(found, places, rows, progress):
    for place, row in zip(places, rows):
        found[place] = row
    progress.add(len(rows))


def _solve(operator, data, runs, layout, options, keep, n_threads=None):
    """Run one batch; return a row for each run."""
    starts = [initial_factors(layout, run["init"], float(run["init_scale"]), run["seed"]) for run in runs]
    y = np.stack([y for _, y, _ in data]) if any(y is not data[0][1] for _, y, _ in data) else data[0][1]
    truths = [truth for _, _, truth in data]
    options = {"n_threads": n_threads, **options}
    if keep and truths[0] is not None:
        options["truth"] = np.stack(truths)
    begin = time.perf_counter()
    solution = solve(
        operator,
        y,
        factors=[np.stack(w) for w in zip(*starts)],
        rule=runs[0]["rule"],
        random_state=[run["seed"] for run in runs],
        on_failure="ignore",
        **options,
    )
    seconds = (time.perf_counter() - begin) / len(runs)
    return [_row(solution[b], truth, seconds, keep) for b, truth in enumerate(truths)]


def _row(solution, truth, seconds, keep):
    """Return the results of one run."""
    s = solution.singular_values()
    total = s.sum()
    share = s[s > 0] / total if total > 0 else np.ones(1)
    error = np.nan
    if truth is not None:
        error = np.sum((solution.matrix().astype(np.float64) - truth) ** 2) / np.sum(truth**2)
    row = {
        "status": solution.status.name,
        "n_iter": solution.n_iter,
        "loss": solution.history["loss"][-1],
        "error": error,
        "rank": solution.rank,
        "effective_rank": np.exp(-np.sum(share * np.log(share))),
        "nuclear_norm": total,
        "seconds": seconds,
    }
    return row | {"solution": solution} if keep else row


class _Progress:
    """Counts runs that have ended, for the callback and the log."""

    def __init__(self, total, callback, verbose):
        self.total, self.callback, self.verbose = total, callback, verbose
        self.done, self.begin = 0, time.perf_counter()

    def add(self, count):
        self.done += count
        if self.verbose:
            spent = time.perf_counter() - self.begin
            left = spent / self.done * (self.total - self.done)
            logger.info("sweep: %d of %d runs, %.1f s, about %.0f s left", self.done, self.total, spent, left)
        if self.callback is not None:
            self.callback(self.done, self.total)


# --- the table -------------------------------------------------------------------------------------------------------


def _shown(value):
    """Return a value as the table holds it: rules by how they print."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if value is None or isinstance(value, (str, bool, int, float, tuple)) else repr(value)


def _column(values):
    """Return values as an array; of objects where they are of several kinds."""
    if all(isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in values):
        return np.array(values)
    if all(isinstance(v, str) for v in values):
        return np.array(values)
    out = np.empty(len(values), object)
    out[:] = values
    return out


class SweepTable:
    """Rows of a sweep: ``table["error"]`` is a column, ``table.where(depth=3)`` some rows.

    Parameters
    ----------
    columns : dict of ndarray
        Of one length.
    solutions : list of Solution, optional

    Attributes
    ----------
    columns : list of str
    solutions : list of Solution or None
        One for each row, if they were kept.
    """

    def __init__(self, columns, solutions=None):
        self._columns, self.solutions = dict(columns), solutions

    @property
    def columns(self):
        """Names of the columns."""
        return list(self._columns)

    def __len__(self):
        return len(next(iter(self._columns.values())))

    def __getitem__(self, name):
        if name not in self._columns:
            raise KeyError(f"{name!r} is no column; there are {', '.join(self._columns)}")
        return self._columns[name]

    def __iter__(self):
        """Yield the rows as dicts."""
        for i in range(len(self)):
            yield {name: column[i] for name, column in self._columns.items()}

    def where(self, **values):
        """Return the rows whose columns have these values.

        Raises
        ------
        KeyError
            If there is no such column.
        """
        chosen = np.ones(len(self), bool)
        for name, value in values.items():
            column, value = self[name], _shown(value)
            chosen &= np.array([bool(one == value) for one in column])
        at = np.flatnonzero(chosen)
        solutions = None if self.solutions is None else [self.solutions[i] for i in at]
        return SweepTable({name: column[at] for name, column in self._columns.items()}, solutions)

    def group(self, by, value="error"):
        """Return the median, smallest and largest of a column for each combination of others, and their count.

        Parameters
        ----------
        by : str or sequence of str
        value : str
            A column of numbers; NaN are left out.

        Returns
        -------
        SweepTable
            The columns ``by``, ``median``, ``min``, ``max``, ``count``, in the order in which they first appear.
        """
        by = [by] if isinstance(by, str) else list(by)
        groups = {}
        for row in self:
            groups.setdefault(repr([row[name] for name in by]), []).append(row)
        if value not in self._columns:
            self[value]  # raises
        columns = {name: _column([rows[0][name] for rows in groups.values()]) for name in by}
        numbers = [np.array([row[value] for row in rows if not np.isnan(row[value])]) for rows in groups.values()]
        for name, function in (("median", np.median), ("min", np.min), ("max", np.max)):
            columns[name] = np.array([function(n) if len(n) else np.nan for n in numbers])
        return SweepTable(columns | {"count": np.array([len(n) for n in numbers])})

    def to_pandas(self):
        """Return a pandas DataFrame.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame(self._columns)

    def to_csv(self, path):
        """Write the rows to a file, numbers with all their digits."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(row.values() for row in self)

    def __repr__(self):
        head = self.columns
        rows = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in self]
        shown = rows if len(rows) <= 40 else [*rows[:20], ["..."] * len(head), *rows[-20:]]
        widths = [max(map(len, column)) for column in zip(head, *shown)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [head, *shown]]
        return "\n".join(lines)
