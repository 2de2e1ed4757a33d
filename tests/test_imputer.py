"""DMFImputer: what it fills in, how it scores, what it says and what it refuses."""

import logging
import signal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn import datasets
from sklearn.exceptions import ConvergenceWarning
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastdmf import DMFImputer
from fastdmf.engine import Status
from fastdmf.entry_kfold import spare_last_entries


def low_rank(n=60, p=40, rank=2, hidden=0.5, noise=0.0, seed=0):
    """Return (truth, the same with noise and holes)."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, p))
    seen = truth + noise * rng.standard_normal(truth.shape)
    return truth, np.where(rng.random(truth.shape) < hidden, np.nan, seen)


def hide(truth, share, seed):
    """Return ``truth`` with a share of its entries hidden."""
    hidden = np.random.default_rng(seed).permutation(truth.size)[: round(share * truth.size)]
    X = truth.copy()
    X.flat[hidden] = np.nan
    return X


def error(filled, truth, X):
    """Root mean square error on the holes of X, relative to that of the truth there."""
    holes = np.isnan(X) & ~np.isnan(truth)
    return np.sqrt(np.mean((filled - truth)[holes] ** 2) / np.mean(truth[holes] ** 2))


# --- quality ---------------------------------------------------------------------------------------------------------


def test_exactly_low_rank_data_are_completed():
    truth, X = low_rank()
    imputer = DMFImputer(random_state=0).fit(X)
    assert imputer.status_ is Status.CONVERGED
    assert error(imputer.transform(X), truth, X) < 0.01
    assert error(imputer.reconstruct(), truth, X) < 0.02
    new, holed = low_rank(seed=0)[0][:5] * 2, low_rank(seed=0)[1][:5] * 2
    assert error(imputer.transform(holed), new, holed) < 0.01


@pytest.mark.filterwarnings("ignore:DMFImputer. rows without")
@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("name", ["wine", "iris", "diabetes", "breast_cancer"])
def test_tables_are_filled_better_than_by_means(name, share):
    truth = getattr(datasets, f"load_{name}")().data
    truth = truth / truth.std(axis=0)
    X = hide(truth, share, 0)
    ours = np.sqrt(np.mean((DMFImputer(random_state=0).fit_transform(X) - truth)[np.isnan(X)] ** 2))
    means = np.sqrt(np.mean((SimpleImputer().fit_transform(X) - truth)[np.isnan(X)] ** 2))
    assert ours < 0.95 * means


@pytest.mark.parametrize("shape", [(100, 8), (60, 60), (12, 80)])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_pure_noise_is_filled_with_means(shape, offset):
    rng = np.random.default_rng(0)
    truth = offset + rng.standard_normal(shape)
    X = hide(truth, 0.3, 1)
    ours = np.sqrt(np.mean((DMFImputer(random_state=0).fit_transform(X) - truth)[np.isnan(X)] ** 2))
    means = np.sqrt(np.mean((SimpleImputer().fit_transform(X) - truth)[np.isnan(X)] ** 2))
    assert ours < 1.05 * means


def test_small_tables_of_noise_are_filled_with_means():
    ours = means = 0.0
    for seed in range(12):
        truth = np.random.default_rng(seed).standard_normal((40, 8))
        X = hide(truth, 0.3, seed)
        ours += np.sum((DMFImputer(random_state=seed).fit_transform(X) - truth)[np.isnan(X)] ** 2)
        means += np.sum((SimpleImputer().fit_transform(X) - truth)[np.isnan(X)] ** 2)
    assert ours < 1.03 * means


@given(seed=st.integers(0, 10_000), n=st.integers(1, 8), p=st.integers(1, 8), share=st.floats(0, 1))
def test_held_out_entries_leave_every_row_and_column_one(seed, n, p, share):
    rng = np.random.default_rng(seed)
    observed = rng.random((n, p)) < 0.6
    observed[0, 0] = True
    rows, cols = np.nonzero(observed)
    drawn = np.flatnonzero(rng.random(len(rows)) < share)
    kept = spare_last_entries(drawn, rows, cols)
    held_out = np.array([], int) if kept is None else kept
    assert set(held_out) <= set(drawn)
    fitted = np.delete(np.arange(len(rows)), held_out)
    assert set(rows[fitted]) == set(rows)
    assert set(cols[fitted]) == set(cols)
    # Given back only where a row or column would have been bare.
    bare = np.delete(np.arange(len(rows)), drawn)
    if set(rows[bare]) == set(rows) and set(cols[bare]) == set(cols):
        assert np.array_equal(held_out, drawn)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_fold_in_is_as_good_as_the_fitted_matrix(noise):
    truth, X = low_rank(80, 50, 3, noise=noise, seed=2)
    imputer = DMFImputer(random_state=0).fit(X)
    folded, fitted = error(imputer.transform(X), truth, X), error(imputer.reconstruct(), truth, X)
    assert folded < 1.1 * fitted + 1e-12
    holes = np.isnan(X)
    gap = np.sqrt(np.mean((imputer.transform(X) - imputer.reconstruct())[holes] ** 2) / np.mean(truth[holes] ** 2))
    assert gap < 1.5 * fitted + 1e-12


def test_depth_is_chosen_by_the_held_out_entries():
    for noise in (0.0, 0.5):
        _, X = low_rank(noise=noise, seed=3)
        candidates = [DMFImputer(depth=depth, solver="descent", random_state=0).fit(X) for depth in (2, 3)]
        best = min(candidates, key=lambda imputer: imputer.history_["validation"].min())
        chosen = DMFImputer(solver="descent", random_state=0).fit(X)
        assert chosen.depth_ == best.depth_
        assert all(np.array_equal(a, b) for a, b in zip(chosen.factors_, best.factors_))


def test_grid_search_over_depth_and_width():
    _, X = low_rank(80, 20, 3, hidden=0.3, noise=0.1, seed=4)
    search = GridSearchCV(DMFImputer(random_state=0), {"depth": [2, 3], "width": [1, 3, 20]}, cv=3).fit(X)
    scores = dict(
        zip([(p["depth"], p["width"]) for p in search.cv_results_["params"]], search.cv_results_["mean_test_score"])
    )
    assert search.best_params_["width"] >= 3
    assert max(scores[2, 1], scores[3, 1]) < 2 * search.best_score_  # scores are negative: rank 1 is far off
    assert -search.best_score_ < 0.3


def test_pipeline_with_a_classifier():
    data, target = datasets.load_iris(return_X_y=True)
    X = hide(data, 0.3, 0)
    model = make_pipeline(DMFImputer(random_state=0), StandardScaler(), LogisticRegression())
    assert cross_val_score(model, X, target, cv=3).mean() > 0.85


# --- the fold-in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["descent", "variational", "gaussian"])
def test_fold_in_is_the_conditional_mean(solver):
    """Against explicit covariances, with the standard deviations; a row's own doubt of the loadings is noise to it."""
    _, X = low_rank(50, 12, 2, noise=0.2, seed=5)
    X[:, 3] *= 1e4
    imputer = DMFImputer(solver=solver, random_state=0).fit(X)
    rows, scale = imputer._rows, imputer.scale_
    mean = imputer.mean_ + scale * rows.mean
    out, std = imputer.transform(X), imputer.uncertainty(X)
    assert imputer.solver_ == solver
    for row, filled, spread in zip(X, out, std):
        o = ~np.isnan(row)
        if solver == "gaussian":
            signal, noise = scale[:, None] * rows.covariance * scale, np.zeros((12, 12))
        else:
            weight = rows.noise / (rows.noise + o.sum() * rows.doubt)
            signal = scale[:, None] * (rows.loadings * weight @ rows.loadings.T) * scale
            noise = rows.noise * np.diag(scale**2)
        gain = signal[~o][:, o] @ np.linalg.inv((signal + noise)[o][:, o])
        assert np.allclose(filled[~o], mean[~o] + gain @ (row[o] - mean[o]), rtol=1e-7, atol=1e-7)
        left = (signal + noise)[~o][:, ~o] - gain @ signal[o][:, ~o]
        assert np.allclose(spread[~o], np.sqrt(np.diag(left)), rtol=1e-6)
        assert (spread[o] == 0).all()


