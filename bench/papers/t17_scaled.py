"""Tong, Ma, Chi 2021: scaled gradient descent for completion takes as many steps at every condition number."""

import numpy as np

import fastdmf
from bench.papers.harness import Experiment, band, figure
from fastdmf.rules import GradientDescent, ScaledGD

TITLE = "ScaledGD: n = 1000, r = 10, p = 0.2, step 0.5, spectral start"
LEVELS = {1e-3: 16, 1e-6: 39, 1e-12: 92}
ORIGIN = "plain NumPy run, listed; 3 steps or 5 %"


def steps_to(levels, errors):
    """Return the first iteration at or below each level, infinite where it is not reached."""
    return [int(np.argmax(errors <= level)) if (errors <= level).any() else np.inf for level in levels]


def run(quick):
    """Count steps at three condition numbers."""
    result = Experiment()
    n, rank, share = (400, 3, 0.3) if quick else (1000, 10, 0.2)
    made, axes = figure(1)
    for kappa in (1, 5, 20):
        counts, slow = [], []
        for seed in range(1 if quick else 3):
            rng = np.random.default_rng(seed)
            u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for _ in range(2))
            s = np.linspace(1, 1 / kappa, rank)
            truth = (u * s) @ v.T
            rows, cols = np.nonzero(rng.random((n, n)) < share)
            mask, y = fastdmf.EntryMask(rows, cols, truth.shape), truth[rows, cols]
            start = fastdmf.spectral_factors(mask, y, rank)
            # (eta/p) Z R (R^T R)^-1 is a step of eta/p on sum r^2 / 2.
            options = {"factors": start, "loss": "sse/2", "truth": truth, "max_iter": 200, "check_every": 1}
            options |= {"tol": 1e-300, "on_failure": "ignore"}
            p = len(y) / n**2
            scaled = np.sqrt(fastdmf.solve(mask, y, rule=ScaledGD(lr=0.5 / p), **options).history["error"])
            plain = np.sqrt(fastdmf.solve(mask, y, rule=GradientDescent(lr=0.5 / p), **options).history["error"])
            counts.append(steps_to(LEVELS, scaled))
            slow.append(plain[-1])
            if seed == 0:
                axes[0].semilogy(scaled, label=f"ScaledGD, kappa {kappa}")
                axes[0].semilogy(plain, "--", label=f"gd, kappa {kappa}")
        counts = np.array(counts)
        for k, (level, listed) in enumerate(LEVELS.items()):
            quantity = f"kappa {kappa}: ScaledGD, steps to {level:g}"
            limits = band("t17_quick" if quick else "t17", f"kappa {kappa} steps to {level:g}")
            result.add(quantity, counts[:, k], *limits, "plain.py")
            if not quick:
                slack = max(3, 0.05 * listed)
                result.add(quantity, counts[:, k], listed - slack, listed + slack, ORIGIN)
        if kappa == 20 and not quick:
            result.add("kappa 20: gd, error after 200 steps", slow, 1e-2, 3e-2, "plain NumPy run, listed: 1.8e-2")
    axes[0].set(xlabel="step", ylabel="relative error")
    axes[0].legend(fontsize="small")
    result.figure = made
    return result
