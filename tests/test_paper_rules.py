"""The papers' step rules: steps against plain NumPy, batches, resumption, bases, and what the papers show of them."""

import itertools

import numpy as np
import pytest

import fastdmf
from fastdmf.backend import get_backend
from fastdmf.chain import Layout
from fastdmf.engine import Status
from fastdmf.problem import Problem
from fastdmf.rules import (
    GradientDescent,
    MirrorDescent,
    NormalisedGD,
    PreconditionedGD,
    ScaledGD,
    Subgradient,
    as_rule,
)

C = {"mse": lambda w: 1 / w, "mse/2": lambda w: 0.5 / w, "sse": lambda w: 1.0, "sse/2": lambda w: 0.5}


def product(factors, symmetric):
    if symmetric:
        return factors[0] @ factors[0].T
    return factors[1] @ factors[0] if len(factors) == 2 else factors[0]


def plain(a, y, weights, factors, *, symmetric, loss, absolute, l2):
    """Return (gradients, residuals, c) of c sum w rho(A(W) - y) + l2/2 sum ||W_j||^2, a of shape (m, n1, n2)."""
    r = np.array([np.sum(one * product(factors, symmetric)) for one in a]) - y
    c = C[loss](weights.sum())
    g = c * np.tensordot(weights * (np.sign(r) if absolute else 2 * r), a, 1)
    if symmetric:
        grads = [(g + g.T) @ factors[0]]
    elif len(factors) == 2:
        grads = [factors[1].T @ g, g @ factors[0].T]
    else:
        grads = [g]
    return [one + l2 * v for one, v in zip(grads, factors)], r, c


def curvature(a, weights):
    return np.sum(weights * (a**2).sum((1, 2))) / np.prod(a.shape[1:])


def power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def scaled_pair(lr, eta, f, g):
    h = np.eye(len(f[0]))
    return [
        f[0] - lr * np.linalg.inv(f[1].T @ f[1] + eta * h) @ g[0],
        f[1] - lr * g[1] @ np.linalg.inv(f[0] @ f[0].T + eta * h),
    ]


def scaled_one(lr, eta, f, g):
    return [f[0] - lr * g[0] @ np.linalg.inv(f[0].T @ f[0] + eta * np.eye(f[0].shape[1]))]


def gradient_damping(f, g, c, kappa):
    if len(f) == 1:
        parts = [g[0] @ power(f[0].T @ f[0], -0.5)]
    else:
        parts = [power(f[1].T @ f[1], -0.5) @ g[0], g[1] @ power(f[0] @ f[0].T, -0.5)]
    return np.sqrt(sum(np.sum(p**2) for p in parts)) / (c * kappa)


def sinh_step(lr, scale, f, g):
    u, s, vt = np.linalg.svd(f[0], full_matrices=False)
    u, s, vt = np.linalg.svd((u * np.arcsinh(s / scale)) @ vt - lr * g[0], full_matrices=False)
    return [(u * (scale * (np.exp(s) - np.exp(-s)) / 2)) @ vt]


def exp_step(lr, f, g):
    values, vectors = np.linalg.eigh(f[0])
    values, vectors = np.linalg.eigh((vectors * np.log(values)) @ vectors.T - lr * (g[0] + g[0].T) / 2)
    return [(vectors * np.exp(values)) @ vectors.T]


def along(eta, f, g):
    return [v - eta * d for v, d in zip(f, g)]


def norm(g):
    return np.sqrt(sum(np.sum(d**2) for d in g))


