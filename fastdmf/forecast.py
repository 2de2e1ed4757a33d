"""What can be told of a run before it starts: settings with which it cannot do what is asked.

Every check returns sentences that name the numbers and the fix; ``solve`` warns with them. In a batch the worst slice
speaks for all.
"""

import numpy as np

from fastdmf.chain import imbalance
from fastdmf.masks import EntryMask
from fastdmf.rules import GradientDescent, Momentum, Nesterov
from fastdmf.symmetry import antisymmetric_share
from fastdmf.theory import determinant_sign, escape_iterations, loss_curvature, stability_limit

__all__ = ["forecast_data", "forecast_rule", "forecast_truth"]

# Learning rate over the limit from which it counts as unstable: at depths 2 to 4, on masks (uniform, sparse, with
# power-law margins, positive) and Gaussian measurements, steps of half the limit to all of it were the longest stable
# ones, and none of 1.6 times the limit was (pytest tests/test_forecast.py -k unstable -s).
_UNSTABLE = 1.5
_POWER_STEPS = 8
# Below these it is rounding, also that of float32.
_ASYMMETRIC, _UNEQUAL, _NEGATIVE, _RANK, _BALANCED = 1e-6, 1e-6, 1e-6, 1e-6, 1e-4
_LARGEST_DETERMINANT = 64


# --- fixed steps -----------------------------------------------------------------------------------------------------


def forecast_rule(problem, rule, x, operator, weights, init_scale, max_iter):
    """Return what the data say about a fixed step: too long for stability, too short to leave the plateau.

    Parameters
    ----------
    problem : fastdmf.problem.Problem
    rule : Rule
        Only gradient descent, heavy ball and Nesterov's momentum have closed forms.
    x : ndarray of shape (B, D)
        The start, evaluated last.
    operator : Operator
    weights : ndarray of shape (1, m) or (B, m), or None
    init_scale : float or None
        None for factors that were given: their largest singular value stands for it.
    max_iter : int

    Returns
    -------
    list of str

    Notes
    -----
    Takes an evaluation at W = 0 and power steps there (the probes of 8 evaluations). ||G(0)||_2 is the drive of the
    leading mode, and over the mean curvature an estimate of s1 = ||W*||_2, once what the randomness of the
    measurements adds is taken off (:func:`_debiased`).
    """
    # The closed forms are of squared residuals alone.
    if type(rule) not in (GradientDescent, Momentum, Nesterov) or problem.bound.loss.name != "squared":
        return []
    if problem.penalties or problem.l2 or max_iter == 0:
        return []
    batch, layout = len(x), problem.layout
    rng = np.random.default_rng(0)
    u, v = (problem.backend.asarray(np.tile(rng.standard_normal(n).astype(x.dtype), (batch, 1))) for n in layout.shape)
    start = np.full(batch, init_scale) if init_scale is not None else problem.leading_singular(v.copy(), _POWER_STEPS)
    zero, grad = (layout.allocate(batch, x.dtype, problem.xp) for _ in range(2))
    problem.evaluate(zero, grad)
    drive = 2 * problem.scale * problem.leading_gradient(u, v, _POWER_STEPS)
    kappa = np.broadcast_to(loss_curvature(operator, problem.loss, weights=weights, symmetric=layout.symmetric), batch)
    with np.errstate(over="ignore", invalid="ignore"):
        divisor = np.where(kappa > 0, kappa, 1)
        squares = 2 * problem.null_objective / divisor
        s1 = _debiased(drive / divisor, squares, _measurements(operator, weights), layout.shape)
    known = np.all([np.isfinite(a) & (a > 0) for a in (drive, kappa, start, s1)], axis=0)
    if not known.any():
        return []
    chosen = {"depth": layout.depth, "symmetric": layout.symmetric}
    beta = getattr(rule, "beta", 0.0)
    sentences = []
    limit = np.full(batch, np.inf)
    limit[known] = stability_limit(
        s1=s1[known], curvature=kappa[known], momentum=beta, nesterov=type(rule) is Nesterov, **chosen
    )
    b = int(np.argmin(limit))
    if rule.lr > _UNSTABLE * limit[b]:
        sentences.append(
            f"lr={rule.lr:g} is {rule.lr / limit[b]:.1f} times the limit of stability, about {limit[b]:.2g} for the "
            f"largest singular value that the data suggest, {s1[b]:.3g}, at depth {layout.depth} with "
            f"loss={problem.loss!r}{_of(b, batch)}: the loss will grow near a fit. Use lr={0.3 * limit[b]:.1g} or "
            "less, or rule='auto'"
        )
    steps = np.zeros(batch)
    level = np.maximum(0.5 * s1, start)
    steps[known] = escape_iterations(
        drive=drive[known],
        init_scale=start[known],
        lr=rule.lr,
        level=level[known],
        momentum=beta,
        **chosen,
    )
    b = int(np.argmax(steps))
    if steps[b] > max_iter:
        sentences.append(
            f"max_iter={max_iter} steps end on the plateau of the start: the leading mode takes about "
            f"{steps[b]:.2g} with lr={rule.lr:g} to grow from {start[b]:.2g} to half of {s1[b]:.3g} at depth "
            f"{layout.depth}, driven by a gradient of {drive[b]:.2g}{_of(b, batch)}. Raise max_iter, lr (stable up to "
            f"about {limit[b]:.2g}) or init_scale, or use rule='auto'"
        )
    return sentences


