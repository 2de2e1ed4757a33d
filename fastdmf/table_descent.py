"""Descent and exact recovery of a table, and the distribution of its rows that their factors tell.

Both find a matrix; what fills the holes of other rows is a mean and a covariance. Those are the moments of the fitted
rows, with a noise variance beside them: that of the residual, or the one that predicts held-out entries best.
"""

import numpy as np

from fastdmf.engine import Status
from fastdmf.fitting import descend, halves, start_factors, thin_svd, unit_scale
from fastdmf.masks import EntryMask
from fastdmf.recovery import largest_rank, recover
from fastdmf.row_fits import RowFit
from fastdmf.row_models import LowRankRows

__all__ = ["WIDEST", "fit_descent", "fit_recovery"]

# The widest chain that is not asked for by name.
WIDEST = 500
# Depths that compete on the held-out entries where none is asked for. Noisy tables, images and traffic counts want 2,
# data of exactly low rank want 3.
_DEPTHS = (2, 3)
# Modes that together hold less than this share of the noise variance are left out of the fold-in.
_NEGLIGIBLE = 0.01
# Noise variances tried in the fold-in, in units of the held-out error, and the most rows that they are tried on.
_NOISE_GRID = np.logspace(-2, 2, 9)
_NOISE_ROWS = 500
# Share of the observed entries that recovery checks itself by where the estimator holds out none.
_VALIDATION = 0.05


def fit_descent(estimator, parts, z, seen, held_out, dtype, *, columns, seed):
    """Return the :class:`RowFit` of the descent on all but the held-out entries.

    Parameters
    ----------
    estimator : estimator
        With the parameters of the descent, of which ``fitting.descend`` reads most; ``depth`` None lets depths compete
        on the held-out entries. With ``warm_start`` its ``factors_`` are the start.
    parts : Parts
        Of the fit.
    z : ndarray of shape (n, p), float64
        The table in units of the fit, without empty columns; what stands in the holes is not read.
    seen : ndarray of bool, shape (n, p)
    held_out : ndarray of int or None
        Indices of observed entries in row-major order.
    dtype : numpy dtype
        Of the fit.
    columns : ndarray of bool, shape (n_features,)
        Which columns of the estimator's factors are those of ``z``.
    seed : int
        Draws the start.

    Raises
    ------
    ValueError
        If a setting of the descent is wrong, or the factors of a warm start are of another shape.
    """
    rows, cols = np.nonzero(seen)
    values = z[rows, cols]
    unit = unit_scale(values)
    start = start_factors(estimator, (len(z), len(columns)), unit)
    if start is not None:
        start[0] = np.ascontiguousarray(start[0][:, columns])
    entries = np.asarray(values / (unit or 1.0), dtype)
    solution = _descend_depths(estimator, parts, EntryMask(rows, cols, z.shape), entries, held_out, start, seed)
    factors = [w * w.dtype.type(unit ** (1 / len(solution.factors))) for w in solution.factors]
    blank = ~seen.any(axis=1)
    if blank.any():  # the loss never saw these rows: their means instead of what is left of the start
        factors[-1][blank] = factors[-1][~blank].mean(axis=0)
    known = slice(None) if held_out is None else held_out
    model = _rows_of_factors(factors, ~blank, values[known], rows[known], cols[known])
    if held_out is not None:
        model.noise = _best_noise(model, z, seen, rows[held_out], cols[held_out])
    return RowFit("descent", model, factors, solution.status, solution.n_iter, solution.history, solution.device)


def _descend_depths(estimator, parts, mask, y, held_out, start, seed):
    """Return the best solution over the depths that compete; an interrupt ends the competition."""
    depths = (estimator.depth,)
    if estimator.depth is None and held_out is not None and start is None and np.ndim(estimator.width) == 0:
        depths = _DEPTHS
    width = min(*mask.shape, WIDEST) if estimator.width is None else estimator.width
    best, lowest = None, np.inf
    for depth in depths:
        if depth is None and np.ndim(width):
            depth = len(width) + 1
        solution = descend(
            estimator,
            parts,
            mask,
            y,
            # Beside the variational fit that may win, one depth has a file of its own as well.
            suffix="" if len(depths) == 1 and estimator.solver == "descent" else f".depth{depth}",
            depth=depth,
            width=width,
            held_out=held_out,
            start=start,
            init_scale=estimator.init_scale,
            seed=seed,
        )
        error = 0.0 if held_out is None else np.nanmin(solution.history["validation"])
        if best is None or error < lowest:
            best, lowest = solution, error
        if solution.status is Status.INTERRUPTED:
            best.status = Status.INTERRUPTED
            break
    return best


