"""Zhuo, Kwon, Ho, Caramanis 2021: U U^T with the exact and with a too large width, noiseless sensing."""

import numpy as np

import fastdmf
from bench.papers.harness import Experiment, figure
from bench.papers.instances import symmetric_gaussian
from fastdmf.rules import GradientDescent

TITLE = "over-specified width: linear convergence at k = r, C/t at k = r + 1"
ORIGIN = "paper (slope -1); plain NumPy run, listed, factor 3"


def run(quick):
    """Follow the spectral error at both widths."""
    result = Experiment()
    d, rank, count, longest = 20, 3, 200, 10_000 if quick else 100_000
    spectrum = np.array([1, 0.9, 0.8])
    at = [t for t in (300, 1000, 10_000, 100_000) if t <= longest]
    curves = {}
    for width in (3, 4):
        curves[width] = []
        for seed in range(1 if quick else 3):
            rng = np.random.default_rng(seed)
            q = np.linalg.qr(rng.standard_normal((d, rank)))[0]
            truth = (q * spectrum) @ q.T
            operator = fastdmf.GaussianDense(symmetric_gaussian(count, d, rng))
            y = operator.apply(truth)
            start = fastdmf.spectral_factors(operator, y, width, symmetric=True)
            errors = {}

            def spectral(progress, errors=errors, truth=truth):
                u = progress.factors()[0]
                errors[progress.iteration] = np.linalg.norm(u @ u.T - truth, 2)
                return False

            # F - 0.1 (1/n) sum r_i A_i F is a step of 0.05 on (1/2n) sum r_i^2.
            options = {"loss": "mse/2", "rule": GradientDescent(lr=0.05), "check_every": 100, "tol": 1e-300}
            steps = 1000 if width == 3 else longest
            fastdmf.solve(operator, y, symmetric=True, factors=start, max_iter=steps, callback=spectral, **options)
            curves[width].append(errors)
    values = {width: {t: [c[t] for c in curves[width]] for t in at if t in curves[width][0]} for width in curves}
    result.add("k = 3: spectral error after 1000 steps", values[3][1000], 0, 1e-13, "linear to machine precision")
    for t, listed in ((1000, 7.4e-3), (10_000, 8.1e-4), (100_000, 8.3e-5)):
        if t in values[4]:
            result.add(f"k = 4: spectral error after {t} steps", values[4][t], listed / 3, listed * 3, ORIGIN)
    slope = np.log10(np.array(values[4][longest]) / np.array(values[4][longest // 10]))
    result.add("k = 4: slope of the last decade", slope, -1.1, -0.9, ORIGIN)
    made, axes = figure(1)
    for width, runs in curves.items():
        steps = np.array(list(runs[0]))[1:]
        axes[0].loglog(steps, np.median([[c[t] for t in steps] for c in runs], axis=0), label=f"width {width}")
    axes[0].set(xlabel="step", ylabel="spectral error")
    axes[0].legend()
    result.figure = made
    return result
