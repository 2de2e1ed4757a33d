"""The one loop of the library: step, record, stop tests, callback, checkpoint, Ctrl-C; and what a solver returns.

The loop drives any :class:`Process` and knows nothing of the solvers. A record at iteration t holds values *before*
update t; one more record follows the last update, so T steps with ``check_every=1`` give T + 1 records.
"""

import itertools
import signal
import threading
import time
import warnings
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np

from fastdmf.arrays import as_host

__all__ = ["History", "Process", "Progress", "SettingWarning", "Solution", "SolveWarning", "Status", "drive"]


class SolveWarning(RuntimeWarning):
    """A run that ended without doing what was asked; the text is the status' sentence."""


class SettingWarning(SolveWarning):
    """Settings with which a run cannot do what is asked, told before it starts; the text says what to change."""


class Status(Enum):
    """How a run ended. ``sentence`` explains it, ``success`` says whether that is what one hopes for."""

    CONVERGED = "the relative training loss reached tol"
    EARLY_STOPPED = "the held-out loss stopped falling; the factors with the lowest one were kept"
    STOPPED = "the callback asked to stop"
    MAX_ITER = "max_iter was reached before tol: raise max_iter, or tol, or hold out data with validation="
    STALLED = (
        "no step lowers the objective any more at this precision: the best point reached is returned; "
        "a larger tol, or float64 data, would end earlier or go further"
    )
    DIVERGED = (
        "the objective grew without bound, so the step is unstable: lower the learning rate, or use rule='auto'; "
        "the last finite record's factors are returned"
    )
    EXACT = "a matrix of low rank meets the data to the last digits, and the data determine it"
    NOISE_LEVEL = "no matrix of low rank meets the data exactly: the fit that predicts held-out data best is returned"
    NOT_IDENTIFIED = (
        "the data do not determine a matrix of low rank: measure more, above all in rows and columns with few entries; "
        "the best fit found is returned"
    )
    INTERRUPTED = "interrupted from the keyboard; the factors of that moment are returned"

    @property
    def sentence(self):
        """One sentence for people."""
        return self.value

    @property
    def success(self):
        """True for the ends that need no warning."""
        return self in _SUCCESS

    def __repr__(self):
        return f"<Status.{self.name}>"


_SUCCESS = {Status.CONVERGED, Status.EARLY_STOPPED, Status.STOPPED, Status.EXACT, Status.NOISE_LEVEL}


@dataclass
class Progress:
    """What a callback sees at a record.

    Attributes
    ----------
    iteration, n_eval : int
        Steps and evaluations done.
    values : dict of str to ndarray
        The record: ``loss``, ``objective``, ``grad_norm``, ``step_size`` and what else is tracked; scalars for a
        single run, arrays over the slices still running for a batch.
    elapsed : float
        Seconds since the start.
    max_iter : int
    factors : callable
        Returns copies of the current factors, as in :class:`Solution`.
    """

    iteration: int
    n_eval: int
    values: dict
    elapsed: float
    max_iter: int
    factors: object = field(repr=False)


class Process(Protocol):
    """What the loop needs of a solver. All arrays run over the slices that are still active."""

    n_eval: int

    def step(self, most):
        """Do one update of every active slice, or up to ``most`` of them; return how many."""

    def record(self):
        """Return a dict of name -> (active, ...) array, which the history keeps: later steps must not change it.

        ``objective``, and for the loop alone ``relative_loss`` and ``null_objective`` (that of W = 0), are needed.
        """

    def failed(self):
        """Return a bool array: slices that can make no progress any more."""

    def keep_best(self, slices):
        """Remember the current factors of ``slices`` (bool array) as the ones to return."""

    def finish(self, position, slice_, best):
        """Store the result of active slice ``position`` as slice ``slice_``; ``best`` takes the remembered ones."""

    def take(self, keep):
        """Go on with the active slices ``keep`` (index array) alone."""

    def factors(self):
        """Return copies of the current factors."""

    def snapshot(self):
        """Return all that ``resume`` needs: arrays, numbers, texts and None in dicts, lists and tuples."""

    def resume(self, snapshot, active):
        """Go on from a snapshot, with the slices ``active`` (index array) alone; called on a fresh process."""


