"""Evaluations and errors of ``rule="auto"`` on the papers' instances and, with ``--data``, on traffic counts.

Instances: T1 (n = 100, rank 5, 2000 entries), T2 (5000 entries), rect (80 x 200, rank 4, 2300 entries), sensing
(n = 50, rank 2, 500 Gaussian measurements); alpha = 1e-3, tol = 1e-6; median [maximum] over the seeds. Traffic: ten
per cent of the observed entries held out, patience 50; RMSE over the hidden entries of every seed.

    python bench/auto.py [--seeds 5] [--data ../shared/data] [--cosine 0 0.03 0.1]
"""

import argparse
import warnings
from pathlib import Path

import numpy as np

import fastdmf
from fastdmf import auto


def low_rank(n1, n2, rank, rng):
    """Return a matrix of the rank with unit mean square."""
    truth = rng.standard_normal((n1, rank)) @ rng.standard_normal((rank, n2))
    return truth * np.sqrt(n1 * n2) / np.linalg.norm(truth)


def completion(n1, n2, rank, count):
    """Return a maker of (truth, operator, y) from a seed."""

    def make(seed):
        rng = np.random.default_rng(seed)
        truth = low_rank(n1, n2, rank, rng)
        rows, cols = np.divmod(rng.choice(n1 * n2, count, replace=False), n2)
        return truth, fastdmf.EntryMask(rows, cols, truth.shape), truth[rows, cols]

    return make


def sensing(seed):
    """Return (truth, operator, y)."""
    rng = np.random.default_rng(seed)
    truth = low_rank(50, 50, 2, rng)
    operator = fastdmf.GaussianDense(rng.standard_normal((500, 50, 50)) / 50)
    return truth, operator, operator.apply(truth)


CASES = {
    "T1": completion(100, 100, 5, 2000),
    "T2": completion(100, 100, 5, 5000),
    "rect": completion(80, 200, 4, 2300),
    "sensing": sensing,
}


def traffic(matrix, hide, seed, depth):
    """Return the RMSE over hidden entries of a matrix whose zeros are unobserved."""
    rng = np.random.default_rng(seed)
    observed = matrix != 0
    hidden = observed & (rng.random(matrix.shape) < hide)
    rows, cols = np.nonzero(observed & ~hidden)
    y = matrix[rows, cols]
    unit = np.sqrt(np.mean(y**2))
    mask = fastdmf.EntryMask(rows, cols, matrix.shape)
    solution = fastdmf.solve(
        mask, y / unit, depth=depth, random_state=seed, validation=0.1, patience=50, max_iter=600, on_failure="ignore"
    )
    return np.sqrt(np.mean((unit * solution.matrix() - matrix)[hidden] ** 2))


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with traffic/hangzhou.npz and traffic/birmingham.npz")
    parser.add_argument("--cosine", type=float, nargs="+", default=[auto._COSINE], help="least cosine of a kept pair")
    args = parser.parse_args()
    warnings.simplefilter("error")
    for cosine in args.cosine:
        auto._COSINE = cosine
        print(f"least cosine {cosine:g}, {args.seeds} seeds")
        print(f"{'case':<9}{'depth':>6}{'evaluations':>16}{'error':>24}")
        for name, make in CASES.items():
            for depth in (2, 3, 4):
                counts, errors = [], []
                for seed in range(args.seeds):
                    truth, operator, y = make(seed)
                    solution = fastdmf.solve(
                        operator, y, depth=depth, random_state=seed + 100, truth=truth, on_failure="ignore"
                    )
                    counts.append(solution.n_eval)
                    errors.append(solution.history["error"][-1])
                evaluations = f"{np.median(counts):.0f} [{max(counts)}]"
                print(f"{name:<9}{depth:>6}{evaluations:>16}{np.median(errors):>14.1e} [{max(errors):.1e}]")
        for name in ("hangzhou", "birmingham") if args.data else ():
            with np.load(args.data / "traffic" / f"{name}.npz") as file:
                matrix = file["tensor"].reshape(len(file["tensor"]), -1).astype(np.float64)
            for hide in (0.2, 0.5):
                for depth in (2, 3):
                    rmse = " ".join(f"{traffic(matrix, hide, seed, depth):.0f}" for seed in range(args.seeds))
                    print(f"{name} {hide:.0%} hidden, depth {depth}: RMSE {rmse}")


if __name__ == "__main__":
    main()