def test_loadings_hold_the_covariance_of_the_fitted_rows():
    _, X = low_rank(noise=0.2, seed=6)
    imputer = DMFImputer(solver="descent", random_state=0).fit(X)
    fitted, rows = imputer.reconstruct(), imputer._rows
    covariance = np.cov(fitted, rowvar=False, bias=True)
    assert np.allclose(rows.mean, fitted.mean(axis=0), atol=1e-12)
    held_out = imputer.history_["validation"].min() * np.nanmean(X**2)
    left_out = np.trace(covariance - rows.loadings @ rows.loadings.T) / X.shape[1]
    assert -1e-12 < left_out <= 0.0101 * held_out
    assert rows.loadings.shape[1] < 40


# --- attributes ------------------------------------------------------------------------------------------------------


def test_attributes():
    _, X = low_rank(noise=0.1)
    imputer = DMFImputer(depth=3, width=(9, 7), random_state=0).fit(X)
    assert [w.shape for w in imputer.factors_] == [(9, 40), (7, 9), (60, 7)]
    product = imputer.factors_[2] @ imputer.factors_[1] @ imputer.factors_[0]
    assert np.allclose(imputer.reconstruct(), product, atol=1e-12)
    s = np.linalg.svd(product, compute_uv=False)[:7]
    assert np.allclose(imputer.singular_values_, s, atol=1e-10 * s[0])
    assert imputer.components_.shape == (7, 40)
    assert np.allclose(imputer.components_ @ imputer.components_.T, np.eye(7), atol=1e-8)
    p = s[s > 0] / s.sum()
    assert np.isclose(imputer.effective_rank_, np.exp(-np.sum(p * np.log(p))))
    assert imputer.depth_ == 3
    assert imputer.n_iter_ == imputer.history_["iteration"][-1] > 0
    assert imputer.device_ == "cpu"
    assert imputer.solver_ == "descent"
    assert imputer.n_features_in_ == 40
    assert imputer.noise_variance_ > 0


