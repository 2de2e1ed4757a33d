"""Operators: the dot test, and every fast route against the base class, which goes through the full matrix."""

import numpy as np
import pytest
from conftest import LOSSES, OPERATORS, random_mask

import fastdmf
from fastdmf.contract import Bound
from fastdmf.operators import EntryMask, GaussianDense, RankOne, as_operator

SHAPES = [(1, 1, 1), (2, 31, 9), (33, 17, 101), (57, 31, 3)]


def _oracle(bound, y, weights):
    """The base class on the same data."""
    return Bound(bound.operator, bound.backend, y, weights, bound.loss, np.dtype(np.float64))


def _relative(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dot(name, shape, rng):
    n1, n2, m = shape
    op = OPERATORS[name](n1, n2, m, rng)
    x, r = rng.standard_normal((n1, n2)), rng.standard_normal(op.size)
    left, right = op.apply(x) @ r, np.sum(x * op.adjoint(r))
    assert abs(left - right) <= 1e-12 * (np.linalg.norm(op.apply(x)) * np.linalg.norm(r) + 1e-300)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OPERATORS)
def test_routes_equal_the_full_matrix(name, loss, dtype, rng, backend):
    """Fused evaluation, halves and losses; shared and own y, weights with zeros, widths off every multiple."""
    n1, n2, m = 33, 21, 160
    op = OPERATORS[name](n1, n2, m, rng)
    tol = 20 * np.finfo(dtype).eps * np.sqrt(n1 * n2)
    for batch, rows, h, weighted in [(1, 1, 5, False), (3, 3, 16, True), (2, 1, 31, True)]:
        p, qt = rng.standard_normal((batch, n1, h)), rng.standard_normal((batch, n2, h))
        y = rng.standard_normal((rows, op.size)) * np.sqrt(h)
        w = rng.random((batch, op.size)) * (rng.random((batch, op.size)) < 0.8) if weighted else None
        bound = op.bind(backend, y, weights=w, loss=LOSSES[loss], dtype=dtype, width=h)
        oracle = _oracle(bound, y, w)
        u, v = rng.standard_normal((batch, n1)), rng.standard_normal((batch, n2))
        expected_probe = (u.copy(), v.copy())
        expected = np.full_like(p, np.nan), np.full_like(qt, np.nan)
        expected_loss = oracle.loss_and_pull(p, qt, *expected, expected_probe)

        pd, qd = p.astype(dtype), qt.astype(dtype)
        for probe in (None, (u.astype(dtype), v.astype(dtype))):
            out = np.full_like(pd, np.nan), np.full_like(qd, np.nan)
            losses = bound.loss_and_pull(pd, qd, *out, probe)
            assert losses.dtype == np.float64
            np.testing.assert_allclose(losses, expected_loss, rtol=tol)
            for ours, theirs in zip(out, expected):
                assert _relative(ours, theirs) < tol
            if probe is not None:
                for ours, theirs in zip(probe, expected_probe):
                    assert _relative(ours, theirs) < tol
        np.testing.assert_array_equal(pd, p.astype(dtype))  # inputs stay
        np.testing.assert_array_equal(qd, qt.astype(dtype))
        np.testing.assert_allclose(bound.losses(pd, qd), expected_loss, rtol=tol)
        assert _relative(bound.forward(pd, qd), oracle.forward(p, qt)) < tol
        r = rng.standard_normal((batch, op.size))
        for ours, theirs in zip(bound.pull(r.astype(dtype), pd, qd), oracle.pull(r, p, qt)):
            assert _relative(ours, theirs) < tol
        x = np.matmul(p, qt.swapaxes(1, 2))
        g, full = np.full_like(x, np.nan, dtype=dtype), np.full_like(x, np.nan)
        np.testing.assert_allclose(bound.loss_and_adjoint(x.astype(dtype), g), expected_loss, rtol=tol)
        oracle.loss_and_adjoint(x, full)
        assert _relative(g, full) < tol
        np.testing.assert_allclose(bound.null_losses(), oracle.null_losses(), rtol=tol)
        np.testing.assert_allclose(bound.weight_sums(), oracle.weight_sums(), rtol=tol)
        np.testing.assert_allclose(bound.curvature(), oracle.curvature(), rtol=tol)
        if batch == 3:
            kept = bound.take(np.array([0, 2]))
            np.testing.assert_allclose(kept.losses(pd[[0, 2]], qd[[0, 2]]), np.asarray(expected_loss)[[0, 2]], rtol=tol)