# name -> rule, kind of chain, elementwise loss, and the update (t, factors, gradients, |r|, weights, c, kappa).
CASES = {
    "scaled, pair": (
        ScaledGD(lr=0.3, damping=0.05), "pair", "squared",
        lambda t, f, g, r, w, c, k: scaled_pair(0.3, 0.05, f, g),
    ),
    "scaled, bare": (ScaledGD(lr=0.2), "pair", "squared", lambda t, f, g, r, w, c, k: scaled_pair(0.2, 0.0, f, g)),
    "scaled, one": (
        ScaledGD(lr=0.1, damping=0.05), "one", "squared",
        lambda t, f, g, r, w, c, k: scaled_one(0.1, 0.05, f, g),
    ),
    "preconditioned, pair": (
        PreconditionedGD(lr=0.3), "pair", "squared",
        lambda t, f, g, r, w, c, k: scaled_pair(0.3, np.sqrt(np.sum(w * r**2) / k), f, g),
    ),
    "preconditioned, one": (
        PreconditionedGD(lr=0.3), "one", "squared",
        lambda t, f, g, r, w, c, k: scaled_one(0.3, np.sqrt(np.sum(w * r**2) / k), f, g),
    ),
    "gradient, pair": (
        ScaledGD(lr=0.3, damping="gradient"), "pair", "squared",
        lambda t, f, g, r, w, c, k: scaled_pair(0.3, gradient_damping(f, g, c, k), f, g),
    ),
    "gradient, one": (
        ScaledGD(lr=0.3, damping="gradient"), "one", "squared",
        lambda t, f, g, r, w, c, k: scaled_one(0.3, gradient_damping(f, g, c, k), f, g),
    ),
    "hypentropy": (
        MirrorDescent(lr=0.3, scale=0.07), "matrix", "squared",
        lambda t, f, g, r, w, c, k: sinh_step(0.3, 0.07, f, g),
    ),
    "entropy": (
        MirrorDescent(lr=0.3, potential="entropy"), "definite", "squared",
        lambda t, f, g, r, w, c, k: exp_step(0.3, f, g),
    ),
    "polyak": (
        Subgradient(lr=0.2), "pair", "absolute",
        lambda t, f, g, r, w, c, k: along(0.2 * np.sum(w * r) / w.sum(), f, g),
    ),
    "polyak, squared": (
        Subgradient(lr=0.03), "one", "squared",
        lambda t, f, g, r, w, c, k: along(0.03 * np.sum(w * r) / w.sum(), f, g),
    ),
    "quantile": (
        Subgradient(lr=0.3, schedule="median", quantile=0.3), "one", "absolute",
        lambda t, f, g, r, w, c, k: along(0.3 * np.quantile(r[w > 0], 0.3), f, g),
    ),
    "geometric": (
        Subgradient(lr=0.3, schedule="geometric", decay=0.6), "pair", "absolute",
        lambda t, f, g, r, w, c, k: along(0.3 * 0.6**t, f, g),
    ),
    "normalised": (
        NormalisedGD(lr=0.3, power=0.7), "pair", "squared",
        lambda t, f, g, r, w, c, k: along(0.3 * (t + 1) ** -0.7 / norm(g), f, g),
    ),
}  # fmt: skip


def instance(kind, batch, seed=0):
    """Return (operator, a, y, weights, factors); y and the factors differ from slice to slice."""
    rng = np.random.default_rng(seed)
    n1, n2, h, m = (6, 6, 3, 23) if kind in ("one", "definite") else (6, 5, 3, 23)
    a = rng.standard_normal((m, n1, n2))
    weights = rng.uniform(0.2, 2.0, m)
    weights[[2, 9]] = 0
    shapes = {"pair": [(h, n2), (n1, h)], "one": [(n1, h)], "matrix": [(n1, n2)], "definite": [(n1, n1)]}[kind]
    factors = [0.6 * rng.standard_normal((batch, *shape)) for shape in shapes]
    if kind == "definite":
        factors = [w @ w.swapaxes(1, 2) + 0.1 * np.eye(n1) for w in factors]
    return fastdmf.GaussianDense(a), a, rng.standard_normal((batch, m)), weights, factors


def run(name, steps, op, y, weights, factors, **options):
    rule, kind, elementwise, _ = CASES[name]
    options = {
        "loss": "mse/2",
        "l2": 0.2,
        "check_every": 1,
        "tol": 1e-300,
        "on_failure": "ignore",
        "random_state": 0,
        **options,
    }
    return fastdmf.solve(
        op,
        y,
        weights=weights,
        factors=factors,
        symmetric=kind == "one",
        rule=rule,
        elementwise_loss=elementwise,
        max_iter=steps,
        **options,
    )


