"""Properties of the public surface on drawn problems."""

import warnings

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastdmf
from fastdmf.engine import SolveWarning

# Few and small: every example is a solve. Deadlines mean nothing on a shared machine with a compiler in the loop.
few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def problems(draw):
    """Return (mask, y, settings of solve) of a small completion problem."""
    n1, n2 = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, n1 * n2))
    rows, cols = np.divmod(rng.permutation(n1 * n2)[:count], n2)
    y = rng.standard_normal(count) * 10.0 ** draw(st.integers(-6, 6))
    depth = draw(st.integers(1, 4))
    chosen = {
        "depth": depth,
        "width": draw(st.none() | st.integers(1, 14) | st.tuples(*[st.integers(1, 9)] * (depth - 1))),
        "init": draw(st.sampled_from(["gaussian", "orthogonal", "balanced"])),
        "init_scale": 1e-2 * float(np.abs(y).max()),
        "loss": draw(st.sampled_from(["mse", "mse/2", "sse", "sse/2"])),
        "l2": 0.0,
        "dtype": draw(st.sampled_from(["float32", "float64"])),
        "max_iter": draw(st.integers(0, 40)),
        "random_state": draw(st.integers(0, 9)),
    }
    if draw(st.booleans()):
        chosen["weights"] = rng.random(count) + 0.1
    if draw(st.booleans()):
        chosen["elementwise_loss"] = ("huber", float(np.abs(y).mean()) + 1e-300)
    return fastdmf.EntryMask(rows, cols, (n1, n2)), y, chosen


def _solve(mask, y, chosen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        return fastdmf.solve(mask, y, **chosen)


@few
@given(problems())
def test_every_run_is_finite_descends_and_repeats(problem):
    mask, y, chosen = problem
    a, b = (_solve(mask, y, chosen) for _ in range(2))
    for w, v in zip(a.factors, b.factors):
        assert np.isfinite(w).all() and w.dtype == chosen["dtype"]
        np.testing.assert_array_equal(w, v)
    assert np.isfinite(a.history["objective"]).all()
    # auto may keep a step that raises the objective (at most twofold) in its first phase, never one in the long run.
    assert a.history["objective"][-1] <= 2 * a.history["objective"][0]
    assert a.n_iter <= chosen["max_iter"] and len(a.history["loss"]) == a.n_iter + 1


@few
@given(problems(), st.integers(0, 2**32 - 1))
def test_the_order_of_the_entries_does_not_matter(problem, seed):
    mask, y, chosen = problem
    order = np.random.default_rng(seed).permutation(mask.size)
    shuffled = fastdmf.EntryMask(mask.rows[order], mask.cols[order], mask.shape)
    other = {**chosen, **({"weights": chosen["weights"][order]} if "weights" in chosen else {})}
    a, b = _solve(mask, y, chosen), _solve(shuffled, y[order], other)
    for w, v in zip(a.factors, b.factors):
        np.testing.assert_array_equal(w, v)


@few
@given(problems())
def test_the_loss_is_that_of_the_matrix(problem):
    """``history["loss"][-1]`` is the named normalisation of the returned product's residuals, written out."""
    mask, y, chosen = problem
    chosen = {**chosen, "dtype": "float64"}
    solution = _solve(mask, y, chosen)
    r = np.abs(solution.matrix()[mask.rows, mask.cols] - y)
    rho = r**2
    if "elementwise_loss" in chosen:
        delta = chosen["elementwise_loss"][1]
        rho = np.where(r <= delta, r**2, delta * (2 * r - delta))
    w = chosen.get("weights", np.ones(len(y)))
    factor = {"mse": 1 / w.sum(), "mse/2": 0.5 / w.sum(), "sse": 1.0, "sse/2": 0.5}[chosen["loss"]]
    expected = factor * np.sum(w * rho)
    scale = factor * np.sum(w * y**2)
    assert abs(solution.history["loss"][-1] - expected) <= 1e-9 * expected + 1e-18 * scale


@few
@given(problems(), st.floats(1e-3, 1e3))
def test_units_cancel(problem, unit):
    """Data and start in other units give the same run in those units: auto has no scale of its own."""
    mask, y, chosen = problem
    chosen = {**chosen, "dtype": "float64", "max_iter": min(chosen["max_iter"], 15)}
    other = {**chosen, "init_scale": chosen["init_scale"] * unit}
    if "elementwise_loss" in chosen:
        other["elementwise_loss"] = ("huber", chosen["elementwise_loss"][1] * unit)
    a, b = _solve(mask, y, chosen), _solve(mask, y * unit, other)
    np.testing.assert_allclose(b.matrix() / unit, a.matrix(), rtol=1e-6, atol=1e-6 * np.abs(a.matrix()).max())
    assert a.status is b.status
