"""Theorem 3 of Arora, Cohen, Hu, Luo 2019: ds_r/dt = -N s_r^(2 - 2/N) <G, u_r v_r^T> along a balanced flow."""

import numpy as np

import fastdmf
from bench.papers.harness import Experiment, figure
from bench.papers.instances import balanced_factors, completion, low_rank
from fastdmf.rules import GradientDescent
from fastdmf.theory import end_to_end_velocity, singular_value_velocity

TITLE = "theorem 3 and the end-to-end dynamics: finite differences converge at first order"
ORIGIN = "theorem 3, first order in eta"


def errors(mask, y, start, depth, lr):
    """Return the relative errors of both velocities after one step of gradient descent."""
    points = []
    options = {"loss": "mse/2", "rule": GradientDescent(lr=lr), "max_iter": 1, "check_every": 1, "tol": 1e-300}
    fastdmf.solve(mask, y, factors=start, callback=lambda p: points.append(p.factors()) or False, **options)
    before, after = (np.linalg.multi_dot(w[::-1]) if len(w) > 1 else w[0] for w in points)
    gradient = mask.adjoint(mask.apply(before) - y) / mask.size
    exact = singular_value_velocity(before, gradient, depth)
    values = [np.linalg.svd(w, compute_uv=False) for w in (before, after)]
    moved = (values[1] - values[0]) / lr
    velocity = end_to_end_velocity(before, gradient, depth)
    return (
        np.linalg.norm(moved - exact) / np.linalg.norm(exact),
        np.linalg.norm((after - before) / lr - velocity) / np.linalg.norm(velocity),
    )


def run(quick):
    """Halve the step three times at each depth."""
    result, n = Experiment(), 15 if quick else 40
    # Steps of the same length in every form: the gradient of mse/2 has the number of entries in its divisor.
    steps = (n * n // 2) / 2000 / 2.0 ** np.arange(4)
    made, axes = figure(1)
    for depth in (1, 2, 3, 4):
        found = []
        for seed in range(3):
            mask, y, _ = completion(seed, n * n // 2, n, 3)
            # A start of full rank with distinct singular values: theorem 3 needs simple ones.
            matrix = 0.3 * low_rank(n, n, np.random.default_rng(100 + seed))
            start = balanced_factors(matrix, depth)
            found.append([errors(mask, y, start, depth, lr) for lr in steps])
        found = np.array(found)
        slopes = -np.diff(np.log2(found), axis=1).mean(axis=1)
        result.add(f"depth {depth}: slope of the error of ds_r/dt", slopes[:, 0], 0.9, 1.1, ORIGIN)
        if depth > 1:  # at depth 1 both sides are the gradient itself
            result.add(f"depth {depth}: slope of the error of dW/dt", slopes[:, 1], 0.9, 1.1, ORIGIN)
        axes[0].loglog(steps, np.median(found[:, :, 0], axis=0), "o-", label=f"depth {depth}")
    axes[0].set(xlabel="step", ylabel="relative error of $\\dot s_r$")
    axes[0].set_xticks(steps, [f"{step:.3g}" for step in steps], minor=False)
    axes[0].set_xticks([], minor=True)
    axes[0].legend()
    result.figure = made
    return result
