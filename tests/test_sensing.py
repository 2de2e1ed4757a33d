"""DMFSensing: recovery, the forms that measurements may take, and what it refuses."""

import logging
import pickle

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV

from fastdmf import DMFSensing, EntryMask, GaussianDense, RankOne
from fastdmf.engine import Status


def instance(m=250, n1=20, n2=16, rank=2, noise=0.0, seed=0, psd=False):
    """Return (truth, measurement matrices, measurements)."""
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((n1, rank))
    truth = left @ (left.T if psd else rng.standard_normal((rank, n2)))
    A = rng.standard_normal((m, *truth.shape))
    y = A.reshape(m, -1) @ truth.ravel()
    return truth, A, y + noise * y.std() * rng.standard_normal(m)


def error(model, truth):
    return np.linalg.norm(model.matrix_ - truth) / np.linalg.norm(truth)


# --- recovery --------------------------------------------------------------------------------------------------------


def test_low_rank_matrix_is_recovered_from_fewer_measurements_than_entries():
    truth, A, y = instance()
    model = DMFSensing(random_state=0).fit(A, y)
    assert model.status_ is Status.EXACT
    assert error(model, truth) < 0.005
    _, new, expected = instance(seed=0, m=300)
    assert model.score(new[250:], expected[250:]) > 0.9999
    ridge = Ridge(alpha=1e-6, fit_intercept=False).fit(A.reshape(250, -1), y)
    assert np.linalg.norm(ridge.coef_ - truth.ravel()) > 0.3 * np.linalg.norm(truth)


def test_psd():
    truth, A, y = instance(m=200, n1=20, psd=True)
    model = DMFSensing(psd=True, random_state=0).fit(A, y)
    assert error(model, truth) < 0.005
    (u,) = model.factors_
    assert u.shape == (20, 20)
    assert np.allclose(model.matrix_, u @ u.T, atol=1e-12)
    assert np.array_equal(model.matrix_, model.matrix_.T)
    assert np.linalg.eigvalsh(model.matrix_).min() > -1e-10
    assert model.depth_ == 2
    narrow = DMFSensing(psd=True, width=2, random_state=0).fit(A, y)
    assert narrow.factors_[0].shape == (20, 2)
    assert error(narrow, truth) < 0.005


def test_held_out_measurements_protect_from_noise():
    for seed in range(3):
        truth, A, y = instance(noise=0.3, seed=seed)
        stopped = DMFSensing(random_state=0).fit(A, y)
        exact = DMFSensing(random_state=0, validation_fraction=0).fit(A, y)
        assert exact.status_ is Status.CONVERGED
        assert "validation" not in exact.history_
        assert error(stopped, truth) < 0.8 * error(exact, truth)


@pytest.mark.parametrize(("of_a", "of_y"), [(1e3, 1.0), (1.0, 1e-4), (1e-5, 1e6)])
def test_units_do_not_matter(of_a, of_y):
    truth, A, y = instance()
    model = DMFSensing(random_state=0).fit(of_a * A, of_y * y)
    assert error(model, of_y / of_a * truth) < 0.005


def test_grid_search_over_depth_and_width():
    _, A, y = instance(noise=0.1)
    grid = {"depth": [2, 3], "width": [1, 4]}
    search = GridSearchCV(DMFSensing(shape=(20, 16), random_state=0), grid, cv=3).fit(A.reshape(250, -1), y)
    assert search.best_params_["width"] == 4
    assert search.best_score_ > 0.9


# --- the forms of measurements ---------------------------------------------------------------------------------------


def test_arrays_and_operators_agree():
    truth, A, y = instance()
    flat = A.reshape(len(A), -1)
    reference = DMFSensing(random_state=0).fit(A, y)
    assert reference.matrix_.shape == truth.shape
    for same in (flat, flat.tolist(), pd.DataFrame(flat), np.asfortranarray(flat)):
        model = DMFSensing(shape=(20, 16), random_state=0).fit(same, y)
        assert np.array_equal(model.matrix_, reference.matrix_)
    model = DMFSensing(random_state=0).fit(GaussianDense(A), y)
    assert np.array_equal(model.matrix_, reference.matrix_)
    for operator in (aslinearoperator(flat), aslinearoperator(sparse.csr_array(flat))):
        model = DMFSensing(shape=(20, 16), random_state=0).fit(operator, y)
        assert error(model, truth) < 0.005
        assert np.allclose(model.predict(operator), flat @ model.coef_)
    for measurements in (A, flat, GaussianDense(A), aslinearoperator(flat)):
        assert np.allclose(reference.predict(measurements), flat @ reference.matrix_.ravel(), rtol=1e-10)
        assert reference.score(measurements, y) > 0.9999
        assert reference.n_features_in_ == 320


