"""Shared pieces of the tests."""

import os
import signal

# GNU OpenMP spins while it waits, which on two busy cores turns 0.3 ms into 20 ms; read once, when it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import numpy as np
import pytest

from fastdmf.backend import get_backend
from fastdmf.operators import EntryMask, GaussianDense, GaussianSeeded, RankOne, as_operator

# A shell that starts the tests in the background leaves Ctrl-C ignored, here and in every process started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The same examples every time, and as long as a busy machine takes; bench/fuzz draws others.
hypothesis.settings.register_profile("fastdmf", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fastdmf")

# For scripts that tests run in a process of their own. ru_maxrss is no substitute: it starts from what the process
# that started it had in memory.
PEAK_KILOBYTES = """
def peak_kilobytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
"""


def random_mask(n1, n2, count, rng, *, empty=True):
    """Entries in random order; with ``empty`` row 0 and column 0 hold none where there is room."""
    low = 1 if empty and min(n1, n2) > 1 else 0
    cells = rng.choice((n1 - low) * (n2 - low), min(count, (n1 - low) * (n2 - low)), replace=False)
    rows, cols = np.divmod(cells, n2 - low)
    return EntryMask(rows + low, cols + low, (n1, n2))


def dense_operator(n1, n2, m, rng):
    """Any scipy LinearOperator: a matrix wrapped so that nothing but its products can be used."""
    from scipy.sparse.linalg import LinearOperator

    a = rng.standard_normal((m, n1 * n2)) / np.sqrt(n1 * n2)
    op = LinearOperator((m, n1 * n2), matvec=lambda x: a @ x, rmatvec=lambda r: a.T @ r, dtype=float)
    return as_operator(op, (n1, n2))


# One row an operator: name -> maker(n1, n2, m, rng).
OPERATORS = {
    "mask": random_mask,
    "gaussian": lambda n1, n2, m, rng: GaussianDense(rng.standard_normal((m, n1, n2)) / np.sqrt(n1 * n2)),
    "seeded": lambda n1, n2, m, rng: GaussianSeeded(int(rng.integers(2**63)), m, (n1, n2)),
    "rank_one": lambda n1, n2, m, rng: RankOne(rng.standard_normal((m, n1)), rng.standard_normal((m, n2))),
    "scipy": dense_operator,
}

# One row a loss; thresholds that leave residuals on both sides.
LOSSES = {
    "squared": "squared",
    "huber": ("huber", 0.7),
    "truncated": ("truncated", 1.1),
    "absolute": "absolute",
}


def completion(seed, n=100, rank=5, count=2000):
    """The paper's instance: ||W*||_F = n, ``count`` entries without replacement; (W*, mask, y)."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n))
    truth *= n / np.linalg.norm(truth)
    rows, cols = np.divmod(rng.choice(n * n, count, replace=False), n)
    return truth, EntryMask(rows, cols, truth.shape), truth[rows, cols]


# What compiles for the estimators is counted by test_first_use.py in the process that has run these, and nothing else.
ESTIMATOR_TESTS = {"test_imputer.py", "test_sensing.py", "test_estimator_checks.py"}


def pytest_collection_modifyitems(items):
    """Run the estimators' tests first and the count of their compiled versions behind them."""

    def place(item):
        return 0 if item.path.name in ESTIMATOR_TESTS else 1 if "share_few_compiled" in item.name else 2

    items.sort(key=place)


@pytest.fixture(autouse=True)
def errors_as_they_were():
    """Every test leaves NumPy's handling of floating-point errors alone; what a failed one left is put back."""
    before = np.geterr()
    yield
    after = np.seterr(**before)
    assert after == before


@pytest.fixture
def backend():
    return get_backend("cpu")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
