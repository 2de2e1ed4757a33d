"""Warnings before a run: right where they speak, silent where they should be, and their numbers."""

import re
import warnings

import numpy as np
import pytest
from conftest import OPERATORS, completion
from scipy.sparse.linalg import aslinearoperator

import fastdmf
from fastdmf.engine import SettingWarning, SolveWarning, Status
from fastdmf.operators import as_operator
from fastdmf.rules import Adam, GradientDescent, GroupRMSprop, Momentum, Nesterov
from fastdmf.symmetry import antisymmetric_share, symmetric_part, symmetric_squared_norms


def told(op, y, **options):
    """Return what ``solve`` warns of before the first step, and nothing of the run itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fastdmf.solve(op, y, **{"callback": lambda p: True, "random_state": 0, **options})
    assert all(w.category is SettingWarning and w.filename == __file__ for w in caught) or run.status is Status.DIVERGED
    return [str(w.message) for w in caught]


def number(sentence, pattern):
    return float(re.search(pattern + r" ([-+.e\d]*\d)", sentence).group(1))


# --- fixed steps -----------------------------------------------------------------------------------------------------


def instance(kind, rng):
    """Measurements of a matrix with mean square 1: uniform, uneven and positive masks, Gaussian."""
    n, rank, count = {
        "mask": (40, 2, 700),
        "sparse": (60, 5, 700),
        "uneven": (60, 3, 1200),
        "positive": (60, 1, 1000),
    }.get(kind, (30, 2, 300))
    if kind == "positive":
        truth = 3 + np.abs(rng.standard_normal((n, 1))) @ np.abs(rng.standard_normal((1, n)))
    else:
        truth = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n))
    truth *= n / np.linalg.norm(truth)
    if kind == "gaussian":
        return truth, fastdmf.GaussianDense(rng.standard_normal((count, n, n)) / n)
    margin = np.arange(1, n + 1) ** (-0.7 if kind in ("uneven", "positive") else 0.0)
    share = np.outer(margin, margin).ravel()
    cells = rng.choice(n * n, count, replace=False, p=share / share.sum())
    return truth, fastdmf.EntryMask(*np.divmod(cells, n), truth.shape)


@pytest.mark.parametrize("kind", ["mask", "sparse", "uneven", "positive", "gaussian"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_warned_steps_are_unstable(kind, depth):
    """The shortest step that warns leaves the neighbourhood of a fit; half the limit stays and is silent."""
    truth, op = instance(kind, np.random.default_rng(1))
    y = op.apply(truth)
    sentence = told(op, y, depth=depth, rule=GradientDescent(lr=1e3))[0]
    limit = number(sentence, "limit of stability, about")
    options = {"depth": depth, "init": "balanced", "init_scale": 1e-2}
    assert not any("stability" in s for s in told(op, y, rule=GradientDescent(lr=1.4 * limit), **options))
    assert any("stability" in s for s in told(op, y, rule=GradientDescent(lr=1.6 * limit), **options))
    fit = fastdmf.solve(op, y, max_iter=400, random_state=0, on_failure="ignore", **options)
    rng = np.random.default_rng(0)
    near = [w + 1e-3 * np.abs(w).max() * rng.standard_normal(w.shape) for w in fit.factors]
    stable = {}
    for share in (0.5, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6):
        rule = GradientDescent(lr=share * limit)
        run = fastdmf.solve(op, y, factors=near, rule=rule, max_iter=300, tol=1e-300, on_failure="ignore")
        stable[share] = run.status is not Status.DIVERGED and run.history["loss"][-1] < 3 * run.history["loss"].min()
    longest = max(share for share, is_stable in stable.items() if is_stable)
    print(f"{kind}, depth {depth}: limit {limit:.3g}, stable up to {longest} of it")
    assert stable[0.5] and not stable[1.6]


@pytest.mark.parametrize(("rule", "gain"), [(Momentum, 1.6), (Nesterov, 1.6 / 2.2)])
def test_limits_of_momentum(rule, gain):
    _, op, y = completion(0, n=40, rank=2, count=700)
    plain, other = (
        number(told(op, y, rule=r)[0], "limit of stability, about")
        for r in (GradientDescent(lr=1e4), rule(lr=1e4, beta=0.6))
    )
    assert other == pytest.approx(gain * plain, rel=0.06)


@pytest.mark.parametrize("init", ["gaussian", "identity", "orthogonal", "balanced"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_predicted_plateaus(init, depth):
    """Four fifths of the prediction end on the plateau, twice its length ends behind it."""
    truth, op, y = completion(0, n=30, rank=2, count=500)
    options = {"depth": depth, "init": init, "init_scale": 1e-3, "rule": GradientDescent(lr=1.0)}
    (sentence,) = told(op, y, max_iter=1, **options)
    predicted, s1 = number(sentence, "takes about"), number(sentence, "to half of")
    assert told(op, y, max_iter=int(1.1 * predicted), **options) == []
    assert s1 == pytest.approx(np.linalg.norm(truth, 2), rel=0.25)
    run = fastdmf.solve(
        op,
        y,
        max_iter=int(2 * predicted),
        check_every=5,
        track="singular_values",
        tol=1e-12,
        random_state=0,
        on_failure="ignore",
        **options,
    )
    grown = run.history["iteration"][np.argmax(run.history["singular_values"][:, 0] > 0.5 * s1)]
    print(f"{init}, depth {depth}: {predicted:.0f} predicted, {grown} taken")
    assert 0.8 * predicted < grown < 1.8 * predicted


def test_plateaus_of_given_factors_momentum_and_symmetric_chains():
    _, op, y = completion(0, n=30, rank=2, count=500)
    gd, heavy = (
        number(told(op, y, rule=rule, max_iter=3)[0], "takes about")
        for rule in (GradientDescent(lr=1.0), Momentum(lr=1.0, beta=0.75))
    )
    assert heavy == pytest.approx(gd / 4, rel=0.06)
    factors = [0.1 * np.eye(30)] * 3  # their product has singular values 1e-3, as from init="identity"
    given = number(told(op, y, factors=factors, rule=GradientDescent(lr=1.0), max_iter=3)[0], "takes about")
    assert given == pytest.approx(gd, rel=0.06)
    large = [np.eye(30) * 5] * 3
    assert told(op, y, factors=large, rule=GradientDescent(lr=1e-3), max_iter=3) == []
    truth, gaussian, measured = psd()
    both = [
        number(told(gaussian, measured, rule=GradientDescent(lr=1e-3), max_iter=3, **chain)[0], "takes about")
        for chain in ({"symmetric": True}, {"depth": 2})
    ]
    assert both[0] == pytest.approx(both[1] / 2, rel=0.1)


def test_a_batch_is_told_once_of_its_worst_slice():
    _, op, y = completion(0, n=30, rank=2, count=500)
    ys = np.stack([y, 3 * y, 2 * y])
    options = {"rule": GradientDescent(lr=8.0), "depth": 3, "max_iter": 5}
    unstable, slow = told(op, ys, **options)
    assert "(slice 1)" in unstable and "(slice 0)" in slow
    assert told(op, ys[0], **options)[-1].replace(" (slice 0)", "") == slow.replace(" (slice 0)", "")
    weights = np.ones((2, len(y)))
    weights[1] *= 5
    unstable = told(op, y, weights=weights, loss="sse", rule=GradientDescent(lr=1.0))[0]
    assert "(slice 1)" in unstable


PAPERS = {
    # The settings of the experiments that the theory is about, at which the runs are stable and long enough.
    "Arora et al. 2019, figure 3, depth 2": dict(
        depth=2, init="identity", rule=GradientDescent(lr=0.1), max_iter=200_000
    ),
    "Arora et al. 2019, figure 3, depth 3": dict(
        depth=3, init="identity", rule=GradientDescent(lr=0.1), max_iter=200_000
    ),
    "Arora et al. 2019, completion": dict(depth=4, rule=GroupRMSprop(), init_scale=1e-6),
    "auto": dict(depth=4, init_scale=1e-6),
    "flow": dict(depth=3, rule="flow", max_iter=10),
    "adam": dict(depth=3, rule=Adam(lr=1e3), max_iter=10),
    "huber": dict(depth=3, rule=GradientDescent(lr=1e3), elementwise_loss=("huber", 1.0), max_iter=10),
    "no step": dict(depth=3, rule=GradientDescent(lr=1e-9), max_iter=0),
}


@pytest.mark.parametrize("name", PAPERS)
def test_silent_on_the_papers_settings_and_where_nothing_is_known(name):
    _, op, y = completion(0)
    assert told(op, y, **PAPERS[name]) == []


@pytest.mark.parametrize("unit", [0.0, 1e-60, 1e150])
def test_extreme_units(unit):
    """Nothing is told of zeros; the forecast itself neither overflows nor divides by zero."""
    _, op, y = completion(0, n=20, rank=2, count=200)
    unstable = GradientDescent(lr=50 / (unit or 1))
    sentences = told(op, unit * y, rule=unstable, init_scale=1e-3 * (unit or 1), depth=2)
    assert len(sentences) == (unit > 0)


def test_silent_on_symmetric_sensing_of_the_paper():
    """Li, Ma and Zhang 2018: d = 100, r = 5, m = 5 d r, eta = 0.0025, 10,000 steps; here d = 40."""
    truth, op, y = psd(d=40, r=5, m=1000)
    options = {"symmetric": True, "init": "identity", "rule": GradientDescent(lr=0.0025), "max_iter": 10_000}
    for scale in (1e-6, 1e-2, 1.0):
        assert told(op, y, init_scale=scale, truth=truth, **options) == []
    assert "stability" in told(op, y, init_scale=1e-3, truth=truth, **{**options, "rule": GradientDescent(lr=1.0)})[0]


def test_silent_when_asked_and_the_run_is_the_same():
    """No warning with on_failure="ignore", and the look ahead moves no bit of the run."""
    _, op, y = completion(0, n=40, rank=2, count=700)
    options = {"rule": GradientDescent(lr=50.0), "max_iter": 30, "depth": 3, "random_state": 0}
    quiet = fastdmf.solve(op, y, on_failure="ignore", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        loud = fastdmf.solve(op, y, **options)
    for a, b in zip(quiet.factors, loud.factors):
        np.testing.assert_array_equal(a, b)
    assert loud.n_eval == quiet.n_eval


# --- the truth -------------------------------------------------------------------------------------------------------


def square_truth(n=4, sign=1):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    s = np.linspace(1, 0.5, n)
    s[-1] *= sign * np.sign(np.linalg.det(u @ v.T))
    return (u * s) @ v.T


@pytest.mark.parametrize("sign", [1, -1])
def test_determinants(sign):
    """From the identity (det > 0): flow reaches a truth with det > 0 and not the other, and only that one is told."""
    truth = square_truth(sign=sign)
    mask = fastdmf.EntryMask(*np.divmod(np.arange(16), 4), (4, 4))
    options = {"depth": 3, "init": "identity", "init_scale": 1e-2, "truth": truth}
    sentences = told(mask, truth.ravel(), **options)
    run = fastdmf.solve(
        mask, truth.ravel(), rule="flow", loss="sse/2", max_iter=600, tol=1e-8, on_failure="ignore", **options
    )
    if sign > 0:
        assert sentences == [] and run.history["error"][-1] < 1e-6
        return
    assert len(sentences) == 1 and "det(truth) is negative, that of the start positive: gradient flow" in sentences[0]
    # What is missing is the last of the singular values 1, 5/6, 2/3, 1/2.
    assert run.history["error"][-1] == pytest.approx(0.25 / np.sum(np.linspace(1, 0.5, 4) ** 2), rel=0.01)
    start = [w.copy() for w in [0.2 * np.eye(4)] * 3]
    start[2][0] *= -1
    assert told(mask, truth.ravel(), factors=start, truth=truth) == []


def test_determinants_that_do_not_matter():
    truth = square_truth(sign=-1)
    mask = fastdmf.EntryMask(*np.divmod(np.arange(16), 4), (4, 4))
    y, singular = truth.ravel(), truth.copy()
    singular[-1] = singular[0]
    for quiet in (
        dict(depth=1, init="identity"),
        dict(depth=3, init="gaussian", random_state=[0, 1, 2, 3]),  # not balanced: it may cross
        dict(depth=3, init="identity", width=3, truth=singular),
    ):
        assert told(mask, y, **{"truth": truth, **quiet}) == []
    assert told(mask, singular.ravel(), depth=3, init="identity", truth=singular) == []
    both = told(mask, y, depth=3, init="identity", truth=np.stack([square_truth(), truth]), random_state=[0, 1])
    assert len(both) == 1 and "(slice 1)" in both[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_width_below_the_rank_of_the_truth(dtype):
    truth, op, y = completion(0, n=30, rank=4, count=500)
    truth, y = truth.astype(dtype), y.astype(dtype)
    s = np.linalg.svd(truth.astype(float), compute_uv=False)
    (sentence,) = told(op, y, depth=3, width=(9, 3), truth=truth)
    assert "width 3 is below the rank of truth, 4: the error cannot fall below" in sentence and "width=4" in sentence
    assert number(sentence, "cannot fall below") == pytest.approx(s[3] ** 2 / np.sum(s**2), rel=0.05)
    assert told(op, y, depth=3, width=4, truth=truth) == []
    assert told(op, y, depth=3, truth=truth) == []
    many = told(op, y, width=3, truth=np.stack([truth * 0 + 1, truth]), random_state=[0, 1])
    assert len(many) == 1 and "(slice 1)" in many[0]


# --- symmetric chains ------------------------------------------------------------------------------------------------


def psd(d=12, r=2, m=150, symmetric=True):
    rng = np.random.default_rng(0)
    u = rng.standard_normal((d, r))
    truth = u @ u.T / np.linalg.norm(u @ u.T, 2)
    a = rng.standard_normal((m, d, d))
    op = fastdmf.GaussianDense((a + a.swapaxes(1, 2)) / 2 if symmetric else a)
    return truth, op, op.apply(truth)


def test_truths_that_no_symmetric_chain_can_be():
    truth, op, y = psd()
    skew = truth.copy()
    skew[0, 1] += 0.3
    share = np.linalg.norm(skew - skew.T) / np.linalg.norm(skew)
    with pytest.raises(ValueError, match=rf"\|\|truth - truth\^T\|\| is {share:.2g} of its norm.*symmetric=False"):
        fastdmf.solve(op, y, symmetric=True, truth=skew, random_state=0)
    assert told(op, y, symmetric=True, truth=truth.astype(np.float32)) == []
    (sentence,) = told(op, y, symmetric=True, truth=truth - 0.2 * np.eye(12))
    assert "truth has negative eigenvalues, the lowest -0.2, and W = U U^T has none" in sentence


def test_antisymmetric_measurements():
    truth, op, y = psd(symmetric=False)
    (sentence,) = told(op, y, symmetric=True)
    a = op.a.reshape(-1, 12, 12)
    share = np.linalg.norm(a - a.swapaxes(1, 2)) / 2 / np.linalg.norm(a)
    assert sentence.startswith(f"{share:.0%} of the measurements' norm is antisymmetric")
    assert "fastdmf.symmetric_part(operator)" in sentence
    part = fastdmf.symmetric_part(op)
    assert told(part, y, symmetric=True) == [] and told(op, y, depth=2) == []
    # The path is the same: the descent sees the symmetric part anyway.
    options = {"symmetric": True, "rule": GradientDescent(lr=0.01), "max_iter": 100, "random_state": 0}
    one, two = (fastdmf.solve(o, y, on_failure="ignore", **options).matrix() for o in (op, part))
    np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


def test_pairs_of_entries_that_differ():
    truth = psd(d=8)[0]
    rows, cols = np.array([0, 3, 1, 5, 2, 4, 4]), np.array([3, 0, 5, 1, 2, 7, 6])
    mask, y = fastdmf.EntryMask(rows, cols, (8, 8)), truth[rows, cols]
    assert told(mask, y, symmetric=True) == []
    y[1] += 0.01
    y[3] -= 0.5
    (sentence,) = told(mask, y, symmetric=True)
    assert (
        "entry (1, 5) and entry (5, 1) differ by 0.5, the largest such gap: a symmetric W meets their mean" in sentence
    )
    weights = np.ones(7)
    weights[3] = 0
    (sentence,) = told(mask, y, symmetric=True, weights=weights)
    assert "entry (0, 3) and entry (3, 0) differ by 0.01" in sentence
    (sentence,) = told(mask, np.stack([truth[rows, cols], y]), symmetric=True)
    assert "(slice 1)" in sentence
    assert told(fastdmf.EntryMask(rows[4:], cols[4:], (8, 8)), y[4:], symmetric=True) == []


# --- symmetric parts -------------------------------------------------------------------------------------------------


def operators(n, rng):
    """Every kind, and symmetric ones of the kinds that can be."""
    made = {name: make(n, n, 40, rng) for name, make in OPERATORS.items()}
    a = rng.standard_normal((20, n, n))
    a = a + a.swapaxes(1, 2)
    vectors = rng.standard_normal((20, n))
    return made | {
        "float16": fastdmf.GaussianDense(rng.standard_normal((20, n, n)), storage="float16"),
        "symmetric gaussian": fastdmf.GaussianDense(a),
        "symmetric rank one": fastdmf.RankOne(vectors),
        "parallel rank one": fastdmf.RankOne(vectors, 2 * vectors),
        "symmetric scipy": as_operator(aslinearoperator(a.reshape(20, -1)), (n, n)),
    }


def matrices(op):
    """The measurement matrices, from the adjoint."""
    return np.stack([op.adjoint(row) for row in np.eye(op.size)]).astype(float)


KINDS = [*operators(3, np.random.default_rng(0))]


@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_part(kind, backend):
    rng = np.random.default_rng(5)
    op = operators(6, rng)[kind]
    part, half = symmetric_part(op), matrices(op)
    sym, anti = (half + half.swapaxes(1, 2)) / 2, (half - half.swapaxes(1, 2)) / 2
    rtol = 1e-3 if kind == "float16" else 1e-6
    np.testing.assert_allclose(matrices(part), sym, atol=rtol * np.abs(sym).max())
    x = rng.standard_normal((6, 6))
    np.testing.assert_allclose(part.apply(x), np.einsum("mij,ij->m", sym, x), rtol=0.01, atol=rtol * np.abs(half).max())
    np.testing.assert_allclose(part.apply(x + x.T), op.apply(x + x.T), atol=10 * rtol * np.abs(half).max())
    estimated = kind in ("seeded", "scipy", "symmetric scipy")
    norms = np.sum(sym**2, axis=(1, 2))
    np.testing.assert_allclose(symmetric_squared_norms(op).sum(), norms.sum(), rtol=0.15 if estimated else rtol)
    np.testing.assert_allclose(part.squared_norms().sum(), norms.sum(), rtol=0.15 if estimated else 10 * rtol)
    share = np.sqrt(np.sum(anti**2) / np.sum(half**2))
    assert antisymmetric_share(op) == pytest.approx(share, rel=0.15 if estimated else 1e-3, abs=1e-7)
    assert antisymmetric_share(part) < (1e-6 if kind != "float16" else 1e-4)
    # Bound, on thin halves, against the definition; a restriction; the homogeneous form.
    dtype = np.float32 if kind == "float16" else np.float64
    y, weights = rng.standard_normal((1, op.size)), rng.random((2, op.size))
    p, qt = rng.standard_normal((2, 6, 3)).astype(dtype), rng.standard_normal((2, 6, 3)).astype(dtype)
    bound = part.bind(backend, y, weights=weights, dtype=dtype, width=3, batch=2)
    gp, gqt = np.empty_like(p), np.empty_like(qt)
    u, v = (rng.standard_normal((2, 6)).astype(dtype) for _ in range(2))
    probe = u.copy(), v.copy()
    losses = bound.loss_and_pull(p, qt, gp, gqt, probe)
    tolerance = {"rtol": 0.02 if dtype == np.float32 else 1e-6, "atol": 0.05 if dtype == np.float32 else 1e-6}
    for b in range(2):
        residual = np.einsum("mij,ij->m", sym, p[b] @ qt[b].T) - y[0]
        g = np.einsum("m,mij->ij", weights[b] * residual, sym)
        assert losses[b] == pytest.approx(np.sum(weights[b] * residual**2), rel=1e-2 if dtype == np.float32 else 1e-6)
        np.testing.assert_allclose(gp[b], g @ qt[b], **tolerance)
        np.testing.assert_allclose(gqt[b], g.T @ p[b], **tolerance)
        np.testing.assert_allclose(probe[0][b], g @ v[b], **tolerance)
    index = np.array([0, 3, 5])
    np.testing.assert_allclose(part.restrict(index).apply(x), part.apply(x)[index], rtol=1e-5)
    zero = bound.homogeneous()
    assert zero.loss_and_pull(0 * p, qt, gp, gqt) == pytest.approx([0, 0], abs=1e-12)


def test_symmetric_parts_that_cost_nothing():
    rng = np.random.default_rng(0)
    squares = fastdmf.RankOne(rng.standard_normal((5, 3)))
    assert symmetric_part(squares) is squares
    half = symmetric_part(operators(3, rng)["float16"])
    assert half.storage == "float16" and half.a.dtype == np.float16


def test_symmetric_part_of_bad_input():
    with pytest.raises(TypeError, match="must be a fastdmf operator, got ndarray"):
        fastdmf.symmetric_part(np.eye(3))
    op = fastdmf.EntryMask([0], [1], (3, 4))
    for call in (symmetric_part, antisymmetric_share, symmetric_squared_norms):
        with pytest.raises(
            ValueError, match=r"only square matrices have a symmetric part, the operator's are \(3, 4\)"
        ):
            call(op)
