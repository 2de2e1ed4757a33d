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


@pytest.mark.parametrize("make", [mask, gaussian])
def test_measurements_within_eps(make, baselines):
    operator, y, _ = make(14, 2, 90, 0)
    exact, eps = baselines.nuclear_norm(operator, y), 0.2
    found = baselines.nuclear_norm(operator, y, eps=eps)
    deviation = np.abs(operator.apply(found.matrix) - y)
    assert found.gap < 1e-5 and deviation.max() < eps * (1 + 1e-3)
    assert np.mean(deviation > eps * 0.999) > 0.3  # the norm falls until many of them are at the limit
    assert np.linalg.norm(found.matrix, "nuc") < 0.99 * np.linalg.norm(exact.matrix, "nuc")
    assert baselines.nuclear_norm(operator, 0 * y, eps=eps).iterations == 0


@pytest.mark.parametrize("make", [mask, gaussian])
def test_the_gap_bounds_the_distance_to_the_minimum(make, baselines):
    """Also long before the end, where the multiplier has to be scaled."""
    operator, y, _ = make(14, 2, 90, 0)
    minimum = np.linalg.norm(baselines.nuclear_norm(operator, y, tol=1e-9).matrix, "nuc")
    for steps in (1, 2, 5, 30):
        found = baselines.nuclear_norm(operator, y, max_iter=steps)
        norm = np.linalg.norm(found.matrix, "nuc")
        assert found.iterations == steps and found.gap > 1e-4
        assert 0 < norm - minimum <= found.gap * norm


def test_enough_measurements_recover_the_truth(baselines):
    operator, y, truth = gaussian(12, 1, 110, 0)
    assert np.linalg.norm(baselines.nuclear_norm(operator, y).matrix - truth) < 1e-4 * np.linalg.norm(truth)
    operator, y, truth = gaussian(12, 1, 60, 0, psd=True)
    found = baselines.nuclear_norm(operator, y, psd=True)
    assert found.gap < 1e-5 and np.linalg.eigvalsh((found.matrix + found.matrix.T) / 2)[0] > -1e-5
    assert np.linalg.norm(found.matrix - truth) < 1e-4 * np.linalg.norm(truth)


def test_entries_of_rank_one_are_completed(baselines):
    operator, y, truth = mask(20, 1, 250, 0)
    found = baselines.nuclear_norm(operator, y)
    assert found.gap < 1e-5 and np.linalg.norm(found.matrix - truth) < 1e-5 * np.linalg.norm(truth)


def test_one_step_on_the_cone(baselines):
    """By hand: a step of lr on (2/m) of the symmetric part of A^T r, negative eigenvalues cut off."""
    operator, y, _ = gaussian(6, 2, 15, 1)
    start = np.diag([1.0, 2, 3, 4, 5, 6])
    g = 2 / 15 * operator.adjoint(operator.apply(start) - y)
    values, vectors = np.linalg.eigh(start - 0.4 * (g + g.T) / 2)
    assert values[0] < -0.1
    x = baselines.psd_projected_gradient(operator, y, lr=0.4, max_iter=1, start=start)
    np.testing.assert_allclose(x, vectors @ np.diag(np.maximum(values, 0)) @ vectors.T, atol=1e-12)


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_cone_and_uniqueness(accelerated, baselines):
    """Rank one, n = 10: the statistical dimension is 32.5."""
    errors = {}
    for count in (20, 45):
        operator, y, truth = gaussian(10, 1, count, 3, psd=True)
        v = np.random.default_rng(5).standard_normal((10, 10))
        options = {"max_iter": 20_000, "tol": 1e-10, "accelerated": accelerated, "start": v @ v.T / 10}
        x = baselines.psd_projected_gradient(operator, y, **options)
        assert np.linalg.eigvalsh(x)[0] > -1e-13 * np.linalg.norm(x)
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


def test_greedy_learning_prefers_rank_to_norm(baselines):
    """The 4 x 4 completion of Li, Luo, Lyu 2020, R = 3: rank one has norm 2 + 2 R^2 = 20, the smallest is 4 R = 12."""
    operator = fastdmf.EntryMask([0, 0, 1, 2, 3, 2], [2, 3, 2, 0, 0, 1], (4, 4))
    y = np.array([1.0, 3, 3, 1, 3, 3])
    stages = baselines.greedy_low_rank(operator, y)
    v = np.array([1.0, 3, 1, 3])
    assert len(stages) == 1
    np.testing.assert_allclose(stages[0], np.outer(v, v), atol=1e-4)
    assert np.linalg.norm(baselines.nuclear_norm(operator, y).matrix, "nuc") == pytest.approx(12, abs=1e-4)
    assert np.trace(baselines.nuclear_norm(operator, y, psd=True).matrix) == pytest.approx(12, abs=1e-3)
