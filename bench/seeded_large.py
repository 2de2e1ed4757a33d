"""Gradient descent on measurements that would take 400 GB: seconds an evaluation and peak memory.

By default 100,000 Gaussian measurements y of a 1000 x 1000 matrix W* of rank 3 and norm 1, depth 3, float32, all
threads; ``--m 3000 --n 300`` takes a second. The start is spectral, the balanced factors of the best rank-3 fit of
A*(y) / m; loss and error must fall at every step.

    python bench/seeded_large.py [--m 100000] [--n 1000] [--steps 2] [--ensemble rademacher]
"""

import argparse
import resource
import time

import numba
import numpy as np

import fastdmf
from fastdmf.rules import GradientDescent

RANK, LR = 3, 0.25


def spectral(operator, y):
    """Return balanced factors W_1, W_2, W_3 whose product is the best fit of rank ``RANK`` to A*(y) / m."""
    u, s, vt = np.linalg.svd(operator.adjoint(y) / np.float32(operator.size), full_matrices=False)
    third = np.diag(np.cbrt(s[:RANK]))
    return [third @ vt[:RANK], third, u[:, :RANK] @ third]


def descend(operator, truth, steps, report):
    """Measure ``truth``, start, and descend; ``report`` takes a line of text."""
    begin = time.perf_counter()
    y = operator.apply(truth)
    report(f"y = A(W*): {time.perf_counter() - begin:.2f} s")
    begin = time.perf_counter()
    factors = spectral(operator, y)
    report(f"A*(y) and its factors: {time.perf_counter() - begin:.2f} s")
    seen = []

    def show(progress):
        seen.append(progress.elapsed)
        error = np.linalg.norm(np.linalg.multi_dot(progress.factors()[::-1]) - truth)
        report(f"step {progress.iteration}: loss {progress.values['loss']:.4e}, error {error:.4f}, {seen[-1]:.2f} s")

    rule = GradientDescent(lr=LR)
    settings = dict(depth=3, factors=factors, rule=rule, max_iter=steps, check_every=1, on_failure="ignore")
    solution = fastdmf.solve(operator, y, callback=show, **settings)
    return solution.history["loss"], (seen[-1] - seen[0]) / (len(seen) - 1)


def main():
    """Print a line a step, seconds an evaluation and the peak of the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--m", type=int, default=100_000)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ensemble", default="gaussian", choices=["gaussian", "rademacher"])
    arguments = parser.parse_args()

    m, n, ensemble = arguments.m, arguments.n, arguments.ensemble
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((n, RANK), np.float32) @ rng.standard_normal((RANK, n), np.float32)
    truth /= np.linalg.norm(truth)
    # Compiled before the clock starts, and checked on a matrix that is quickly drawn.
    descend(fastdmf.GaussianSeeded(1, 4000, (60, 60), ensemble=ensemble), truth[:60, :60].copy(), 1, lambda line: None)

    print(f"{ensemble}, {numba.get_num_threads()} threads; stored as float32 A would take {4e-9 * m * n * n:,.1f} GB")
    operator = fastdmf.GaussianSeeded(0, m, (n, n), ensemble=ensemble)
    loss, seconds = descend(operator, truth, arguments.steps, lambda line: print(line, flush=True))
    print(f"loss fell {loss[0] / loss[-1]:.1f} times, at every step: {bool((np.diff(loss) < 0).all())}")
    print(f"{seconds:.2f} s an evaluation, {m * n * n / seconds / 1e9:.2f}e9 entries a second")
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