def test_masks_and_rank_one_measurements():
    truth, _, _ = instance()
    rng = np.random.default_rng(1)
    rows, cols = np.nonzero(rng.random(truth.shape) < 0.6)
    model = DMFSensing(random_state=0).fit(EntryMask(rows, cols, truth.shape), truth[rows, cols])
    assert error(model, truth) < 0.01
    left, right = rng.standard_normal((260, 20)), rng.standard_normal((260, 16))
    operator = RankOne(left, right)
    model = DMFSensing(random_state=0, validation_fraction=0).fit(operator, operator.apply(truth))
    assert error(model, truth) < 0.01


def test_shape():
    rng = np.random.default_rng(0)
    for features, expected in ((1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (36, (6, 6)), (30, (5, 6))):
        A = rng.standard_normal((20, features))
        model = DMFSensing(random_state=0, tol=0.5).fit(A, A @ np.ones(features))
        assert model.matrix_.shape == expected
    model = DMFSensing(shape=[18, 2], random_state=0, tol=0.5).fit(np.ones((5, 36)), np.ones(5))
    assert model.matrix_.shape == (18, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_types(dtype):
    truth, A, y = instance()
    before = A.tobytes(), y.tobytes()
    model = DMFSensing(random_state=0, tol=1e-5).fit(A.astype(dtype), y)
    assert model.matrix_.dtype == model.coef_.dtype == dtype
    assert model.predict(A.astype(dtype)).dtype == dtype
    assert error(model, truth) < 0.01
    assert (A.tobytes(), y.tobytes()) == before


def test_attributes():
    _, A, y = instance(noise=0.1)
    model = DMFSensing(depth=3, width=(5, 6), random_state=0).fit(A, y)
    assert [w.shape for w in model.factors_] == [(5, 16), (6, 5), (20, 6)]
    assert np.allclose(model.factors_[2] @ model.factors_[1] @ model.factors_[0], model.matrix_, atol=1e-12)
    assert np.array_equal(model.coef_, model.matrix_.ravel())
    s = np.linalg.svd(model.matrix_, compute_uv=False)[:5]
    assert np.allclose(model.singular_values_, s, atol=1e-10 * s[0])
    assert model.components_.shape == (5, 16)
    p = s / s.sum()
    assert np.isclose(model.effective_rank_, np.exp(-np.sum(p * np.log(p))))
    assert model.n_iter_ == model.history_["iteration"][-1] > 0
    assert (model.device_, model.solver_, model.depth_) == ("cpu", "descent", 3)


# --- behaviour -------------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bits():
    _, A, y = instance()
    first = DMFSensing(random_state=3, n_threads=1).fit(A, y)
    again = DMFSensing(random_state=3, n_threads=2).fit(A, y)
    assert np.array_equal(first.matrix_, again.matrix_)
    assert np.array_equal(pickle.loads(pickle.dumps(first)).predict(A), first.predict(A))
    assert np.array_equal(clone(first).fit(A, y).matrix_, first.matrix_)


def test_warm_start():
    _, A, y = instance()
    model = DMFSensing(random_state=0, validation_fraction=0, tol=1e-3, warm_start=True).fit(A, y)
    cold = model.n_iter_
    assert model.fit(A, y).n_iter_ < 0.1 * cold
    assert model.set_params(tol=1e-5).fit(A, y).n_iter_ < cold
    with pytest.raises(ValueError, match=r"warm_start: the last fit's matrix was \(20, 16\), this one is \(16, 20\)"):
        model.fit(A.swapaxes(1, 2), y)
    psd = DMFSensing(psd=True, random_state=0, validation_fraction=0, warm_start=True)
    _, A, y = instance(psd=True)
    cold = psd.fit(A, y).n_iter_
    assert psd.fit(A, y).n_iter_ < 0.1 * cold


def test_zero_measurements():
    _, A, _ = instance(m=30)
    model = DMFSensing(random_state=0).fit(A, np.zeros(30))
    assert not model.matrix_.any()
    assert model.effective_rank_ == 0
    assert not DMFSensing(random_state=0).fit(0 * A, np.zeros(30)).matrix_.any()


def test_verbose_logs_progress(caplog):
    _, A, y = instance()
    with caplog.at_level(logging.INFO, logger="fastdmf"):
        DMFSensing(random_state=0, verbose=1).fit(A, y)
    assert "DMFSensing depth default: iteration 0, loss" in caplog.text


def test_max_iter_warns():
    _, A, y = instance()
    with pytest.warns(ConvergenceWarning, match="DMFSensing: MAX_ITER: max_iter was reached"):
        model = DMFSensing(random_state=0, max_iter=2).fit(A, y)
    assert model.n_iter_ == 2
    assert np.isfinite(model.matrix_).all()


def test_column_vector_y_warns():
    _, A, y = instance()
    flat = DMFSensing(random_state=0).fit(A, y)
    for measurements in (A, GaussianDense(A)):
        with pytest.warns(DataConversionWarning, match="column-vector"):
            model = DMFSensing(random_state=0).fit(measurements, y[:, None])
        assert np.array_equal(model.matrix_, flat.matrix_)


# --- refusals --------------------------------------------------------------------------------------------------------

A, Y = np.random.default_rng(0).standard_normal((10, 6)), np.arange(10.0)


def spoilt(array, value):
    array = array.astype(np.result_type(array, type(value)))
    array.flat[3] = value
    return array


@pytest.mark.parametrize(
    ("parameters", "measurements", "y", "kind", "message"),
    [
        ({"shape": (2, 4)}, A, Y, ValueError, r"A has 6 features, but shape=\(2, 4\) has 8 entries"),
        (
            {"shape": (3, 2)},
            A.reshape(10, 2, 3),
            Y,
            ValueError,
            r"matrices of shape \(2, 3\), but the shape is \(3, 2\)",
        ),
        ({"shape": (3, 2)}, GaussianDense(A, (2, 3)), Y, ValueError, r"of shape \(2, 3\), but shape=\(3, 2\)"),
        ({"shape": (2, 4)}, aslinearoperator(A), Y, ValueError, r"A has 6 features, but shape=\(2, 4\) has 8"),
        ({"shape": (0, 6)}, A, Y, ValueError, "shape must be two positive integers"),
        ({"shape": 6}, A, Y, ValueError, "shape must be two positive integers"),
        ({"shape": (2.5, 2)}, A, Y, ValueError, "shape must be two positive integers"),
        ({"shape": (1, 2, 3)}, A, Y, ValueError, "shape must be two positive integers"),
        ({"psd": True}, A, Y, ValueError, r"psd=True needs a square matrix, got shape \(2, 3\)"),
        ({"psd": True, "depth": 3}, A[:, :4], Y, ValueError, "depth"),
        ({}, A, Y[:9], ValueError, "inconsistent numbers of samples"),
        ({}, GaussianDense(A, (2, 3)), Y[:9], ValueError, "A has 10 measurements, y has 9"),
        ({}, spoilt(A, np.nan), Y, ValueError, "NaN"),
        ({}, spoilt(A, np.inf), Y, ValueError, "infinity"),
        ({}, A, spoilt(Y, np.nan), ValueError, "y contains NaN"),
        ({}, GaussianDense(A, (2, 3)), spoilt(Y, np.inf), ValueError, "y contains infinity"),
        ({}, spoilt(A, 1j), Y, ValueError, "Complex data not supported"),
        ({}, spoilt(A.astype(object), "text"), Y, ValueError, "A and y must hold numbers"),
        ({}, A, spoilt(Y.astype(object), "text"), ValueError, "must hold numbers"),
        ({}, sparse.csr_array(A), Y, TypeError, "[Ss]parse"),
        ({}, A[0], Y, ValueError, "Expected 2D array"),
        ({}, spoilt(A, 1e200), Y, ValueError, "A holds values too large to be squared"),
        ({}, A, np.stack([Y, Y], axis=1), ValueError, "1d array"),
        ({}, A[:0], Y[:0], ValueError, "0 sample"),
        ({"depth": 0}, A, Y, ValueError, "depth"),
        ({"width": 0}, A, Y, ValueError, "width"),
        ({"tol": 0}, A, Y, ValueError, "tol"),
        ({"init_scale": -1.0}, A, Y, ValueError, "init_scale"),
        ({"max_iter": -1}, A, Y, ValueError, "max_iter"),
        ({"patience": 0}, A, Y, ValueError, "patience"),
        ({"rule": "sgd"}, A, Y, ValueError, "rule"),
        ({"solver": "sgd"}, A, Y, ValueError, "solver must be 'auto' or 'descent' or 'recovery'"),
        ({"device": "tpu"}, A, Y, ValueError, "device"),
        ({"validation_fraction": 1}, A, Y, ValueError, "validation_fraction"),
        ({"verbose": "yes"}, A, Y, ValueError, "verbose"),
    ],
)
def test_bad_input(parameters, measurements, y, kind, message):
    with pytest.raises(kind, match=message):
        DMFSensing(random_state=0, **parameters).fit(measurements, y)


def test_bad_predict():
    model = DMFSensing(random_state=0).fit(A, Y)
    with pytest.raises(ValueError, match="X has 5 features, but DMFSensing is expecting 6"):
        model.predict(A[:, :5])
    with pytest.raises(ValueError, match=r"matrices of shape \(3, 2\), but the shape is \(2, 3\)"):
        model.predict(A.reshape(10, 3, 2))
    with pytest.raises(ValueError, match=r"A measures matrices of shape \(3, 2\), the fitted one is \(2, 3\)"):
        model.predict(GaussianDense(A, (3, 2)))
    with pytest.raises(ValueError, match="length 5.* 6"):
        model.predict(aslinearoperator(A[:, :5]))
    with pytest.raises(NotFittedError):
        DMFSensing().predict(A)


def test_operator_after_names():
    frame = pd.DataFrame(A, columns=list("abcdef"))
    model = DMFSensing(random_state=0).fit(frame, Y)
    assert list(model.feature_names_in_) == list("abcdef")
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[list("fedcba")])
    operator = LinearOperator((10, 6), matvec=lambda x: A @ x, rmatvec=lambda r: A.T @ r, dtype=float)
    model.fit(operator, Y)
    assert not hasattr(model, "feature_names_in_")
    assert model.n_features_in_ == 6


def test_recovery_finishes_the_digits_of_exact_measurements():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((20, 2)) @ rng.standard_normal((2, 16))
    a = rng.standard_normal((200, 320))
    y = a @ truth.ravel()
    for solver in ("auto", "recovery"):
        model = DMFSensing(shape=truth.shape, solver=solver, random_state=0).fit(a, y)
        assert model.solver_ == "recovery"
        assert model.status_ is Status.EXACT
        assert model.singular_values_.shape == (2,)
        assert np.linalg.norm(model.matrix_ - truth) < 1e-10 * np.linalg.norm(truth)
    model = DMFSensing(shape=truth.shape, solver="descent", random_state=0).fit(a, y)
    assert model.solver_ == "descent"
    assert np.linalg.norm(model.matrix_ - truth) > 1e-8 * np.linalg.norm(truth)


def test_noise_is_left_to_the_descent_unless_recovery_is_asked_for():
    rng = np.random.default_rng(1)
    truth = rng.standard_normal((20, 2)) @ rng.standard_normal((2, 16))
    a = rng.standard_normal((300, 320))
    y = a @ truth.ravel()
    y += 0.1 * y.std() * rng.standard_normal(len(y))
    auto = DMFSensing(shape=truth.shape, random_state=0).fit(a, y)
    assert auto.solver_ == "descent"
    asked = DMFSensing(shape=truth.shape, solver="recovery", random_state=0).fit(a, y)
    assert asked.status_ is Status.NOISE_LEVEL
    assert len(asked.singular_values_) == 2
    errors = [np.linalg.norm(m.matrix_ - truth) / np.linalg.norm(truth) for m in (asked, auto)]
    assert errors[0] < 1.1 * errors[1]


def test_recovery_has_no_psd_form():
    with pytest.raises(ValueError, match="psd=True is fitted by descent"):
        DMFSensing(psd=True, solver="recovery").fit(np.ones((9, 9)), np.ones(9))
