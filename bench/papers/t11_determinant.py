"""Razin and Cohen 2020: a 2 x 2 completion whose every fit has determinant -1, from a start with a positive one.

Observed (1,2) = (2,1) = 1 and (2,2) = 0. Gradient flow keeps the sign of det W, so the free entry grows without bound
as the loss falls: |w_11| >= (1 - sqrt(2 l))^2 / sqrt(2 l) at loss l < 1/2, and every norm with it.
"""

import numpy as np

import fastdmf
from bench.papers.harness import Experiment, band, figure
from bench.papers.instances import balanced_factors
from fastdmf.rules import GradientDescent

TITLE = "a 2 x 2 matrix whose norms diverge while its rank falls to 1"
BOUND = "bound derived from det > 0"


def start(alpha, seed, depth=3):
    """Return balanced factors of alpha times a Gaussian matrix with positive determinant."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((2, 2))
    while np.linalg.det(matrix) <= 0:
        matrix = rng.standard_normal((2, 2))
    return balanced_factors(alpha * matrix, depth)


def run(quick):
    """Follow |w_11| against the loss."""
    result = Experiment()
    mask, y = fastdmf.EntryMask([0, 1, 1], [1, 0, 1], (2, 2)), np.array([1.0, 1.0, 0.0])
    alpha, final = (1e-3, 1e-2) if quick else (1e-6, 1e-4)
    levels = [level for level in (1e-1, 1e-2, 1e-3, 1e-4) if level >= final]
    slack, reached, determinants = [], {level: [] for level in levels}, []
    made, axes = figure(1)
    for seed in range(1 if quick else 3):
        logged = []

        def log(progress, logged=logged):
            w = np.linalg.multi_dot(progress.factors()[::-1])
            logged.append((progress.values["loss"], abs(w[0, 0]), np.linalg.det(w)))
            return progress.values["loss"] <= final

        options = {"loss": "sse/2", "rule": GradientDescent(lr=3e-3), "max_iter": 6_000_000, "check_every": 100}
        fastdmf.solve(mask, y, factors=start(alpha, seed), callback=log, tol=1e-12, **options)
        loss, entry, determinant = np.array(logged).T
        low = loss < 0.5
        root = np.sqrt(2 * loss[low])
        slack.append(np.min(entry[low] / ((1 - root) ** 2 / root)))
        determinants.append(determinant.min())
        for level in levels:
            below = loss <= level
            reached[level].append(entry[below][0] if below.any() else np.nan)
        axes[0].loglog(loss[low], entry[low], label=f"start {seed}")
    result.add("smallest |w_11| over its bound", slack, 1, np.inf, BOUND)
    result.add("smallest determinant on the way", determinants, 0, np.inf, "the flow keeps its sign")
    listed = {1e-1: 1.8, 1e-2: 6, 1e-3: 20, 1e-4: 70}
    for level in levels:
        if quick:
            limits = band("t11_quick", f"entry at loss {level:g}")
            result.add(f"|w_11| at loss {level:g}", reached[level], *limits, "plain.py")
        else:
            result.near(f"|w_11| at loss {level:g}", reached[level], listed[level], 0.2, "paper's figure, 20 %")
    grid = np.logspace(np.log10(final), np.log10(0.4), 50)
    axes[0].loglog(grid, (1 - np.sqrt(2 * grid)) ** 2 / np.sqrt(2 * grid), "k--", label="bound")
    axes[0].set(xlabel="loss", ylabel="$|w_{11}|$")
    axes[0].legend()
    result.figure = made
    return result
