"""Zhang, Fattahi, Zhang 2021: preconditioned gradient descent keeps a linear rate at a too large width."""

import numpy as np

import fastdmf
from bench.papers.harness import Experiment, figure
from fastdmf.rules import GradientDescent, ScaledGD

TITLE = "PrecGD: n = 100, r* = 2, r = 4, m = 1200, step 1e-5"
ORIGIN = "plain NumPy run, listed"


def run(quick):
    """Follow both rules from the same start at two condition numbers."""
    result = Experiment()
    n, rank, width = (40, 2, 4) if quick else (100, 2, 4)
    count = 3 * n * width
    # The step is in units of sum r^2, which grows with the number of measurements.
    lr = 1e-5 * 1200 / count
    made, axes = figure(1)
    for kappa in (1, 5):
        found = {"PrecGD": [], "gd": []}
        for seed in range(1 if quick else 3):
            rng = np.random.default_rng(seed)
            q = np.linalg.qr(rng.standard_normal((n, rank)))[0]
            z = q * np.sqrt([1, 1 / kappa])
            truth = z @ z.T
            # U U^T sees the symmetric part alone, so that the mean squared residual estimates ||U U^T - M*||_F^2.
            operator = fastdmf.GaussianDense(rng.standard_normal((count, n, n)))
            y = operator.apply(truth)
            start = np.hstack([z, np.zeros((n, width - rank))]) + 1e-2 * rng.standard_normal((n, width))
            options = {"symmetric": True, "factors": [start], "loss": "sse", "truth": truth, "max_iter": 400}
            options |= {"check_every": 100, "tol": 1e-300, "on_failure": "ignore"}
            for name, rule in (("PrecGD", ScaledGD(lr=lr, damping="loss")), ("gd", GradientDescent(lr=lr))):
                solution = fastdmf.solve(operator, y, rule=rule, **options)
                found[name].append(np.sqrt(solution.history["error"] * np.sum(truth**2)))
        rate = [(e[-1] / e[1]) ** (1 / 3) for e in found["PrecGD"]]
        result.add(f"kappa {kappa}: PrecGD, factor of the error per 100 steps", rate, 0.2, 0.4, ORIGIN + ": .3")
        if not quick:
            last = [e[-1] for e in found["PrecGD"]]
            result.add(f"kappa {kappa}: PrecGD, error after 400 steps", last, 1e-4, 5e-4, ORIGIN + ": 2.8e-4, 2.3e-4")
            last = [e[-1] for e in found["gd"]]
            result.add(f"kappa {kappa}: gd, error after 400 steps", last, 6e-3, 2.4e-2, ORIGIN + ": 1.2e-2")
        for name, errors in found.items():
            axes[0].semilogy(100 * np.arange(5), errors[0], "o-", label=f"{name}, kappa {kappa}")
    axes[0].set(xlabel="step", ylabel="error (Frobenius)")
    axes[0].legend()
    result.figure = made
    return result
