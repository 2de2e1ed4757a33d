"""Low-rank fits of noisy data: the rank by held-out measurements, the penalty by the noise."""

import numpy as np

from fastdmf.continuation import Continuation, Schedule
from fastdmf.descent import solve
from fastdmf.tangent import LowRank, degrees_of_freedom, gauss_newton, thin_svd

__all__ = ["noisy_fit"]

_SCHEDULE = Schedule(end=0.02)
# Ridge on the matrix, in units of the mean curvature: some to tell the ranks apart, then a share of the noise variance
# of the chosen rank, relative to the data's mean square (1 would be the ridge of a Gaussian prior on the entries). A
# hundred held-out entries cannot choose it. The share was chosen on ten instances of bench/recovery.py's noise panel.
_SCAN = (0.001, 0.01, 0.1)
_FREE = 1e-7
_SHARE = 0.2
# The descent's stop was chosen on these very measurements, and it never sees them: it must be clearly better.
_BETTER = 0.9
_PATIENCE = 3  # ranks without a better one
_DESCENT_PATIENCE = 100  # evaluations: plateaus between two modes last longer than the default of 25
_STEPS, _CG, _TOL = 12, 200, 1e-12


def noisy_fit(data, max_rank, validation, rng):
    """Return the fit whose rank predicts held-out measurements best, its relative error, and its credit.

    Every rank is fitted from the truncated end of a continuation with three penalties, the best one again with a share
    of its noise variance, at last to all the data. The early-stopped descent is tried on the same measurements and
    kept where it is better on them: with many noisy unknowns its gradual bias serves better than any rank.

    Parameters
    ----------
    data : Measurements
    max_rank : int
    validation : float
        Fraction held out.
    rng : numpy.random.Generator

    Returns
    -------
    x : LowRank
    error : float
        sqrt(sum w r^2 / sum w y^2) over the held-out measurements.
    credible : bool
        Whether that is further below 1, the error of the zero matrix, than chance explains: two standard deviations of
        the mean square of that many Gaussian numbers.
    """
    held = data.operator.hold_out(validation, rng)
    train, test = data.restrict(np.setdiff1d(np.arange(data.operator.size), held)), data.restrict(held)
    if not train.y.any():
        n1, n2 = data.operator.shape
        return LowRank(data.xp.zeros((n1, 1)), np.zeros(1), data.xp.zeros((n2, 1))), 1.0, False
    path = Continuation(train, _SCHEDULE, rng)
    while not path.done:
        path.step()

    def fits(rank, penalties):
        x = path.x.truncated(rank)
        for penalty in sorted(penalties, reverse=True):
            x, _ = gauss_newton(train, x, _STEPS, _TOL, _CG, penalty=penalty)
            yield np.sqrt(test.loss(x)), penalty, x

    tried = []
    for rank in range(1, min(max_rank, path.x.rank) + 1):
        tried += fits(rank, _SCAN)
        best = min(tried, key=lambda fit: fit[0])[2].rank
        if rank == best + _PATIENCE:
            break
    rank = best
    ((_, _, free),) = fits(rank, (_FREE,))
    freedom = max(train.operator.size - degrees_of_freedom(train.operator.shape, rank), 1)
    noise = train.loss(free) * train.operator.size / freedom
    ((error, penalty, x),) = fits(rank, (_SHARE * noise,))

    settings = {"validation": held, "patience": _DESCENT_PATIENCE, "on_failure": "ignore", "device": data.backend.name}
    descent = solve(data.operator, data.y, weights=data.weights, dtype=float, random_state=0, **settings)
    data.n_eval += train.n_eval + descent.n_eval
    chance = np.sqrt(max(1 - 2 * np.sqrt(2 / len(held)), 0.25))
    other = thin_svd(*map(data.xp.asarray, descent.halves()))
    if (other_error := np.sqrt(test.loss(other))) < _BETTER * error:
        # Modes at the level of the rounding are none.
        return other.truncated(max(int((other.s > 1e-3 * other.s[0]).sum()), 1)), other_error, other_error < chance
    return gauss_newton(data, x, _STEPS, _TOL, _CG, penalty=penalty)[0], error, error < chance