def _measurements(operator, weights):
    """Return how many measurements of equal weight tell as much: (sum w)^2 / sum w^2, (1,) or (B,)."""
    if weights is None:
        return np.array([float(operator.size)])
    w = weights.astype(np.float64)
    return w.sum(axis=1) ** 2 / (w**2).sum(axis=1)


def _debiased(norm, squares, measurements, shape):
    """Return the largest singular value of W* from ``norm`` = ||A*(A(W*))||_2 over the mean curvature.

    That matrix is W* plus, from random measurements, independent entries of variance tau^2 = ||W*||_F^2 / m, which
    turn s1 into sqrt((s1^2 + n1 tau^2) (s1^2 + n2 tau^2)) / s1 (Benaych-Georges and Nadakuditi 2012, low-rank
    perturbations of rectangular Gaussian matrices): solved for s1. Where the noise hides it, ||W*||_F over the root of
    min(n1, n2) bounds it from below.
    """
    n1, n2 = shape
    size = np.sqrt(squares)
    # In units of ||W*||_F, so that no square overflows.
    middle = (norm / np.where(size > 0, size, 1)) ** 2 - (n1 + n2) / measurements
    inside = middle**2 - 4 * n1 * n2 / measurements**2
    visible = (middle > 0) & (inside > 0)
    s1 = np.sqrt(0.5 * (middle + np.sqrt(np.where(visible, inside, 0))), where=visible, out=np.zeros_like(norm))
    return size * np.maximum(s1, min(n1, n2) ** -0.5)


# --- the truth -------------------------------------------------------------------------------------------------------


def forecast_truth(layout, truth, factors):
    """Return why W cannot become the truth: too narrow, an impossible sign of its determinant or eigenvalues.

    Parameters
    ----------
    layout : fastdmf.chain.Layout
    truth : ndarray of shape (1, n1, n2) or (B, n1, n2), or None
    factors : list of ndarray of shape (B, d_j, d_{j-1})
        The start.

    Returns
    -------
    list of str
    """
    if truth is None:
        return []
    sentences = [_too_narrow(layout, truth)]
    if layout.symmetric:
        sentences.append(_negative(truth))
    else:
        sentences.append(_determinant(layout, truth, factors))
    return [sentence for sentence in sentences if sentence]


def _too_narrow(layout, truth):
    inner = layout.dims[1:-1]
    if not inner or min(inner) >= min(layout.shape):
        return None
    width = min(inner)
    # A sketch first: most truths fit, and their rank need not be known.
    sketch = np.linalg.svd(truth @ np.random.default_rng(0).standard_normal((layout.shape[1], width + 1)), False)[1]
    wide = np.flatnonzero(sketch[:, width] > _RANK * sketch[:, 0])
    if not len(wide):
        return None
    spectra = np.linalg.svd(truth[wide], compute_uv=False)
    floors = np.sum(spectra[:, width:] ** 2, axis=1) / np.sum(spectra**2, axis=1)
    b = int(np.argmax(floors))
    rank = int((spectra[b] > _RANK * spectra[b, 0]).sum())
    return (
        f"width {width} is below the rank of truth, {rank}{_of(wide[b], len(truth))}: the error cannot fall below "
        f"{floors[b]:.2g}. Use width={rank} or more"
    )