def test_standardize():
    mixed = datasets.load_wine().data
    imputer = DMFImputer(random_state=0).fit(mixed)
    assert np.allclose(imputer.scale_, mixed.std(axis=0))
    assert np.allclose(imputer.mean_, mixed.mean(axis=0))
    _, wide = low_rank(20, 60)
    assert not DMFImputer(random_state=0).fit(wide + 3).mean_.any()
    _, tall = low_rank(200, 40, hidden=0.2)
    imputer = DMFImputer(random_state=0).fit(tall + 3)
    assert np.allclose(imputer.mean_, np.nanmean(tall + 3, axis=0))
    assert (imputer.scale_ == 1).all()
    imputer = DMFImputer(random_state=0, standardize=True).fit(wide)
    assert np.allclose(imputer.scale_, np.nanstd(wide, axis=0))
    imputer = DMFImputer(random_state=0, standardize=False).fit(mixed)
    assert not imputer.mean_.any()
    assert (imputer.scale_ == 1).all()


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_units_do_not_matter(unit):
    _, X = low_rank(40, 30, noise=0.1)
    out = DMFImputer(random_state=0).fit_transform(X)
    assert np.allclose(DMFImputer(random_state=0).fit_transform(unit * X) / unit, out, rtol=1e-3, atol=1e-3)
    exact = DMFImputer(random_state=0).fit_transform(2.0**30 * X)
    assert np.allclose(exact / 2.0**30, out, rtol=1e-9, atol=1e-9)


