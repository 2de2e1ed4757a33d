"""Li, Luo, Lyu 2020: a 4 x 4 completion where the smallest nuclear norm and the smallest rank part ways.

Observed (1,3) = 1, (1,4) = (2,3) = R and their mirror images, R = 3. The rank-one completion v v^T, v = (1, R, 1, R),
has nuclear norm 2 + 2 R^2 = 20; the smallest is 4 R = 12.
"""

import numpy as np

import fastdmf
from bench.baselines import greedy_low_rank
from bench.papers.harness import Experiment, band, figure
from fastdmf.rules import GradientDescent

TITLE = "4 x 4 counterexample to the nuclear-norm conjecture"
LISTED = {(2, 1e-1): 12.17, (2, 1e-4): 13.36, (2, 1e-8): 15.71, (2, 1e-12): 17.97}
LISTED |= {(3, 1e-1): 15.77, (3, 1e-2): 19.49, (3, 1e-3): 19.97}
R = 3.0


def problem():
    """Return (mask, y), both halves of the symmetric matrix observed."""
    rows, cols = np.array([0, 0, 1, 2, 3, 2]), np.array([2, 3, 2, 0, 0, 1])
    return fastdmf.EntryMask(rows, cols, (4, 4)), np.array([1, R, R, 1, R, R])


def nuclear_norm(depth, alpha, seed):
    """Fit from a start of end-to-end scale alpha; return the nuclear norm of the result."""
    mask, y = problem()
    u = np.random.default_rng(seed).standard_normal((4, 4)) / 2 * np.sqrt(alpha)
    options = {"loss": "sse", "max_iter": 200_000, "check_every": 100, "tol": 1e-12, "on_failure": "ignore"}
    if depth == 2:
        solution = fastdmf.solve(mask, y, symmetric=True, factors=[u], rule=GradientDescent(lr=5e-3), **options)
    else:
        lam, q = np.linalg.eigh(u @ u.T)
        root = (q * np.maximum(lam, 0) ** (1 / depth)) @ q.T
        solution = fastdmf.solve(mask, y, factors=[root] * depth, rule=GradientDescent(lr=2e-3), **options)
    return solution.singular_values().sum()


def run(quick):
    """Nuclear norms at several scales and depths; the greedy path finds the rank-one completion."""
    result = Experiment()
    cases = [case for case in LISTED if not quick or case in ((2, 1e-1), (2, 1e-4), (3, 1e-1), (3, 1e-2))]
    norms = {case: [nuclear_norm(*case, seed) for seed in range(3)] for case in cases}
    for (depth, alpha), values in norms.items():
        limits = band("t10", f"depth {depth} alpha {alpha:g} nuclear norm")
        result.add(f"depth {depth}, alpha {alpha:g}: nuclear norm", values, *limits, "plain.py")
    for depth in (2, 3):
        medians = [np.median(norms[case]) for case in cases if case[0] == depth]
        result.add(f"depth {depth}: smallest rise as alpha falls", np.diff(medians).min(), 0, np.inf, "monotone, text")
    greedy = greedy_low_rank(*problem())[-1]
    result.near(
        "greedy low-rank learning: nuclear norm", np.trace(greedy), 20, 1e-3, "2 + 2 R^2, the rank-one completion"
    )
    made, axes = figure(1)
    for depth in (2, 3):
        chosen = [case for case in cases if case[0] == depth]
        axes[0].semilogx([c[1] for c in chosen], [np.median(norms[c]) for c in chosen], "o-", label=f"depth {depth}")
    for level, text in ((12, "smallest nuclear norm"), (20, "rank one")):
        axes[0].axhline(level, color="0.5", linestyle=":")
        axes[0].text(1e-12, level, text, va="top" if level > 12 else "bottom", fontsize="small")
    axes[0].set(xlabel="init scale", ylabel="nuclear norm")
    axes[0].legend()
    result.figure = made
    return result
