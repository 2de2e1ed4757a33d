"""The basis of the hidden layers: rules with scalar coefficients do not see it, Adam does."""

import numpy as np

import fastdmf
from bench.papers.harness import Experiment
from bench.papers.instances import completion
from fastdmf.chain import Layout, initial_factors
from fastdmf.rules import Adam, Auto, GradientDescent, GroupRMSprop, Momentum, Nesterov

TITLE = "rotated hidden layers: the same end-to-end path, or not"
ORIGIN = "invariance of the product"
RULES = {
    "gd": GradientDescent(lr=8.0),
    "momentum": Momentum(lr=0.5),
    "nesterov": Nesterov(lr=0.5),
    "group_rmsprop": GroupRMSprop(lr=0.05),
    "auto": Auto(),
}


def rotated(factors, seed):
    """Return factors with the same product, every hidden layer turned by a random orthogonal matrix."""
    rng, out = np.random.default_rng(seed), [w.copy() for w in factors]
    for j in range(len(out) - 1):
        turn = np.linalg.qr(rng.standard_normal((len(out[j]),) * 2))[0]
        out[j], out[j + 1] = turn @ out[j], out[j + 1] @ turn.T
    return out


def run(quick):
    """Run every rule from both starts."""
    result, n = Experiment(), 40 if quick else 100
    seeds, steps = range(2 if quick else 5), 49
    for name, rule in [*RULES.items(), ("adam", Adam(lr=1e-2))]:
        distances = []
        for seed in seeds:
            mask, y, _ = completion(seed, n * n // 3, n, 3)
            start = initial_factors(Layout((n,) * 4), "gaussian", 1e-2, seed)
            options = {"rule": rule, "max_iter": 1 if name == "adam" else steps, "tol": 1e-300, "loss": "mse"}
            one, two = (fastdmf.solve(mask, y, factors=f, **options).matrix() for f in (start, rotated(start, seed)))
            distances.append(np.linalg.norm(one - two) / np.linalg.norm(one))
        if name == "adam":
            result.add("adam: distance after one step, relative", distances, 1e-3, np.inf, ORIGIN)
        else:
            result.add(f"{name}: distance after {steps} steps, relative", distances, 0, 1e-10, ORIGIN)
    return result
