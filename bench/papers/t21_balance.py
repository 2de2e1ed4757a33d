"""Balancedness: D_j = W_{j+1}^T W_{j+1} - W_j W_j^T moves by exactly eta^2 (g_{j+1}^T g_{j+1} - g_j g_j^T) a step."""

import itertools

import numpy as np

import fastdmf
from bench.papers.harness import Experiment
from bench.papers.instances import completion, symmetric_gaussian
from fastdmf.rules import GradientDescent

TITLE = "conservation law of gradient descent, exact in eta^2; drift at a fixed time of first order"
ORIGIN = "identity (8.4); slope 1"


def gaps(factors):
    """Return the imbalances D_j."""
    return [above.T @ above - below @ below.T for below, above in itertools.pairwise(factors)]


def path(operator, y, start, lr, steps):
    """Return the factors before every step."""
    kept = []
    options = {"loss": "mse/2", "rule": GradientDescent(lr=lr), "max_iter": steps, "check_every": 1, "tol": 1e-300}
    fastdmf.solve(operator, y, factors=start, callback=lambda p: kept.append(p.factors()) or False, **options)
    return kept


def run(quick):
    """Check the identity with every operator, and the order of the drift."""
    result, rng, n = Experiment(), np.random.default_rng(0), 12 if quick else 30
    mask, y, truth = completion(0, 4 * n, n, 2)
    vectors = rng.standard_normal((6 * n, n))
    operators = {
        "mask": mask,
        "Gaussian": fastdmf.GaussianDense(symmetric_gaussian(6 * n, n, rng)),
        "rank one": fastdmf.RankOne(vectors),
        "seeded": fastdmf.GaussianSeeded(3, 6 * n, (n, n)),
    }
    start = [0.3 * rng.standard_normal((n, n)) for _ in range(4)]
    for name, operator in operators.items():
        y = operator.apply(truth) / n
        lr, worst = 1e-3, 0.0
        points = path(operator, y, start, lr, 20)
        for before, after in itertools.pairwise(points):
            grads = [(b - a) / lr for b, a in zip(before, after)]
            scale = sum(np.sum(w**2) for w in after)
            jumps = [g2.T @ g2 - g1 @ g1.T for g1, g2 in itertools.pairwise(grads)]
            for d0, d1, jump in zip(gaps(before), gaps(after), jumps):
                worst = max(worst, np.abs(d1 - d0 - lr**2 * jump).max() / scale)
        result.add(f"{name}: largest error of the identity, relative", worst, 0, 1e-12, ORIGIN)
    y, base = mask.apply(truth), [np.eye(n)] * 3
    drifts = []
    for halving in range(4):
        lr, steps = 0.1 / 2**halving, 50 * 2**halving
        final = path(mask, y, base, lr, steps)[-1]
        drifts.append(max(np.linalg.norm(d) for d in gaps(final)))
    slopes = -np.diff(np.log2(drifts))
    result.add("slope of the drift in eta", np.median(slopes), 0.95, 1.05, ORIGIN)
    return result
