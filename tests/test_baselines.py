"""The baselines of the papers: certificates of optimality, the cone, the stages of greedy learning."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import fastdmf

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    yield importlib.import_module("bench.baselines")
    for name in [name for name in sys.modules if name == "bench" or name.startswith("bench.")]:
        del sys.modules[name]


def gaussian(n, rank, count, seed, psd=False):
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((n, rank))
    truth = u @ (u if psd else rng.standard_normal((n, rank))).T
    operator = fastdmf.GaussianDense(rng.standard_normal((count, n, n)))
    return operator, operator.apply(truth), truth


def mask(n, rank, count, seed):
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n))
    rows, cols = np.divmod(rng.choice(n * n, count, replace=False), n)
    operator = fastdmf.EntryMask(rows, cols, (n, n))
    return operator, truth[rows, cols], truth


@pytest.mark.parametrize("make", [mask, gaussian])
def test_the_smallest_nuclear_norm_is_certified(make, baselines):
    for count in (60, 130):
        operator, y, truth = make(14, 2, count, 0)
        found = baselines.nuclear_norm(operator, y)
        assert found.gap < 1e-5
        np.testing.assert_allclose(operator.apply(found.matrix), y, atol=1e-9 * np.abs(y).max())
        assert np.linalg.norm(found.matrix, "nuc") <= np.linalg.norm(truth, "nuc") * (1 + 1e-6)
        # No random feasible direction lowers it.
        rng, norm = np.random.default_rng(1), np.linalg.norm(found.matrix, "nuc")
        for _ in range(20):
            direction = rng.standard_normal(operator.shape)
            rows = operator.a if make is gaussian else np.eye(196)[operator.rows * 14 + operator.cols]
            direction -= np.linalg.lstsq(rows, rows @ direction.ravel(), rcond=None)[0].reshape(14, 14)
            assert np.linalg.norm(found.matrix + 1e-2 * direction, "nuc") > norm * (1 - 1e-6)


def test_enough_measurements_recover_the_truth(baselines):
    operator, y, truth = gaussian(12, 1, 110, 0)
    assert np.linalg.norm(baselines.nuclear_norm(operator, y).matrix - truth) < 1e-4 * np.linalg.norm(truth)
    operator, y, truth = gaussian(12, 1, 60, 0, psd=True)
    found = baselines.nuclear_norm(operator, y, psd=True)
    assert found.gap < 1e-5 and np.linalg.eigvalsh((found.matrix + found.matrix.T) / 2)[0] > -1e-5
    assert np.linalg.norm(found.matrix - truth) < 1e-4 * np.linalg.norm(truth)


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_cone_and_uniqueness(accelerated, baselines):
    """Rank one, n = 10: the statistical dimension is 32.5."""
    errors = {}
    for count in (20, 45):
        operator, y, truth = gaussian(10, 1, count, 3, psd=True)
        v = np.random.default_rng(5).standard_normal((10, 10))
        options = {"max_iter": 20_000, "tol": 1e-10, "accelerated": accelerated, "start": v @ v.T / 10}
        x = baselines.psd_projected_gradient(operator, y, **options)
        assert np.linalg.eigvalsh(x)[0] > -1e-6 * np.linalg.norm(x)
        assert np.linalg.norm(operator.apply(x) - y) < 1e-4 * np.linalg.norm(y)
        errors[count] = np.linalg.norm(x - truth) / np.linalg.norm(truth)
    assert errors[20] > 0.1 and errors[45] < 1e-4


def test_greedy_stages(baselines):
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((12, 2)))[0]
    truth = (q * [3.0, 1.0]) @ q.T
    operator = fastdmf.GaussianDense(rng.standard_normal((300, 12, 12)))
    stages = baselines.greedy_low_rank(operator, operator.apply(truth))
    assert [np.linalg.matrix_rank(w, tol=1e-4) for w in stages] == [1, 2]
    assert np.linalg.norm(stages[0] - 3 * np.outer(q[:, 0], q[:, 0])) < 0.5
    assert np.linalg.norm(stages[1] - truth) < 1e-6
