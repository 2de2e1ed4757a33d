"""Fits of a table's row distribution, and the choice among them by held-out entries.

Two kinds compete. ``variational``: few factors, any shape and size. ``gaussian``: the full covariance of up to 500
columns under shrinkage, whose strength and kind are chosen by the held-out entries too. What is best for one table in
general is best within a few percent for none (bench/imputer.py), and an entry held out costs the fit little: the
winner is fitted again to all entries.
"""

from dataclasses import dataclass

import numpy as np

from fastdmf.backend import thread_limits
from fastdmf.checkpoint import CheckpointFile, digest
from fastdmf.checks import check_count
from fastdmf.covariance import TOL, Shrinkage, estimate_covariance
from fastdmf.engine import Status, Stop, drive
from fastdmf.entry_kfold import spare_last_entries
from fastdmf.fitting import split_svd
from fastdmf.masks import EntryMask
from fastdmf.row_models import GaussianRows, LowRankRows, blocks_of_rows
from fastdmf.row_neighbours import SHARES, NeighbourRows, affordable
from fastdmf.variational import vbmf

__all__ = [
    "RowFit",
    "TrialInterrupted",
    "choose_gaussian",
    "choose_neighbours",
    "clearly_better",
    "default_shrinkage",
    "fit_gaussian",
    "fit_variational",
    "held_out_errors",
    "make_folds",
]

# Trials end earlier than the fit that stays: their order is what counts.
_TRIAL_TOL, _TRIAL_ITER = 0.03, 30
# Entries that tell one fit from another; tables of fewer held-out entries are tried on more folds:
# with one fold a table of noise, or one of twenty rows, may be given to the wrong kind.
_ENOUGH, _MOST_FOLDS = 250, 8
_MAX_ITER = 200
_DEPTH = 3  # of the factors
# Strengths of the shrinkage tried, in rows a column of the table; each starts from the fit before it, and a kind of
# target is done when the error rises. Tables of many rows begin with the weakest.
_STRENGTHS, _MANY = (5.0, 1.0, 0.2), 4
# Columns from which one correlation for each distance is tried: a few distances are no better than one number.
_ORDERED = 16
# Noise variance, in units of the variance, under which data count as exactly fitted.
_EXACT = 1e-10


@dataclass
class RowFit:
    """A fitted row distribution.

    Attributes
    ----------
    solver : str
        "variational", "gaussian", "descent" or "recovery".
    rows : GaussianRows, NeighbourRows or LowRankRows
    factors : list of ndarray
        [W_1, ..., W_N]; their product is the fitted matrix.
    status : Status
    n_iter : int
    history : dict of ndarray
    device : str
    """

    solver: str
    rows: object
    factors: list
    status: Status
    n_iter: int
    history: dict
    device: str


def fit_variational(z, seen, dtype, *, depth=None, width=None, max_iter=None, **options):
    """Return the :class:`RowFit` of ``vbmf``.

    Which entries are observed does not inform the factors: a table's holes are taken as holes.

    Parameters
    ----------
    z : ndarray of shape (n, p), float64
        What stands in the holes is not read.
    seen : ndarray of bool, shape (n, p)
    dtype : numpy dtype
        Of the fit.
    depth, width, max_iter
        As for ``vbmf``.
    options
        ``callback``, ``checkpoint``, ``device``, ``n_threads``, ``random_state``.
    """
    index = np.nonzero(seen)
    mask, y = EntryMask(*index, z.shape), z[index].astype(dtype)
    settings = {"depth": depth, "width": width, "max_iter": _MAX_ITER if max_iter is None else max_iter}
    solution = vbmf(mask, y, implicit_features=False, on_failure="ignore", **settings, **options)
    sweeps = solution.sweeps
    left, right = (side.x[:, : sweeps.live].astype(np.float64) for side in sweeps.sides)
    free = sweeps.rows.free[: sweeps.live] > 0
    # Rows without entries count as the mean of the others, and new rows are expected there.
    blank = ~seen.any(axis=1)
    left[blank] = left[~blank].mean(axis=0)
    # The columns' biases stand against a constant column of the rows.
    mean = solution.mean + right @ left.mean(axis=0)
    prior = sweeps.rows.prior[: sweeps.live][free]
    doubt = sweeps.columns.variance[: sweeps.live][free] * prior
    rows = LowRankRows(mean, right[:, free] * np.sqrt(prior), solution.noise, doubt)
    left = np.column_stack([np.ones(len(left)), left[:, free] - left[:, free].mean(axis=0)])
    right = np.vstack([mean, right[:, free].T])
    factors = split_svd(left, right, _DEPTH if depth is None else depth, dtype)
    exact = solution.status is Status.MAX_ITER and solution.noise <= _EXACT * np.mean(np.square(y, dtype=np.float64))
    status = Status.CONVERGED if exact else solution.status
    return RowFit("variational", rows, factors, status, solution.n_iter, solution.history, solution.device)


