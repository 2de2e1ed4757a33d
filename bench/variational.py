"""``vbmf`` with its defaults on real data: test error, CPU and wall seconds, sweeps, components.

    python bench/variational.py --data ../shared/data
    python bench/variational.py --data ../shared/data --large        # 20 million synthetic ratings besides

The data folder holds ``movielens/``, ``images/``, ``traffic/`` and ``synthetic.py``. Splits: the official folds of
MovieLens-100K; the last tenth of ``default_rng(0).permutation`` of MovieLens-1M; half of an image and 40 % of the
traffic counts hidden at random with ``default_rng(0)``. Predictions are clipped to the range of the scale. The default
settings were chosen on u1 and MovieLens-1M; the other rows were only run.
"""

import argparse
import importlib.util
import resource
import time
from pathlib import Path

import numpy as np

import fastdmf


def ratings(folder, name):
    """Return (shape, training triples, test triples, range of the values)."""
    if name == "ml-1m":
        z = np.load(folder / "movielens/ml-1m/ratings.npz")
        order = np.random.default_rng(0).permutation(len(z["user"]))
        triples = [z[key][order] for key in ("user", "item", "rating")]
        cut = len(order) - len(order) // 10
        return (6040, 3706), [a[:cut] for a in triples], [a[cut:] for a in triples], (1, 5)
    parts = (np.load(folder / f"movielens/ml-100k/{name}.{part}.npz") for part in ("base", "test"))
    train, test = ([z[key] for key in ("user", "item", "rating")] for z in parts)
    return (943, 1682), train, test, (1, 5)


def dense(folder, name):
    """Return the same for a dense matrix with cells hidden at random."""
    if name == "hangzhou":
        x = np.load(folder / "traffic/hangzhou.npz")["tensor"].reshape(80, -1)
        hidden = (x != 0) & (np.random.default_rng(0).random(x.shape) < 0.4)
        seen, limits = (x != 0) & ~hidden, (0, np.inf)
    else:
        x = np.load(folder / "images/test_images.npz")[name].astype(np.float32) / 255
        seen = np.random.default_rng(0).random(x.shape) < 0.5
        hidden, limits = ~seen, (0, 1)
    return x.shape, [*np.nonzero(seen), x[seen]], [*np.nonzero(hidden), x[hidden]], limits


def synthetic(folder, *size):
    """Return the same for the synthetic ratings."""
    spec = importlib.util.spec_from_file_location("synthetic", folder / "synthetic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train, test, shape = module.synthetic(*size)
    return shape, train, test, (-np.inf, np.inf)


def measure(name, shape, train, test, limits):
    """Print one row."""
    cpu, wall = time.process_time(), time.perf_counter()
    mask = fastdmf.EntryMask(train[0], train[1], shape)
    solution = fastdmf.vbmf(mask, train[2], random_state=0, on_failure="ignore")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    error = np.sqrt(np.mean((np.clip(solution.predict(test[0], test[1]), *limits) - test[2]) ** 2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{name:<12}{error:>9.4f}{cpu:>8.2f}{wall:>8.2f}{solution.n_iter:>8}{solution.components:>12}{peak:>9.2f}")


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--large", action="store_true", help="also 2 and 20 million synthetic ratings")
    args = parser.parse_args()
    for width in (30, 62):  # compile before the clock starts
        warm = fastdmf.EntryMask(*np.divmod(np.arange(0, 160 * 150, 7), 150), (160, 150))
        fastdmf.vbmf(warm, np.ones(warm.size, np.float32), width=width, implicit_features=True, on_failure="ignore")
    print(f"{'data':<12}{'RMSE':>9}{'CPU s':>8}{'wall s':>8}{'sweeps':>8}{'components':>12}{'peak GB':>9}")
    for name in ("u1", "u2", "u3", "u4", "u5", "ml-1m"):
        measure(name, *ratings(args.data, name))
    for name in ("hangzhou", "barbara", "boat", "peppers", "house"):
        measure(name, *dense(args.data, name))
    if args.large:
        measure("synth2m", *synthetic(args.data, 20_000, 8_000, 2_000_000, 10))
        measure("synth20m", *synthetic(args.data, 138_493, 26_744, 20_000_000, 10))


if __name__ == "__main__":
    main()