@pytest.mark.parametrize("route", ["one_pass_serial", "one_pass", "two_pass", "dense"])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_mask_route(route, weighted, rng, backend):
    """The planner's choices give the same answer; block and range edges inside the matrix."""
    n1, n2, h = 70, 45, 16
    op = random_mask(n1, n2, 900, rng)
    y = rng.standard_normal((1, op.size))
    w = rng.random((1, op.size)) if weighted else None
    bound = op.bind(backend, y, weights=w, dtype=np.float64, width=h)
    bound.route, bound._n_ranges, bound._block_rows = route, 3, 32
    p, qt = rng.standard_normal((1, n1, h)), rng.standard_normal((1, n2, h))
    ours, theirs = (np.full_like(p, np.nan), np.full_like(qt, np.nan)), (np.empty_like(p), np.empty_like(qt))
    losses = bound.loss_and_pull(p, qt, *ours)
    np.testing.assert_allclose(losses, _oracle(bound, y, w).loss_and_pull(p, qt, *theirs), rtol=1e-13)
    for a, b in zip(ours, theirs):
        assert _relative(a, b) < 1e-14 * 20


@pytest.mark.parametrize("name", OPERATORS)
def test_restrict_and_norms(name, rng):
    op = OPERATORS[name](9, 8, 25, rng)
    index = rng.permutation(op.size)[:11]
    x, r = rng.standard_normal(op.shape), rng.standard_normal(11)
    part = op.restrict(index)
    np.testing.assert_allclose(part.apply(x), op.apply(x)[index], rtol=1e-12)
    full = np.zeros(op.size)
    full[index] = r
    np.testing.assert_allclose(part.adjoint(r), op.adjoint(full), rtol=1e-12, atol=1e-14)
    exact = np.array([np.sum(op.adjoint(e) ** 2) for e in np.eye(op.size)])
    # The scipy route estimates the norms from 16 draws: relative standard deviation sqrt(2/16) each.
    rtol = 1e-12 if name != "scipy" else 0.25
    np.testing.assert_allclose(op.squared_norms().sum(), exact.sum(), rtol=rtol)
    np.testing.assert_allclose(part.squared_norms().sum(), exact[index].sum(), rtol=rtol if rtol < 0.1 else 0.5)


def test_nested_restriction(rng):
    op = OPERATORS["scipy"](5, 4, 12, rng)
    twice = op.restrict(np.arange(2, 12)).restrict(np.array([3, 0]))
    x = rng.standard_normal(op.shape)
    np.testing.assert_array_equal(twice.apply(x), op.apply(x)[[5, 2]])


def test_mask_keeps_the_given_order(rng):
    rows, cols = np.divmod(rng.permutation(6 * 7)[:20], 7)
    op = EntryMask(rows, cols, (6, 7))
    np.testing.assert_array_equal(op.rows, rows)
    np.testing.assert_array_equal(op.cols, cols)
    assert op.order is not None
    order = np.lexsort((cols, rows))
    assert EntryMask(rows[order], cols[order], (6, 7)).order is None
    for dtype in (np.int32, np.uint8, np.float64):
        np.testing.assert_array_equal(EntryMask(rows.astype(dtype), cols.astype(dtype), (6, 7)).cols, cols)