@pytest.mark.parametrize("name", CASES)
def test_three_steps_by_hand(name):
    _, kind, elementwise, update = CASES[name]
    op, a, y, weights, starts = instance(kind, 2)
    terms = {"symmetric": kind == "one", "loss": "mse/2", "absolute": elementwise == "absolute", "l2": 0.2}
    paths = [[w[b] for w in starts] for b in range(2)]
    kappa = curvature(a, weights)
    for t in range(3):
        solution = run(name, t + 1, op, y, weights, starts)
        for b in range(2):
            grads, r, c = plain(a, y[b], weights, paths[b], **terms)
            paths[b] = update(t, paths[b], grads, np.abs(r), weights, c, kappa)
            for got, expected in zip(solution[b].factors, paths[b], strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)
    assert max(np.abs(w - v[0]).max() for w, v in zip(paths[0], starts)) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_batch_equals_single_runs(name):
    op, _, y, weights, factors = instance(CASES[name][1], 3)
    batch = run(name, 12, op, y, weights, factors)
    for b in range(3):
        single = run(name, 12, op, y[b], weights, [w[b] for w in factors])
        for key, values in batch[b].history.items():
            np.testing.assert_allclose(values, single.history[key], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(batch[b].matrix(), single.matrix(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_slices_that_end_leave_the_others_alone(name):
    """Slice 0 has met its tolerance at the start; the other goes on by its own numbers."""
    kind = CASES[name][1]
    op, _, y, weights, factors = instance(kind, 2)
    first = [w[0] for w in factors]
    y[0] = (1 + 1e-6) * op.apply(product(first, kind == "one"))
    batch = run(name, 9, op, y, weights, factors, tol=1e-3)
    assert batch.status[0] is Status.CONVERGED and batch.n_iter[0] == 0 and batch.n_iter[1] == 9
    single = run(name, 9, op, y[1], weights, [w[1] for w in factors], tol=1e-3)
    np.testing.assert_allclose(batch[1].matrix(), single.matrix(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_single_precision(name):
    op, _, y, weights, factors = instance(CASES[name][1], 2)
    one, two = (run(name, 8, op, y, weights, factors, dtype=dtype) for dtype in ("float32", "float64"))
    assert one.factors[0].dtype == np.float32
    assert np.linalg.norm(one.matrix() - two.matrix()) < 1e-4 * np.linalg.norm(two.matrix())


@pytest.mark.parametrize("name", CASES)
def test_same_bits_after_an_interruption(name, tmp_path):
    op, _, y, weights, factors = instance(CASES[name][1], 2)
    whole = run(name, 20, op, y, weights, factors)
    seen = []
    path = tmp_path / "run.npz"
    stopped = run(
        name, 20, op, y, weights, factors, checkpoint=path, callback=lambda p: seen.append(1) or len(seen) > 7
    )
    assert stopped.status[0] is Status.STOPPED
    resumed = run(name, 20, op, y, weights, factors, checkpoint=path)
    assert [w.tobytes() for w in resumed.factors] == [w.tobytes() for w in whole.factors]
    assert all(v.tobytes() == resumed.history[key].tobytes() for key, v in whole.history.items())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1] in ("pair", "one")])
def test_the_path_does_not_depend_on_the_basis(name):
    """An orthogonal change of the basis of the hidden layer; without damping any change."""
    op, _, y, weights, factors = instance(CASES[name][1], 1)
    rng = np.random.default_rng(5)
    turn = rng.standard_normal((3, 3)) + 2 * np.eye(3)
    if name != "scaled, bare":
        turn = np.linalg.qr(turn)[0]
    if len(factors) == 2:
        turned = [turn @ factors[0][0], factors[1][0] @ np.linalg.inv(turn)]
    else:
        turned = [factors[0][0] @ turn]
    given = [w[0] for w in factors]
    one, two = (run(name, 15, op, y[0], weights, f, l2=0.0) for f in (given, turned))
    np.testing.assert_allclose(one.matrix(), two.matrix(), rtol=1e-8, atol=1e-10)


# --- ScaledGD, PrecGD ------------------------------------------------------------------------------------------------


def mask_instance(kappa, n=400, rank=3, fraction=0.3, seed=1):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for _ in range(2))
    truth = (u * np.linspace(1, 1 / kappa, rank)) @ v.T
    rows, cols = np.nonzero(rng.random((n, n)) < fraction)
    return truth, fastdmf.EntryMask(rows, cols, truth.shape), truth[rows, cols]


def test_scaled_does_not_see_the_condition_number():
    """Tong, Ma, Chi 2021: 0.5 / p from a spectral start; gradient descent with the same step slows down."""
    counts, slow = [], []
    for kappa in (1, 5, 20):
        truth, mask, y = mask_instance(kappa)
        factors = fastdmf.spectral_factors(mask, y, 3)
        step = 0.5 / 0.3
        options = {"factors": factors, "loss": "sse/2", "truth": truth, "max_iter": 60, "check_every": 1, "tol": 1e-20}
        scaled, plain = (
            np.sqrt(fastdmf.solve(mask, y, rule=rule, on_failure="ignore", **options).history["error"])
            for rule in (ScaledGD(lr=step), GradientDescent(lr=step))
        )
        counts.append([int(np.argmax(scaled < level)) for level in (1e-3, 1e-6)])
        slow.append(plain[-1])
    print("steps to 1e-3, 1e-6:", counts, "gradient descent after 60:", slow)
    between = [six - three for three, six in counts]
    assert min(between) > 0 and max(between) - min(between) <= 2
    assert max(six for _, six in counts) <= min(six for _, six in counts) + 12
    assert slow[0] < 1e-6 and slow[1] > 1e-3 and slow[2] > 3e-2


def test_preconditioned_is_linear_above_the_rank():
    """Zhang, Fattahi, Zhang 2021: rank 2 by width 4 from symmetric Gaussian measurements; gradient descent sticks."""
    n, rank, width, m = 40, 2, 4, 480
    rates = {}
    for kappa in (1, 5):
        rng = np.random.default_rng(0)
        a = rng.standard_normal((m, n, n))
        a = np.triu(a) + np.triu(a, 1).swapaxes(1, 2)
        z = np.linalg.qr(rng.standard_normal((n, rank)))[0] * np.sqrt([1, 1 / kappa])
        truth, op = z @ z.T, fastdmf.GaussianDense(a)
        start = np.hstack([z, np.zeros((n, width - rank))]) + 1e-2 * rng.standard_normal((n, width))
        for name, rule in (
            ("loss", as_rule("preconditioned").set_params(lr=2.5e-5)),
            ("gradient", ScaledGD(lr=2.5e-5, damping="gradient")),
            ("gd", GradientDescent(lr=2.5e-5)),
        ):
            options = {"factors": [start], "symmetric": True, "loss": "sse", "truth": truth, "tol": 1e-25}
            run = fastdmf.solve(op, op.apply(truth), rule=rule, max_iter=400, on_failure="ignore", **options)
            error = np.sqrt(run.history["error"])
            rates[name, kappa] = (error[-1] / error[20]) ** 0.5, error[-1]  # a hundred steps' factor, from 200 on
            if name != "gd":
                # The damping follows the error's norm.
                ratio = run.history["damping"] / (error * np.linalg.norm(truth))
                assert 0.3 < ratio.min() and ratio.max() < 10
    print(rates)
    for name in ("loss", "gradient"):
        assert max(rates[name, kappa][0] for kappa in (1, 5)) < 0.5
        assert max(rates[name, kappa][1] for kappa in (1, 5)) < 2e-3
        assert rates[name, 5][0] == pytest.approx(rates[name, 1][0], rel=0.1)
    assert rates["gd", 1][0] > 0.8 and rates["gd", 1][1] > 2e-3


def test_singular_factors():
    op, _, y, weights, factors = instance("pair", 2)
    factors[0][1, 2] = 2 * factors[0][1, 0]  # slice 1: dependent rows of W_1
    options = {"weights": weights, "factors": factors, "rule": ScaledGD(lr=0.1)}
    with pytest.raises(ValueError, match=r"factors of slice 1 have linearly dependent columns \(width 3\)"):
        fastdmf.solve(op, y, **options)
    damped = fastdmf.solve(op, y, **{**options, "rule": ScaledGD(lr=0.1, damping=0.1)}, max_iter=5, on_failure="ignore")
    assert np.isfinite(damped.matrix()).all()


def test_a_gram_matrix_that_becomes_singular_ends_the_slice():
    """A full mask and step one: W_2 is the regression on W_1, of rank one like the data, and W_1 has no step left."""
    rng = np.random.default_rng(0)
    truth = np.stack([np.outer(rng.standard_normal(5), rng.standard_normal(4)), rng.standard_normal((5, 4))])
    rows, cols = np.divmod(np.arange(20), 4)
    mask = fastdmf.EntryMask(rows, cols, (5, 4))
    factors = [rng.standard_normal((2, 4)), rng.standard_normal((5, 2))]
    options = {"factors": factors, "loss": "sse/2", "tol": 1e-9, "on_failure": "ignore", "check_every": 1}
    solution = fastdmf.solve(mask, truth.reshape(2, 20), rule=ScaledGD(lr=1.0), max_iter=6, **options)
    assert solution.status[0] in (Status.STALLED, Status.DIVERGED) and solution.n_iter[0] < 6
    assert solution.status[1] is Status.MAX_ITER
    assert np.isfinite(solution.matrix()).all()


def test_scaled_refuses():
    op, _, y, weights, factors = instance("pair", 1)
    y, weights = y[0], weights
    with pytest.raises(ValueError, match="ScaledGD preconditions one factor by the other: .* got depth 3"):
        fastdmf.solve(op, y, depth=3, rule="scaled")
    with pytest.raises(ValueError, match="PreconditionedGD .* got depth 1"):
        fastdmf.solve(op, y, depth=1, rule="preconditioned")
    with pytest.raises(ValueError, match="damping='loss' measures the error by squared residuals"):
        fastdmf.solve(op, y, depth=2, rule="preconditioned", elementwise_loss="absolute")


# --- mirror descent --------------------------------------------------------------------------------------------------


def test_mirror_follows_factored_descent():
    """Wu and Rebeschini 2021, where everything commutes: the distance to U U^T with lr / 4 halves with the step."""
    n, m = 8, 20
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    op = fastdmf.GaussianDense(np.einsum("ik,mk,jk->mij", q, rng.standard_normal((m, n)), q))
    truth = (q[:, :2] * [1, 0.5]) @ q[:, :2].T
    distances = []
    for divisor in (1, 2, 4):
        lr, paths = 0.2 / divisor, ([], [])
        options = {"loss": "mse/2", "max_iter": 100 * divisor, "check_every": divisor, "on_failure": "ignore"}
        for path, rule, start in (
            (paths[0], MirrorDescent(lr=lr, potential="entropy"), {"factors": [1e-2 * np.eye(n)]}),
            (paths[1], GradientDescent(lr=lr / 4), {"factors": [1e-1 * np.eye(n)], "symmetric": True}),
        ):
            fastdmf.solve(
                op,
                op.apply(truth),
                rule=rule,
                callback=lambda progress, path=path: path.append(progress.factors()[0]),
                **options,
                **start,
            )
        distances.append(max(np.linalg.norm(w - u @ u.T) for w, u in zip(*paths, strict=True)))
    print("distances", distances, "of a path of length", np.linalg.norm(paths[0][-1] - paths[0][0]))
    assert distances[0] < 0.05 and np.linalg.norm(paths[0][-1] - truth) < 0.1
    np.testing.assert_allclose(np.divide(distances[:-1], distances[1:]), 2, rtol=0.05)


def sensing(n, rank, m):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((m, n, n))
    u = rng.standard_normal((n, rank))
    truth = u @ u.T / np.sum(u**2)
    op = fastdmf.GaussianDense((a + a.swapaxes(1, 2)) / 2)
    return truth, op, op.apply(truth)


def test_mirror_and_factored_descent_recover_alike():
    """The same instance at n = 20, r = 2, m = 3 n r: the error falls with alpha, and both end at the same one."""
    truth, op, y = sensing(20, 2, 120)
    options = {"loss": "mse/2", "truth": truth, "max_iter": 1500, "tol": 1e-12, "on_failure": "ignore"}
    errors = []
    for alpha in (1e-2, 1e-4):
        mirror = fastdmf.solve(op, y, factors=[alpha * np.eye(20)], rule=MirrorDescent(potential="entropy"), **options)
        start = {"factors": [np.sqrt(alpha) * np.eye(20)], "symmetric": True}
        plain = fastdmf.solve(op, y, rule=GradientDescent(lr=0.25), **start, **options)
        assert np.linalg.eigvalsh(mirror.matrix())[0] > 0
        errors.append([np.sqrt(run.history["error"][-1]) for run in (mirror, plain)])
        assert errors[-1][0] == pytest.approx(errors[-1][1], rel=0.25)
    print("errors", errors)
    assert errors[1][0] < 0.25 * errors[0][0] and errors[1][0] < 0.05


def test_hypentropy_starts_at_zero(rng):
    """A rectangular matrix of rank 2 from half of its entries; the smaller the scale, the closer."""
    truth = rng.standard_normal((30, 2)) @ rng.standard_normal((2, 20))
    truth /= np.linalg.norm(truth, 2)
    rows, cols = np.nonzero(rng.random(truth.shape) < 0.5)
    mask = fastdmf.EntryMask(rows, cols, truth.shape)
    errors = []
    for scale in (1.0, 1e-2, 1e-4):
        solution = fastdmf.solve(
            mask,
            truth[rows, cols],
            factors=[np.zeros(truth.shape)],
            rule=MirrorDescent(lr=1.0, scale=scale),
            loss="sse/2",
            truth=truth,
            tol=1e-5,
            max_iter=2000,
        )
        assert solution.status is Status.CONVERGED
        errors.append(np.sqrt(solution.history["error"][-1]))
    print("errors", errors)
    assert errors[0] > 0.5 and errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1]