class History:
    """Records of all slices; one that has ended leaves NaN."""

    def __init__(self, batch):
        self.batch, self.rows, self.iterations, self.active = batch, [], [], []

    def add(self, iteration, active, values):
        """Append one record of the slices ``active``."""
        self.iterations.append(iteration)
        self.active.append(active)
        self.rows.append(values)

    def runs(self):
        """Yield (start, stop) of runs of records that hold the same slices: slices end seldom."""
        start = 0
        for _, run in itertools.groupby(self.active, key=id):
            stop = start + len(list(run))
            yield start, stop
            start = stop

    def snapshot(self):
        """Return all records but the last as a list with one dict for each run of them."""
        out = []
        for start, stop in self.runs():
            rows = self.rows[start : min(stop, len(self.rows) - 1)]
            if rows:
                values = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
                at = np.array(self.iterations[start : start + len(rows)])
                out.append({"active": self.active[start], "iterations": at, "values": values})
        return out

    def resume(self, snapshot):
        """Take the records of a snapshot."""
        for run in snapshot:
            for k, iteration in enumerate(run["iterations"]):
                self.add(int(iteration), run["active"], {name: v[k] for name, v in run["values"].items()})

    def arrays(self):
        """Return name -> array of shape (records, B, ...)."""
        out = {"iteration": np.array(self.iterations)}
        for name, first in self.rows[0].items():
            out[name] = np.full((len(self.rows), self.batch, *first.shape[1:]), np.nan)
            for start, stop in self.runs():
                out[name][start:stop, self.active[start]] = np.stack([row[name] for row in self.rows[start:stop]])
        return out


class Interrupt:
    """Turn Ctrl-C into a flag while a loop runs, so that it ends between two steps; a second one raises.

    Inside another one, what one of them has seen the other has as well.

    Attributes
    ----------
    seen : bool
    outer : Interrupt or None
        The one that this one is inside of.
    """

    def __init__(self):
        self.seen, self.outer, self._previous = False, None, None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            owner = getattr(previous, "__self__", None)
            if isinstance(owner, Interrupt):
                self.outer, self.seen = owner, owner.seen
            # A handler that somebody else installed (a notebook's, say) is left alone.
            if self.outer is not None or previous is signal.default_int_handler:
                self._previous = previous
                signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, signum, frame):
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *exception):
        if self.outer is not None:
            self.outer.seen |= self.seen
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)


@dataclass(frozen=True)
class Stop:
    """The stop tests' settings.

    Attributes
    ----------
    max_iter : int
    check_every : int
        Steps between records; the tests run at records.
    tol : float
        On the record's ``relative_loss``.
    patience : int or None
        Evaluations without a lower ``validation`` loss; None without held-out data.
    watch : bool
        Keep the last finite record's factors and stop when the objective grows beyond ``GROWTH`` times the start.
    """

    max_iter: int
    check_every: int
    tol: float
    patience: int | None = None
    watch: bool = False


# Objective over that of the start (or of W = 0, whichever is larger) from which a fixed step counts as unstable.
GROWTH = 1e3


