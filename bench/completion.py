"""The paper's completion experiment: seconds and error of plain NumPy and of ``solve``, in one process.

Arora, Cohen, Hu and Luo 2019: n = 100, rank 5, ||W*||_F = n, 2000 entries, alpha = 1e-3, depth 3, stopped at a training
mean square of 1e-6. Rows: the paper's rule in plain NumPy, float64 with a dense masked residual; the same rule by
``solve`` from the same start, which must take the same steps; ``rule="auto"``, nothing tuned, from the same starts.

    python bench/completion.py [--seeds 3] [--depth 3] [--json FILE]

Times are CPU seconds of one thread; kernels are compiled before the clock starts.
"""

import argparse
import json
import platform
import time
import warnings
from pathlib import Path

import numpy as np

import fastdmf
from fastdmf.backend import thread_limits
from fastdmf.chain import Layout, initial_factors

N, RANK, ENTRIES, ALPHA, TARGET = 100, 5, 2000, 1e-3, 1e-6
LR, BETA, EPS = 1e-3, 0.99, 1e-4


def instance(seed):
    """Return W* and the observed rows and columns."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((N, RANK)) @ rng.standard_normal((RANK, N))
    truth *= N / np.linalg.norm(truth)
    return truth, *np.divmod(rng.choice(N * N, ENTRIES, replace=False), N)


def plain_numpy(truth, rows, cols, factors, max_iter=100_000):
    """Run the paper's rule with NumPy alone; return (evaluations, product)."""
    mask = np.zeros(truth.shape)
    mask[rows, cols] = 1
    factors = [w.copy() for w in factors]
    square = 0.0
    for t in range(1, max_iter + 1):
        products = [factors[0]]
        for w in factors[1:]:
            products.append(w @ products[-1])
        residual = mask * (products[-1] - truth)
        if np.sum(residual**2) / ENTRIES <= TARGET:
            return t, products[-1]
        back = 2 / ENTRIES * residual
        grads = [None] * len(factors)
        for j in range(len(factors) - 1, 0, -1):
            grads[j] = back @ products[j - 1].T
            back = factors[j].T @ back
        grads[0] = back
        square = BETA * square + (1 - BETA) * sum(np.sum(g**2) for g in grads)
        step = LR / (np.sqrt(square / (1 - BETA**t)) + EPS)
        for w, g in zip(factors, grads):
            w -= step * g
    return max_iter, products[-1]


def by_solve(truth, rows, cols, factors, rule):
    """Run ``solve`` from the same start; return (evaluations, product)."""
    mask = fastdmf.EntryMask(rows, cols, truth.shape)
    y = truth[rows, cols]
    solution = fastdmf.solve(
        mask, y, factors=factors, rule=rule, tol=TARGET * ENTRIES / np.sum(y**2), check_every=1, n_threads=1
    )
    return solution.n_eval, solution.matrix()


def main():
    """Print the table; append JSON lines if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of instances (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=3, help="depth (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to append the rows to, as JSON lines")
    args = parser.parse_args()
    layout = Layout((N,) * (args.depth + 1))
    methods = {
        "plain NumPy, paper's rule": plain_numpy,
        "solve, paper's rule": lambda *a: by_solve(*a, "group_rmsprop"),
        "solve, auto": lambda *a: by_solve(*a, "auto"),
    }
    results = {name: [] for name in methods}
    with warnings.catch_warnings(), thread_limits(1):
        warnings.simplefilter("ignore")
        warm = [*instance(0), initial_factors(layout, "gaussian", ALPHA, 0)]
        by_solve(*warm, "auto")
        for seed in range(args.seeds):
            truth, rows, cols = instance(seed)
            start = initial_factors(layout, "gaussian", ALPHA, seed + 1000)
            for name, method in methods.items():
                begin = time.process_time()
                count, product = method(truth, rows, cols, start)
                seconds = time.process_time() - begin
                error = np.sum((product - truth) ** 2) / np.sum(truth**2)
                results[name].append((seconds, count, error))
    base = np.median([r[0] for r in results["plain NumPy, paper's rule"]])
    print(f"depth {args.depth}, {args.seeds} instances, medians; {platform.machine()}, numpy {np.__version__}")
    print(f"{'method':<28}{'evaluations':>12}{'CPU s':>9}{'error':>10}{'NumPy / this':>14}")
    for name, rows in results.items():
        seconds, count, error = np.median(rows, axis=0)
        print(f"{name:<28}{count:>12.0f}{seconds:>9.3f}{error:>10.1e}{base / seconds:>14.1f}")
        if args.json:
            line = {"case": f"completion depth {args.depth}", "method": name, "seconds": seconds, "evaluations": count}
            line |= {"error": error, "ratio": base / seconds, "seeds": args.seeds, "version": fastdmf.__version__}
            with args.json.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
