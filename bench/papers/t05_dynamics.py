"""Arora, Cohen, Hu, Luo 2019, figure 3: singular values along gradient descent from the identity, depths 1 to 3."""

import numpy as np

import fastdmf
from bench.papers.harness import Experiment, band, figure
from bench.papers.instances import completion
from fastdmf import SingularValuesDisplay
from fastdmf.rules import GradientDescent

TITLE = "singular-value dynamics: gradient descent lr 0.1, identity start alpha 1e-3"
FIGURE = "paper's figure 3, within 30 % (other instances)"
STEPS = {1: 30_000, 2: 40_000, 3: 40_000}


def run(quick):
    """Follow the ten leading singular values at every depth."""
    result = Experiment()
    n, rank, count = (50, 3, 900) if quick else (100, 5, 2000)
    made, axes = figure(3)
    options = {"init": "identity", "init_scale": 1e-3, "loss": "mse", "tol": 1e-12, "on_failure": "ignore"}
    options |= {"rule": GradientDescent(lr=0.1), "check_every": 100, "track": "singular_values"}
    for depth in (1, 2, 3):
        steps = STEPS[depth] // (2 if quick else 1)
        takes_off, tails, best, apart = [], [], [], []
        for seed in range(1 if quick else 3):
            mask, y, truth = completion(seed, count, n, rank)
            solution = fastdmf.solve(mask, y, depth=depth, truth=truth, max_iter=steps, **options)
            history, s = solution.history, solution.history["singular_values"]
            when = [history["iteration"][np.argmax(s[:, r] > 10)] if s[-1, r] > 10 else np.nan for r in range(rank)]
            takes_off.append(when[0])
            apart.append(np.sum(np.diff(when) > 0))
            tails.append(s[-1, rank])
            best.append(history["error"].min())
        key = "t5_quick" if quick else "t5"
        found = {"step at which s_1 passes 10": takes_off, "best error": best, f"s_{rank + 1} at the end": tails}
        for name, (quantity, values) in zip(("take-off", "best error", "tail"), found.items()):
            result.add(f"depth {depth}: {quantity}", values, *band(key, f"depth {depth} {name}"), "plain.py")
        if not quick and depth > 1:
            listed = {2: 4e3, 3: 8e3}[depth]
            result.near(f"depth {depth}: first take-off", takes_off, listed, 0.3, FIGURE)
        if not quick and depth == 3:
            result.add("depth 3: largest singular value beyond the rank", tails, 0, 1, "paper's figure 3: tail about 0")
            result.add("depth 3: modes that leave one after the other", apart, rank - 1, rank - 1, "paper's figure 3")
        true = np.linalg.svd(truth, compute_uv=False)[:rank]
        SingularValuesDisplay.from_solution(solution, truth=true).plot(ax=axes[depth - 1])
        axes[depth - 1].set_title(f"depth {depth}")
    result.figure = made
    return result