@pytest.mark.parametrize("potential", ["hypentropy", "entropy"])
def test_mirror_overflow_is_divergence(potential):
    """Both functions leave float32 after a step; the other slice goes on, and what is returned is finite."""
    truth, op, y = sensing(10, 1, 80)
    y = np.stack([y, 1e4 * y])
    solution = fastdmf.solve(
        op,
        y,
        factors=[1e-2 * np.eye(10)],
        rule=MirrorDescent(lr=1.0, scale=1e-2, potential=potential),
        loss="mse/2",
        dtype="float32",
        max_iter=200,
        on_failure="ignore",
    )
    assert solution.status[1] is Status.DIVERGED and solution.status[0] is not Status.DIVERGED
    assert np.isfinite(solution.matrix()).all()
    assert np.linalg.norm(solution[0].matrix() - truth) < 0.3 * np.linalg.norm(truth)


@pytest.mark.parametrize(
    ("start", "match"),
    [
        (np.zeros((4, 4)), "symmetric positive definite .* slice 0 is not"),
        (np.eye(4) - 2 * np.outer([1, 0, 0, 0], [1, 0, 0, 0]), "least eigenvalue -1"),
        (np.eye(4) + np.eye(4, k=1), "symmetric positive definite"),
        (np.ones((4, 3)), r"needs a square matrix, got shape \(4, 3\)"),
    ],
)
def test_entropy_refuses(start, match):
    rows, cols = np.nonzero(np.ones(start.shape))
    mask = fastdmf.EntryMask(rows, cols, start.shape)
    with pytest.raises(ValueError, match=match):
        fastdmf.solve(mask, np.ones(mask.size), factors=[start], rule=MirrorDescent(potential="entropy"))
    with pytest.raises(ValueError, match="MirrorDescent moves the matrix itself and needs depth=1, got depth 2"):
        fastdmf.solve(mask, np.ones(mask.size), depth=2, rule="mirror")


