"""Escape from the plateau: a scalar chain on 0.5 (s - 1)^2 from s = alpha, iterations until s = 0.5."""

import numpy as np

import fastdmf
from bench.papers.harness import Experiment
from fastdmf.rules import GradientDescent

TITLE = "escape from a small start, scalar chain, step 1e-2"
COUNTS = {
    2: (230, 346, 462, 578, 693),
    3: (377, 916, 2071, 4559, 9918),
    4: (469, 1554, 4975, 15788, 49977),
}
ALPHAS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def run(quick):
    """Count steps for every depth and start."""
    result = Experiment()
    mask = fastdmf.EntryMask([0], [0], (1, 1))
    for depth, counts in COUNTS.items():
        for alpha, count in list(zip(ALPHAS, counts))[: 3 if quick else 5]:
            start = [np.array([[alpha ** (1 / depth)]])] * depth
            reached = []

            def half(progress, reached=reached):
                return progress.values["loss"] <= 0.125 and not reached.append(progress.iteration)

            options = {"loss": "sse/2", "max_iter": 100_000, "check_every": 1, "callback": half}
            fastdmf.solve(mask, np.ones(1), factors=start, rule=GradientDescent(lr=1e-2), **options)
            quantity = f"depth {depth}, alpha {alpha:g}: iterations to s = 0.5"
            result.near(quantity, reached[0], count, 0.01, "listed count, 1 %")
    return result
