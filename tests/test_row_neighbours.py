"""Errors of a row distribution read off the nearest rows: leave-one-out errors, the correction, when it is used."""

import numpy as np
import pytest
from sklearn.impute import KNNImputer

from fastdmf import DMFImputer
from fastdmf.row_models import GaussianRows
from fastdmf.row_neighbours import NeighbourRows, affordable


def table(n=40, p=7, hidden=0.3, seed=0):
    """Return (z, seen, GaussianRows) with rows of few holes, of many, and one of a single entry."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((p, p))
    z = rng.standard_normal((n, p)) @ root + 1
    seen = rng.random((n, p)) >= hidden
    seen[:, 0] |= ~seen.any(axis=1)
    seen[0], seen[1] = True, np.arange(p) == 2
    return np.where(seen, z, np.nan), seen, GaussianRows(np.full(p, 0.5), root.T @ root + 0.1 * np.eye(p))


def test_leave_one_out_errors_are_those_of_hidden_entries():
    z, seen, rows = table()
    errors = rows.leave_one_out(np.where(seen, z, 1e9), seen)
    assert (errors[~seen] == 0).all()
    for i, j in np.argwhere(seen):
        visible = seen[i].copy()
        visible[j] = False
        filled = rows.fill(z[i][None], visible[None])[0, j]
        np.testing.assert_allclose(errors[i, j], z[i, j] - filled, rtol=1e-9, atol=1e-10)


def test_a_hole_gets_a_share_of_the_mean_error_of_the_nearest_rows():
    """Against loops over all rows."""
    z, seen, rows = table(n=120)
    share, k = 0.5, 10
    model = NeighbourRows.of(rows, z, seen, share)
    new, visible, _ = table(n=9, hidden=0.6, seed=1)
    plain, corrected = rows.fill(new, visible), model.fill(new, visible)
    assert np.array_equal(corrected[visible], new[visible])
    errors = rows.leave_one_out(z, seen)
    for i, j in np.argwhere(~visible):
        order = np.argsort(((model.table - plain[i]) ** 2).sum(axis=1))[:60]
        near = [row for row in order if seen[row, j]][:k]
        np.testing.assert_allclose(corrected[i, j], plain[i, j] + share * errors[near, j].mean(), rtol=1e-10)
    again, variances = model.fill(new, visible, variances=True)
    assert np.array_equal(again, corrected)
    assert np.array_equal(variances, rows.fill(new, visible, variances=True)[1])
    # The bits of a row do not depend on the rows beside it.
    assert np.array_equal(model.fill(new[3:5], visible[3:5]), corrected[3:5])


def clusters(n=400, p=12, seed=0):
    """Rows around eight centres: within a cluster nothing says more than its centre."""
    rng = np.random.default_rng(seed)
    centres = 3 * rng.standard_normal((8, p))
    truth = centres[rng.integers(8, size=n)] + 0.3 * rng.standard_normal((n, p))
    return truth, np.where(rng.random(truth.shape) < 0.3, np.nan, truth)


def root_mean_square(filled, truth, X):
    return np.sqrt(np.mean((filled - truth)[np.isnan(X)] ** 2))


def test_clusters_are_filled_better_than_by_one_linear_rule():
    truth, X = clusters()
    imputer = DMFImputer(random_state=0).fit(X)
    assert isinstance(imputer._rows, NeighbourRows) and imputer.solver_ == "gaussian"
    filled = imputer.transform(X)
    errors = {
        "with neighbours": root_mean_square(filled, truth, X),
        "without": root_mean_square(imputer._rows.rows.fill(X - imputer.mean_, ~np.isnan(X)) + imputer.mean_, truth, X),
        "KNNImputer": root_mean_square(KNNImputer().fit_transform(X), truth, X),
    }
    print(errors)
    assert errors["with neighbours"] < 0.8 * errors["without"]
    assert np.array_equal(DMFImputer(random_state=0).fit_transform(X), filled)
    assert np.array_equal(imputer.transform(X[7:8]), filled[7:8])
    new, holed = clusters(seed=0)[0][:50] + 0.01, clusters(seed=0)[1][:50] + 0.01
    assert root_mean_square(imputer.transform(holed), new, holed) < 1.1 * errors["with neighbours"]
    assert (imputer.uncertainty(X)[np.isnan(X)] > 0).all()


def test_one_linear_rule_stays_where_it_is_right():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((300, 3)) @ rng.standard_normal((3, 10)) + 0.3 * rng.standard_normal((300, 10))
    imputer = DMFImputer(random_state=0).fit(np.where(rng.random(truth.shape) < 0.2, np.nan, truth))
    assert isinstance(imputer._rows, GaussianRows)


@pytest.mark.parametrize(("n", "p", "yes"), [(20, 3, False), (100, 3, True), (5000, 60, True), (20_000, 60, False)])
def test_small_and_large_tables_do_without(n, p, yes):
    assert affordable(n, p) is yes