# --- score -----------------------------------------------------------------------------------------------------------


def test_score_hides_a_seeded_fifth():
    truth, X = low_rank(noise=0.2, seed=7)
    imputer = DMFImputer(random_state=0).fit(X)
    rows, cols = np.nonzero(~np.isnan(X))
    hidden = np.random.default_rng(0).permutation(len(rows))[: round(0.2 * len(rows))]
    rest = X.copy()
    rest[rows[hidden], cols[hidden]] = np.nan
    miss = imputer.transform(rest)[rows[hidden], cols[hidden]] - X[rows[hidden], cols[hidden]]
    assert np.isclose(imputer.score(X), -np.sqrt(np.mean(miss**2)), rtol=1e-12)
    assert imputer.score(X) == imputer.score(X)
    assert -0.5 < imputer.score(X) < -0.2


def test_score_counts_columns_alike_in_mixed_units():
    X = datasets.load_wine().data
    assert -1 < DMFImputer(random_state=0).fit(X).score(X) < -0.5


# --- empty rows and columns ------------------------------------------------------------------------------------------


def test_empty_rows_and_columns_are_filled_and_said():
    truth, X = low_rank(noise=0.1)
    X[7] = np.nan
    X[:, [3, 11]] = np.nan
    frame = pd.DataFrame(X, columns=[f"c{j}" for j in range(40)])
    imputer = DMFImputer(random_state=0)
    with pytest.warns(UserWarning, match="columns without any observed entry are filled .*: c3, c11$"):
        imputer.fit(frame)
    with pytest.warns(UserWarning, match="rows without any observed entry .*: 7$"):
        out = imputer.transform(frame)
    assert np.allclose(out[:, [3, 11]], np.nanmean(X))
    fitted = np.delete(imputer.reconstruct(), 7, axis=0)
    assert np.allclose(out[7], fitted.mean(axis=0), atol=1e-6)
    assert np.allclose(imputer.reconstruct()[7], out[7])
    others = np.delete(np.arange(40), [3, 11])
    holed = np.where(np.isnan(X), np.nan, X)[:, others]
    assert error(np.delete(out[:, others], 7, 0), np.delete(truth[:, others], 7, 0), np.delete(holed, 7, 0)) < 0.15


def test_empty_columns_can_be_dropped():
    _, X = low_rank(noise=0.1)
    X[:, 3] = np.nan
    imputer = DMFImputer(random_state=0, keep_empty_features=False, add_indicator=True).set_output(transform="pandas")
    with pytest.warns(UserWarning, match="columns without any observed entry are dropped: 3"):
        out = imputer.fit_transform(X)
    assert list(out.columns[:39]) == [f"x{j}" for j in range(40) if j != 3]
    assert "missingindicator_x3" in out.columns
    assert imputer.reconstruct().shape == (60, 39)
    assert np.isfinite(imputer.score(X))


def test_empty_column_that_is_observed_later():
    _, X = low_rank(noise=0.1)
    X[:, 3] = np.nan
    with pytest.warns(UserWarning, match="columns without"):
        imputer = DMFImputer(random_state=0).fit(X)
    again = X.copy()
    again[:, 3] = 5.0
    out = imputer.transform(again)
    assert (out[:, 3] == 5).all()
    assert np.array_equal(np.delete(out, 3, 1), np.delete(imputer.transform(X), 3, 1))


@pytest.mark.parametrize("value", [0.0, 1.0, -7.0])
def test_constants_are_filled_with_themselves(value):
    X = np.full((6, 5), value)
    X[1, 2] = X[4, 0] = np.nan
    assert np.allclose(DMFImputer(random_state=0).fit_transform(X), value, atol=1e-6)


# --- options ---------------------------------------------------------------------------------------------------------