@pytest.mark.parametrize(
    ("rows", "cols", "shape", "error", "match"),
    [
        ([0, 5], [0, 0], (5, 5), ValueError, "rows must be below 5.*got 5"),
        ([0, 1], [0, 9], (5, 5), ValueError, "cols must be below 5"),
        ([0, -1], [0, 0], (5, 5), ValueError, "rows must not be negative, got -1"),
        ([0, 1.5], [0, 0], (5, 5), TypeError, "rows must hold whole numbers"),
        ([0, 1], [0, np.nan], (5, 5), TypeError, "cols must hold whole numbers"),
        (["a", "b"], [0, 0], (5, 5), TypeError, "rows must hold whole numbers"),
        ([0, 1], [0], (5, 5), ValueError, "same length, got 2 and 1"),
        ([], [], (5, 5), ValueError, "at least one observed entry"),
        ([[0]], [0], (5, 5), ValueError, "rows must have 1 dimension"),
        ([1, 3, 1], [2, 0, 2], (5, 5), ValueError, "1 entries occur more than once, the first at row 1, column 2"),
        ([0], [0], (0, 5), ValueError, "shape must be positive"),
        ([0], [0], (5,), ValueError, "shape must be two integers"),
        ([0], [0], (5, 2.5), ValueError, "shape must be two integers"),
    ],
)
def test_bad_masks(rows, cols, shape, error, match):
    with pytest.raises(error, match=match):
        EntryMask(rows, cols, shape)


def test_equal_columns_in_neighbouring_rows_are_no_duplicates():
    assert EntryMask([0, 1, 3, 3], [2, 2, 2, 3], (5, 5)).size == 4


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: GaussianDense(np.zeros((3, 4))), ValueError, "needs shape"),
        (lambda: GaussianDense(np.zeros((3, 4)), (3, 2)), ValueError, "does not fit"),
        (lambda: GaussianDense(np.zeros((3, 2, 2)), (4, 1)), ValueError, "does not fit"),
        (lambda: GaussianDense(np.full((3, 2, 2), np.nan)), ValueError, "NaN or infinite"),
        (lambda: GaussianDense(np.zeros((3, 2, 2), complex)), TypeError, "real"),
        (lambda: GaussianDense(np.zeros(4)), ValueError, "dimensions"),
        (lambda: RankOne(np.zeros((3, 2)), np.zeros((4, 2))), ValueError, "as many vectors, got 3 and 4"),
        (lambda: RankOne(np.zeros((3, 2), "U1")), TypeError, "real"),
        (lambda: as_operator(np.zeros((3, 5)), (2, 2)), ValueError, "length 5, but shape"),
        (lambda: as_operator(np.zeros((3, 4))), TypeError, "as_operator"),
        (lambda: as_operator("no", (2, 2)), TypeError, "not a linear operator"),
        (lambda: as_operator(np.zeros((3, 4), complex), (2, 2)), TypeError, "real"),
    ],
)
def test_bad_operators(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_integer_measurements_are_taken():
    assert GaussianDense(np.ones((2, 2, 2), int)).a.dtype == np.float64
    assert fastdmf.RankOne(np.ones((2, 2), np.float32)).a.dtype == np.float32


@pytest.mark.parametrize("name", OPERATORS)
def test_homogeneous_shares_the_map_and_has_no_data(backend, rng, name):
    operator = OPERATORS[name](9, 7, 30, rng)
    weights = rng.uniform(0.5, 2, (1, operator.size))
    y = rng.standard_normal((1, operator.size))
    bound = operator.bind(backend, y, weights=weights)
    p, qt = rng.standard_normal((1, 9, 3)), rng.standard_normal((1, 7, 3))
    gp, gqt = np.empty_like(p), np.empty_like(qt)
    before = bound.loss_and_pull(p, qt, gp, gqt)
    null = bound.homogeneous()
    loss = null.loss_and_pull(p, qt, gp, gqt)
    r = operator.apply(p[0] @ qt[0].T)
    np.testing.assert_allclose(loss, np.sum(weights * r**2), rtol=1e-10)
    np.testing.assert_allclose(gp[0], operator.adjoint(weights[0] * r) @ qt[0], atol=1e-10)
    np.testing.assert_array_equal(bound.loss_and_pull(p, qt, gp, gqt), before)
    np.testing.assert_array_equal(bound.y, y)
