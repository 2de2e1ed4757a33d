"""What a record of leading singular values costs: all of them by decomposition, or subspace iteration between records.

    python bench/records.py

Runs of gradient descent that record at every step, beside the same run that records nothing; seconds a record.
"""

import time

import numpy as np

import fastdmf
from fastdmf.rules import GradientDescent

CASES = [(100, 100, 3), (2000, 200, 2), (2000, 200, 3)]  # n, width, depth
STEPS = 25


def seconds(mask, y, width, depth, track):
    """Return the least of three runs."""
    options = {"rule": GradientDescent(lr=0.5), "max_iter": STEPS, "check_every": 1, "random_state": 0, "tol": 1e-12}
    spent = []
    for _ in range(3):
        begin = time.perf_counter()
        fastdmf.solve(mask, y, width=width, depth=depth, track=track, on_failure="ignore", **options)
        spent.append(time.perf_counter() - begin)
    return min(spent)


def main():
    """Print a line a case."""
    for n, width, depth in CASES:
        rng = np.random.default_rng(0)
        truth = rng.standard_normal((n, 5)) @ rng.standard_normal((5, n))
        rows, cols = np.divmod(rng.choice(n * n, 20 * n, replace=False), n)
        mask = fastdmf.EntryMask(rows, cols, (n, n))
        none, every, top = (
            seconds(mask, truth[rows, cols], width, depth, track)
            for track in ((), "singular_values", "top_singular_values")
        )
        costs = [1e3 * (spent - none) / (STEPS + 1) for spent in (every, top)]
        print(f"n = {n}, width {width}, depth {depth}: all {costs[0]:.2f} ms a record, the leading ten {costs[1]:.2f}")


if __name__ == "__main__":
    main()
