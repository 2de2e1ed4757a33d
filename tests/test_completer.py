"""DMFCompleter: what it accepts, predictions, folding in, partial fits, errors, and scikit-learn's manners."""

import doctest
import pickle
import warnings

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.base import clone, is_regressor
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils import estimator_checks

from fastdmf import DMFCompleter, EntryMask, completer, entry_kfold, vbmf
from fastdmf.engine import Status

N1, N2, RANK = 200, 180, 3


def problem(seed=0, count=6000, noise=0.3, dtype=np.float64):
    """Low rank, biases and noise at random cells: (pairs, values, all values without the noise)."""
    rng = np.random.default_rng(seed)
    truth = 1 + 0.4 * rng.standard_normal((N1, 1)) + 0.4 * rng.standard_normal(N2)
    truth += rng.standard_normal((N1, RANK)) @ rng.standard_normal((RANK, N2))
    pairs = np.column_stack(np.divmod(rng.choice(N1 * N2, count, replace=False), N2))
    y = truth[tuple(pairs.T)] + noise * rng.standard_normal(count)
    return pairs, y.astype(dtype), truth


def as_sparse(pairs, y, shape=(N1, N2), kind=sparse.csr_array):
    return kind(sparse.coo_array((y, tuple(pairs.T)), shape=shape))


def rmse(a, b):
    return float(np.sqrt(np.mean((np.asarray(a) - b) ** 2)))


@pytest.fixture(scope="module")
def data():
    return problem()


@pytest.fixture(scope="module")
def fitted(data):
    pairs, y, _ = data
    return DMFCompleter(random_state=0).fit(pairs, y)


@pytest.fixture(scope="module")
def words(data):
    """The same with ids that are strings."""
    pairs, y, _ = data
    named = np.array([[f"u{i:03}", f"v{j:03}"] for i, j in pairs], object)
    return named, DMFCompleter(random_state=0).fit(named, y)


@pytest.fixture(scope="module")
def by_descent(data):
    pairs, y, _ = data
    return DMFCompleter(solver="descent", random_state=0).fit(pairs, y)


# --- the fit ---------------------------------------------------------------------------------------------------------


def test_completes(data, fitted):
    pairs, _, truth = data
    error = rmse(fitted.reconstruct(), truth)
    print(f"error {error:.4f} without noise, {len(fitted.singular_values_)} components, {fitted.n_iter_} sweeps")
    assert error < 0.19 and fitted.status_ is Status.CONVERGED
    assert len(fitted.singular_values_) == RANK and 1 < fitted.effective_rank_ <= RANK
    assert abs(fitted.noise_variance_ - 0.09) < 0.01
    assert fitted.score(pairs, data[1]) > 0.95


def test_equals_vbmf(data):
    """The model is the solver's: the same predictions, standard deviations and factors for the same seed."""
    pairs, y, _ = data
    model = DMFCompleter(random_state=5, min_value=-np.inf, max_value=np.inf).fit(as_sparse(pairs, y))
    seed = int(np.random.RandomState(5).randint(np.iinfo(np.int32).max))
    solution = vbmf(EntryMask(*pairs.T, (N1, N2)), y, random_state=seed)
    np.testing.assert_allclose(model.reconstruct(), solution.matrix(), atol=1e-12)
    mean, std = model.predict(pairs, return_std=True)
    expected = solution.predict(*pairs.T, return_std=True)
    np.testing.assert_allclose(mean, expected[0], atol=1e-12)
    np.testing.assert_allclose(std, expected[1], rtol=0.01)
    for a, b in zip(model.factors_, solution.factors):
        np.testing.assert_array_equal(a, b)


def test_fitted_attributes(data, fitted, by_descent):
    # Rotations through Gram matrices lose half of the digits of modes that are almost dead, which descents leave.
    for model, solver, tol in ((fitted, "variational", 1e-8), (by_descent, "descent", 1e-4)):
        latent = model.factors_[0]
        for w in model.factors_[1:]:
            latent = w @ latent
        whole = model.mean_ + model.row_bias_[:, None] + model.column_bias_ + latent
        low, high = data[1].min(), data[1].max()
        np.testing.assert_allclose(model.reconstruct(), np.clip(whole, low, high), atol=tol)
        r = len(model.singular_values_)
        np.testing.assert_allclose((model.components_ @ model.components_.T)[:RANK, :RANK], np.eye(RANK), atol=1e-6)
        np.testing.assert_allclose(np.linalg.svd(latent, compute_uv=False)[:r], model.singular_values_, atol=tol)
        assert len(model.factors_) == model.depth_ == 3
        assert model.solver_ == solver and model.device_ == "cpu" and model.n_iter_ >= 1
        assert "loss" in model.history_
        assert list(model.row_ids_) == list(range(N1)) and list(model.column_ids_) == list(range(N2))


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("solver", ["variational", "descent"])
def test_depth_and_width(data, solver, depth):
    pairs, y, truth = data
    # Deep descents through narrow chains stay at saddle points.
    width = {("descent", 2): (4,), ("descent", 4): 10}.get((solver, depth), 4)
    model = DMFCompleter(depth, width, solver=solver, patience=400, random_state=0).fit(pairs, y)
    assert len(model.factors_) == depth == model.depth_
    assert model.factors_[0].shape[0] <= max(np.atleast_1d(width)) and rmse(model.reconstruct(), truth) < 0.5