def test_bounds():
    truth, X = low_rank(noise=0.1)
    out = DMFImputer(random_state=0, min_value=-0.5, max_value=np.full(40, 0.25)).fit_transform(X)
    holes = np.isnan(X)
    free = DMFImputer(random_state=0).fit_transform(X)
    assert np.array_equal(out[holes], np.clip(free[holes], -0.5, 0.25))
    assert np.array_equal(out[~holes], X[~holes])


@pytest.mark.parametrize(("bounds", "filled"), [({"min_value": 1e300}, 1), ({"max_value": -1e300}, -1)])
def test_bounds_beyond_float32(bounds, filled):
    """Its largest numbers stand for them."""
    _, X = low_rank(20, 10, hidden=0.3)
    out = DMFImputer(random_state=0, **bounds).fit_transform(X.astype(np.float32))
    assert out.dtype == np.float32 and (out[np.isnan(X)] == filled * np.finfo(np.float32).max).all()


def test_indicator():
    _, X = low_rank(20, 10, hidden=0.3)
    X[:, 2] = 1.0
    imputer = DMFImputer(random_state=0, add_indicator=True)
    out = imputer.fit_transform(X)
    holes = np.isnan(np.delete(X, 2, axis=1))
    assert np.array_equal(out[:, 10:], holes)
    expected = [f"x{j}" for j in range(10)] + [f"missingindicator_x{j}" for j in range(10) if j != 2]
    assert list(imputer.get_feature_names_out()) == expected


def test_without_held_out_entries_the_fit_goes_to_tol():
    _, X = low_rank(noise=0.1)
    imputer = DMFImputer(random_state=0, validation_fraction=0, tol=1e-4).fit(X)
    assert imputer.status_ is Status.CONVERGED
    assert imputer.depth_ == 3
    assert "validation" not in imputer.history_
    seen = ~np.isnan(X)
    residual = (imputer.reconstruct() - X)[seen]
    assert np.sum(residual**2) <= 1.001e-4 * np.sum(X[seen] ** 2)


def test_warm_start():
    _, X = low_rank(noise=0.1)
    imputer = DMFImputer(random_state=0, depth=2, validation_fraction=0, tol=1e-3, warm_start=True).fit(X)
    cold = imputer.n_iter_
    first = imputer.transform(X)
    assert imputer.fit(X).n_iter_ < 0.1 * cold
    assert np.allclose(imputer.transform(X), first, atol=1e-6)
    with pytest.raises(ValueError, match=r"warm_start: the last fit's matrix was \(60, 40\), this one is \(59, 40\)"):
        imputer.fit(X[1:])
    with pytest.raises(ValueError, match="warm_start: the last fit had depth 2, depth=3 is asked"):
        imputer.set_params(depth=3).fit(X)
    with pytest.raises(ValueError, match=r"warm_start: the last fit had width \(40,\), width=5 is asked"):
        imputer.set_params(depth=2, width=5).fit(X)


def test_verbose_logs_progress(caplog):
    _, X = low_rank(noise=0.1)
    with caplog.at_level(logging.INFO, logger="fastdmf"):
        DMFImputer(random_state=0, depth=2).fit(X)
        assert not caplog.records
        DMFImputer(random_state=0, depth=2, verbose=1).fit(X)
    assert "DMFImputer depth 2: iteration 0, loss" in caplog.text
    assert "held out" in caplog.text
    assert 3 < len(caplog.records) < 40


def test_max_iter_warns():
    _, X = low_rank()
    with pytest.warns(ConvergenceWarning, match="DMFImputer: MAX_ITER: max_iter was reached"):
        imputer = DMFImputer(random_state=0, max_iter=3).fit(X)
    assert imputer.status_ is Status.MAX_ITER
    assert imputer.n_iter_ == 3
    assert np.isfinite(imputer.transform(X)).all()


