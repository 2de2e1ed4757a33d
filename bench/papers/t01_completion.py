"""Arora, Cohen, Hu, Luo 2019: completion of a 100 x 100 matrix of rank 5 from 2000 entries, the paper's own rule."""

import time

import fastdmf
from bench.papers.harness import Experiment, band, figure
from bench.papers.instances import completion
from fastdmf.rules import GroupRMSprop

TITLE = "deep matrix completion: 2000 entries, depths 2, 3, 4, GroupRMSprop lr 1e-3, alpha 1e-3"
RULE = GroupRMSprop(lr=1e-3, beta=0.99, eps=1e-4)
OPTIONS = {"rule": RULE, "loss": "mse", "tol": 1e-6, "max_iter": 1_000_000, "check_every": 10}
FIGURE = "paper's figure 2 and runs of the authors' rule (papers' T1 band)"


def instance(seed):
    """Return the paper's instance of a seed."""
    return completion(seed)


def small(seed):
    """Return an instance that takes a second."""
    return completion(seed, 900, 50, 3)


def run(quick):
    """Sweep depths and seeds."""
    result, begin = Experiment(), time.perf_counter()
    depths = (2, 3) if quick else (2, 3, 4)
    table = fastdmf.sweep(small if quick else instance, seed=range(3), depth=depths, init_scale=1e-3, **OPTIONS)
    seconds = time.perf_counter() - begin
    for depth in depths:
        rows = table.where(depth=depth)
        if quick:
            for value in ("error", "effective_rank"):
                limits = band("t1_quick", f"depth {depth} {value}")
                result.add(f"depth {depth}: {value.replace('_', ' ')}", rows[value], *limits, "plain.py")
            continue
        error = (3e-2, 9e-2) if depth == 2 else (2e-5, 8e-5)
        rank = (8, 9.5) if depth == 2 else (4.9, 5.1)
        result.add(f"depth {depth}: reconstruction error", rows["error"], *error, FIGURE)
        result.add(f"depth {depth}: effective rank", rows["effective_rank"], *rank, FIGURE)
        result.add(f"depth {depth}: iterations", rows["n_iter"], *band("t1", f"depth {depth} iterations"), "plain.py")
    if not quick:
        result.add("seconds for the table", seconds, 0, 90, "two cores")
    made, axes = figure(1)
    for depth in depths:
        rows = table.where(depth=depth)
        axes[0].semilogy([depth] * len(rows), rows["error"], "o", label=f"depth {depth}")
    axes[0].set(xlabel="depth", ylabel="reconstruction error", xticks=depths)
    result.figure = made
    return result