def fit_recovery(parts, z, seen, dtype, *, suffix="", noise="auto", validation, device, n_threads, seed):
    """Return the :class:`RowFit` of :func:`fastdmf.recover` on the rows that hold anything.

    Parameters
    ----------
    parts, z, seen, dtype
        As for :func:`fit_descent`; the recovery itself is done in float64.
    suffix : str
        To the name of the checkpoint.
    noise, device, n_threads
        As for :func:`fastdmf.recover`.
    validation : float
        Share of the observed entries that the recovery is checked by; 0 is taken as 0.05.
    seed : int

    Raises
    ------
    ValueError
        If the observed entries are too few to recover anything, or all zero.
    """
    told = seen.any(axis=1)
    rows, cols = np.nonzero(seen[told])
    values, shape = z[told][rows, cols], (int(told.sum()), z.shape[1])
    if largest_rank(shape, len(values)) == 0 or not values.any():
        raise ValueError(
            f"X has {len(values)} observed entries, too few or all alike to recover {shape[0]} rows and {shape[1]} "
            "columns exactly: use solver='auto' or 'variational'"
        )
    solution = recover(
        EntryMask(rows, cols, shape),
        values,
        noise=noise,
        validation=validation or _VALIDATION,
        on_failure="ignore",
        **parts.options("recovery", suffix),
        device=device,
        n_threads=n_threads,
        random_state=seed,
    )
    right, left = solution.factors
    whole = np.empty((len(z), len(right)))
    whole[told], whole[~told] = left, left.mean(axis=0)
    factors = [right, whole]
    model = _rows_of_factors(factors, told, values, np.flatnonzero(told)[rows], cols)
    factors = [w.astype(dtype) for w in factors]
    return RowFit("recovery", model, factors, solution.status, solution.n_iter, solution.history, solution.device)


def _rows_of_factors(factors, told, z, rows, cols):
    """Return the mean and the covariance of the fitted rows ``told``, with the error at the given entries as noise."""
    left, right = (half.astype(np.float64) for half in halves(factors))
    residual = z - np.einsum("ij,ji->i", left[rows], right[:, cols])
    noise = float(np.mean(residual**2))
    left = left[told]
    middle = left.mean(axis=0)
    _, s, vt = thin_svd(left - middle, right)
    variances = s**2 / len(left)
    tail = np.cumsum(variances[::-1])[::-1] / right.shape[1]
    weighty = tail > _NEGLIGIBLE * noise
    loadings = (vt[weighty] * np.sqrt(variances[weighty])[:, None]).T.copy()
    # What rounding needs for the factorizations to exist, down to the grid's smallest.
    floor = np.finfo(np.float64).eps / _NOISE_GRID[0] * float(variances.sum())
    return LowRankRows(middle @ right, loadings, max(noise, floor), np.zeros(loadings.shape[1]))


def _best_noise(model, z, seen, rows, cols):
    """Return the noise variance that predicts the held-out entries best, folded in from the other entries."""
    tried = np.unique(rows)
    tried = tried[:: -(-len(tried) // _NOISE_ROWS)]
    chosen = np.isin(rows, tried)
    rows, cols = rows[chosen], cols[chosen]
    visible = seen.copy()
    visible[rows, cols] = False
    # The last one leaves next to nothing beside the mean.
    grid = model.noise * _NOISE_GRID
    grid = np.append(grid, 100 * max(grid[-1], float(np.sum(model.loadings**2))))
    position = np.searchsorted(tried, rows)
    truth = z[rows, cols] - model.mean[cols]
    errors = np.empty((len(grid), len(rows)))
    for start, gram, right in model.systems(z, visible, tried):
        here = (position >= start) & (position < start + len(gram))
        loadings = model.loadings[cols[here]]
        for k, noise in enumerate(grid):
            c = np.linalg.solve(gram + noise * np.eye(gram.shape[1]), right)[:, :, 0]
            predicted = np.einsum("ij,ij->i", loadings, c[position[here] - start])
            errors[k, here] = (predicted - truth[here]) ** 2
    # The largest noise variance that the held-out entries cannot tell from the best one (paired errors): a handful of
    # entries must not argue away the shrinkage towards the mean.
    excess = errors - errors[errors.sum(axis=1).argmin()]
    doubt = np.sqrt(np.mean(excess**2, axis=1) / len(rows))
    return float(grid[excess.mean(axis=1) <= doubt].max())
