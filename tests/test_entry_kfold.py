"""Folds of entries: all rows and columns keep one, seeds repeat, scikit-learn's tools take them."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.model_selection import GridSearchCV, cross_val_score

from fastdmf import DMFCompleter, EntryKFold


def pairs_of(n1, n2, k, seed):
    rng = np.random.default_rng(seed)
    return np.column_stack(np.divmod(rng.choice(n1 * n2, min(k, n1 * n2), replace=False), n2))


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(2, 60), st.integers(2, 6), st.integers(0, 100))
def test_every_row_and_column_keeps_an_entry(n1, n2, k, n_splits, seed):
    pairs = pairs_of(n1, n2, k, seed)
    if len(pairs) < n_splits:
        return
    folds = list(EntryKFold(n_splits, random_state=seed).split(pairs))
    assert len(folds) == n_splits
    tested = np.zeros(len(pairs), int)
    for train, test in folds:
        assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(pairs)))
        for axis in (0, 1):
            assert set(pairs[train, axis]) == set(pairs[:, axis])
        tested[test] += 1
    assert tested.max() <= 1
    # An entry that its row and column can spare is tested, whichever the fold.
    counts = [np.bincount(pairs[:, axis])[pairs[:, axis]] for axis in (0, 1)]
    assert not tested[(counts[0] == 1) | (counts[1] == 1)].any()


def test_most_entries_are_tested_once():
    pairs = pairs_of(100, 80, 3000, 0)
    folds = list(EntryKFold(5, random_state=0).split(pairs))
    assert sum(len(test) for _, test in folds) > 2990
    assert all(580 < len(test) <= 600 for _, test in folds)


def test_seeds_and_ids():
    pairs = pairs_of(20, 10, 100, 0)
    splits = [np.concatenate([t for _, t in EntryKFold(3, random_state=s).split(pairs)]) for s in (0, 0, 1)]
    assert np.array_equal(splits[0], splits[1]) and not np.array_equal(splits[0], splits[2])
    frame = pd.DataFrame({"v": 1.0, "who": [f"u{i}" for i in pairs[:, 0]], "what": pairs[:, 1]})
    named = EntryKFold(3, random_state=0, columns=("who", "what")).split(frame)
    assert np.array_equal(np.sort(np.concatenate([t for _, t in named])), np.sort(splits[0]))
    assert EntryKFold(3).get_n_splits() == 3


@pytest.mark.parametrize("n_splits", [1, 2.0, True, 11])
def test_bad_number_of_splits(n_splits):
    with pytest.raises(ValueError, match="n_splits must be an integer from 2 to the number of entries, 10"):
        next(EntryKFold(n_splits).split(pairs_of(5, 4, 10, 0)))


def test_sparse_matrices_are_refused():
    with pytest.raises(TypeError, match="X must be pairs or a DataFrame"):
        next(EntryKFold(2).split(sparse.eye_array(5).tocsr()))


def low_rank(seed=0, noise=0.2):
    rng = np.random.default_rng(seed)
    full = rng.standard_normal((150, 3)) @ rng.standard_normal((3, 120)) + noise * rng.standard_normal((150, 120))
    pairs = pairs_of(150, 120, 4000, seed)
    return pairs, full[tuple(pairs.T)]


def test_cross_validation_and_grid_search():
    pairs, y = low_rank()
    cv = EntryKFold(3, random_state=0)
    scores = cross_val_score(DMFCompleter(random_state=0), pairs, y, cv=cv)
    assert (scores > 0.9).all()
    search = GridSearchCV(
        DMFCompleter(random_state=0), {"width": [1, 3, 10]}, cv=cv, scoring="neg_root_mean_squared_error"
    )
    search.fit(pairs, y, entry_weight=np.ones(len(y)))
    errors = -search.cv_results_["mean_test_score"]
    print("width 1, 3, 10:", errors)
    assert errors[0] > 2 * errors[1] and search.best_params_["width"] in (3, 10)
    assert search.predict(pairs).shape == y.shape
    # Strings for ids, and a table: the same folds, the same scores.
    words = np.array([[f"r{i:03}", f"c{j:03}"] for i, j in pairs], object)
    assert np.allclose(cross_val_score(DMFCompleter(random_state=0), words, y, cv=cv), scores)
    frame = pd.DataFrame(words, columns=["row", "column"])
    assert np.allclose(cross_val_score(DMFCompleter(random_state=0), frame, y, cv=cv), scores)


def test_cross_validation_of_a_table_with_its_values():
    """Without y: the values are those of the table, in training and in scoring."""
    pairs, y = low_rank()
    frame = pd.DataFrame({"row": pairs[:, 0], "column": pairs[:, 1], "value": y})
    cv = EntryKFold(3, random_state=0)
    scores = cross_val_score(DMFCompleter(random_state=0), frame, cv=cv)
    assert np.allclose(scores, cross_val_score(DMFCompleter(random_state=0), pairs, y, cv=cv))