def _negative(truth):
    """U U^T has no negative eigenvalues."""
    eigenvalues = np.linalg.eigvalsh(0.5 * (truth + truth.swapaxes(1, 2)))
    lowest, size = eigenvalues[:, 0], np.abs(eigenvalues).max(axis=1)
    b = int(np.argmin(lowest / size))
    if lowest[b] > -_NEGATIVE * size[b]:
        return None
    return (
        f"truth has negative eigenvalues, the lowest {lowest[b]:.3g}{_of(b, len(truth))}, and W = U U^T has none: "
        "use symmetric=False"
    )


def _determinant(layout, truth, factors):
    n, n2 = layout.shape
    if n != n2 or n > _LARGEST_DETERMINANT or layout.depth < 2 or min(layout.dims) < n:
        return None
    balanced = imbalance(factors) < _BALANCED
    s = np.linalg.svd(truth, compute_uv=False)
    regular = s[:, -1] > _RANK * s[:, 0]
    signs = determinant_sign(factors)
    conflict = balanced & regular & (signs * np.linalg.slogdet(truth)[0] < 0)
    if not conflict.any():
        return None
    b = int(np.argmax(conflict))
    of_truth, of_start = ("positive", "negative") if signs[b] < 0 else ("negative", "positive")
    kept = "finite steps cross late" if layout.depth == 2 else "finite steps hardly ever cross"
    return (
        f"det(truth) is {of_truth}, that of the start {of_start}{_of(b, len(conflict))}: gradient flow from a balanced "
        f"start keeps the sign, so W stays away from truth ({kept}). Start from factors whose product has the other "
        "sign, such as with one row of W_N negated"
    )


# --- symmetric chains ------------------------------------------------------------------------------------------------


def forecast_data(operator, y, weights):
    """Return what a symmetric W cannot see or meet in the measurements.

    Parameters
    ----------
    operator : Operator
        Of square matrices.
    y, weights : ndarray of shape (1, m) or (B, m); weights may be None

    Returns
    -------
    list of str
    """
    if isinstance(operator, EntryMask):
        return _unequal_entries(operator, y, weights)
    share = antisymmetric_share(operator)
    if share <= _ASYMMETRIC:
        return []
    return [
        f"{share:.0%} of the measurements' norm is antisymmetric, which a symmetric W never sees: measure with "
        "fastdmf.symmetric_part(operator)"
    ]


def _unequal_entries(operator, y, weights):
    n = operator.shape[0]
    rows, cols = operator.rows.astype(np.int64), operator.cols.astype(np.int64)
    place = rows * n + cols
    order = np.argsort(place)
    mirrored = cols * n + rows
    found = order[np.minimum(np.searchsorted(place[order], mirrored), len(order) - 1)]
    here = np.flatnonzero((place[found] == mirrored) & (rows < cols))
    there = found[here]
    if not len(here):
        return []
    gaps = np.abs(y[:, here].astype(np.float64) - y[:, there])
    if weights is not None:
        gaps = gaps * ((weights[:, here] > 0) & (weights[:, there] > 0))
    b, k = (int(i) for i in np.unravel_index(np.argmax(gaps), gaps.shape))
    if gaps[b, k] <= _UNEQUAL * np.abs(y).max():
        return []
    i, j = int(rows[here[k]]), int(cols[here[k]])
    return [
        f"y has entry ({i}, {j}) and entry ({j}, {i}) differ by {gaps[b, k]:.3g}, the largest such gap"
        f"{_of(b, len(gaps))}: a symmetric W meets their mean at best. Average such pairs, or use symmetric=False"
    ]


def _of(b, batch):
    """Name the slice where there are several."""
    return f" (slice {b})" if batch > 1 else ""