class TrialInterrupted(Exception):
    """Ctrl-C ended a trial: what is fitted is what the trial had come to, and no choice is made.

    Attributes
    ----------
    fit : RowFit
    """

    def __init__(self, fit):
        super().__init__(fit.status.sentence)
        self.fit = fit


class _Expectation:
    """Expectation maximisation of a table's mean and covariance, as the loop drives it (``engine.Process``)."""

    def __init__(self, z, seen, shrinkage, start):
        self._table, self._shrinkage = (z, seen), shrinkage
        self._blocks = list(blocks_of_rows(seen))
        self.rows = estimate_covariance(z, seen, shrinkage, max_iter=0, blocks=[])[0] if start is None else start
        self.n_eval, self.change = 0, np.nan

    def step(self, most):
        self.rows, changes = estimate_covariance(
            *self._table, self._shrinkage, start=self.rows, max_iter=1, blocks=self._blocks
        )
        self.change = float(changes[0])
        self.n_eval += 1
        return 1

    def record(self):
        reached = self.change if self.n_eval else 1.0
        values = {"relative_loss": reached, "null_objective": 1.0, "objective": 0.0, "change": self.change}
        return {name: np.array([value]) for name, value in values.items()}

    def failed(self):
        return np.array([False])

    def finish(self, position, slice_, best):
        """Nothing: the rows are the result."""

    def factors(self):
        return [self.rows.covariance[None]]

    def snapshot(self):
        return {"n_eval": self.n_eval, "change": self.change, "rows": [self.rows.mean, self.rows.covariance]}

    def resume(self, snapshot, active):
        self.n_eval, self.change = snapshot["n_eval"], snapshot["change"]
        self.rows = GaussianRows(*snapshot["rows"])


def _estimate(z, seen, shrinkage, start, tol, max_iter, callback=None, checkpoint=None):
    """Return (rows, status, largest change of each step) of ``estimate_covariance`` with what every solver has."""
    process = _Expectation(z, seen, shrinkage, start)
    file = None
    if checkpoint is not None:
        run = digest("gaussian", z, seen, shrinkage, process.rows.mean, process.rows.covariance, tol, max_iter)
        file = CheckpointFile(checkpoint, run)
    (status,), _, history = drive(process, 1, Stop(max_iter, 1, tol), callback, file)
    return process.rows, status, history["change"][1:, 0]


def fit_gaussian(
    z,
    seen,
    shrinkage,
    dtype,
    *,
    share=0.0,
    depth=None,
    start=None,
    max_iter=None,
    n_threads=None,
    callback=None,
    checkpoint=None,
):
    """Return the :class:`RowFit` of ``estimate_covariance``; the fitted matrix is the completed one.

    Parameters
    ----------
    z, seen, dtype
        As for :func:`fit_variational`.
    shrinkage : Shrinkage
    share : float
        Of the nearest rows' errors that fills are corrected by.
    depth : int, optional
        Number of factors that the fitted matrix is split into.
    start : GaussianRows, optional
    max_iter, n_threads : int, optional
    callback, checkpoint : optional
        As for :func:`fastdmf.solve`.
    """
    max_iter = _MAX_ITER if max_iter is None else check_count("max_iter", max_iter)
    with thread_limits(n_threads):
        rows, *end = _estimate(z, seen, shrinkage, start, TOL, max_iter, callback, checkpoint)
        return _gaussian_fit(rows, z, seen, share, depth, dtype, *end)


def _gaussian_fit(rows, z, seen, share, depth, dtype, status, changes):
    deviation = rows.fill(z, seen) - rows.mean
    model = NeighbourRows.of(rows, z, seen, share) if share else rows
    left, right = np.column_stack([np.ones(len(z)), deviation]), np.vstack([rows.mean, np.eye(z.shape[1])])
    factors = split_svd(left, right, _DEPTH if depth is None else depth, dtype)
    history = {"iteration": np.arange(1, len(changes) + 1), "change": changes}
    return RowFit("gaussian", model, factors, status, len(changes), history, "cpu")


def default_shrinkage(p):
    """Return the shrinkage for ``p`` columns where nothing is held out to choose it."""
    return Shrinkage(float(p))


@dataclass
class Fold:
    """Entries held out, as index arrays (rows, columns), and what is ``visible`` without them, (n, p)."""

    hidden: tuple
    visible: np.ndarray


