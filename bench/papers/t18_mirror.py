"""Wu and Rebeschini 2021: mirror descent with the spectral entropy beside gradient descent on U U^T.

Where the gradient and W commute both are one flow. Elsewhere entries between eigenvalues a and b of W move by their
logarithmic mean under mirror descent, and by their arithmetic mean under U U^T: the smaller the start, the more.
"""

import numpy as np

import fastdmf
from bench.baselines import nuclear_norm
from bench.papers.harness import Experiment, band, figure
from fastdmf.rules import GradientDescent, MirrorDescent

TITLE = "mirror descent (spectral entropy) beside gradient descent on U U^T, n = 50, r = 5"
PAPER = "paper: the curves overlap"


def effective_rank(x):
    """Return exp of the entropy of the normalised singular values."""
    s = np.linalg.svd(x, compute_uv=False)
    p = s[s > 0] / s.sum()
    return np.exp(-np.sum(p * np.log(p)))


def paths(operator, y, truth, alphas, steps):
    """Return (errors of both rules along the path (records, alphas), last matrices of both)."""
    n = len(truth)
    options = {"loss": "mse/2", "truth": truth, "max_iter": steps, "check_every": 50, "tol": 1e-300}
    options["on_failure"] = "ignore"
    start = np.stack([alpha * np.eye(n) for alpha in alphas])
    mirror = MirrorDescent(lr=1.0, potential="entropy")
    # Z - (eta/m) sum r_i A_i; its twin is U - (eta/4) (2/m) sum r_i A_i U.
    dual = fastdmf.solve(operator, y, depth=1, factors=[start], rule=mirror, **options)
    twin = fastdmf.solve(
        operator, y, symmetric=True, factors=[np.sqrt(start)], rule=GradientDescent(lr=0.25), **options
    )
    return [np.sqrt(s.history["error"]) for s in (dual, twin)], [s.matrix() for s in (dual, twin)]


def run(quick):
    """Both rules from several starts, with many and with few measurements."""
    result = Experiment()
    n, rank, steps = (20, 2, 2000) if quick else (50, 5, 5000)
    alphas = (1e-1, 1e-3, 1e-5) if quick else (1e-1, 1e-4, 1e-7, 1e-10)
    apart, falls, ranks = [], [], []
    for seed in range(1 if quick else 3):
        rng = np.random.default_rng(seed)
        u = rng.standard_normal((n, rank))
        truth = u @ u.T
        truth /= np.trace(truth)
        for count in (3 * n * rank, n * rank):
            g = rng.standard_normal((count, n, n))
            operator = fastdmf.GaussianDense((g + g.swapaxes(1, 2)) / 2)
            y = operator.apply(truth)
            errors, last = paths(operator, y, truth, alphas, steps)
            distances = np.abs(np.log10(errors[0][-1] / errors[1][-1]))
            apart.append(distances.max())
            if quick:
                for k, alpha in enumerate(alphas):
                    case = f"m {count // (n * rank)}nr alpha {alpha:g}"
                    low, high = band("t18_quick", f"{case} error")
                    result.add(f"{case}: error of U U^T", errors[1][-1, k], low, high, "plain.py")
                    _, high = band("t18_quick", f"{case} decades apart at the end")
                    result.add(f"{case}: decades apart at the end", distances[k], 0, high, "plain.py")
            if count == 3 * n * rank:
                falls.append(errors[0][-1, -1] / errors[0][-1, 0])
                curves = errors
            else:
                convex = effective_rank(nuclear_norm(operator, y).matrix)
                ranks.append([effective_rank(x[-1]) / convex for x in last])
    if not quick:
        result.add("largest distance of the last errors, decades", apart, 0, 0.1, PAPER)
    result.add("m = 3 n r: error, smallest over largest alpha", falls, 0, 0.1, "paper: error falls with alpha")
    for k, name in enumerate(("mirror descent", "U U^T")):
        values = np.array(ranks)[:, k]
        result.add(
            f"m = n r: effective rank of {name} over the convex one", values, 0, 1, "paper: below the convex one"
        )
    made, axes = figure(1)
    at = 50 * np.arange(len(curves[0]))
    for k, alpha in enumerate(alphas):
        axes[0].semilogy(at, curves[0][:, k], label=f"mirror, $\\alpha$ = {alpha:g}", color=f"C{k}")
        axes[0].semilogy(at, curves[1][:, k], "--", color="k", linewidth=0.8)
    axes[0].set(xlabel="step", ylabel="relative error", title="dashed: $U U^T$")
    axes[0].legend(fontsize="small")
    result.figure = made
    return result
