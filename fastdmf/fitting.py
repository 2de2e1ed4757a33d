"""What the estimators share: checks of their settings, the descent on data of unit scale, its fitted attributes."""

import warnings
from contextlib import contextmanager
from numbers import Integral, Real

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from fastdmf.checks import check_number
from fastdmf.descent import solve
from fastdmf.engine import Solution, Status
from fastdmf.fit_parts import caller_level
from fastdmf.rules import as_rule

__all__ = [
    "GAIN",
    "check_settings",
    "descend",
    "draw_held_out",
    "effective_rank",
    "explain",
    "halves",
    "in_range",
    "matrix_attributes",
    "report",
    "split_svd",
    "start_factors",
    "thin_svd",
    "unit_scale",
]

# The gain of evidence an entry at which ``vbmf`` ends, and the tolerance of ``solve``, where none is asked for.
GAIN, _TOL = 5e-4, 1e-6


def check_settings(estimator, solvers=("auto", "descent")):
    """Check the settings that the solvers do not see; ``solvers`` is None for an estimator without that choice.

    Raises
    ------
    ValueError
        Naming the parameter.
    """
    if solvers is not None and estimator.solver not in solvers:
        raise ValueError(f"solver must be {' or '.join(map(repr, solvers))}, got {estimator.solver!r}")
    fraction = estimator.validation_fraction
    number = isinstance(fraction, Real) and not isinstance(fraction, bool)
    if not number or not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction must be a number in [0, 1), got {fraction!r}")
    verbose = estimator.verbose
    if not isinstance(verbose, (Integral, np.bool_)) or verbose < 0:
        raise ValueError(f"verbose must be an integer >= 0, got {verbose!r}")


@contextmanager
def explain(name):
    """Let the errors about entries that are not real numbers say which argument is meant and what to do."""
    try:
        yield
    except ValueError as error:
        if "Complex data" in str(error):
            raise ValueError(
                f"Complex data not supported: {name} must be real; pass real and imaginary parts apart"
            ) from None
        if "could not convert" in str(error) or "inhomogeneous" in str(error):
            raise ValueError(f"{name} must hold numbers ({error}): encode categories as numbers") from error
        raise
    except TypeError as error:
        if "parse data" in str(error):
            raise
        raise TypeError(f"{name} must hold real numbers: {error}") from error