# --- subgradient descent ---------------------------------------------------------------------------------------------


def outliers(d=20, rank=3, m=500, share=0.1):
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((d, rank)))[0]
    truth, op = q @ q.T, fastdmf.GaussianDense(rng.standard_normal((m, d, d)))
    clean = op.apply(truth)
    y = clean.copy()
    y[rng.choice(m, round(share * m), replace=False)] += 10 * rng.standard_normal(round(share * m))
    return truth, op, clean, y


def test_the_absolute_loss_recovers_from_outliers():
    """Ma and Fattahi 2023, Ding et al. 2021: d = 20, r = 3, m = 500, width 6, a tenth hit by N(0, 100)."""
    truth, op, clean, y = outliers()
    start = fastdmf.spectral_factors(op, y, 6, symmetric=True, transform="sign", scale=1e-6)

    def error(data, rule, loss="mse", elementwise="absolute"):
        options = {"factors": start, "symmetric": True, "truth": truth, "on_failure": "ignore", "tol": 1e-12}
        return np.sqrt(
            fastdmf.solve(
                op, data, rule=rule, loss=loss, elementwise_loss=elementwise, max_iter=2000, **options
            ).history["error"][-1]
        )

    errors = {
        "polyak, clean": error(clean, Subgradient(lr=0.2)),
        "median": error(y, Subgradient(lr=0.2, schedule="median"), "mse/2"),
        "geometric": error(y, Subgradient(lr=0.1, schedule="geometric", decay=0.995)),
        "squared": error(y, GradientDescent(lr=0.1), elementwise="squared"),
    }
    print(errors)
    assert max(errors[name] for name in ("polyak, clean", "median", "geometric")) < 2e-3
    assert errors["squared"] > 0.5


