"""The stability limit of a gradient step at a balanced exact fit of 0.5 ||W - W*||_F^2: 2 / (N s1^(2 - 2/N))."""

import numpy as np

import fastdmf
from bench.papers.harness import Experiment
from fastdmf.rules import GradientDescent
from fastdmf.theory import stability_limit

TITLE = "stability limit of gradient descent, depths 1 to 4"
ORIGIN = "identity: top eigenvalue of the Hessian"


def run(quick):
    """Nudge an exact fit and watch the loss with 0.97 and 1.03 of the limit."""
    result, s1, steps = Experiment(), 1.7, 300 if quick else 2000
    mask = fastdmf.EntryMask([0], [0], (1, 1))
    below, above = [], []
    for depth in (1, 2, 3, 4):
        root = np.array([[s1 ** (1 / depth)]])
        start = [root * (1 + 1e-6)] + [root] * (depth - 1)
        for share, out in ((0.97, below), (1.03, above)):
            rule = GradientDescent(lr=share * stability_limit(depth, s1))
            options = {"loss": "sse/2", "max_iter": steps, "check_every": 1, "tol": 1e-300, "on_failure": "ignore"}
            loss = fastdmf.solve(mask, np.array([s1]), factors=start, rule=rule, **options).history["loss"]
            out.append((loss[-1] if share < 1 else loss.max()) / loss[0])
    for depth, value in zip((1, 2, 3, 4), below):
        result.add(f"depth {depth}, 0.97 of the limit: last loss over the first", value, 0, 1e-4, ORIGIN)
    for depth, value in zip((1, 2, 3, 4), above):
        result.add(f"depth {depth}, 1.03 of the limit: largest loss over the first", value, 100, np.inf, ORIGIN)
    return result