def draw_held_out(fraction, m, rng):
    """Return sorted indices of held-out observations of ``m``; None when there are to be none.

    At least ten are drawn where that leaves four fifths for the fit: fewer cannot tell one stopping point from
    another.
    """
    count = min(max(round(fraction * m), min(10, m // 5)), m - 1)
    if fraction == 0 or count < 1:
        return None
    return np.sort(rng.permutation(m)[:count])


def unit_scale(values):
    """Return the root mean square of ``values`` in float64, free of overflow; 0 for zeros alone, inf with one inf."""
    largest = float(np.abs(values).max())
    if largest in (0, np.inf):
        return largest
    return largest * float(np.sqrt(np.mean(np.square(values / largest, dtype=np.float64))))


def in_range(bounds, dtype):
    """Return bounds of predictions in ``dtype``: infinite ones as they are, others no further than its largest number.

    Parameters
    ----------
    bounds : float or ndarray of float64
    dtype : numpy dtype
    """
    largest = float(np.finfo(dtype).max)
    return np.where(np.isinf(bounds), bounds, np.clip(bounds, -largest, largest)).astype(dtype)[()]


def start_factors(estimator, shape, unit, symmetric=False):
    """Return the last fit's factors in the scale of this one for a warm start, else None.

    Raises
    ------
    ValueError
        If they belong to another shape, depth or width than this fit asks for.
    """
    if not estimator.warm_start or not hasattr(estimator, "factors_") or unit == 0:
        return None
    factors = estimator.factors_
    ends = (len(factors[0]),) * 2 if symmetric else (factors[-1].shape[0], factors[0].shape[1])
    if ends != tuple(shape):
        raise ValueError(f"warm_start: the last fit's matrix was {ends}, this one is {tuple(shape)}; use a clone")
    depth = 2 if symmetric else len(factors)
    if estimator.depth not in (None, depth):
        raise ValueError(f"warm_start: the last fit had depth {depth}, depth={estimator.depth!r} is asked; use a clone")
    inner = (factors[0].shape[1],) if symmetric else tuple(w.shape[0] for w in factors[:-1])
    asked = (estimator.width,) * len(inner) if np.ndim(estimator.width) == 0 else tuple(estimator.width)
    if estimator.width is not None and asked != inner:
        raise ValueError(f"warm_start: the last fit had width {inner}, width={estimator.width!r} is asked; use a clone")
    return [w / unit ** (1 / depth) for w in factors]


def descend(
    estimator,
    parts,
    operator,
    y,
    *,
    suffix="",
    fitted=None,
    depth,
    width,
    held_out,
    start,
    init_scale,
    seed,
    symmetric=False,
    weights=None,
    elementwise_loss="squared",
):
    """Run ``solve`` with the estimator's settings; an unsuccessful end is left to :func:`report`.

    Parameters
    ----------
    estimator : estimator
    parts : Parts
        Of the fit, of which this is the one with the role ``suffix``.
    fitted : callable, optional
        As for :meth:`fastdmf.progress.Reports.run`.
    operator, y, depth, width, start, init_scale, seed, symmetric, weights, elementwise_loss
        As for :func:`fastdmf.solve`.
    held_out : array of int or None
    """
    tol = _TOL if estimator.tol is None else estimator.tol
    check_number("tol", tol, 0)
    rule = as_rule(estimator.rule)
    told = parts.options(
        f"depth {'default' if depth is None else depth}",
        suffix,
        goal=("loss", tol * float(np.mean(np.square(y, dtype=np.float64)))),
        check_every=rule.check_every,
        fitted=fitted,
    )
    return solve(
        operator,
        y,
        weights=weights,
        depth=depth,
        width=width,
        factors=start,
        symmetric=symmetric,
        elementwise_loss=elementwise_loss,
        init_scale=init_scale,
        rule=rule,
        max_iter=estimator.max_iter,
        tol=tol,
        validation=held_out,
        patience=estimator.patience,
        **told,
        device=estimator.device,
        n_threads=estimator.n_threads,
        dtype=y.dtype,
        random_state=seed,
        on_failure="ignore",
    )


def matrix_attributes(factors, unit=1.0, symmetric=False):
    """Return the fitted attributes of an estimator whose model is one matrix, name -> value.

    Parameters
    ----------
    factors : list of ndarray
        [W_1, ..., W_N], or [U] of a ``symmetric`` chain.
    unit : float
        Of the data: the factors take it in equal parts, which keeps them balanced.
    symmetric : bool
    """
    depth = 2 if symmetric else len(factors)
    factors = [w * w.dtype.type(unit ** (1 / depth)) for w in factors]
    solution = Solution(factors, None, 0, 0, {}, symmetric)
    _, s, vt = thin_svd(*solution.halves())
    return {
        "factors_": factors,
        "depth_": depth,
        "matrix_": solution.matrix(),
        "components_": vt,
        "singular_values_": s,
        "effective_rank_": effective_rank(s),
    }


def report(estimator, solution):
    """Set what every estimator tells of its fit, and warn if the solver did not end well."""
    estimator.n_iter_ = solution.n_iter
    estimator.status_ = solution.status
    estimator.history_ = solution.history
    estimator.device_ = solution.device
    # With held-out data the best point on the path is returned, and a descent that stalls has no more path to offer.
    settled = solution.status is Status.STALLED and "validation" in solution.history
    if not (solution.status.success or settled):
        warnings.warn(
            f"{type(estimator).__name__}: {solution.status.name}: {solution.status.sentence}",
            ConvergenceWarning,
            stacklevel=caller_level(),
        )


def halves(factors):
    """Return (W_N, W_{N-1} ... W_1)."""
    right = factors[0]
    for w in factors[1:-1]:
        right = w @ right
    return factors[-1], right


def split_svd(left, right, depth, dtype):
    """Return ``left @ right`` as balanced factors [W_1, ..., W_depth], the inner ones diag(s^(1/depth))."""
    u, s, vt = thin_svd(left, right)
    root = s ** (1 / depth)
    factors = [root[:, None] * vt, *[np.diag(root)] * (depth - 2), u * root]
    return [np.ascontiguousarray(w, dtype) for w in factors]


def thin_svd(left, right):
    """Return U, s, V^T of ``left @ right`` in float64, through QR of the two sides where they are thin.

    Parameters
    ----------
    left, right : ndarray of shape (n1, h) and (h, n2)

    Returns
    -------
    u, s, vt : ndarray of shape (n1, k), (k,) and (k, n2), k = min(n1, h, n2)
    """
    left, right = left.astype(np.float64), right.astype(np.float64)
    n1, h = left.shape
    n2 = right.shape[1]
    if 2 * h >= min(n1, n2):
        u, s, vt = np.linalg.svd(left @ right, full_matrices=False)
    else:
        ql, rl = np.linalg.qr(left)
        qr, rr = np.linalg.qr(right.T)
        u, s, vt = np.linalg.svd(rl @ rr.T)
        u, vt = ql @ u, vt @ qr.T
    k = min(n1, h, n2)
    return u[:, :k], s[:k], vt[:k]


def effective_rank(s):
    """Return exp(-sum p log p), p = s / sum s, the entropy's number of singular values; 0 for zeros alone."""
    share = s[s > 0] / s.sum() if s.any() else s[:0]
    return float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0