def test_descent(data, by_descent):
    """Early stopping on held-out entries; biases of their own help on ratings, and hurt where there are hardly any."""
    pairs, y, truth = data
    without = DMFCompleter(solver="descent", biases=False, random_state=0).fit(pairs, y)
    for model, bound in ((by_descent, 0.45), (without, 0.25)):
        error = rmse(model.reconstruct(), truth)
        print(f"error {error:.4f}, noise {model.noise_variance_:.4f}, {model.status_}")
        assert error < bound and "validation" in model.history_
        assert model.status_ in (Status.EARLY_STOPPED, Status.STALLED)
        assert 0.09 < model.noise_variance_ < 0.25
    assert by_descent.row_bias_.any() and not without.row_bias_.any()
    with pytest.raises(ValueError, match="return_std=True needs the variational solver"):
        by_descent.predict([[0, 0]], return_std=True)


def test_descent_recovers_exactly_low_rank_data():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((80, 2)) @ rng.standard_normal((2, 60))
    pairs = np.argwhere(rng.random(truth.shape) < 0.4)
    model = DMFCompleter(solver="descent", biases=False, validation_fraction=0, tol=1e-8, random_state=0)
    model.set_params(min_value=-np.inf, max_value=np.inf).fit(pairs, truth[tuple(pairs.T)])
    assert model.status_ is Status.CONVERGED and not model.row_bias_.any()
    assert rmse(model.reconstruct(), truth) < 1e-3
    # A new row is known exactly from a few of its entries.
    row = model.fold_in(sparse.csr_array(np.where(np.arange(60) < 12, truth[:1], 0))).reconstruct()
    assert rmse(row, truth[0]) < 1e-2


def test_types(data):
    """float32 and small integers are fitted in float32, the rest in float64; predictions follow."""
    pairs, y, truth = data
    for kind, dtype in ((np.float32, np.float32), (np.int8, np.float32), (np.int64, np.float64), (bool, np.float32)):
        values = np.clip(np.round(y), -9, 9).astype(kind)
        model = DMFCompleter(random_state=0).fit(pairs, values)
        assert model.factors_[0].dtype == dtype
        assert model.predict(pairs).dtype == model.reconstruct([0]).dtype == model.top_k([0])[1].dtype == dtype


def test_weights(data):
    """An entry of weight 2 counts as two, one of weight 0 not at all."""
    pairs, y, _ = data
    half = len(y) // 2
    weight = np.r_[np.ones(half), np.zeros(len(y) - half)]
    model = DMFCompleter(random_state=0, implicit_features=False, min_value=-np.inf, max_value=np.inf)
    left = clone(model).fit(pairs, y, entry_weight=weight)
    only = model.fit(as_sparse(pairs[:half], y[:half]))
    np.testing.assert_allclose(left.reconstruct(), only.reconstruct(), atol=1e-10)
    twice = DMFCompleter(random_state=0).fit(pairs, y, entry_weight=2 * np.ones(len(y)))
    assert twice.noise_variance_ < 0.12
    assert (
        DMFCompleter(solver="descent", random_state=0).fit(pairs, y, entry_weight=weight).score(pairs[:half], y[:half])
        > 0.9
    )


def test_bounds(data):
    pairs, y, _ = data
    model = DMFCompleter(random_state=0).fit(pairs, y)
    assert y.min() <= model.reconstruct().min() and model.reconstruct().max() <= y.max()
    free = clone(model).set_params(min_value=-np.inf, max_value=np.inf).fit(pairs, y)
    assert free.reconstruct().min() < y.min()
    tight = clone(model).set_params(min_value=0, max_value=1.5).fit(pairs, y)
    for values in (tight.reconstruct(), tight.predict(pairs), tight.top_k()[1]):
        assert values.min() >= 0 and values.max() == 1.5


@pytest.mark.parametrize(("low", "high"), [(1e300, np.inf), (-np.inf, -1e300), (-1e300, 1e300)])
def test_bounds_beyond_the_type_of_the_values(data, low, high):
    """The largest numbers of float32 stand for what it cannot hold."""
    pairs, y, _ = data
    model = DMFCompleter(random_state=0, min_value=low, max_value=high).fit(pairs, y.astype(np.float32))
    out, largest = model.predict(pairs), np.finfo(np.float32).max
    assert out.dtype == np.float32 and np.isfinite(out).all()
    if low == 1e300:
        assert (out == largest).all()
    elif high == -1e300:
        assert (out == -largest).all()
    else:
        np.testing.assert_array_equal(
            out,
            clone(model)
            .set_params(min_value=-np.inf, max_value=np.inf)
            .fit(pairs, y.astype(np.float32))
            .predict(pairs),
        )