# --- normalised descent ----------------------------------------------------------------------------------------------


def test_normalised_drifts_to_balance():
    """Josz 2026: from unbalanced factors that fit, imbalance falls while gradient descent keeps it."""
    rng = np.random.default_rng(0)
    n, rank = 20, 2
    truth = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n))
    truth /= np.linalg.norm(truth, 2)
    rows, cols = np.nonzero(rng.random((n, n)) < 0.6)
    mask = fastdmf.EntryMask(rows, cols, truth.shape)
    u, s, vt = np.linalg.svd(truth)
    factors = [vt[:rank] * np.sqrt(s[:rank, None]) / 2, 2 * u[:, :rank] * np.sqrt(s[:rank])]
    factors = [w + 0.02 * rng.standard_normal(w.shape) for w in factors]
    drift, kept = (
        fastdmf.solve(
            mask,
            truth[rows, cols],
            factors=factors,
            rule=rule,
            loss="sse/2",
            tol=1e-30,
            max_iter=2000,
            track="imbalance",
            on_failure="ignore",
        ).history
        for rule in (NormalisedGD(lr=0.3, power=0.3), GradientDescent(lr=0.1))
    )
    print("imbalance", drift["imbalance"][[0, 40, -1]], "gradient descent", kept["imbalance"][[0, -1]])
    assert drift["loss"][40:].max() < 1e-2 * drift["loss"][0]  # it has fitted, and goes on
    assert drift["imbalance"][-1] < 0.4 * drift["imbalance"][40] < 0.4 * drift["imbalance"][0]
    assert kept["imbalance"][-1] > 0.95 * kept["imbalance"][0]