def test_interrupt_leaves_a_fitted_imputer():
    truth, X = low_rank()

    class Interrupt(logging.Handler):
        def emit(self, record):
            if "iteration 20," in record.getMessage():
                signal.raise_signal(signal.SIGINT)

    handler, logger = Interrupt(), logging.getLogger("fastdmf")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with pytest.warns(ConvergenceWarning, match="INTERRUPTED"):
            imputer = DMFImputer(solver="descent", random_state=0, verbose=1).fit(X)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert imputer.status_ is Status.INTERRUPTED
    assert imputer.depth_ == 2  # depth 3 was not begun
    assert imputer.transform(X).shape == X.shape


# --- refusals --------------------------------------------------------------------------------------------------------


def with_entry(value):
    X = np.arange(20.0).reshape(5, 4)
    X[2, 1] = value
    return X


@pytest.mark.parametrize(
    ("X", "kind", "message"),
    [
        (np.full((4, 3), np.nan), ValueError, "X has no observed entry"),
        (with_entry(np.inf), ValueError, "X contains infinite values .1, the first at row 2, column 1."),
        (with_entry(-np.inf), ValueError, "infinite"),
        (with_entry(0) + 1j, ValueError, "Complex data not supported: X"),
        (np.array([["a", "b"], ["c", "d"]]), ValueError, "X must hold numbers"),
        (np.array([[1.0, "b"], [2.0, 3.0]], dtype=object), ValueError, "X must hold numbers.*encode"),
        (pd.DataFrame({"a": [1.0, 2.0], "b": ["u", "v"]}), ValueError, "X must hold numbers"),
        (pd.DataFrame({"a": pd.to_datetime(["2020-01-01", "2020-01-02"]), "b": [1, 2]}), TypeError, "X must hold real"),
        ([[1j, 2], [3, 4]], TypeError, "X must hold real numbers.*complex"),
        ([[1.0, 2.0], [3.0]], ValueError, "X must hold numbers.*inhomogeneous"),
        (with_entry(1e200), ValueError, "X holds values too large to be squared, up to 1.0e.200"),
        (np.arange(5.0), ValueError, "Expected 2D array"),
        (np.zeros((3, 2, 2)), ValueError, "dim 3|3 dim"),
        (np.zeros((0, 3)), ValueError, "0 sample"),
        (np.zeros((3, 0)), ValueError, "0 feature"),
        (sparse.csr_matrix(np.eye(4)), TypeError, "[Ss]parse"),
    ],
)
def test_bad_input(X, kind, message):
    with pytest.raises(kind, match=message):
        DMFImputer(random_state=0).fit(X)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"depth": 0}, "depth"),
        ({"depth": 2.5}, "depth"),
        ({"width": 0}, "width"),
        ({"width": -3}, "width"),
        ({"depth": 3, "width": (2,)}, "width"),
        ({"tol": 0}, "tol"),
        ({"tol": -1e-3}, "tol"),
        ({"init_scale": 0}, "init_scale"),
        ({"init_scale": -1}, "init_scale"),
        ({"max_iter": -1}, "max_iter"),
        ({"patience": 0}, "patience"),
        ({"rule": "sgd"}, "rule"),
        ({"solver": "sgd"}, "solver must be 'auto' or 'variational' or 'gaussian' or 'descent' or 'recovery'"),
        ({"device": "tpu"}, "device"),
        ({"n_threads": 0}, "n_threads"),
        ({"validation_fraction": 1.0}, "validation_fraction must be a number in"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"validation_fraction": "a"}, "validation_fraction"),
        ({"standardize": "yes"}, "standardize must be True, False or 'auto'"),
        ({"min_value": 2.0, "max_value": 1.0}, "min_value must be below max_value"),
        ({"min_value": [0.0, 0.0]}, "min_value must be a number or hold one for each of the 4 features"),
        ({"max_value": "high"}, "max_value must be a number"),
        ({"missing_values": "?"}, "missing_values must be NaN or a number"),
        ({"verbose": -1}, "verbose"),
        ({"random_state": "seed"}, "seed"),
    ],
)
def test_bad_parameters(parameters, message):
    X = with_entry(np.nan)
    if "missing_values" in parameters:
        X = with_entry(0)
    with pytest.raises(ValueError, match=message):
        DMFImputer(**parameters).fit(X)