def test_constant_values():
    pairs = np.argwhere(np.ones((6, 5)))
    for solver in ("variational", "descent"):
        model = DMFCompleter(solver=solver, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(pairs, np.full(30, 2.5))
        np.testing.assert_allclose(model.predict(pairs), 2.5)


def test_empty_and_single_entry_rows_and_columns():
    pairs, y, truth = problem(1, 3000)
    X = as_sparse(np.vstack([pairs, [N1 + 1, 3], [5, N2 + 1]]), np.r_[y, 2.0, 2.0], (N1 + 3, N2 + 3))
    model = DMFCompleter(random_state=0).fit(X)
    whole = model.reconstruct()
    assert whole.shape == X.shape and np.isfinite(whole).all()
    assert rmse(whole[:N1, :N2], truth) < 0.35
    # The empty row is predicted like an unknown one, up to what its emptiness says.
    assert rmse(whole[N1], np.clip(model.mean_ + model.column_bias_, y.min(), y.max())) < 0.5
    one = DMFCompleter(random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        one.fit([[0, 0]], [3.0])
    assert one.predict([[0, 0]]) == 3.0


# --- input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        sparse.csr_array,
        sparse.csc_array,
        sparse.coo_array,
        sparse.lil_array,
        sparse.dok_array,
        sparse.csr_matrix,
        sparse.csc_matrix,
        sparse.coo_matrix,
    ],
)
def test_sparse_formats(data, fitted, kind):
    """Every format that says what it stores, with 64-bit indices as well; patterns come back in the same format."""
    pairs, y, _ = data
    X = as_sparse(pairs, y, kind=kind)
    before = X.tocoo(copy=True).data.tobytes()
    model = DMFCompleter(random_state=0).fit(X)
    np.testing.assert_allclose(model.reconstruct(), fitted.reconstruct(), atol=1e-10)
    assert X.tocoo().data.tobytes() == before
    pattern = as_sparse(pairs[:500], np.ones(500, bool), kind=kind)
    out, std = model.predict(pattern, return_std=True)
    for part in (out, std):
        assert part.shape == X.shape and part.nnz == 500 and part.dtype == np.float64
        assert part.format == (pattern.format if pattern.format in ("csr", "csc", "coo") else "csr")
        assert isinstance(part, sparse.sparray) == isinstance(pattern, sparse.sparray)
    np.testing.assert_allclose(out.toarray()[tuple(pairs[:500].T)], model.predict(pairs[:500]), atol=1e-12)
    assert pattern.dtype == bool
    if kind is sparse.csr_array:
        X.indptr, X.indices = X.indptr.astype(np.int64), X.indices.astype(np.int64)
        np.testing.assert_array_equal(DMFCompleter(random_state=0).fit(X).reconstruct(), model.reconstruct())


def test_explicit_zeros_are_observed():
    pairs, _, _ = problem()
    X = as_sparse(pairs, np.where(np.arange(len(pairs)) % 2, 0.0, 1.0))
    assert X.nnz == len(pairs)
    model = DMFCompleter(random_state=0).fit(X)
    assert abs(model.mean_ - 0.5) < 1e-9
    # A prediction that is zero stays stored.
    low = clone(model).set_params(min_value=-1, max_value=0).fit(X)
    assert low.predict(X).nnz == len(pairs)


def as_polars(frame):
    """Return the same as polars holds it; ``from_pandas`` would need pyarrow."""
    return pl.DataFrame({name: frame[name].tolist() for name in frame})


def test_frames(data, words):
    pairs, y, _ = data
    named, model = words
    frame = pd.DataFrame({"user": named[:, 0], "item": named[:, 1], "rating": y})
    turned = pd.DataFrame({"when": 0, "rating": y, "item": named[:, 1], "user": named[:, 0]})
    columns = ("user", "item", "rating")
    same = [
        DMFCompleter(random_state=0).fit(frame),
        DMFCompleter(random_state=0, columns=columns).fit(turned),
        DMFCompleter(random_state=0, columns=columns[:2]).fit(turned, y),
        DMFCompleter(random_state=0).fit(frame[["user", "item"]], y),
        DMFCompleter(random_state=0).fit(as_polars(frame)),
        DMFCompleter(random_state=0).fit(frame.astype({"user": "category", "rating": "Float64"})),
        DMFCompleter(random_state=0).fit(named.tolist(), y.tolist()),
        DMFCompleter(random_state=0).fit(named.astype(str), y),
    ]
    for other in same:
        np.testing.assert_array_equal(other.reconstruct(), model.reconstruct())
        assert list(other.row_ids_) == [f"u{i:03}" for i in range(N1)]
    expected = model.predict(named[:50])
    np.testing.assert_array_equal(same[0].predict(frame[:50]), expected)
    np.testing.assert_array_equal(same[1].predict(turned[:50]), expected)
    np.testing.assert_array_equal(same[1].predict(turned[["item", "user"]][:50]), expected)
    np.testing.assert_array_equal(same[4].predict(as_polars(frame[["user", "item"]][:50])), expected)
    assert same[0].score(frame) == pytest.approx(model.score(named, y))


def test_ids_are_only_names(data, fitted, words):
    """Integers beyond 32 bits and strings: the same fit as positions, in any order of the entries."""
    pairs, y, _ = data
    big = pairs * 2**40 + 2**33
    order = np.random.default_rng(1).permutation(len(y))
    model = DMFCompleter(random_state=0).fit(big[order], y[order])
    np.testing.assert_array_equal(model.predict(big), fitted.predict(pairs))
    np.testing.assert_array_equal(words[1].predict(words[0]), fitted.predict(pairs))
    ids, values = model.top_k([2**33], 4)
    expected, same = fitted.top_k([0], 4)
    np.testing.assert_array_equal(ids, expected * 2**40 + 2**33)
    np.testing.assert_array_equal(values, same)
    assert words[1].top_k(["u000"], 4)[0].tolist() == [[f"v{j:03}" for j in expected[0]]]


@pytest.mark.parametrize("how", ["sum", "mean", "last"])
@pytest.mark.parametrize("weighted", [False, True])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_duplicates(how, weighted, seed):
    """Against a dictionary of lists."""
    from fastdmf.entries import mask_of

    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 30))
    rows, cols = rng.integers(0, 4, k), rng.integers(0, 3, k)
    values, weights = rng.standard_normal(k), rng.integers(0, 3, k).astype(float) if weighted else None
    found = {}
    for n in range(k):
        found.setdefault((rows[n], cols[n]), []).append(n)
    if how == "sum" and weighted:
        if len(found) < k:
            with pytest.raises(ValueError, match="duplicates='sum' does not go with entry_weight"):
                mask_of(rows, cols, values, weights, (4, 3), how)
        return
    mask, v, w = mask_of(rows, cols, values, weights, (4, 3), how)
    assert mask.size == len(found)
    for n, cell in enumerate(zip(mask.rows, mask.cols)):
        at = found[cell]
        share = np.ones(len(at)) if w is None else weights[at]
        if how == "sum":
            assert np.isclose(v[n], values[at].sum())
        elif how == "last":
            assert v[n] == values[at[-1]] and (w is None or w[n] == share[-1])
        else:
            assert share.sum() == 0 or np.isclose(v[n], values[at] @ share / share.sum())
            assert w is None or w[n] == share.sum()