def test_normalised_steps_have_their_length():
    op, _, y, _, factors = instance("pair", 1)
    points = []
    options = {"factors": [w[0] for w in factors], "check_every": 1, "on_failure": "ignore"}
    rule = NormalisedGD(lr=0.05, power=0.4)
    fastdmf.solve(op, y[0], rule=rule, max_iter=6, callback=lambda p: points.append(p.factors()), **options)
    lengths = [norm([b - a for a, b in zip(one, two)]) for one, two in itertools.pairwise(points)]
    np.testing.assert_allclose(lengths, 0.05 * np.arange(1.0, 7) ** -0.4, rtol=1e-10)


def test_normalised_rests_where_there_is_no_gradient():
    layout = Layout((1, 1, 1))
    mask = fastdmf.EntryMask([0], [0], (1, 1))
    problem = Problem(mask.bind(get_backend(), np.array([[1.0], [1.0]]), width=1), layout, 2)
    x = layout.allocate(2, np.float64)
    layout.write(x, [np.ones((1, 1)), np.ones((1, 1))], 0)  # fits; slice 1 is the saddle at zero
    before, rule = x.copy(), NormalisedGD(lr=0.1)
    state = rule.init(problem, x)
    rule.step(problem, state)
    assert (state.step_size == 0).all() and np.array_equal(state.x, before)