def test_nan_beside_another_marker():
    with pytest.raises(ValueError, match="X contains NaN, but holes are marked by missing_values=-1"):
        DMFImputer(missing_values=-1).fit(with_entry(np.nan))


def test_missing_device():
    with pytest.raises(RuntimeError, match="cuda"):
        DMFImputer(device="cuda").fit(with_entry(np.nan))


def test_infinite_values_in_new_rows():
    imputer = DMFImputer(random_state=0).fit(with_entry(np.nan))
    for call in (imputer.transform, imputer.score):
        with pytest.raises(ValueError, match="infinite"):
            call(with_entry(np.inf))
    with pytest.raises(ValueError, match="no observed entry to score"):
        imputer.score(np.full((2, 4), np.nan))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_columns_that_do_not_vary_keep_their_mean_in_any_unit(scale):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((20, 5)) * [1, 10, 100, 1, 1]
    X[:, 3] = np.nan
    X[4, 3] = 0.3
    X[:, 4] = -2.0
    X[7:9, 4] = np.nan
    out = DMFImputer(random_state=0).fit_transform(scale * X) / scale
    np.testing.assert_allclose(out[:, 3], 0.3, atol=1e-2)
    np.testing.assert_allclose(out[:, 4], -2.0, atol=1e-2)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9),
    p=st.integers(1, 7),
    share=st.floats(0, 0.8),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 999),
)
@pytest.mark.filterwarnings("ignore:DMFImputer")
def test_any_small_table(n, p, share, scale, seed):
    rng = np.random.default_rng(seed)
    X = scale * rng.standard_normal((n, p))
    X[rng.random((n, p)) < share] = np.nan
    X[0, 0] = scale
    out = DMFImputer(random_state=0).fit_transform(X)
    seen = ~np.isnan(X)
    assert out.shape == X.shape
    assert np.isfinite(out).all()
    assert np.array_equal(out[seen], X[seen])
    assert np.abs(out).max() < 100 * np.abs(X[seen]).max()


def test_exactly_low_rank_data_are_recovered_to_the_last_digits():
    """2000 entries of a 100 x 100 matrix of rank 5: a fifth, and 1e-10 where the descent stops at 4e-3."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((100, 5)) @ rng.standard_normal((5, 100))
    X = np.full(truth.shape, np.nan)
    seen = rng.permutation(truth.size)[:2000]
    X.flat[seen] = truth.flat[seen]
    for solver in ("auto", "recovery"):
        imputer = DMFImputer(solver=solver, random_state=0)
        filled = imputer.fit_transform(X)
        assert imputer.solver_ == "recovery"
        assert imputer.status_ is Status.EXACT
        assert imputer.noise_variance_ < 1e-10
        assert len(imputer.singular_values_) == 5
        assert np.linalg.norm(imputer.reconstruct() - truth) < 1e-10 * np.linalg.norm(truth)
        assert np.linalg.norm(filled - truth) < 1e-6 * np.linalg.norm(truth)


def test_recovery_on_request_fits_noise_too():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((60, 2)) @ rng.standard_normal((2, 50))
    X = truth + 0.1 * rng.standard_normal(truth.shape)
    X[rng.random(X.shape) < 0.5] = np.nan
    imputer = DMFImputer(solver="recovery", random_state=0).fit(X)
    assert imputer.status_ is Status.NOISE_LEVEL
    assert np.linalg.norm(imputer.reconstruct() - truth) < 0.15 * np.linalg.norm(truth)
    with pytest.raises(ValueError, match="too few or all alike to recover"):
        DMFImputer(solver="recovery").fit(np.eye(4) + np.where(np.eye(4) > 0, 0, np.nan))
