"""Gissin, Shalev-Shwartz, Daniely 2019: incremental learning in sensing, modes arrive one by one."""

import numpy as np

import fastdmf
from bench.papers.harness import Experiment, band, figure
from fastdmf import SingularValuesDisplay
from fastdmf.rules import GradientDescent

TITLE = "incremental learning: W* = diag(12, 6, 4, 3), m = 1000, depths 1 to 3"
MODES = np.array([12.0, 6.0, 4.0, 3.0])
LISTED = {2: (240, 440, 600, 840), 3: (820, 1680, 2460, 3480)}
ORIGIN = "plain NumPy run, listed; 10 %"


def run(quick):
    """Run to loss 0.01 at every depth."""
    result = Experiment()
    n, count = 50, 1000
    truth = np.zeros((n, n))
    truth[range(4), range(4)] = MODES
    made, axes = figure(2)
    options = {"init": "identity", "init_scale": 1e-4, "loss": "mse", "check_every": 10, "track": "singular_values"}
    errors, halves = {}, {}
    for depth in (1, 2, 3):
        errors[depth], halves[depth] = [], []
        for seed in range(1 if quick else 3):
            operator = fastdmf.GaussianDense(np.random.default_rng(seed).standard_normal((count, n, n)))
            y = operator.apply(truth)
            stop = {"tol": 0.01 / np.mean(y**2), "max_iter": 20_000}
            rule = GradientDescent(lr=1e-3)
            solution = fastdmf.solve(operator, y, depth=depth, rule=rule, truth=truth, **stop, **options)
            s, at = solution.history["singular_values"], solution.history["iteration"]
            errors[depth].append(solution.history["error"][-1])
            halves[depth].append([at[np.argmax(s[:, r] > MODES[r] / 2)] for r in range(4)])
        if depth > 1:
            SingularValuesDisplay.from_solution(solution, truth=MODES).plot(ax=axes[depth - 2])
            axes[depth - 2].set_title(f"depth {depth}")
    for depth in (1, 2, 3):
        limits = band("t14", f"depth {depth} error")
        result.add(f"depth {depth}: relative squared error", errors[depth], *limits, "plain.py")
    for depth in (2, 3):
        for r in range(4):
            values = np.array(halves[depth])[:, r]
            result.near(f"depth {depth}: step at half height of mode {r + 1}", values, LISTED[depth][r], 0.1, ORIGIN)
    result.figure = made
    return result