def test_duplicates_in_a_fit(data, fitted):
    pairs, y, _ = data
    again = np.vstack([pairs[:300], pairs])
    stale = np.r_[np.full(300, 99.0), y]
    with pytest.raises(
        ValueError, match=r"300 entries occur more than once.*choose duplicates='sum', 'mean' or 'last'"
    ):
        DMFCompleter().fit(again, stale)
    last = DMFCompleter(random_state=0, duplicates="last", max_value=y.max()).fit(again, stale)
    np.testing.assert_array_equal(last.reconstruct(), fitted.reconstruct())


@pytest.mark.parametrize("how", ["sum", "mean", "last"])
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_merged_entries(how, seed):
    """As if all had come at once, the old ones combined before."""
    from fastdmf.completer import _sorted
    from fastdmf.entries import mask_of, merge

    rng = np.random.default_rng(seed)
    weighted = [bool(rng.integers(2)) and how != "sum" for _ in range(2)]
    offset = 0.5
    sets = []
    for shape, use in zip(((3, 4), (5, 4)), weighted):
        k = int(rng.integers(1, 12))
        cells = rng.choice(shape[0] * shape[1], min(k, shape[0] * shape[1]), replace=False)
        k = len(cells)
        values, weights = rng.standard_normal(k), rng.integers(1, 4, k).astype(float) if use else None
        sets.append((*np.divmod(cells, 4), values, weights))
    old, new = (
        _sorted(*mask_of(i, j, v - offset, w, shape, "error")) for (i, j, v, w), shape in zip(sets, ((3, 4), (5, 4)))
    )
    before = [None if a is None else a.copy() for a in (*old, *new)]
    indptr, indices, y, w = merge(old, new, 4, how, offset)
    both = [np.concatenate([a[n] for a in sets]) for n in range(3)]
    together = None
    if any(weighted):
        together = np.concatenate([np.ones(len(a[0])) if a[3] is None else a[3] for a in sets])
    mask, values, weights = mask_of(*both, together, (5, 4), how)
    expected = _sorted(mask, values - offset, weights)
    assert np.array_equal(indptr, expected[0]) and np.array_equal(indices, expected[1])
    k = indptr[-1]
    np.testing.assert_allclose(y[:k], expected[2][:k], atol=1e-12)
    assert len(y) == len(indices) and (w is None) == (weights is None)
    if w is not None:
        np.testing.assert_array_equal(w, expected[3])
    assert all(b is None or np.array_equal(a, b) for a, b in zip((*old, *new), before))


BAD_FITS = [
    ("text", TypeError, "X must be a sparse matrix, an array of pairs"),
    (None, TypeError, "X must be a sparse matrix, an array of pairs"),
    (np.ones((4, 3)), ValueError, r"got an array of shape \(4, 3\); DMFImputer fills dense matrices"),
    (np.ones((4, 3), int), ValueError, r"got an array of shape \(4, 3\)$"),
    (np.ones(4, int), ValueError, r"got an array of shape \(4,\)"),
    (sparse.dia_array(np.eye(3)), TypeError, "X is sparse in DIA format, which stores zeros of its own"),
    (sparse.csr_array((3, 3)), ValueError, "X has no entries"),
    (np.zeros((0, 2), int), ValueError, "X has no entries"),
    (sparse.coo_array((np.array([1.0, np.nan]), ([0, 1], [0, 1]))), ValueError, "values contains NaN or infinite"),
    (sparse.coo_array((np.array([1.0, np.inf]), ([0, 1], [0, 1]))), ValueError, "values contains NaN or infinite"),
    (sparse.coo_array((np.array([1j, 1]), ([0, 1], [0, 1]))), TypeError, "values must hold real numbers"),
    (sparse.coo_array((np.ones(2), ([0, 0], [1, 1]))), ValueError, "entries occur more than once"),
    (pd.DataFrame({"a": [1]}), ValueError, "row, column and value are needed"),
    (pd.DataFrame({"a": [1], "b": [2]}), ValueError, "no values: X must be"),
    (pd.DataFrame({"a": [1], "b": [2], "c": ["x"]}), TypeError, "values must be real numbers"),
    (pd.DataFrame({"a": [1, "x"], "b": [2, 3], "c": [1.0, 2.0]}), TypeError, "row ids must all be integers or all"),
    (pd.DataFrame({"a": [1, 2], "b": ["x", None], "c": [1.0, 2.0]}), ValueError, "column ids contain missing values"),
]