def drive(process, batch, stop, callback=None, checkpoint=None):
    """Run ``process`` until every slice has ended.

    Parameters
    ----------
    process : Process
    batch : int
        Number of slices.
    stop : Stop
    callback : callable, optional
        Called with a :class:`Progress` at every record; a true value stops all slices.
    checkpoint : CheckpointFile, optional
        Where to go on from, and where to write the state at records: when it is due, and at the end, whatever ends it.

    Returns
    -------
    statuses : list of Status
    n_iter : ndarray of int, shape (B,)
        Steps that lead to the result of each slice's last record.
    history : dict of ndarray
        Shapes (records, B, ...).

    Raises
    ------
    KeyboardInterrupt
        On a second Ctrl-C, and on one that comes when all slices have ended, unless an :class:`Interrupt` is around
        this that has seen it now.
    """
    started = time.perf_counter()
    active = np.arange(batch)
    statuses: list = [None] * batch
    n_iter = np.zeros(batch, np.int64)
    best = np.full(batch, np.inf)
    best_at = np.zeros(batch, np.int64)
    has_best = np.full(batch, stop.watch and stop.patience is None)
    history = History(batch)
    iteration = 0
    if checkpoint is not None and (tree := checkpoint.load()) is not None:
        active, iteration, ceiling = tree["active"], tree["iteration"], tree["ceiling"]
        statuses = [None if name is None else Status[name] for name in tree["statuses"]]
        n_iter, best, best_at, has_best = (tree[name] for name in ("n_iter", "best", "best_at", "has_best"))
        history.resume(tree["history"])
        process.resume(tree["process"], active)

    with Interrupt() as interrupt, np.errstate(over="ignore", invalid="ignore"):
        while True:
            values = process.record()
            relative, null_objective = values.pop("relative_loss"), values.pop("null_objective")
            history.add(iteration, active, values)
            objective = values["objective"]
            if iteration == 0:
                largest = np.finfo(np.float64).max
                ceiling = np.minimum(GROWTH * np.maximum(objective, null_objective) if stop.watch else np.inf, largest)
                ceiling = np.broadcast_to(ceiling, batch).copy()
            diverged = ~(objective <= ceiling)  # also where it is NaN or infinite

            if stop.patience is not None:
                held_out = values["validation"]
                better = held_out < best[active]
                best[active[better]] = held_out[better]
                best_at[active[better]] = process.n_eval
                process.keep_best(better)
                has_best[active[better]] = True
            elif stop.watch:
                process.keep_best(~diverged)

            answer = None
            if callback is not None:
                try:
                    answer = callback(_progress(process, iteration, values, batch, started, stop))
                except KeyboardInterrupt:
                    interrupt.seen = True

            # All slices at once: most records end none.
            failed = process.failed()
            done = diverged | (relative <= stop.tol) | failed
            if stop.patience is not None:
                waited = process.n_eval - best_at[active] >= stop.patience
                done |= waited
            ends: dict = {}
            pressed = interrupt.seen
            last = answer or pressed or iteration >= stop.max_iter
            for position in range(len(active)) if last else done.nonzero()[0]:
                if diverged[position]:
                    status = Status.DIVERGED
                elif pressed:  # even where the run is over: what would follow it must hear of it
                    status = Status.INTERRUPTED
                elif relative[position] <= stop.tol:
                    status = Status.CONVERGED
                elif stop.patience is not None and waited[position]:
                    status = Status.EARLY_STOPPED
                elif failed[position]:
                    status = Status.STALLED
                elif answer:
                    status = Status.STOPPED
                else:
                    status = Status.MAX_ITER
                ends[position] = status

            if checkpoint is not None and (len(ends) == len(active) or checkpoint.due()):
                names = [None if status is None else status.name for status in statuses]
                numbers = {"n_iter": n_iter, "best": best, "best_at": best_at, "has_best": has_best}
                place = {"iteration": iteration, "active": active, "ceiling": ceiling, "statuses": names, **numbers}
                # Without this record: it is the first thing that a resumed run makes again.
                checkpoint.save({**place, "history": history.snapshot(), "process": process.snapshot()})

            for position, status in ends.items():
                slice_ = active[position]
                statuses[slice_], n_iter[slice_] = status, iteration
                wants_best = stop.patience is not None or status is Status.DIVERGED
                process.finish(position, slice_, bool(wants_best and has_best[slice_]))
            if ends:
                keep = np.array([i for i in range(len(active)) if i not in ends], np.int64)
                active, ceiling = active[keep], ceiling[keep]
                if len(active) == 0:
                    break
                process.take(keep)

            last = min(iteration + stop.check_every, stop.max_iter)
            while iteration < last and not interrupt.seen:
                iteration += process.step(last - iteration)
    if interrupt.seen and not pressed and interrupt.outer is None:  # after the last record's decisions
        raise KeyboardInterrupt
    return statuses, n_iter, history.arrays()


def _progress(process, iteration, values, batch, started, stop):
    factors = process.factors
    if batch == 1:
        values = {k: v[0] for k, v in values.items()}

        def factors():
            return [w[0] for w in process.factors()]

    return Progress(iteration, process.n_eval, values, time.perf_counter() - started, stop.max_iter, factors)


def warn_unless_success(statuses, stacklevel=3):
    """Warn with the sentence of every kind of unsuccessful status once, and the number of slices."""
    failures = {}
    for status in statuses:
        if not status.success:
            failures[status] = failures.get(status, 0) + 1
    for status, count in failures.items():
        where = f" ({count} of {len(statuses)} runs)" if len(statuses) > 1 else ""
        warnings.warn(f"{status.name}{where}: {status.sentence}", SolveWarning, stacklevel=stacklevel)