# --- the spectral start ----------------------------------------------------------------------------------------------


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("shape", [(12, 9), (340, 310)])
@pytest.mark.parametrize("transform", ["identity", "sign"])
def test_spectral_factors_of_a_mask(shape, transform, rng):
    """Dense decomposition and Lanczos against the full SVD of the filled-in matrix; entries in random order."""
    truth = rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1]))
    rows, cols = np.nonzero(rng.random(shape) < 0.4)
    order = rng.permutation(len(rows))
    rows, cols = rows[order], cols[order]
    mask, y = fastdmf.EntryMask(rows, cols, shape), truth[rows, cols]
    filled = np.zeros(shape)
    filled[rows, cols] = (y if transform == "identity" else np.sign(y)) * truth.size / len(y)
    settings = {"transform": transform, "scale": 0.25}
    w1, w2 = fastdmf.spectral_factors(mask, y, 3, **settings)
    assert w1.shape == (3, shape[1]) and w2.shape == (shape[0], 3) and w1.dtype == np.float64
    np.testing.assert_allclose(w2 @ w1, 0.25 * best(filled, 3), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(w1 @ w1.T, w2.T @ w2, rtol=1e-8, atol=1e-8)  # balanced
    assert (w2[np.abs(w2).argmax(0), range(3)] > 0).all() and (np.diff(np.linalg.norm(w2, axis=0)) < 0).all()
    for one, again in zip((w1, w2), fastdmf.spectral_factors(mask, y, 3, **settings), strict=True):
        assert np.array_equal(one, again)


@pytest.mark.parametrize("n", [12, 310])
def test_spectral_factors_of_a_symmetric_matrix(n, rng):
    signed = rng.standard_normal((n, 3))
    truth = (signed * [1, -1, 0.5]) @ signed.T
    rows, cols = np.nonzero(rng.random((n, n)) < 0.8)
    mask = fastdmf.EntryMask(rows, cols, truth.shape)
    filled = np.zeros((n, n))
    filled[rows, cols] = truth[rows, cols] * n * n / len(rows)
    values, vectors = np.linalg.eigh((filled + filled.T) / 2)
    (u,) = fastdmf.spectral_factors(mask, truth[rows, cols], 2, symmetric=True)
    np.testing.assert_allclose(u @ u.T, (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T, rtol=1e-8, atol=1e-8)
    # Width n: all eigenvalues, and negative ones count as zero.
    if n == 12:
        (u,) = fastdmf.spectral_factors(mask, truth[rows, cols], n, symmetric=True)
        np.testing.assert_allclose(u @ u.T, (vectors * np.maximum(values, 0)) @ vectors.T, rtol=1e-8, atol=1e-8)


def test_spectral_factors_have_the_units_of_the_matrix(rng):
    """Measurements by N(0, 0.3^2) numbers: c = 1 / (m 0.3^2) up to the sample's own norm, and the mean is W."""
    truth = rng.standard_normal((6, 1)) @ rng.standard_normal((1, 5))
    a = 0.3 * rng.standard_normal((20_000, 6, 5))
    op = fastdmf.GaussianDense(a)
    w1, w2 = fastdmf.spectral_factors(op, op.apply(truth), 1)
    assert np.linalg.norm(w2 @ w1 - truth) < 0.05 * np.linalg.norm(truth)
    # Signs: E sign(<A, W>) A is W / ||W|| times sigma sqrt(2 / pi).
    w1, w2 = fastdmf.spectral_factors(op, op.apply(truth), 1, transform="sign")
    expected = truth / np.linalg.norm(truth) * np.sqrt(2 / np.pi) / 0.3
    assert np.linalg.norm(w2 @ w1 - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rank": 0}, "rank must be an integer >= 1"),
        ({"rank": 4}, r"rank must be at most 3 for shape \(4, 3\), got 4"),
        ({"y": np.ones(5)}, "y has 5 measurements, the operator 12"),
        ({"y": np.full(12, np.nan)}, "y contains NaN"),
        ({"y": np.zeros(12)}, "y is zero everywhere"),
        ({"transform": "log"}, "transform must be one of .*'log'"),
        ({"scale": 0}, "scale must be a number > 0"),
        ({"symmetric": True}, r"symmetric=True needs a square matrix, got shape \(4, 3\)"),
    ],
)
def test_spectral_factors_refuse(change, match):
    rows, cols = np.nonzero(np.ones((4, 3)))
    arguments = {"y": np.arange(12.0), "rank": 2, **change}
    with pytest.raises(ValueError, match=match):
        fastdmf.spectral_factors(fastdmf.EntryMask(rows, cols, (4, 3)), **arguments)


def test_spectral_factors_need_a_positive_eigenvalue():
    mask = fastdmf.EntryMask([0, 1], [0, 1], (2, 2))
    with pytest.raises(ValueError, match="no positive eigenvalue"):
        fastdmf.spectral_factors(mask, -np.ones(2), 1, symmetric=True)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ScaledGD(lr=0), r"ScaledGD\(lr=...\) must be a number > 0"),
        (lambda: ScaledGD(damping=-1), r"ScaledGD\(damping=...\) must be a number >= 0, got -1"),
        (lambda: ScaledGD(damping="trace"), "damping=...\\) must be a number >= 0, 'loss' or 'gradient', got 'trace'"),
        (lambda: PreconditionedGD(damping=None), r"PreconditionedGD\(damping=...\)"),
        (lambda: MirrorDescent(lr=np.inf), "lr"),
        (lambda: MirrorDescent(scale=0.0), r"scale=...\) must be a number > 0"),
        (lambda: MirrorDescent(potential="euclid"), "potential=...\\) must be one of .*'euclid'"),
        (lambda: Subgradient(lr=-1), "lr"),
        (lambda: Subgradient(quantile=1.0), r"quantile=...\) must be a number > 0 and < 1"),
        (lambda: Subgradient(decay=0), "decay"),
        (lambda: Subgradient(schedule="armijo"), "schedule=...\\) must be one of .*'armijo'"),
        (lambda: NormalisedGD(lr=0), "lr"),
        (lambda: NormalisedGD(power=1.0), r"power=...\) must be a number >= 0 and < 1"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_names():
    kinds = {"scaled": ScaledGD, "mirror": MirrorDescent, "subgradient": Subgradient, "normalised": NormalisedGD}
    assert {name: type(as_rule(name)) for name in kinds} == kinds
    assert as_rule("preconditioned") == PreconditionedGD(damping="loss") and as_rule("scaled").damping == 0.0


def test_imbalance_makes_too_wide_factors_converge_linearly():
    """Xiong, Ding, Du 2023: exp(-c T) from a start out of balance, c like its imbalance; C/T from a balanced one."""
    rng, n = np.random.default_rng(0), 20
    u = np.linalg.qr(rng.standard_normal((n, 2)))[0]
    truth = (u * [1.0, 0.8]) @ u.T
    mask = fastdmf.EntryMask(*np.divmod(np.arange(n * n), n), (n, n))
    options = {"loss": "sse/2", "rule": GradientDescent(lr=0.2), "check_every": 50, "tol": 1e-300, "truth": truth}
    options |= {"width": 4, "depth": 2, "random_state": 0, "on_failure": "ignore"}

    def errors(init, alpha, steps):
        history = fastdmf.solve(mask, truth.ravel(), init=init, init_scale=alpha, max_iter=steps, **options).history
        return np.sqrt(history["error"])

    balanced = errors("balanced", 0.1, 4000)
    assert balanced[40] / balanced[80] == pytest.approx(2, rel=0.1)  # 2000 and 4000 steps
    rates = []
    for alpha in (0.01, 0.02):
        curve = errors("imbalanced", alpha, 1500)
        late = np.log(curve[(curve > 1e-10) & (curve < 1e-4)])
        assert len(late) > 5
        steps = np.diff(late)
        np.testing.assert_allclose(steps, steps.mean(), rtol=0.2)  # straight on a semilog plot
        rates.append(-steps.mean())
    assert rates[1] / rates[0] == pytest.approx(2, rel=0.1)