@pytest.mark.parametrize(("X", "error", "message"), BAD_FITS)
def test_bad_x(X, error, message):
    y = np.ones(len(X)) if isinstance(X, np.ndarray) else None
    with pytest.raises(error, match=message):
        DMFCompleter().fit(X, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": None}, ValueError, "no values: X must be"),
        ({"y": np.ones(3)}, ValueError, r"y must hold one value for each of the 6000 pairs of X, got shape \(3,\)"),
        ({"entry_weight": np.ones(3)}, ValueError, "entry_weight must hold one weight for each of the 6000 entries"),
        ({"entry_weight": -np.ones(6000)}, ValueError, "entry_weight must not be negative"),
        ({"entry_weight": np.zeros(6000)}, ValueError, "entry_weight is zero everywhere"),
        ({"entry_weight": np.full(6000, np.nan)}, ValueError, "entry_weight contains NaN"),
        ({"solver": "als"}, ValueError, "solver must be 'auto' or 'variational' or 'descent' or 'recovery', got 'als'"),
        ({"duplicates": "max"}, ValueError, "duplicates must be one of"),
        ({"biases": "no"}, ValueError, "biases must be True or False"),
        ({"min_value": "low"}, ValueError, "min_value must be a number or None"),
        ({"max_value": np.nan}, ValueError, "max_value must be a number or None"),
        ({"min_value": 2, "max_value": 1}, ValueError, "min_value must be below max_value"),
        ({"depth": 1}, ValueError, "depth must be an integer >= 2"),
        ({"width": 0}, ValueError, "width must be an integer >= 1"),
        ({"tol": -1}, ValueError, "tol must be a number"),
        ({"max_iter": 0}, ValueError, "max_iter must be an integer >= 1"),
        ({"verbose": -1}, ValueError, "verbose must be an integer >= 0"),
        ({"validation_fraction": 1.0}, ValueError, "validation_fraction must be a number in"),
        ({"device": "tpu"}, ValueError, "device must be 'auto', 'cpu' or 'cuda'"),
        ({"n_threads": 0}, ValueError, "n_threads must be a positive integer"),
    ],
)
def test_bad_parameters(data, change, error, message):
    pairs, y, _ = data
    arguments = {"y": change.get("y", y), "entry_weight": change.get("entry_weight")}
    parameters = {name: value for name, value in change.items() if name not in arguments}
    with pytest.raises(error, match=message):
        DMFCompleter(**parameters).fit(pairs, **arguments)


@pytest.mark.parametrize(
    ("columns", "message"),
    [("a", "columns must name row, column and value"), (("a", "x"), r"columns names \['x'\], but X has")],
)
def test_bad_columns(columns, message):
    frame = pd.DataFrame({"a": [1, 2], "b": [2, 3], "c": [1.0, 2.0]})
    with pytest.raises(ValueError, match=message):
        DMFCompleter(columns=columns).fit(frame)
    with pytest.raises(ValueError, match="y must be None when X is sparse"):
        DMFCompleter().fit(sparse.eye_array(3).tocsr(), np.ones(3))


def test_positions_out_of_range(data):
    pairs, y, _ = data
    model = DMFCompleter(random_state=0).fit(as_sparse(pairs, y))
    with pytest.raises(ValueError, match="row index 200 is out of range: the model has 200 rows"):
        model.predict([[200, 0]])
    with pytest.raises(ValueError, match="column index -1 is negative"):
        model.predict([[0, -1]])
    with pytest.raises(ValueError, match=r"the pattern has shape \(3, 3\), the model \(200, 180\)"):
        model.predict(sparse.eye_array(3).tocsr())
    with pytest.raises(TypeError, match="row ids are strings, but the model was fitted to positions"):
        model.predict([["a", "b"]])
    with pytest.raises(ValueError, match="column index 180 is out of range"):
        model.reconstruct(cols=[180])
    with pytest.raises(ValueError, match="rows must have 1 dimension"):
        model.reconstruct(rows=[[1, 2]])
    with pytest.raises(ValueError, match="X has 3 columns, the model 180"):
        model.fold_in(sparse.eye_array(3).tocsr())


def test_before_fit():
    model = DMFCompleter()
    for call in (
        lambda: model.predict([[0, 0]]),
        model.reconstruct,
        model.top_k,
        lambda: model.fold_in([[0, 0]], [1.0]),
        lambda: model.score([[0, 0]], [1.0]),
    ):
        with pytest.raises(NotFittedError):
            call()


# --- predictions -----------------------------------------------------------------------------------------------------


def test_unknown_ids(data, words):
    named, model = words
    with pytest.warns(UserWarning, match="2 of 3 pairs have an unknown row or column") as caught:
        out, std = model.predict([["u003", "v004"], ["new", "v004"], ["new", "newer"]], return_std=True)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert out[0] == model.predict([["u003", "v004"]])[0]
    assert out[1] == pytest.approx(model.mean_ + model.column_bias_[4]) and out[2] == pytest.approx(model.mean_)
    assert std[0] < std[1] < std[2]
    with pytest.warns(UserWarning, match="1 of 2 rows are unknown") as caught:
        block = model.reconstruct(["u001", "new"])
    np.testing.assert_allclose(block[1], np.clip(model.mean_ + model.column_bias_, data[1].min(), data[1].max()))
    with pytest.warns(UserWarning, match="1 of 1 rows are unknown"):
        ids, _ = model.top_k(["new"], 3)
    best = np.argsort(-model.column_bias_)[:3]
    assert list(ids[0]) == [f"v{j:03}" for j in best] and caught[0].filename == __file__
    with pytest.raises(TypeError, match="row ids were strings at fit and are integers now"):
        model.predict(np.array([[1, 2]]))


def test_no_pairs(fitted):
    assert fitted.predict(np.zeros((0, 2), int)).shape == (0,)
    assert fitted.predict([], return_std=True)[1].shape == (0,)
    assert fitted.reconstruct([], []).shape == (0, 0)
    assert fitted.top_k([], 2)[0].shape == (0, 2)


