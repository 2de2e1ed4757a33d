"""Which solver a table is fitted by: the one that predicts its held-out entries best.

The full covariance and the variational fit compete on several folds; the winner is fitted again to all entries. The
descent joins where the table may be of exactly low rank, and recovery finishes what is.
"""

from dataclasses import dataclass, replace

import numpy as np

from fastdmf.checkpoint import digest
from fastdmf.covariance import TOL
from fastdmf.engine import Status
from fastdmf.fit_parts import Kept
from fastdmf.fitting import GAIN
from fastdmf.recovery import largest_rank
from fastdmf.row_fits import (
    TrialInterrupted,
    choose_gaussian,
    choose_neighbours,
    clearly_better,
    default_shrinkage,
    fit_gaussian,
    fit_variational,
    held_out_errors,
    make_folds,
)
from fastdmf.table_descent import WIDEST

__all__ = ["FEW_COLUMNS", "ChoiceSettings", "choose_fit"]

# Columns, or rows, up to which a matrix is a table of few variables: not suspected of exactly low rank.
FEW_COLUMNS = 30
# Columns up to which their full covariance competes (a step costs up to n p^3 / 4 flops), in all and for each row.
_NARROW, _NARROW_PER_ROW = 500, 4
# Exactly low-rank data are suspected where less than the first share of the variance is left at the held-out entries,
# or, in matrices of so few cells, more than the second.
_FITTED, _NOT_UNDERSTOOD, _SMALL = 1e-3, 0.1, 30_000
_FINISHED = 1e-9  # there are no more digits to win


@dataclass(frozen=True)
class ChoiceSettings:
    """What an estimator leaves to the choice and its rivals, under the names of its parameters.

    Attributes
    ----------
    solver : {"auto", "variational", "gaussian"}
        ``"auto"`` lets all compete; ``"gaussian"`` still has its shrinkage chosen by the held-out entries.
    depth, width : int or None
        With one of them given, the full covariance does not compete.
    max_iter : int or None
        Of every fit but the trials of the full covariance.
    device : str
    n_threads : int or None
    """

    solver: str
    depth: int | None
    width: int | None
    max_iter: int | None
    device: str
    n_threads: int | None


def choose_fit(settings, parts, z, seen, held_out, dtype, *, seed, descent, recovery):
    """Return the :class:`RowFit` of the solver asked for, or of the one that predicts held-out entries best.

    Parameters
    ----------
    settings : ChoiceSettings
    parts : Parts
        Of the fit.
    z : ndarray of shape (n, p), float64
        The table in units of the fit, zeros in the holes, without empty columns.
    seen : ndarray of bool, shape (n, p)
    held_out : ndarray of int or None
        Indices of observed entries in row-major order. Without any there is no choice.
    dtype : numpy dtype
        Of the fit.
    seed : int
        Draws the starts and the further folds.
    descent : callable
        Returns the fit of the same table by descent, without the entries ``held_out``.
    recovery : callable
        Returns that of :func:`fastdmf.recover`; takes ``suffix`` and ``noise``.

    Raises
    ------
    TrialInterrupted
        On Ctrl-C before there is a choice.
    """
    reports, n_threads = parts.reports, settings.n_threads
    title = f"depth {'default' if settings.depth is None else settings.depth}"
    gain = {"goal": ("evidence", GAIN)}
    common = {"depth": settings.depth, "max_iter": settings.max_iter, "n_threads": n_threads}
    variational = common | {"width": settings.width, "device": settings.device, "random_state": seed}
    covariance, errors = {"shrinkage": default_shrinkage(z.shape[1])}, None
    solver = _first_solver(settings, z.shape)
    if held_out is not None and (settings.solver == "auto" or solver == "gaussian"):
        folds = make_folds(seen, held_out, seed)
        if solver == "gaussian":
            kept = Kept(parts.file(".covariances"), lambda: digest("covariances", z, seen, held_out, seed))
            try:
                shrinkage, models, errors = choose_gaussian(z, folds, reports, kept, dtype, n_threads)
            finally:
                kept.write()
            share, errors = choose_neighbours(z, models, errors, folds, reports, n_threads)
            covariance = {"shrinkage": shrinkage, "share": share, "start": models[0]}
        if settings.solver == "auto":
            told = parts.options(title, **gain)
            trials = []
            for k, fold in enumerate(folds):
                told["checkpoint"] = parts.file(f".fold{k}")
                trials.append(fit_variational(z, fold.visible, dtype, **variational, **told))
                if trials[-1].status is Status.INTERRUPTED:
                    raise TrialInterrupted(trials[-1])
            others = held_out_errors([trial.rows for trial in trials], z, folds)
            reports.say(f"variational: held out {others.mean():.4g}")
            if errors is None or clearly_better(others, errors):
                solver, errors = "variational", others
            if _may_be_exact(z, seen, errors):
                fit = _fit_low_rank(reports, z, seen, folds[0], errors, descent, recovery)
                if fit is not None:
                    return fit
    if solver == "gaussian":
        told = parts.options("gaussian", goal=("change", TOL))
        return fit_gaussian(z, seen, dtype=dtype, **covariance, **common, **told)
    return fit_variational(z, seen, dtype, **variational, **parts.options(title, **gain))


def _first_solver(settings, shape):
    """Return the solver asked for, or the one that the others must be clearly better than for a table (n, p)."""
    if settings.solver != "auto":
        return settings.solver
    n, p = shape
    narrow = p <= min(_NARROW, _NARROW_PER_ROW * n)
    return "gaussian" if narrow and settings.depth is None and settings.width is None else "variational"


def _may_be_exact(z, seen, errors):
    """Whether the matrix may be of exactly low rank: all but fitted, or small and not understood.

    Exact recovery from few entries is the descent's own domain; where it predicts held-out entries to a few
    percent, ``recover`` finishes the digits.
    """
    share = errors.mean() / max(np.var(z[seen]), 1e-300)
    few = z.size <= _SMALL and min(z.shape) > FEW_COLUMNS and share > _NOT_UNDERSTOOD
    return few or (_FINISHED < share < _FITTED and max(z.shape) <= WIDEST)


def _fit_low_rank(reports, z, seen, fold, errors, descent, recovery):
    """Return the fit by recovery if that is exact, else by descent if that is clearly better than ``errors``, or None.

    Parameters are those of :func:`choose_fit`, and the fold of its held-out entries with the squared errors of the best
    fit so far, of which those on this fold are the first.
    """
    fit = descent()
    if fit.status is Status.INTERRUPTED:
        raise TrialInterrupted(fit)
    others = held_out_errors([fit.rows], z, [fold])
    reports.say(f"descent: held out {others.mean():.4g}")
    enough = largest_rank((int(seen.any(axis=1).sum()), z.shape[1]), int(seen.sum()))
    if enough and min(others.mean(), errors.mean()) < _FITTED * np.var(z[seen]):
        exact = recovery(suffix=".recovery", noise=False)
        reports.say(f"recovery: {exact.status.name}")
        if exact.status is Status.EXACT:
            return exact
        if exact.status is Status.INTERRUPTED:
            raise TrialInterrupted(replace(fit, status=Status.INTERRUPTED))
    return fit if clearly_better(others, errors[: len(others)]) else None
