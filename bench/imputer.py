"""DMFImputer beside mean filling, KNNImputer and IterativeImputer on seeded holes: every case, the bad ones first.

    python bench/imputer.py --data ../shared/data --json bench/results/imputer.jsonl
    python bench/imputer.py --data ../shared/data --methods dmf --reuse bench/results/imputer.jsonl

Matrices: scikit-learn's bundled tables, and with ``--data`` the traffic matrices, in either orientation, and the
images below that folder. Entries are hidden at random, at three rates, with five seeds (matrices of more than 30,000
entries: one seed). Tables of mixed units are scored in units of each column's standard deviation, matrices of one
unit in that unit. IterativeImputer is left out above 500 columns, where it would take hours. Every method runs with
its defaults, and every run appends one JSON line; ``--reuse`` takes earlier lines instead of running a method again.
The table's last column is the error of "dmf" over that of the best peer.
"""

import argparse
import json
import os
import platform
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
from sklearn import datasets
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

import fastdmf
from fastdmf import DMFImputer

MIXED = ("breast_cancer", "wine", "diabetes", "iris", "linnerud")
SHARES = (0.1, 0.3, 0.5)
PEERS = ("mean", "knn", "iterative")
METHODS = {
    "dmf": lambda: DMFImputer(random_state=0),
    "descent": lambda: DMFImputer(solver="descent", random_state=0),
    "mean": lambda: SimpleImputer(keep_empty_features=True),
    "knn": lambda: KNNImputer(keep_empty_features=True),
    "iterative": lambda: IterativeImputer(keep_empty_features=True, random_state=0),
}


def matrices(data):
    """Yield (name, matrix with NaN where unknown, whether its columns have units of their own)."""
    for name in MIXED:
        yield name, getattr(datasets, f"load_{name}")().data.astype(float), True
    yield "digits", datasets.load_digits().data, False
    if data is None:
        return
    for name in ("hangzhou", "birmingham"):
        tensor = np.load(data / "traffic" / f"{name}.npz")["tensor"].astype(float)
        matrix = tensor.reshape(len(tensor), -1)
        matrix[matrix == 0] = np.nan  # unobserved in these two
        matrix = matrix[:, ~np.isnan(matrix).all(axis=0)]
        yield name, matrix, False
        yield f"{name}.T", np.ascontiguousarray(matrix.T), False
    images = np.load(data / "images" / "test_images.npz")
    for name in ("barbara", "house", "boat", "peppers"):
        yield name, images[name] / 255, False


def with_holes(truth, share, seed):
    """Return a copy with ``share`` of the observed entries hidden, and their flat indices."""
    known = np.flatnonzero(~np.isnan(truth))
    hidden = np.random.default_rng(seed).permutation(known)[: round(share * known.size)]
    X = truth.copy()
    X.flat[hidden] = np.nan
    return X, hidden


def measure(imputer, truth, X, hidden, scale):
    """Return (root mean square error on the hidden entries, CPU seconds)."""
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # empty rows and columns are part of the data
        warnings.simplefilter("ignore", ConvergenceWarning)
        filled = imputer.fit_transform(X)
    seconds = time.process_time() - started
    return float(np.sqrt(np.mean(((filled - truth) / scale).flat[hidden] ** 2))), seconds


def read(path):
    """Return the lines of an earlier run as {(case, share, seed, method): line}."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    return {(line["case"], line["hidden"], line["seed"], line["method"]): line for line in lines}


def run(arguments):
    """Return the results as ``read`` does; new ones are appended to the file as they come."""
    known = read(arguments.reuse)
    results = {}
    machine = {"fastdmf": fastdmf.__version__, "sklearn": sklearn.__version__, "numpy": np.__version__}
    machine |= {"machine": platform.machine(), "cores": os.cpu_count()}
    for name, truth, mixed in matrices(arguments.data):
        if arguments.only and name not in arguments.only:
            continue
        scale = np.nanstd(truth, axis=0) if mixed else np.ones(truth.shape[1])
        for share in arguments.shares:
            for seed in range(1 if truth.size > 30_000 else arguments.seeds):
                X, hidden = with_holes(truth, share, seed)
                for method in METHODS:
                    key = name, share, seed, method
                    if method not in arguments.methods:
                        if key in known:
                            results[key] = known[key]
                        continue
                    if method == "iterative" and truth.shape[1] > 500:
                        continue
                    error, seconds = measure(METHODS[method](), truth, X, hidden, scale)
                    line = {"case": name, "hidden": share, "seed": seed, "method": method, "rmse": error}
                    results[key] = line | {"seconds": seconds, "shape": truth.shape, **machine}
                    if arguments.json:
                        with arguments.json.open("a") as file:
                            file.write(json.dumps(results[key]) + "\n")
    return results


def rows(results):
    """Return [(ratio, case, share, {method: (error, seconds)})], means over the seeds, the worst ratio first."""
    table = []
    for case, share in dict.fromkeys(key[:2] for key in results):
        found = {}
        for method in METHODS:
            of = [v for k, v in results.items() if k[:2] == (case, share) and k[3] == method]
            if of:
                found[method] = tuple(float(np.mean([line[key] for line in of])) for key in ("rmse", "seconds"))
        peers = [found[peer][0] for peer in PEERS if peer in found]
        ratio = found["dmf"][0] / min(peers) if "dmf" in found and peers else np.nan
        table.append((ratio, case, share, found))
    return sorted(table, key=lambda row: -np.nan_to_num(row[0]))


def main():
    """Print the table."""
    shared = Path("../shared/data")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=shared if shared.is_dir() else None)
    parser.add_argument("--methods", nargs="*", default=["dmf", *PEERS], choices=list(METHODS))
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of matrices")
    parser.add_argument("--json", type=Path, help="file to append the results to")
    parser.add_argument("--reuse", type=Path, help="file with results of the methods that are not run")
    arguments = parser.parse_args()
    if "dmf" in arguments.methods:  # compile before the clock starts
        for dtype in (np.float64,):
            X = np.random.default_rng(0).standard_normal((200, 150)).astype(dtype)
            X[X > 1] = np.nan
            measure(METHODS["dmf"](), X, X, np.array([0]), 1.0)
    table = rows(run(arguments))
    shown = [method for method in METHODS if any(method in row[3] for row in table)]
    print(f"{'case':<14}{'hidden':>7}" + "".join(f"{m:>10}{'s':>7}" for m in shown) + f"{'dmf/best peer':>15}")
    for ratio, case, share, found in table:
        cells = "".join(
            f"{found[m][0]:>10.4g}{found[m][1]:>7.2f}" if m in found else f"{'-':>10}{'':>7}" for m in shown
        )
        print(f"{case:<14}{share:>7.0%}{cells}{ratio:>15.3f}")


if __name__ == "__main__":
    main()