@dataclass(repr=False)
class Solution:
    """What a solver returns.

    Attributes
    ----------
    factors : list of ndarray
        [W_1, ..., W_N], W_j of shape (d_j, d_{j-1}); for a symmetric chain [U]. Batch: (B, d_j, d_{j-1}).
    status : Status or list of Status
    n_iter, n_eval : int
        Steps, and evaluations of loss and gradient. ``n_iter`` is an array for a batch.
    history : dict of ndarray
        One row a record; ``iteration``, ``loss``, ``objective``, ``grad_norm``, ``step_size`` and what was tracked.
        A batch has a second axis, NaN after a slice has ended.
    symmetric : bool
        W = U U^T.
    device : str
    seconds, compile_seconds : float
        Wall-clock seconds of the solve, and those that kernels took besides to be imported, compiled or loaded from
        the cache: nothing from the second solve of a kind on.
    """

    factors: list
    status: object
    n_iter: object
    n_eval: int
    history: dict
    symmetric: bool = False
    device: str = "cpu"
    seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def batched(self):
        """Whether the arrays have a leading batch axis."""
        return isinstance(self.status, list)

    def __repr__(self):
        kind = "U U^T" if self.symmetric else f"depth {len(self.factors)}"
        statuses = self.status if self.batched else [self.status]
        counts = {status.name: statuses.count(status) for status in dict.fromkeys(statuses)}
        ends = ", ".join(f"{n} {name}" if self.batched else name for name, n in counts.items())
        last = f", loss {self.history['loss'][-1]:.3g}" if not self.batched and "loss" in self.history else ""
        shape = self.factors[-1].shape[-2], self.factors[0].shape[-2 if self.symmetric else -1]
        return f"<Solution: {shape[0]} x {shape[1]}, {kind}; {ends} after {self.n_eval} evaluations{last}>"

    def __len__(self):
        if not self.batched:
            raise TypeError("a single run has no length")
        return len(self.status)

    def __getitem__(self, b):
        """Return slice ``b`` of a batch as a single solution."""
        if not self.batched:
            raise TypeError("a single run cannot be indexed")
        status = self.status[b]  # raises IndexError, which also ends an iteration
        rows = ~np.isnan(self.history["loss"][:, b])
        history = {k: v[rows] if k == "iteration" else v[rows, b] for k, v in self.history.items()}
        return Solution(
            [w[b] for w in self.factors],
            status,
            int(self.n_iter[b]),
            self.n_eval,
            history,
            self.symmetric,
            self.device,
            self.seconds,
            self.compile_seconds,
        )

    def halves(self):
        """Return (L, R) with W = L R: thin where the chain is; for depth 1 (W, identity)."""
        if self.symmetric:
            u = self.factors[0]
            return u, u.swapaxes(-1, -2)
        if len(self.factors) == 1:
            w = self.factors[0]
            return w, np.eye(w.shape[-1], dtype=w.dtype)
        widths = [w.shape[-2] for w in self.factors[:-1]]
        k = int(np.argmin(widths)) + 1
        return _product(self.factors[k:]), _product(self.factors[:k])

    def matrix(self):
        """Return W, shape (n1, n2) or (B, n1, n2): the full matrix."""
        if not self.symmetric and len(self.factors) == 1:
            return self.factors[0].copy()
        left, right = self.halves()
        return left @ right

    def singular_values(self):
        """Return the singular values of W, descending, float64 on the host, without forming W where it is thin."""
        return singular_values(*(as_host(half) for half in self.halves()))

    @property
    def rank(self):
        """Numerical rank: the number of singular values above 1e-3 of the largest (a list for a batch)."""
        counts = numerical_ranks(np.atleast_2d(self.singular_values()))
        return counts if self.batched else counts[0]


def numerical_ranks(s):
    """Return the number of singular values above 1e-3 of the largest for each row of ``s``, as a list."""
    return [int((row > 1e-3 * row[0]).sum()) if row[0] > 0 else 0 for row in s]


def _product(factors):
    """Return W_j ... W_i for ``factors`` = [W_i, ..., W_j]."""
    out = factors[0]
    for w in factors[1:]:
        out = w @ out
    return out


def singular_values(left, right):
    """Return the singular values of ``left @ right`` in float64, through QR of the thin sides when they are thin."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    n1, h = left.shape[-2:]
    n2 = right.shape[-1]
    if 2 * h >= min(n1, n2):
        return np.linalg.svd(left @ right, compute_uv=False)
    r1 = np.linalg.qr(left, mode="r")
    r2 = np.linalg.qr(right.swapaxes(-1, -2), mode="r")
    return np.linalg.svd(r1 @ r2.swapaxes(-1, -2), compute_uv=False)
