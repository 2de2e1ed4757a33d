"""Li, Ma, Zhang 2018, simulations: W = U U^T with a full-width U from alpha I, m = 5 d r Gaussian measurements."""

import numpy as np

import fastdmf
from bench.papers.harness import Experiment, band, figure
from fastdmf.rules import GradientDescent

TITLE = "over-parametrised symmetric sensing: error after 1e4 steps against the start"
FIGURE = "paper's figure data, 30 %"
LISTED = {1.0: 3.14, 10**-0.5: 0.408, 0.1: 0.081, 10**-1.5: 0.0249, 0.01: 0.0099, 10**-2.5: 0.0043, 0.001: 0.0018}


def truth_of(d, rank, rng):
    """Return X* = U* U*^T with normalised Gaussian columns."""
    u = rng.standard_normal((d, rank))
    u /= np.linalg.norm(u, axis=0)
    return u @ u.T


def measurements(count, d, rng, dtype):
    """Return independent N(0, 1) matrices, of which U U^T sees the symmetric part alone."""
    a = rng.standard_normal((count, d, d)).astype(dtype)
    a += a.swapaxes(1, 2).copy()
    a *= 0.5
    return fastdmf.GaussianDense(a)


def errors(d, rank, steps, alphas, draw, dtype):
    """Return (train, test) of every start, and the history; all starts share one read of the measurements."""
    truth = truth_of(d, rank, np.random.default_rng(1))
    operator = measurements(5 * d * rank, d, np.random.default_rng([2, draw]), dtype)
    y = operator.apply(truth).astype(dtype)
    start = np.stack([alpha * np.eye(d) for alpha in alphas])
    # The true gradient of (1/m) sum r^2 with the paper's 0.0025: the factor that reproduces its figures.
    options = {"rule": GradientDescent(lr=0.0025), "loss": "mse", "max_iter": steps, "check_every": 200, "tol": 1e-30}
    solution = fastdmf.solve(
        operator, y, symmetric=True, factors=[start], truth=truth, on_failure="ignore", dtype=dtype, **options
    )
    test = np.sqrt(solution.history["error"])
    train = np.sqrt(solution.history["loss"] / np.mean(y.astype(float) ** 2))
    return train[-1], test[-1], solution.history["iteration"], test


def run(quick):
    """Three draws of the measurements for one truth."""
    result = Experiment()
    d, rank, steps, draws = (40, 2, 3000, 3) if quick else (100, 5, 10_000, 3)
    alphas = (1e-1, 1e-2, 1e-3) if quick else tuple(LISTED)
    runs = [errors(d, rank, steps, alphas, draw, np.float64 if quick else np.float32) for draw in range(draws)]
    train, test = (np.array([r[k] for r in runs]) for k in (0, 1))
    for k, alpha in enumerate(alphas):
        if quick:
            limits = band("t7_quick", f"alpha {alpha:g} test")
            result.add(f"alpha {alpha:.3g}: test error", test[:, k], *limits, "plain.py")
        else:
            result.near(f"alpha {alpha:.3g}: test error", test[:, k], LISTED[alpha], 0.3, FIGURE)
    if not quick:
        result.near("alpha 1: train error", train[:, 0], 6.4e-3, 0.3, FIGURE)
    made, axes = figure(1)
    for k, alpha in enumerate(alphas):
        axes[0].loglog(runs[0][2][1:], runs[0][3][1:, k], label=f"$\\alpha$ = {alpha:.2g}")
    axes[0].set(xlabel="step", ylabel="relative test error")
    axes[0].legend(fontsize="small")
    result.figure = made
    return result
