"""When the PSD cone alone determines the matrix: accelerated projected gradient from random PSD starts, n = 20.

For symmetric Gaussian measurements the threshold is the statistical dimension n r - r (r - 1)/2 + (n - r)(n - r + 1)/4
(115 for r = 1, 133.5 for r = 3); with rank-one measurements the trace lies in their span, and far fewer do.
"""

import numpy as np

import fastdmf
from bench.baselines import psd_projected_gradient
from bench.papers.harness import Experiment, figure
from fastdmf.theory import uniqueness_threshold

TITLE = "uniqueness of PSD solutions around the statistical dimension"


def error(n, rank, count, seed, kind):
    """Return the relative error of the cone's solution from a random start."""
    rng = np.random.default_rng([seed, count, rank])
    u = rng.standard_normal((n, rank))
    truth = u @ u.T / np.sum(u**2)
    if kind == "gaussian":
        # Symmetric parts: rotation invariant, as the statistical dimension supposes.
        g = rng.standard_normal((count, n, n))
        operator = fastdmf.GaussianDense((g + g.swapaxes(1, 2)) / 2)
    else:
        a = rng.standard_normal((count, n))
        operator = fastdmf.GaussianDense(a[:, :, None] * a[:, None, :])
    v = rng.standard_normal((n, n))
    start = v @ v.T / np.sum(v**2)
    x = psd_projected_gradient(
        operator, operator.apply(truth), max_iter=20_000, tol=1e-12, accelerated=True, start=start
    )
    return np.linalg.norm(x - truth) / np.linalg.norm(truth)


def run(quick):
    """Medians on either side of each threshold."""
    result, seeds = Experiment(), range(15)
    n, made = 20, figure(1)
    for rank, at, above in ((1, 115, 127), (3, 134, 147)):
        threshold = uniqueness_threshold(n, rank)
        counts = (at - 55, at, above)
        found = {count: np.array([error(n, rank, count, seed, "gaussian") for seed in seeds]) for count in counts}
        name = f"r = {rank} (m* = {threshold:g})"
        result.add(f"{name}, m = {at - 55}: error", found[at - 55], 0.3, 2.0, "text: about 1 far below the threshold")
        share = np.mean(found[at] > 1e-3)
        result.add(f"{name}, m = {at}: share not unique", share, 0.1, 0.9, "the threshold: half of the instances")
        result.add(f"{name}, m = {above}: error", found[above], 0, 1e-6, "listed: 1e-9 and below")
        medians = [np.median(errors) for errors in found.values()]
        made[1][0].semilogy(np.array(counts) / threshold, medians, "o-", label=f"Gaussian, r = {rank}")
    errors = [error(n, 1, 50, seed, "rank one") for seed in seeds]
    result.add("rank-one measurements, r = 1, m = 50: error", errors, 0, 1e-6, "listed: 2e-8")
    made[1][0].set(xlabel="measurements over the threshold", ylabel="median relative error")
    made[1][0].legend()
    result.figure = made[0]
    return result