def test_blocks(data, fitted, monkeypatch):
    """Blocks of rows change nothing, and rows and columns come in the order asked for."""
    whole = fitted.reconstruct()
    best = fitted.top_k()
    monkeypatch.setattr("fastdmf.completer._CHUNK", 7 * N2)
    np.testing.assert_allclose(fitted.reconstruct(), whole, atol=1e-12)
    for a, b in zip(fitted.top_k(), best):
        np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_allclose(fitted.reconstruct([5, 3], [9, 1, 1]), whole[np.ix_([5, 3], [9, 1, 1])], atol=1e-12)
    np.testing.assert_allclose(fitted.predict(data[0]), whole[tuple(data[0].T)], atol=1e-12)


@pytest.mark.parametrize("k", [1, 10, N2])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_top_k(data, k, exclude_seen):
    pairs, y, _ = data
    model = DMFCompleter(random_state=0, min_value=-np.inf, max_value=np.inf).fit(pairs, y)
    scores = model.reconstruct()
    if exclude_seen:
        scores[tuple(pairs.T)] = -np.inf
    columns, values = model.top_k(k=k, exclude_seen=exclude_seen)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(scores, order, 1)
    none = np.isneginf(expected)
    np.testing.assert_array_equal(columns, np.where(none, -1, order))
    np.testing.assert_allclose(values, np.where(none, np.nan, expected), atol=1e-12)
    assert none.any() == (exclude_seen and k == N2)


@pytest.mark.parametrize("k", [0, N2 + 1, 2.5, True])
def test_bad_k(fitted, k):
    with pytest.raises(ValueError, match="k must be"):
        fitted.top_k([0], k)


# --- what comes later ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, 1.0])
def test_folding_in_the_training_rows(data, weight):
    """With the columns of a converged fit, rows come out nearly as they were."""
    pairs, y, _ = data
    X = as_sparse(pairs, y)
    weight = None if weight is None else np.full(X.nnz, weight)
    model = DMFCompleter(random_state=0, tol=1e-7, max_iter=200).fit(X, entry_weight=weight)
    before = model.reconstruct()
    folded = model.fold_in(X[:40], entry_weight=None if weight is None else weight[: X[:40].nnz])
    away = rmse(folded.reconstruct(), before[:40])
    print(f"rows folded in: {away:.1e} from the fit")
    assert away < 5e-3 and np.array_equal(model.reconstruct(), before)
    np.testing.assert_allclose(folded.row_bias_, model.row_bias_[:40], atol=1e-2)
    assert folded.column_bias_ is not model and np.array_equal(folded.column_bias_, model.column_bias_)
    # The folded rows have seen what they were given.
    assert np.array_equal(folded.top_k(k=3)[0], model.top_k(range(40), 3)[0])


def test_the_mean_of_several_starts_does_all_that_one_does(data):
    pairs, y, truth = data
    old = pairs[:, 0] < 150
    one, model = (DMFCompleter(n_init=n, random_state=0).fit(pairs[old], y[old]) for n in (1, 3))
    errors = [rmse(m.reconstruct(), truth[:150]) for m in (one, model)]
    print("one start, three:", errors)
    assert errors[1] < 1.01 * errors[0]
    whole = model.reconstruct()
    columns, scores = model.top_k([3, 5], 4, exclude_seen=False)
    np.testing.assert_allclose(scores, np.sort(whole[[3, 5]], axis=1)[:, :-5:-1], atol=1e-6)
    values, deviations = model.predict(pairs[old][:50], return_std=True)
    np.testing.assert_allclose(values, whole[tuple(pairs[old][:50].T)], atol=1e-6)
    assert (deviations > 0.2).all()
    latent = model.factors_[2] @ model.factors_[1] @ model.factors_[0]
    both = model.mean_ + model.row_bias_[:, None] + model.column_bias_ + latent
    np.testing.assert_allclose(np.clip(both, y[old].min(), y[old].max()), whole, atol=1e-4)
    folded = model.fold_in(pairs[~old], y[~old])
    assert rmse(folded.reconstruct(), truth[150:]) < 1.25 * errors[1]
    model.partial_fit(pairs[~old], y[~old])
    assert rmse(model.reconstruct()[150:], truth[150:]) < 1.25 * errors[1]
    assert np.array_equal(pickle.loads(pickle.dumps(model)).reconstruct(), model.reconstruct())


def test_folding_in_new_rows(data):
    """Rows that the fit never saw are predicted nearly as well as those that it saw, from as many entries."""
    pairs, y, truth = data
    old = pairs[:, 0] < 150
    model = DMFCompleter(random_state=0).fit(pairs[old], y[old])
    folded = model.fold_in(pairs[~old], y[~old])
    assert list(folded.row_ids_) == list(range(150, 200))
    errors = rmse(model.reconstruct(), truth[:150]), rmse(folded.reconstruct(), truth[150:])
    print("rows of the fit, rows folded in:", errors)
    assert errors[1] < 1.25 * errors[0]
    assert folded.predict(pairs[~old], return_std=True)[1].mean() < 0.6
    one = model.fold_in(pairs[~old][:1], y[~old][:1])
    assert np.isfinite(one.reconstruct()).all() and one.top_k(k=2)[0].shape == (1, 2)
    with pytest.warns(UserWarning, match="1 of 2 entries are of unknown columns and left out"):
        model.fold_in([[7, 3], [7, 999]], [1.0, 1.0])
    with pytest.raises(ValueError, match="entries occur more than once"):
        model.fold_in([[7, 3], [7, 3]], [1.0, 1.0])


