"""scikit-learn's estimator checks, and those that it makes on complete tables only, repeated with holes."""

import pickle

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastdmf import DMFImputer, DMFSensing


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([DMFImputer(), DMFSensing()])
def test_scikit_learn(estimator, check):
    check(estimator)


def holed(n=40, p=12, seed=0, dtype=float):
    """Noisy rank-2 table in mixed units, a quarter of it missing."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, 2)) @ rng.standard_normal((2, p)) + 0.1 * rng.standard_normal((n, p)) + 3
    X[:, ::2] *= 1000
    X[rng.random(X.shape) < 0.25] = np.nan
    return X.astype(dtype)


@pytest.fixture(scope="module")
def fitted():
    X = holed()
    return X, DMFImputer(random_state=0).fit(X)


def fit_and_fill(seed):
    X = holed(seed=seed)
    return DMFImputer(random_state=0).fit(X).transform(X)


def test_fit_transform_is_fit_then_transform(fitted):
    X, imputer = fitted
    assert np.array_equal(DMFImputer(random_state=0).fit_transform(X), imputer.transform(X))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_observed_entries_are_unchanged_and_the_type_kept(dtype):
    X = holed(dtype=dtype)
    out = DMFImputer(random_state=0).fit_transform(X)
    seen = ~np.isnan(X)
    assert out.dtype == dtype
    assert out[seen].tobytes() == X[seen].tobytes()
    assert np.isfinite(out).all()


def test_rows_are_filled_alone_as_together(fitted):
    X, imputer = fitted
    together = imputer.transform(X)
    assert np.array_equal(np.vstack([imputer.transform(X[i : i + 1]) for i in range(len(X))]), together)
    order = np.random.default_rng(0).permutation(len(X))
    assert np.array_equal(imputer.transform(X[order]), together[order])


def test_filling_twice_changes_nothing(fitted):
    X, imputer = fitted
    once = imputer.transform(X)
    assert np.array_equal(imputer.transform(once), once)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_same_seed_gives_the_same_bits(fitted, n_threads):
    X, imputer = fitted
    again = DMFImputer(random_state=0, n_threads=n_threads).fit(X)
    for a, b in zip(imputer.factors_, again.factors_):
        assert np.array_equal(a, b)
    assert np.array_equal(imputer.transform(X), again.transform(X))


def test_random_state_instance_and_other_seeds(fitted):
    X, imputer = fitted
    same = DMFImputer(random_state=np.random.RandomState(0)).fit_transform(X)
    assert np.array_equal(same, imputer.transform(X))
    assert not np.array_equal(DMFImputer(random_state=1).fit_transform(X), same)


@pytest.mark.parametrize("missing_values", [np.nan, -1.0])
def test_input_is_never_written_to(tmp_path, missing_values):
    X = holed()
    X[np.isnan(X)] = missing_values
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    before = X.tobytes()
    imputer = DMFImputer(missing_values=missing_values, random_state=0)
    out = imputer.fit_transform(mapped)
    imputer.score(mapped)
    assert np.array_equal(imputer.fit_transform(np.asfortranarray(X)), out)
    assert np.array_equal(imputer.fit_transform(X), out)
    assert X.tobytes() == before


def test_integers_lists_and_markers(fitted):
    X, imputer = fitted
    whole = np.where(np.isnan(X), -1, np.round(X))
    reference = DMFImputer(random_state=0).fit_transform(np.where(whole == -1, np.nan, whole))
    by_marker = DMFImputer(missing_values=-1, random_state=0).fit_transform(whole.astype(int))
    assert by_marker.dtype == np.float64
    assert np.array_equal(by_marker, reference)
    nested = [[None if np.isnan(x) else x for x in row] for row in X]
    assert np.array_equal(DMFImputer(missing_values=None, random_state=0).fit_transform(nested), imputer.transform(X))


@pytest.mark.parametrize("missing_values", [np.nan, -1.0])
def test_masked_entries_are_holes(fitted, missing_values):
    X, imputer = fitted
    masked = np.ma.masked_array(np.where(np.isnan(X), 1e9, X), np.isnan(X))
    assert np.array_equal(
        DMFImputer(missing_values=missing_values, random_state=0).fit_transform(masked), imputer.transform(X)
    )


def test_pandas_missing_values(fitted):
    X, imputer = fitted
    frame = pd.DataFrame(X).convert_dtypes()
    assert np.array_equal(DMFImputer(missing_values=pd.NA, random_state=0).fit_transform(frame), imputer.transform(X))


def test_pandas_in_and_out(fitted):
    X, imputer = fitted
    names = [f"column {j}" for j in range(X.shape[1])]
    frame = pd.DataFrame(X, columns=names, index=np.arange(len(X)) + 100)
    frame["column 3"] = frame["column 3"].astype("Float64")
    out = DMFImputer(random_state=0).set_output(transform="pandas").fit_transform(frame)
    assert list(out.columns) == names
    assert list(out.index) == list(frame.index)
    assert np.array_equal(out.to_numpy(), imputer.transform(X))


def test_polars_in_and_out(fitted):
    X, imputer = fitted
    frame = pl.DataFrame({f"c{j}": [None if np.isnan(x) else x for x in X[:, j]] for j in range(X.shape[1])})
    filled = DMFImputer(random_state=0, add_indicator=True).set_output(transform="polars").fit_transform(frame)
    assert isinstance(filled, pl.DataFrame)
    p = X.shape[1]
    assert filled.columns == [f"c{j}" for j in range(p)] + [f"missingindicator_c{j}" for j in range(p)]
    assert np.array_equal(filled.to_numpy()[:, :p], imputer.transform(X))


def test_feature_names_are_checked():
    frame = pd.DataFrame(holed(), columns=[f"c{j}" for j in range(12)])
    imputer = DMFImputer(random_state=0).fit(frame)
    assert list(imputer.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        imputer.transform(frame.rename(columns={"c0": "other"}))
    with pytest.raises(ValueError, match="feature names"):
        imputer.transform(frame[frame.columns[::-1]])
    with pytest.raises(ValueError, match="input_features"):
        imputer.get_feature_names_out(["wrong"] * 12)


def test_wrong_number_of_features(fitted):
    X, imputer = fitted
    for call in (imputer.transform, imputer.score):
        with pytest.raises(ValueError, match="X has 11 features, but DMFImputer is expecting 12"):
            call(X[:, 1:])


def test_unfitted():
    X = holed()
    imputer = DMFImputer()
    for call in (
        lambda: imputer.transform(X),
        lambda: imputer.score(X),
        imputer.reconstruct,
        imputer.get_feature_names_out,
    ):
        with pytest.raises(NotFittedError):
            call()


def test_pickle_and_clone(fitted):
    X, imputer = fitted
    assert np.array_equal(pickle.loads(pickle.dumps(imputer)).transform(X), imputer.transform(X))
    fresh = clone(imputer)
    assert not hasattr(fresh, "factors_")
    assert np.array_equal(fresh.fit_transform(X), imputer.transform(X))


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_joblib(backend):
    seeds = range(4)
    parallel = joblib.Parallel(n_jobs=2, backend=backend)(joblib.delayed(fit_and_fill)(seed) for seed in seeds)
    for seed, out in zip(seeds, parallel):
        assert np.array_equal(out, fit_and_fill(seed))
