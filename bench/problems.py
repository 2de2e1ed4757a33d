"""Completion problems that the comparisons share: ratings, synthetic ratings, traffic, images, small tables.

The data folder holds ``movielens/``, ``images/``, ``traffic/`` and ``synthetic.py`` and is given by path; none of it
belongs to the package. Splits: the official folds of MovieLens-100K (u1 to u5); the last tenth of
``default_rng(seed).permutation`` of MovieLens-1M; of matrices a share of the known cells, hidden at random with
``default_rng(seed)``.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RATINGS = ("u1", "u2", "u3", "u4", "u5", "ml-1m", "synth2m", "synth20m")
TRAFFIC = ("hangzhou", "birmingham")
IMAGES = ("barbara", "boat", "peppers", "house")
TABLES = ("breast_cancer", "wine", "diabetes", "iris", "linnerud", "digits")
MATRICES = TRAFFIC + IMAGES + TABLES
_SYNTHETIC = {"synth2m": (20_000, 8_000, 2_000_000, 10), "synth20m": (138_493, 26_744, 20_000_000, 10)}
# Tables whose columns have units of their own are scored in standard deviations of the columns.
_MIXED = ("breast_cancer", "wine", "diabetes", "iris", "linnerud")


@dataclass
class Problem:
    """Training and test entries (rows, columns, values) of a matrix.

    Attributes
    ----------
    limits : tuple of float
        Range to which every method's predictions are clipped.
    scale : ndarray of shape (n2,) or None
        Errors in column j are divided by ``scale[j]``.
    """

    name: str
    shape: tuple
    train: tuple
    test: tuple
    limits: tuple = (-np.inf, np.inf)
    scale: np.ndarray = None

    def error(self, predictions):
        """Return the root mean square error of predictions at the test entries."""
        wrong = np.clip(predictions, *self.limits) - self.test[2]
        if self.scale is not None:
            wrong = wrong / self.scale[self.test[1]]
        return float(np.sqrt(np.mean(wrong.astype(np.float64) ** 2)))

    def matrix(self):
        """Return the training entries as an array with NaN where nothing is known."""
        x = np.full(self.shape, np.nan)
        x[self.train[0], self.train[1]] = self.train[2]
        return x

    def save(self, folder):
        """Write the arrays so that a process can load them without having made them."""
        for part, triple in (("train", self.train), ("test", self.test)):
            for key, values in zip(("rows", "columns", "values"), triple):
                np.save(folder / f"{part}_{key}.npy", values)
        scale = np.ones(self.shape[1]) if self.scale is None else self.scale
        np.savez(folder / "about.npz", name=self.name, shape=self.shape, limits=self.limits, scale=scale)

    @classmethod
    def load(cls, folder):
        """Read what ``save`` wrote."""
        parts = [
            tuple(np.load(folder / f"{part}_{key}.npy") for key in ("rows", "columns", "values"))
            for part in ("train", "test")
        ]
        about = np.load(folder / "about.npz")
        return cls(str(about["name"]), tuple(about["shape"].tolist()), *parts, tuple(about["limits"]), about["scale"])


def _movielens(folder, name, seed):
    keys = ("user", "item", "rating")
    if name == "ml-1m":
        z = np.load(folder / "movielens/ml-1m/ratings.npz")
        order = np.random.default_rng(seed).permutation(len(z["user"]))
        cut = len(order) - len(order) // 10
        triples = [z[key][order] for key in keys]
        return Problem(name, (6040, 3706), tuple(a[:cut] for a in triples), tuple(a[cut:] for a in triples), (1, 5))
    base, test = (np.load(folder / f"movielens/ml-100k/{name}.{part}.npz") for part in ("base", "test"))
    return Problem(name, (943, 1682), tuple(base[key] for key in keys), tuple(test[key] for key in keys), (1, 5))


def _synthetic(folder, name):
    spec = importlib.util.spec_from_file_location("synthetic", folder / "synthetic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train, test, shape = module.synthetic(*_SYNTHETIC[name])
    return Problem(name, shape, train, test)


def full_matrix(folder, name):
    """Return (matrix with NaN where unknown, limits of the values)."""
    if name in TRAFFIC:
        # Instants by sites, the order in which a table of sensors is kept; 0 means unobserved in these two.
        tensor = np.load(Path(folder) / "traffic" / f"{name}.npz")["tensor"].astype(float)
        x = tensor.reshape(len(tensor), -1).T.copy()
        x[x == 0] = np.nan
        return x[~np.isnan(x).all(axis=1)], (0, np.inf)
    if name in IMAGES:
        return np.load(Path(folder) / "images" / "test_images.npz")[name] / 255.0, (0, 1)
    from sklearn import datasets

    return getattr(datasets, f"load_{name}")().data.astype(float), (-np.inf, np.inf)


def _matrix(folder, name, share, seed):
    x, limits = full_matrix(folder, name)
    known = ~np.isnan(x)
    hidden = known & (np.random.default_rng(seed).random(x.shape) < share)
    seen = known & ~hidden
    scale = np.nanstd(x, axis=0) if name in _MIXED else None
    train, test = ((*np.nonzero(part), x[part]) for part in (seen, hidden))
    return Problem(f"{name} {share:.0%}", x.shape, train, test, limits, scale)


def problem(folder, name, seed=0, share=0.5):
    """Return the problem ``name``; ``seed`` and ``share`` choose what is hidden where no split is given."""
    folder = Path(folder)
    if name in _SYNTHETIC:
        return _synthetic(folder, name)
    return _movielens(folder, name, seed) if name in RATINGS else _matrix(folder, name, share, seed)