@pytest.mark.parametrize("solver", ["variational", "descent"])
def test_partial_fit_of_new_entries(data, solver):
    """A tenth of the entries later: between the fit without them and the fit of everything, near the latter."""
    pairs, y, truth = data
    order = np.random.default_rng(0).permutation(len(y))
    first, later = order[: 9 * len(y) // 10], order[9 * len(y) // 10 :]
    make = lambda at: DMFCompleter(solver=solver, random_state=0).fit(pairs[at], y[at])  # noqa: E731
    model, whole = make(first), make(order)
    before = rmse(model.reconstruct(), truth)
    model.partial_fit(pairs[later], y[later])
    after, best = rmse(model.reconstruct(), truth), rmse(whole.reconstruct(), truth)
    print(f"{before:.4f} before, {after:.4f} after, {best:.4f} at once")
    assert after < before and after < best + 0.5 * (before - best) + 0.003
    assert np.array_equal(model.top_k(k=5)[0] >= 0, np.ones((N1, 5), bool))
    seen = {tuple(pair) for pair in pairs}
    assert not seen & {(i, j) for i, row in enumerate(model.top_k(k=5)[0]) for j in row}


def test_partial_fit_in_two_halves(data):
    pairs, y, truth = data
    order = np.random.default_rng(0).permutation(len(y))
    half = len(y) // 2
    model = DMFCompleter(random_state=0).fit(pairs[order[:half]], y[order[:half]])
    before = rmse(model.reconstruct(), truth)
    model.partial_fit(pairs[order[half:]], y[order[half:]])
    after, best = (
        rmse(model.reconstruct(), truth),
        rmse(DMFCompleter(random_state=0).fit(pairs, y).reconstruct(), truth),
    )
    print(f"{before:.4f} from one half, {after:.4f} with the other, {best:.4f} at once")
    assert after < 1.15 * best < before


def test_partial_fit_of_new_rows_and_columns(data, words):
    pairs, y, truth = data
    named = words[0]
    old = (pairs[:, 0] < 150) & (pairs[:, 1] < 120)
    model = DMFCompleter(random_state=0).fit(named[old], y[old])
    assert model.partial_fit(named[~old], y[~old]) is model
    assert set(model.row_ids_) == {f"u{i:03}" for i in range(N1)} and len(model.column_ids_) == N2
    assert list(model.row_ids_[:150]) == [f"u{i:03}" for i in range(150)]
    predictions = model.predict(np.array([[f"u{i:03}", f"v{j:03}"] for i in range(N1) for j in range(N2)], object))
    errors = np.square(predictions.reshape(N1, N2) - truth)
    blocks = [errors[:150, :120], errors[150:, :120], errors[:150, 120:], errors[150:, 120:]]
    print("old, new rows, new columns, both:", [round(float(np.sqrt(block.mean())), 3) for block in blocks])
    assert all(np.sqrt(block.mean()) < 0.25 for block in blocks)
    assert model.factors_[-1].shape[0] == N1 and model.components_.shape[1] == N2
    fresh = DMFCompleter(random_state=0).partial_fit(named, y)
    np.testing.assert_array_equal(fresh.predict(named), words[1].predict(named))


def test_partial_fit_of_sparse_matrices(data):
    """The matrix grows to the largest shape; positions stay."""
    pairs, y, _ = data
    old = (pairs[:, 0] < 150) & (pairs[:, 1] < 120)
    model = DMFCompleter(random_state=0).fit(as_sparse(pairs[old], y[old], (150, 120)))
    by_pairs = pickle.loads(pickle.dumps(model)).partial_fit(pairs[~old], y[~old])
    model.partial_fit(as_sparse(pairs[~old], y[~old], (N1 + 1, N2)))
    assert model.reconstruct().shape == (N1 + 1, N2)
    np.testing.assert_allclose(model.reconstruct()[:N1], by_pairs.reconstruct(), atol=1e-10)
    model.partial_fit(as_sparse(np.array([[149, 0]]), np.array([1.0]), (150, 1)), entry_weight=[2.0]) if (
        [149, 0] not in pairs.tolist()
    ) else None
    assert model.reconstruct().shape == (N1 + 1, N2)


def test_partial_fit_of_an_entry_again(data):
    pairs, y, _ = data
    strict = DMFCompleter(random_state=0).fit(pairs, y)
    before = strict.reconstruct()
    with pytest.raises(ValueError, match=r"1 entries occur more than once.*duplicates="):
        strict.partial_fit(pairs[:1], y[:1] + 3)
    np.testing.assert_array_equal(strict.reconstruct(), before)
    same = DMFCompleter(random_state=0, duplicates="last").fit(pairs, y)
    same.partial_fit(pairs[:1], y[:1] + 3)
    i, j = pairs[0]
    assert same.reconstruct()[i, j] > before[i, j] + 0.2
    untouched = np.delete(np.arange(N1), i), np.delete(np.arange(N2), j)
    np.testing.assert_allclose(same.reconstruct(*untouched), before[np.ix_(*untouched)], atol=1e-12)


# --- scikit-learn's manners ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_mixin_order,
        estimator_checks.check_valid_tag_types,
        estimator_checks.check_estimator_tags_renamed,
    ],
    ids=lambda check: check.__name__,
)
def test_scikit_learn_checks(check):
    """Those of the official checks that give the estimator no table to fit to."""
    check("DMFCompleter", DMFCompleter())


def test_tags():
    model = DMFCompleter()
    assert is_regressor(model)
    tags = model.__sklearn_tags__()
    assert tags.input_tags.sparse and not tags.target_tags.required