def make_folds(seen, held_out, seed):
    """Return the :class:`Fold` of ``held_out``, and further ones where that is too few entries to tell fits apart.

    Parameters
    ----------
    seen : ndarray of bool, shape (n, p)
    held_out : ndarray of int
        Indices of observed entries in row-major order.
    seed : int
        Draws the further folds, of as many entries.
    """
    index = np.nonzero(seen)
    rest = np.setdiff1d(np.arange(len(index[0])), held_out)
    rest = np.random.default_rng(seed).permutation(rest)
    more = min(_MOST_FOLDS - 1, len(rest) // len(held_out), -(-_ENOUGH // len(held_out)) - 1)
    folds = []
    for chosen in [held_out, *np.split(rest[: more * len(held_out)], max(more, 1))][: more + 1]:
        chosen = spare_last_entries(np.sort(chosen), *index)
        if chosen is not None:
            hidden = tuple(at[chosen] for at in index)
            visible = seen.copy()
            visible[hidden] = False
            folds.append(Fold(hidden, visible))
    return folds


def choose_gaussian(z, folds, reports, kept, dtype, n_threads=None):
    """Return (shrinkage, rows of each fold, squared errors on the held-out entries) of the best trial.

    Parameters
    ----------
    z : ndarray of shape (n, p), float64
    folds : list of Fold
    reports : Reports
        Told of every trial.
    kept : Kept
        Trials that were made already are not made again.
    dtype : numpy dtype
        Of the fit.

    Raises
    ------
    TrialInterrupted
        On Ctrl-C.
    """
    n, p = z.shape
    best, best_errors = None, None
    callback = reports.run("trial", goal=("change", _TRIAL_TOL))
    with thread_limits(n_threads):
        for by_distance in (False, True)[: 1 + (p >= _ORDERED)]:
            # The target by distance is an estimate itself, and from a strong one there is no way back: its trials
            # go from the best fit so far up.
            rows, lowest = [None] * len(folds) if best is None else list(best[1]), None
            strengths = _STRENGTHS[::-1] if by_distance or n >= _MANY * p else _STRENGTHS
            for strength in strengths:
                shrinkage = Shrinkage(max(strength * p, 1.0), by_distance)
                for k, fold in enumerate(folds):
                    name = f"{shrinkage} on fold {k}"
                    if (made := kept.get(name)) is not None:
                        rows[k] = GaussianRows(*made)
                        continue
                    tried, *end = _estimate(z, fold.visible, shrinkage, rows[k], _TRIAL_TOL, _TRIAL_ITER, callback)
                    if end[0] is Status.INTERRUPTED:
                        raise TrialInterrupted(_gaussian_fit(tried, z, fold.visible, 0.0, None, dtype, *end))
                    rows[k] = tried
                    kept.put(name, [tried.mean, tried.covariance])
                errors = held_out_errors(rows, z, folds)
                told = f"strength {shrinkage.strength:g}, by distance {by_distance}"
                reports.say(f"gaussian, {told}: {errors.mean():.4g}")
                if best is None or errors.mean() < best_errors.mean():
                    best, best_errors = (shrinkage, list(rows)), errors
                if lowest is not None and errors.mean() > lowest:
                    break
                lowest = errors.mean()
    return *best, best_errors


def choose_neighbours(z, models, errors, folds, reports, n_threads=None):
    """Return (share, squared errors) of the best correction of each fold's model by the nearest rows; 0 for none.

    Parameters
    ----------
    z, folds, reports
        As for :func:`choose_gaussian`.
    models : list of GaussianRows
        One a fold.
    errors : ndarray
        Theirs on the held-out entries: the correction must be clearly better.
    """
    best = 0.0, errors
    if not affordable(*z.shape):
        return best
    with thread_limits(n_threads):
        for share in SHARES:
            corrected = [NeighbourRows.of(rows, z, fold.visible, share) for rows, fold in zip(models, folds)]
            others = held_out_errors(corrected, z, folds)
            reports.say(f"gaussian, corrected by {share:g} of the neighbours' errors: {others.mean():.4g}")
            if clearly_better(others, best[1]):
                best = share, others
    return best


def held_out_errors(models, z, folds):
    """Return the squared errors of each model on its fold's entries, folded in from the rest of their rows."""
    errors = []
    for rows, fold in zip(models, folds):
        touched, place = np.unique(fold.hidden[0], return_inverse=True)
        filled = rows.fill(z[touched], fold.visible[touched])
        errors.append((filled[place, fold.hidden[1]] - z[fold.hidden]) ** 2)
    return np.concatenate(errors)


def clearly_better(errors, others):
    """Whether paired squared errors are lower by more than a standard error of their mean difference."""
    difference = others - errors
    return bool(difference.mean() > np.sqrt(np.mean(difference**2) / len(difference)))
