"""Elementwise losses: values by hand, derivatives by differences, and who can take which."""

import numpy as np
import pytest
from conftest import LOSSES, OPERATORS, random_mask

import fastdmf
from fastdmf.contract import Bound
from fastdmf.losses import ElementwiseLoss, as_loss

ALL = {**LOSSES, "truncated_prediction": ("truncated_prediction", 1.3)}

# (prediction, y) and, for each loss with its threshold, (rho, psi, slope) written down by hand.
BY_HAND = {
    "squared": [(1.5, 1.0, 0.25, 0.5, 1), (-2.0, 1.0, 9.0, -3.0, 1)],
    "huber": [(1.5, 1.0, 0.25, 0.5, 1), (-2.0, 1.0, 0.7 * (6 - 0.7), -0.7, 0)],
    "truncated": [(1.5, 1.0, 0.25, 0.5, 1), (-2.0, 1.0, 1.1**2, 0.0, 0)],
    "absolute": [(1.5, 1.0, 0.5, 0.5, 0), (-2.0, 1.0, 3.0, -0.5, 0)],
    # Beyond the edge the value at the edge, and nothing where y lies beyond it, too.
    "truncated_prediction": [
        (1.2, 2.0, 0.64, -0.8, 1),
        (1.5, 1.0, 0.3**2, 0.0, 0),
        (-1.5, 1.0, 2.3**2, 0.0, 0),
        (1.5, 2.0, 0.0, 0.0, 0),
    ],
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ALL)
def test_values_by_hand(name, dtype):
    loss, rows = as_loss(ALL[name]), np.array(BY_HAND[name])
    prediction, y = rows[:, 0].astype(dtype), rows[:, 1].astype(dtype)
    for ours, theirs in zip((loss.rho, loss.psi, loss.slope), rows.T[2:]):
        out = ours(prediction - y, y)
        assert out.dtype == dtype
        np.testing.assert_allclose(out, theirs, rtol=20 * np.finfo(dtype).eps, atol=1e-6 if dtype == np.float32 else 0)


@pytest.mark.parametrize("name", ALL)
def test_derivatives_by_differences(name, rng):
    """2 psi = rho' and slope = psi' away from the edges; y of one row shared by a batch."""
    loss, h = as_loss(ALL[name]), 1e-6
    r, y = rng.standard_normal((3, 400)), rng.standard_normal((1, 400))
    far = np.abs(np.abs(r) - (loss.delta if name in ("huber", "truncated") else 0)) > 1e-3
    far &= np.abs(np.abs(r + y) - loss.delta) > 1e-3
    rho_slope = (loss.rho(r + h, y) - loss.rho(r - h, y)) / (2 * h)
    psi_slope = (loss.psi(r + h, y) - loss.psi(r - h, y)) / (2 * h)
    assert far.mean() > 0.9
    np.testing.assert_allclose(rho_slope[far], 2 * loss.psi(r, y)[far], rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(psi_slope[far], loss.slope(r, y)[far], rtol=1e-7, atol=1e-8)
    if name != "squared":
        assert 0.1 < np.mean(loss.slope(r, y) == 0)  # both sides were met


def test_predictions_that_are_all_too_large_are_no_fit():
    """The indicator alone would call them perfect, and so would a descent that has overshot."""
    op = fastdmf.RankOne(np.random.default_rng(0).standard_normal((30, 4)))
    y = op.apply(np.diag([1.0, 0.5, 0, 0]))
    bound = op.bind(fastdmf.backend.get_backend("cpu"), y[None], loss=("truncated_prediction", 2 * y.max()))
    huge = 1e3 * np.eye(4)[None]
    assert bound.losses(huge, huge)[0] > bound.null_losses()[0] == pytest.approx(np.sum(y**2))


@pytest.mark.parametrize("name", ["mask", "gaussian", "seeded"])
def test_kernels_refuse_what_they_do_not_know(name, rng, backend):
    op = OPERATORS[name](6, 5, 12, rng)
    y, loss = rng.standard_normal(op.size), ("truncated_prediction", 1.0)
    message = f"'truncated_prediction' is for RankOne and scipy operators: the kernels of {type(op).__name__}"
    with pytest.raises(ValueError, match=message):
        op.bind(backend, y[None], loss=loss)
    with pytest.raises(ValueError, match=message):
        fastdmf.solve(op, y, elementwise_loss=loss, random_state=0)
    # The base class, through the full matrix, is no kernel.
    assert Bound(op, backend, y[None], None, as_loss(loss), np.dtype(float)).null_losses() == pytest.approx(
        np.sum(y**2)
    )


@pytest.mark.parametrize("name", ["rank_one", "scipy"])
def test_gradient_of_the_truncated_prediction(name, rng, backend):
    """Along random directions, with weights, no measurement at the edge; both routes give the same."""
    op = OPERATORS[name](5, 4, 40, rng)
    y, w = rng.standard_normal((2, 40)), rng.random((2, 40))
    p, qt = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 4, 3))
    predictions = np.stack([op.apply(a @ b.T) for a, b in zip(p, qt)])
    delta = float(np.median(np.abs(predictions)))
    assert np.abs(np.abs(predictions) - delta).min() > 1e-4
    loss = as_loss(("truncated_prediction", delta))
    bound = op.bind(backend, y, weights=w, loss=loss)
    gp, gqt = np.full_like(p, np.nan), np.full_like(qt, np.nan)
    losses = bound.loss_and_pull(p, qt, gp, gqt)
    expected, kept = [], np.abs(predictions) <= delta
    for b in range(2):
        r = predictions[b] - y[b]
        edge = np.maximum(delta - np.sign(predictions[b]) * y[b], 0)
        expected.append(np.sum(w[b] * np.where(kept[b], r**2, edge**2)))
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    dp, dq, h = rng.standard_normal(p.shape), rng.standard_normal(qt.shape), 1e-6
    rise = bound.losses(p + h * dp, qt + h * dq) - bound.losses(p - h * dp, qt - h * dq)
    slope = 2 * (np.sum(gp * dp, axis=(1, 2)) + np.sum(gqt * dq, axis=(1, 2)))
    np.testing.assert_allclose(rise / (2 * h), slope, rtol=1e-6)
    oracle = Bound(op, backend, y, w, loss, np.dtype(float))
    ours, theirs = (gp, gqt), (np.empty_like(p), np.empty_like(qt))
    np.testing.assert_allclose(oracle.loss_and_pull(p, qt, *theirs), losses, rtol=1e-12)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        ("truncated_prediction", "needs a positive threshold"),
        (("truncated_prediction", 0.0), "needs a positive threshold"),
        (("truncated_prediction", np.nan), "needs a positive threshold"),
        ("bounded", "must be one of .*'truncated_prediction'"),
        (("absolute", 1.0), "takes no threshold, got 1.0"),
    ],
)
def test_bad_losses(loss, match):
    with pytest.raises(ValueError, match=match):
        as_loss(loss)


def test_a_mask_knows_the_loss_of_a_zero_matrix(rng, backend):
    """Its residuals are -y."""
    op = random_mask(7, 6, 20, rng)
    y = rng.standard_normal((1, 20))
    for name in LOSSES:
        loss = as_loss(LOSSES[name])
        assert op.bind(backend, y, loss=loss).null_losses() == pytest.approx(loss.rho(-y, y).sum())
    assert as_loss(loss) is loss
    assert as_loss(("huber", 2)) == ElementwiseLoss("huber", 2.0)