def test_clone_pickle_and_refit(data, fitted):
    pairs, y, _ = data
    loaded = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(loaded.reconstruct(), fitted.reconstruct())
    np.testing.assert_array_equal(loaded.partial_fit([[7, N2 + 5]], [1.0]).predict([[8, 3]]), fitted.predict([[8, 3]]))
    fresh = clone(fitted)
    assert not hasattr(fresh, "factors_")
    np.testing.assert_array_equal(fresh.fit(pairs, y).reconstruct(), fitted.reconstruct())
    settings_before = fitted.get_params()
    np.testing.assert_array_equal(fresh.fit(pairs[:5000], y[:5000]).fit(pairs, y).reconstruct(), fitted.reconstruct())
    assert fitted.get_params() == settings_before


def test_predictions_change_nothing(data, fitted):
    before = dict(vars(fitted))
    fitted.predict(data[0])
    fitted.top_k()
    fitted.fold_in(*data[:2])
    after = vars(fitted)
    assert before.keys() == after.keys() and all(after[name] is value for name, value in before.items())


def test_seeds_threads_and_order(data, fitted):
    pairs, y, _ = data
    for n_threads in (1, 2):
        model = DMFCompleter(random_state=0, n_threads=n_threads).fit(pairs, y)
        np.testing.assert_array_equal(model.reconstruct(), fitted.reconstruct())
        np.testing.assert_array_equal(model.predict(pairs), fitted.predict(pairs))
    same = DMFCompleter(random_state=np.random.RandomState(0)).fit(pairs, y)
    np.testing.assert_array_equal(same.reconstruct(), fitted.reconstruct())
    assert not np.array_equal(DMFCompleter(random_state=1).fit(pairs, y).reconstruct(), fitted.reconstruct())


def test_read_only_memory(tmp_path, data, fitted):
    pairs, y, _ = data
    np.save(tmp_path / "p.npy", pairs)
    np.save(tmp_path / "y.npy", y)
    mapped = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "py")
    np.testing.assert_array_equal(DMFCompleter(random_state=0).fit(*mapped).reconstruct(), fitted.reconstruct())


def _fit_and_predict(seed):
    pairs, y, _ = problem(seed)
    return DMFCompleter(random_state=0).fit(pairs, y).predict(pairs)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_joblib(backend):
    out = joblib.Parallel(n_jobs=2, backend=backend)(joblib.delayed(_fit_and_predict)(seed) for seed in (0, 1))
    for seed, values in zip((0, 1), out):
        np.testing.assert_allclose(values, _fit_and_predict(seed), atol=1e-10)


def test_warning_and_progress(data, caplog):
    pairs, y, _ = data
    with pytest.warns(ConvergenceWarning, match="DMFCompleter: MAX_ITER") as caught:
        DMFCompleter(max_iter=2, random_state=0).fit(pairs, y)
    assert caught[0].filename == __file__
    with caplog.at_level("INFO", logger="fastdmf"):
        for solver in ("variational", "descent"):
            DMFCompleter(solver=solver, verbose=1, random_state=0).fit(pairs, y)
    assert "DMFCompleter depth default: iteration 0, loss" in caplog.text and "held out" in caplog.text


@pytest.mark.parametrize("module", [completer, entry_kfold])
def test_examples(module):
    """The docstrings' examples give what they say."""
    results = doctest.testmod(module)
    assert results.attempted > 5 and results.failed == 0


# --- at scale --------------------------------------------------------------------------------------------------------


def test_a_million_entries():
    """Generated ratings of 20,000 x 5,000: error near the noise, no temporary of the size of the matrix."""
    import tracemalloc

    rng = np.random.default_rng(0)
    n1, n2, k, noise = 20_000, 5_000, 1_000_000, 0.5
    u, v = rng.standard_normal((n1, 4), dtype=np.float32), rng.standard_normal((n2, 4), dtype=np.float32)
    cells = np.unique(rng.integers(0, n1 * n2, k + 20_000))
    rows, cols = np.divmod(rng.permutation(cells), n2)
    y = np.einsum("kh,kh->k", u[rows], v[cols]) / 2 + noise * rng.standard_normal(len(rows), dtype=np.float32)
    X = sparse.csr_array((y[:k], (rows[:k], cols[:k])), shape=(n1, n2))
    model = DMFCompleter(random_state=0).fit(X)
    error = rmse(model.predict(np.column_stack([rows[k:], cols[k:]])), y[k:])
    print(f"error {error:.4f}, {len(model.singular_values_)} components, noise {model.noise_variance_:.3f}")
    assert error < 0.58 and len(model.singular_values_) == 4
    tracemalloc.start()
    try:
        columns, _ = model.top_k(k=5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert columns.shape == (n1, 5) and peak < 0.5 * 4 * n1 * n2


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_recovery_finds_entries_outside_the_range_of_the_known_ones(dtype):
    rng = np.random.default_rng(0)
    truth = (rng.standard_normal((60, 3)) @ rng.standard_normal((3, 50))).astype(dtype)
    truth[3] *= 30
    pairs = np.argwhere(rng.random(truth.shape) < 0.3)
    model = DMFCompleter(solver="recovery", random_state=0).fit(pairs, truth[tuple(pairs.T)])
    assert model.solver_ == "recovery"
    assert model.status_ is Status.EXACT
    assert len(model.singular_values_) == 3
    tol = 1e-10 if dtype == np.float64 else 1e-5
    assert np.linalg.norm(model.reconstruct() - truth) < tol * np.linalg.norm(truth)
    assert model.reconstruct().dtype == dtype
    new = model.fold_in(np.stack([np.zeros(50, int), np.arange(50)], axis=1)[::4], 2 * truth[3, ::4])
    assert np.linalg.norm(new.reconstruct() - 2 * truth[3]) < 1e-2 * np.linalg.norm(2 * truth[3])
    with pytest.raises(ValueError, match="the others have no posterior"):
        model.predict(pairs[:3], return_std=True)
