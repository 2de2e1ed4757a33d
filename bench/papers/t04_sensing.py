"""Arora, Cohen, Hu, Luo 2019: sensing, 2000 Gaussian measurements of a 100 x 100 matrix of rank 5."""

import time

import numpy as np

import fastdmf
from bench.baselines import nuclear_norm
from bench.papers.harness import Experiment, band, figure
from bench.papers.instances import low_rank, sensing
from bench.papers.t01_completion import OPTIONS
from fastdmf import ErrorDisplay

TITLE = "deep matrix sensing: 2000 measurements, depths 2 and 3 against the init scale"
FIGURE = "paper's figure, within a factor of 2 (other instances)"
LISTED = {1e-3: 3.8e-2, 1e-5: 4e-3, 1e-7: 4.5e-4}


def run(quick):
    """Sweep scales, depths and seeds over one set of measurements, which every slice of a batch shares."""
    result = Experiment()
    n, rank, count = (30, 2, 400) if quick else (100, 5, 2000)
    operator = sensing(count, n, np.float64 if quick else np.float32)

    def instance(seed):
        truth = low_rank(n, rank, np.random.default_rng(seed))
        y = operator.apply(truth)
        return operator, y.astype(operator.dtype), truth

    seeds, scales = range(3), (1e-3, 1e-5) if quick else tuple(LISTED)
    begin = time.perf_counter()
    three = fastdmf.sweep(instance, seed=seeds, depth=(3,), init_scale=(1e-3,), **OPTIONS)
    seconds = time.perf_counter() - begin
    two = fastdmf.sweep(instance, seed=seeds, depth=(2,), init_scale=scales, **OPTIONS)
    if quick:
        for depth, table, some in ((2, two, scales), (3, three, (1e-3,))):
            for scale in some:
                limits = band("t4_quick", f"depth {depth} alpha {scale:g} error")
                errors = table.where(init_scale=scale)["error"]
                result.add(f"depth {depth}, alpha {scale:g}: error", errors, *limits, "plain.py")
        return result
    for scale, listed in LISTED.items():
        errors = two.where(init_scale=scale)["error"]
        result.add(f"depth 2, alpha {scale:g}: error", errors, listed / 2, listed * 2, FIGURE)
    result.add("depth 3, alpha 0.001: error", three["error"], 8.5e-6 / 2, 2 * 1.7e-5, FIGURE)
    result.add("depth 3: effective rank", three["effective_rank"], 4.8, 5.15, "rank of the truth")
    result.add("depth 3, 3 seeds in one batch: seconds", seconds, 0, 360, "the authors' code takes an hour a run")
    errors, norms = [], []
    for seed in seeds:
        _, y, truth = instance(seed)
        convex = nuclear_norm(operator, y).matrix
        errors.append(np.sum((convex - truth) ** 2) / np.sum(truth**2))
        norms.append(np.linalg.norm(truth, "nuc") - np.linalg.norm(convex, "nuc"))
    result.add("smallest nuclear norm: error", errors, 7e-4 / 4, 4 * 7e-4, "paper's figure, within a factor of 4")
    result.add("nuclear norm of the truth less the smallest", norms, 0, np.inf, "the minimum is below")
    made, axes = figure(1)
    ErrorDisplay.from_table(two, x="init_scale", by="depth", value="error").plot(ax=axes[0])
    result.figure = made
    return result
