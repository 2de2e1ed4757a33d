"""Quadratic networks: rank-one measurements of U U^T, the paper's rule, and the estimator."""

import logging
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import OPERATORS
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastdmf
from fastdmf import DMFQuadratic, RankOne
from fastdmf.chain import Layout
from fastdmf.contract import Bound
from fastdmf.engine import SolveWarning, Status
from fastdmf.fitting import effective_rank
from fastdmf.problem import Problem
from fastdmf.rescaled import RescaledGradientDescent


def network(m, d=20, r=2, seed=0, noise=0.0):
    """Return (U U^T, X, y): Gaussian inputs, columns of U of norm one as in the paper's simulations."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((d, r))
    u /= np.linalg.norm(u, axis=0)
    x = rng.standard_normal((m, d))
    y = np.sum((x @ u) ** 2, axis=1)
    return u @ u.T, x, y + noise * y.std() * rng.standard_normal(m)


def error(matrix, truth):
    return np.linalg.norm(matrix - truth) / np.linalg.norm(truth)


# --- the operator on U U^T ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss", ["squared", ("truncated_prediction", 4.0)])
def test_one_product_for_both_sides(loss, dtype, rng, backend):
    """P = Q^T = U: half the work, the same numbers as the base class and as two separate sides."""
    m, d, h = 70, 9, 4
    op = RankOne(rng.standard_normal((m, d)))
    y, w = rng.standard_normal((3, m)), rng.random((3, m))
    u = rng.standard_normal((3, d, h))
    bound = op.bind(backend, y, weights=w, loss=loss, dtype=dtype)
    oracle = Bound(op, backend, y, w, bound.loss, np.dtype(float))
    left, right = rng.standard_normal((3, d)), rng.standard_normal((3, d))
    probe, expected_probe = (left.astype(dtype), right.astype(dtype)), (left.copy(), right.copy())
    ours, theirs = (np.full((3, d, h), np.nan, dtype) for _ in range(2)), (np.empty_like(u), np.empty_like(u))
    ours, p = tuple(ours), u.astype(dtype)
    losses = bound.loss_and_pull(p, p, *ours, probe)
    np.testing.assert_array_equal(p, u.astype(dtype))
    tol = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(losses, oracle.loss_and_pull(u, u, *theirs, expected_probe), rtol=tol)
    for a, b in zip((*ours, *probe), (*theirs, *expected_probe)):
        assert error(a, b) < tol
    np.testing.assert_array_equal(ours[0], ours[1])
    assert not np.shares_memory(*ours)
    copied = tuple(np.empty_like(p) for _ in range(2))
    np.testing.assert_allclose(bound.loss_and_pull(p, p.copy(), *copied), losses, rtol=tol)
    assert error(ours[0], copied[0]) < tol and error(ours[1], copied[1]) < tol
    r = rng.standard_normal((3, m))
    for a, b in zip(bound.pull(r.astype(dtype), p, p), oracle.pull(r, u, u)):
        assert error(a, b) < tol
    assert error(bound.forward(p, p), oracle.forward(u, u)) < tol


# --- the paper's rule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "c"), [("mse", 1.0), ("mse/2", 0.5), ("sse", None)])
@pytest.mark.parametrize("target", [None, 1.7])
def test_three_steps_by_hand(loss, c, target, rng, backend):
    """The algorithm on U alone, for two runs with weights and data of their own, written out in plain NumPy."""
    m, d, h, bound_r = 60, 7, 5, 3.0
    x, y, w = rng.standard_normal((m, d)), 2 * rng.random((2, m)), 0.5 + rng.random((2, m))
    lr = 0.004 if c else 0.004 / m
    layout = Layout((d, h, d), symmetric=True)
    bound = RankOne(x).bind(backend, y, weights=w, loss=("truncated_prediction", bound_r), dtype=np.float64)
    problem = Problem(bound, layout, 2, loss=loss)
    flat = layout.allocate(2, np.float64)
    u = 0.4 * rng.standard_normal((2, d, h))
    layout.factors(flat)[0][:] = u
    rule = RescaledGradientDescent(lr=lr, target=target)
    state = rule.init(problem, flat)
    truncated = 0
    for _ in range(3):
        moved = []
        for b in range(2):
            total = w[b].sum()
            prediction = np.sum((x @ u[b]) ** 2, axis=1)
            keep = prediction <= bound_r
            truncated += np.sum(~keep)
            mean = (x * (w[b] * keep * (prediction - y[b]))[:, None]).T @ x / total  # M of the paper
            scale = c or total
            tau = target or np.sum(w[b] * y[b]) / total
            step = u[b] - lr * 4 * scale * mean @ u[b]
            moved.append(step / (1 - 4 * scale * lr * (np.sum(u[b] ** 2) - tau)))
        u = np.stack(moved)
        rule.step(problem, state)
        np.testing.assert_allclose(layout.factors(state.x)[0], u, rtol=1e-12)
        np.testing.assert_array_equal(state.step_size, lr)
    assert 0 < truncated < 3 * 2 * m
    losses, objective = problem.evaluate(state.x, np.empty_like(state.x))
    np.testing.assert_allclose((state.losses, state.objective), (losses, objective), rtol=1e-12)


def test_the_rescaling_cancels_the_trace(backend):
    """With many inputs a step is one of gradient descent on ||U U^T - X*||_F^2, which the plain step is not.

    E M = 2 (U U^T - X*) + (||U||_F^2 - tr X*) I, of which the second part is to go.
    """
    truth, x, y = network(400_000, d=5, seed=3)
    u = 0.7 * np.random.default_rng(1).standard_normal((1, 5, 5))
    layout = Layout((5, 5, 5), symmetric=True)
    problem = Problem(RankOne(x).bind(backend, y[None]), layout, 1)
    lr, excess = 1e-3, np.sum(u**2) - np.trace(truth)
    ends = []
    for rule in (RescaledGradientDescent(lr=lr, target=np.trace(truth)), fastdmf.rules.GradientDescent(lr=lr)):
        flat = layout.allocate(1, np.float64)
        layout.factors(flat)[0][:] = u
        state = rule.init(problem, flat)
        rule.step(problem, state)
        ends.append((layout.factors(state.x)[0] - u)[0] / lr)
    expected = -8 * (u[0] @ u[0].T - truth) @ u[0] / (1 - 4 * lr * excess)
    gaps = [np.linalg.norm(end - expected) / np.linalg.norm(expected) for end in ends]
    print(f"off the step without the trace term: {gaps[0]:.1e} rescaled, {gaps[1]:.1e} plain")
    assert gaps[0] < 0.05 and gaps[1] > 0.5


def test_the_rule_recovers_a_network_from_many_inputs():
    truth, x, y = network(6000)
    solution = fastdmf.solve(
        RankOne(x),
        y,
        symmetric=True,
        rule=RescaledGradientDescent(lr=0.02, target=np.trace(truth)),
        elementwise_loss=("truncated_prediction", 8 * y.mean()),
        max_iter=500,
        random_state=0,
        on_failure="ignore",
    )
    print(f"error {error(solution.matrix(), truth):.1e}")
    assert error(solution.matrix(), truth) < 0.02
    estimated = fastdmf.solve(
        RankOne(x),
        y,
        symmetric=True,
        rule=RescaledGradientDescent(lr=0.02),
        max_iter=500,
        random_state=0,
        on_failure="ignore",
    )
    assert error(estimated.matrix(), truth) < 0.03  # tau by the mean of y, off by 1 %


def test_batch_equals_single_runs():
    """Each slice with its own data, mean of y and fate: the second diverges, alone."""
    _, x, y = network(300, d=8)
    batch, starts = np.stack([y, 2 * y, 0.5 * y]), np.array([0.1, 3.0, 0.2])[:, None, None] * np.eye(8)
    arguments = {
        "symmetric": True,
        "rule": RescaledGradientDescent(lr=0.03),
        "elementwise_loss": ("truncated_prediction", 60.0),
        "max_iter": 40,
        "on_failure": "ignore",
        "tol": 1e-30,
    }
    together = fastdmf.solve(RankOne(x), batch, factors=[starts], **arguments)
    statuses = []
    for b in range(3):
        alone = fastdmf.solve(RankOne(x), batch[b], factors=[starts[b]], **arguments)
        np.testing.assert_allclose(together[b].factors[0], alone.factors[0], rtol=1e-12)
        np.testing.assert_allclose(together[b].history["objective"], alone.history["objective"], rtol=1e-12)
        statuses.append(alone.status)
        assert together[b].status is alone.status
    assert statuses == [Status.MAX_ITER, Status.DIVERGED, Status.MAX_ITER]


def test_a_step_that_is_too_large_ends_as_diverged():
    """Where the denominator is not positive the run stays where it is: no NaN, no success by truncation."""
    _, x, y = network(300, d=8)
    start = [3.0 * np.eye(8)]  # ||U||_F^2 = 72, tau = 2
    arguments = {"symmetric": True, "factors": start, "elementwise_loss": ("truncated_prediction", 30.0)}
    with pytest.warns(SolveWarning, match="DIVERGED.*lower the learning rate"):
        solution = fastdmf.solve(RankOne(x), y, rule=RescaledGradientDescent(lr=0.1), max_iter=100, **arguments)
    assert solution.status is Status.DIVERGED
    np.testing.assert_array_equal(solution.factors[0], start[0])
    assert np.isfinite(solution.history["objective"][0]) and np.isinf(solution.history["objective"][-1])
    # Truncation takes the gradient away and leaves the growth: that has to end as well.
    with pytest.warns(SolveWarning, match="DIVERGED"):
        grown = fastdmf.solve(RankOne(x), y, rule=RescaledGradientDescent(lr=1e-3), max_iter=10_000, **arguments)
    assert np.isfinite(grown.factors[0]).all() and grown.n_iter < 10_000


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": 0}, r"RescaledGradientDescent\(lr=...\) must be a number > 0, got 0"),
        ({"lr": "big"}, "lr"),
        ({"target": -1.0}, r"RescaledGradientDescent\(target=...\) must be a number > 0, got -1.0"),
        ({"target": np.nan}, "target"),
    ],
)
def test_bad_rule(settings, match):
    with pytest.raises(ValueError, match=match):
        RescaledGradientDescent(**settings)


def test_the_rule_is_for_the_symmetric_chain(rng):
    op = OPERATORS["rank_one"](6, 6, 30, rng)
    with pytest.raises(ValueError, match=r"RescaledGradientDescent is for U U\^T: pass symmetric=True"):
        fastdmf.solve(op, rng.random(30), rule=RescaledGradientDescent(), depth=2, random_state=0)


# --- the estimator -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning", "ignore:much of y is negative:UserWarning")
@parametrize_with_checks([DMFQuadratic()])
def test_scikit_learn(estimator, check):
    check(estimator)


def test_a_network_is_recovered_from_fewer_samples_than_coefficients():
    truth, x, y = network(160)  # 210 free entries in U U^T
    model = DMFQuadratic(random_state=0).fit(x, y)
    assert model.status_ is Status.CONVERGED
    assert error(model.matrix_, truth) < 1e-3
    (u,) = model.factors_
    assert u.shape == (20, 20)
    np.testing.assert_allclose(model.matrix_, u @ u.T, atol=1e-12)
    np.testing.assert_allclose(model.singular_values_, np.linalg.eigvalsh(model.matrix_)[::-1], atol=1e-10)
    spectral = model.components_.T * model.singular_values_ @ model.components_
    np.testing.assert_allclose(spectral, model.matrix_, atol=1e-10)
    assert model.effective_rank_ == pytest.approx(effective_rank(np.linalg.svd(truth)[1][:2]), rel=0.01)
    assert np.sum(model.singular_values_ > 1e-2) == 2
    _, new, expected = network(200, seed=0)
    new, expected = new[160:], expected[160:]
    naive = np.array([sum((row @ u[:, k]) ** 2 for k in range(20)) for row in new])
    np.testing.assert_allclose(model.predict(new), naive, rtol=1e-12)
    assert model.score(new, expected) > 0.9999
    pairs = np.triu_indices(20)
    ridge = Ridge(alpha=1e-8, fit_intercept=False).fit(x[:, pairs[0]] * x[:, pairs[1]], y)
    assert ridge.score(new[:, pairs[0]] * new[:, pairs[1]], expected) < 0.9


def test_default_rule_and_the_papers():
    """1500 inputs in 50 dimensions, rank 3: errors of U U^T and of fresh predictions, medians of three seeds."""
    errors = {}
    for seed in range(3):
        truth, x, y = network(1500 + 500, d=50, r=3, seed=seed)
        x, y, new, expected = x[:1500], y[:1500], x[1500:], y[1500:]
        paper = {"rule": RescaledGradientDescent(lr=0.02), "truncation": 8, "max_iter": 2000, "validation_fraction": 0}
        for name, settings in {"auto": {}, "truncated": {"truncation": 8}, "paper": paper}.items():
            model = DMFQuadratic(random_state=0, **settings)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(x, y)
            off = np.sqrt(np.mean((model.predict(new) - expected) ** 2) / np.mean(expected**2))
            errors.setdefault(name, []).append((error(model.matrix_, truth), off, model.n_iter_))
    for name, rows in errors.items():
        print(name, "; ".join(f"matrix {e:.1e}, predictions {p:.1e}, {n} steps" for e, p, n in rows))
    medians = {name: np.median(rows, axis=0) for name, rows in errors.items()}
    assert medians["auto"][0] < 5e-4 and medians["auto"][1] < 5e-4
    assert medians["truncated"][0] < 5e-4
    assert 10 * medians["auto"][0] < medians["paper"][0] < 0.1


def test_noise():
    """Held-out samples end the fit in time; one of all samples goes on, though U U^T >= 0 keeps it from overfitting."""
    errors = []
    for seed in range(3):
        truth, x, y = network(400, noise=0.1, seed=seed)
        assert (y < 0).any()  # which noise may do
        stopped = DMFQuadratic(random_state=0).fit(x, y)
        with pytest.warns(ConvergenceWarning, match="STALLED|MAX_ITER"):
            full = DMFQuadratic(random_state=0, validation_fraction=0).fit(x, y)
        assert stopped.status_ is Status.EARLY_STOPPED
        assert "validation" in stopped.history_ and "validation" not in full.history_
        errors.append((error(stopped.matrix_, truth), error(full.matrix_, truth)))
    print("held out, all:", *(f"{e:.3f}, {f:.3f};" for e, f in errors))
    assert np.max(errors) < 0.08
    held_out, full = np.median(errors, axis=0)
    assert held_out < 1.05 * full


@pytest.mark.parametrize(("of_x", "of_y"), [(1e3, 1.0), (1.0, 1e-4), (1e-5, 1e6)])
def test_units_do_not_matter(of_x, of_y):
    truth, x, y = network(200)
    reference = DMFQuadratic(random_state=0).fit(x, y)
    model = DMFQuadratic(random_state=0).fit(of_x * x, of_y * y)
    assert error(model.matrix_, of_y / of_x**2 * truth) < 1e-3
    np.testing.assert_allclose(model.predict(of_x * x), of_y * reference.predict(x), rtol=0.01, atol=1e-3 * of_y)


def test_truncation_leaves_out_long_inputs():
    """Inputs with heavy tails (t, 4 degrees of freedom) and noise in proportion to y: the few largest matter less."""
    errors = []
    for seed in range(3):
        truth, x, _ = network(1000, seed=seed)
        rng = np.random.default_rng(seed)
        x = rng.standard_t(4, x.shape) / np.sqrt(2)
        y = np.einsum("ij,jk,ik->i", x, truth, x) * (1 + 0.3 * rng.standard_normal(len(x)))
        fits = [DMFQuadratic(random_state=0, truncation=t).fit(x, y) for t in (None, 2.0)]
        errors.append([error(model.matrix_, truth) for model in fits])
    print("plain, truncated:", *(f"{plain:.3f}, {kept:.3f};" for plain, kept in errors))
    plain, kept = np.median(errors, axis=0)
    assert kept < 0.9 * plain


def test_width_precision_and_other_forms_of_input():
    truth, x, y = network(200)
    narrow = DMFQuadratic(width=2, random_state=0).fit(x, y)
    assert narrow.factors_[0].shape == (20, 2) and narrow.singular_values_.shape == (2,)
    assert error(narrow.matrix_, truth) < 1e-3
    single = DMFQuadratic(random_state=0).fit(x.astype(np.float32), y.astype(np.float32))
    assert single.factors_[0].dtype == single.matrix_.dtype == np.float32
    assert single.predict(x.astype(np.float32)).dtype == np.float32
    assert error(single.matrix_, truth) < 1e-3
    reference = DMFQuadratic(random_state=0).fit(x, y)
    for same in (x.tolist(), np.asfortranarray(x), pd.DataFrame(x)):
        assert np.array_equal(DMFQuadratic(random_state=0).fit(same, y).matrix_, reference.matrix_)
    assert np.array_equal(pickle.loads(pickle.dumps(reference)).predict(x), reference.predict(x))
    assert np.array_equal(clone(reference).fit(x, y).matrix_, reference.matrix_)


def test_warm_start_goes_on():
    truth, x, y = network(200)
    model = DMFQuadratic(random_state=0, warm_start=True, max_iter=20)
    with pytest.warns(ConvergenceWarning, match="DMFQuadratic: MAX_ITER"):
        first = error(model.fit(x, y).matrix_, truth)
    model.set_params(max_iter=None).fit(10 * x, y)
    assert model.history_["loss"][0] < 0.9  # of W = 0
    assert error(model.matrix_, truth / 100) < 1e-3 < first
    with pytest.raises(ValueError, match="warm_start: the last fit had width"):
        model.set_params(width=3).fit(x, y)


def test_grid_search_and_progress(caplog):
    _, x, y = network(200, noise=0.1)
    search = GridSearchCV(DMFQuadratic(random_state=0), {"width": [1, 4]}, cv=2).fit(x, y)
    assert search.best_params_["width"] == 4 and search.best_score_ > 0.9
    with caplog.at_level(logging.INFO, logger="fastdmf"):
        DMFQuadratic(random_state=0, verbose=1).fit(x, y)
    assert caplog.messages[0].startswith("DMFQuadratic depth 2: iteration 0, loss")


def test_targets_that_no_network_of_this_form_has():
    """Centred or negative targets: a warning, a fit that is not worse than nothing, and no NaN."""
    _, x, y = network(200)
    for target in (y - y.mean(), -y):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = DMFQuadratic(random_state=0).fit(x, target)
        assert "much of y is negative" in str(caught[0].message)
        assert caught[0].filename == __file__
        assert np.mean((model.predict(x) - target) ** 2) <= 1.01 * np.mean(target**2)
    zeros = DMFQuadratic(random_state=0).fit(x, np.zeros(200))
    assert not zeros.predict(x).any() and zeros.effective_rank_ == 0


X, Y = np.random.default_rng(0).standard_normal((12, 4)), np.arange(12.0)


def spoilt(array, value):
    array = array.astype(np.result_type(array, type(value)))
    array.flat[3] = value
    return array


@pytest.mark.parametrize(
    ("parameters", "x", "y", "kind", "message"),
    [
        ({}, X, Y[:9], ValueError, "inconsistent numbers of samples"),
        ({}, X[:1], Y[:1], ValueError, "1 sample.* minimum of 2"),
        ({}, X[:0], Y[:0], ValueError, "0 sample"),
        ({}, X[0], Y, ValueError, "Expected 2D array"),
        ({}, np.zeros((12, 4)), Y, ValueError, "X is zero everywhere"),
        ({}, spoilt(X, np.nan), Y, ValueError, "NaN"),
        ({}, spoilt(X, np.inf), Y, ValueError, "infinity"),
        ({}, X, spoilt(Y, np.nan), ValueError, "y contains NaN"),
        ({}, X, spoilt(Y.astype(object), "text"), ValueError, "must hold numbers"),
        ({}, spoilt(X, 1j), Y, ValueError, "Complex data not supported"),
        ({}, sparse.csr_array(X), Y, TypeError, "[Ss]parse"),
        ({}, X, np.stack([Y, Y], axis=1), ValueError, "1d array"),
        ({"width": 0}, X, Y, ValueError, "width"),
        ({"truncation": 0}, X, Y, ValueError, "truncation must be a number > 0, got 0"),
        ({"truncation": "auto"}, X, Y, ValueError, "truncation must be a number"),
        ({"init_scale": "small"}, X, Y, ValueError, "init_scale must be a number > 0, got 'small'"),
        ({"tol": 0}, X, Y, ValueError, "tol"),
        ({"max_iter": -1}, X, Y, ValueError, "max_iter"),
        ({"patience": 0}, X, Y, ValueError, "patience"),
        ({"rule": "sgd"}, X, Y, ValueError, "rule"),
        ({"device": "tpu"}, X, Y, ValueError, "device"),
        ({"validation_fraction": 1}, X, Y, ValueError, "validation_fraction"),
        ({"verbose": "yes"}, X, Y, ValueError, "verbose"),
    ],
)
def test_bad_input(parameters, x, y, kind, message):
    with pytest.raises(kind, match=message):
        DMFQuadratic(random_state=0, **parameters).fit(x, y)


def test_bad_predict():
    truth, x, y = network(200)
    frame = pd.DataFrame(x, columns=[f"c{j}" for j in range(20)])
    model = DMFQuadratic(random_state=0).fit(frame, y)
    assert list(model.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="X has 19 features, but DMFQuadratic is expecting 20"):
        model.fit(x, y).predict(x[:, 1:])
    model.fit(frame, y)
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[frame.columns[::-1]])
    np.testing.assert_allclose(model.predict(frame), np.sum((x @ model.factors_[0]) ** 2, axis=1), rtol=1e-12)
    with pytest.raises(NotFittedError):
        DMFQuadratic().predict(x)
