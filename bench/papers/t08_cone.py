"""Li, Ma, Zhang 2018: projected gradient on the PSD cone against U U^T from a small start, rank 1, few measurements."""

import numpy as np

import fastdmf
from bench.baselines import psd_projected_gradient
from bench.papers.harness import Experiment, band, figure
from bench.papers.t07_symmetric import measurements, truth_of
from fastdmf.rules import GradientDescent

TITLE = "projected gradient on the PSD cone against U U^T, rank 1"
FIGURE = "paper's figure data"


def both(truth, count, steps, draw, dtype):
    """Return the relative errors of U U^T from 0.01 I and of the cone for one draw of the measurements."""
    d = len(truth)
    operator = measurements(count, d, np.random.default_rng([3, count, draw]), dtype)
    y = operator.apply(truth).astype(dtype)
    options = {"rule": GradientDescent(lr=0.0025), "loss": "mse", "max_iter": steps, "check_every": 500, "tol": 1e-6}
    start = [0.01 * np.eye(d)]
    solution = fastdmf.solve(operator, y, symmetric=True, factors=start, truth=truth, dtype=dtype, **options)
    x = psd_projected_gradient(operator, y, lr=0.0025, max_iter=steps, tol=1e-3)
    return np.sqrt(solution.history["error"][-1]), np.linalg.norm(x - truth) / np.linalg.norm(truth)


def run(quick):
    """Both methods for several numbers of measurements, the same step."""
    result = Experiment()
    d, steps, multiples = (30, 3000, (5, 15, 25)) if quick else (100, 10_000, (5, 15, 25, 35))
    dtype = np.float64 if quick else np.float32
    truth = truth_of(d, 1, np.random.default_rng(1))
    cone, factored = [], []
    for multiple in multiples:
        found = [both(truth, multiple * d, steps, draw, dtype) for draw in range(1 if quick else 3)]
        for out, errors in zip((factored, cone), zip(*found)):
            out.append(errors)
    for k, multiple in enumerate(multiples):
        if quick:
            for name, values in (("cone", cone), ("factored", factored)):
                result.add(
                    f"m = {multiple} d: {name}", values[k], *band("t8_quick", f"m {multiple}d {name}"), "plain.py"
                )
            continue
        result.add(f"m = {multiple} d: U U^T", factored[k], 0, 0.05, FIGURE + " (.047 to .003)")
        if multiple < 25:
            result.add(f"m = {multiple} d: cone", cone[k], 0.3, 1.0, FIGURE)
    if not quick:
        result.near("m = 25 d: cone", cone[2], 0.36, 0.3, FIGURE + ", 30 %")
        result.add("m = 35 d: cone", cone[3], 0, 0.05, FIGURE + " (.023)")
    made, axes = figure(1)
    axes[0].semilogy(multiples, np.median(cone, axis=1), "o-", label="projected gradient on the cone")
    axes[0].semilogy(multiples, np.median(factored, axis=1), "s-", label="$U U^T$, small start")
    axes[0].set(xlabel="measurements / d", ylabel="relative error")
    axes[0].legend()
    result.figure = made
    return result
