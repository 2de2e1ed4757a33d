"""DMFImputer beside mean filling and KNNImputer on seeded holes: a table of errors and seconds.

``python bench/imputer.py`` measures on scikit-learn's bundled tables, ``--data PATH`` adds the traffic and image
matrices below PATH (``traffic/*.npz``, ``images/*.npz``; ``../shared/data`` is taken when it is there),
``--standardize`` the settings to compare, ``--json FILE`` appends the rows as JSON lines.

Tables of mixed units are scored in units of each column's standard deviation, matrices of one unit in that unit.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
from sklearn import datasets
from sklearn.impute import KNNImputer, SimpleImputer

import fastdmf
from fastdmf import DMFImputer

MIXED = ("breast_cancer", "wine", "diabetes", "iris", "linnerud")


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
        yield name, images[name].astype(float), False


def low_rank(seed):
    """Yield the exactly low-rank 100 x 100 matrix of rank 5 of the completion experiments, 2000 entries observed."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((100, 5)) @ rng.standard_normal((5, 100))
    truth *= 100 / np.linalg.norm(truth)
    X = np.full(truth.shape, np.nan)
    seen = rng.permutation(truth.size)[:2000]
    X.flat[seen] = truth.flat[seen]
    return truth, X


def with_holes(truth, share, seed):
    """Return a copy with ``share`` of the observed entries hidden, and their flat indices."""
    known = np.flatnonzero(~np.isnan(truth))
    hidden = np.random.default_rng(seed).permutation(known)[: round(share * known.size)]
    X = truth.copy()
    X.flat[hidden] = np.nan
    return X, hidden


def measure(imputer, truth, X, hidden, scale):
    """Return (root mean square error on the hidden entries, seconds)."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # empty rows and columns are part of the data
        filled = imputer.fit_transform(X)
    seconds = time.perf_counter() - started
    return float(np.sqrt(np.mean(((filled - truth) / scale).flat[hidden] ** 2))), seconds


def run(name, truth, X_hidden, mixed, settings, peers):
    """Return one row of the table: the mean over the seeds."""
    scale = np.nanstd(truth, axis=0) if mixed else np.ones(truth.shape[1])
    imputers = {f"dmf {key}": value for key, value in settings.items()}
    if peers:
        imputers |= {"mean": SimpleImputer(keep_empty_features=True), "knn": KNNImputer(keep_empty_features=True)}
    row = {}
    for label, imputer in imputers.items():
        results = [measure(imputer, truth, X, hidden, scale) for X, hidden in X_hidden]
        row[label], row[f"{label} s"] = np.mean(results, axis=0).tolist()
        if label == "dmf auto":
            row["depth"], row["noise"] = imputer.depth_, imputer.noise_variance_
    return row


def main():
    """Print the table."""
    shared = Path("../shared/data")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=shared if shared.is_dir() else None)
    parser.add_argument("--standardize", nargs="*", default=["auto"], choices=["auto", "yes", "no"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of matrices")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    values = {"auto": "auto", "yes": True, "no": False}
    print(
        f"fastdmf {fastdmf.__version__}, scikit-learn {sklearn.__version__}, numpy {np.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores; mean of up to {arguments.seeds} seeds"
    )
    cases = [
        (name, truth, mixed, share, [with_holes(truth, share, seed) for seed in range(arguments.seeds)])
        for name, truth, mixed in matrices(arguments.data)
        for share in (0.2, 0.5)
    ]
    for seed in range(arguments.seeds):
        truth, X = low_rank(seed)
        cases.append((f"rank 5 #{seed}", truth, False, 0.8, [(X, np.flatnonzero(np.isnan(X)))]))
    for name, truth, mixed, share, pairs in cases:
        if arguments.only and name not in arguments.only:
            continue
        if truth.size > 30_000:
            pairs = pairs[:1]
        settings = {key: DMFImputer(standardize=values[key], random_state=0) for key in arguments.standardize}
        variance = np.nanvar(truth, axis=0)
        variance = variance[variance > 0]
        row = {"median/mean variance": np.median(variance) / variance.mean()}
        row |= run(name, truth, pairs, mixed, settings, peers=truth.shape[0] < 2000 or truth.shape[1] < 100)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"{name:14s} {truth.shape[0]:5d} x {truth.shape[1]:<5d} {share:.0%}  {shown}", flush=True)
        if arguments.json:
            record = {"name": name, "shape": truth.shape, "hidden": share, "python": sys.version.split()[0], **row}
            with arguments.json.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
