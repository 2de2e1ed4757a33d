"""Step rules: hand-computed steps, conservation laws, gauge invariance, stability, the self-tuned rule."""

import itertools
import warnings

import numpy as np
import pytest
from conftest import OPERATORS, completion, random_mask

import fastdmf
from fastdmf.chain import Layout, initial_factors
from fastdmf.engine import SolveWarning, Status
from fastdmf.problem import Problem
from fastdmf.rules import (
    RULES,
    Adam,
    Auto,
    GradientDescent,
    GroupRMSprop,
    Momentum,
    Nesterov,
    NormalisedGD,
    Subgradient,
    as_rule,
)

FIXED = {
    "gd": GradientDescent(lr=0.05),
    "momentum": Momentum(lr=0.02, beta=0.7),
    "nesterov": Nesterov(lr=0.02, beta=0.7),
    "group_rmsprop": GroupRMSprop(lr=0.01, beta=0.9, eps=1e-3),
    "adam": Adam(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6),
}


def _setup(rng, backend, name="mask", dims=(7, 6, 5, 9), batch=2, l2=0.0, scale=0.6):
    op = OPERATORS[name](dims[-1], dims[0], 40, rng)
    layout = Layout(dims)
    bound = op.bind(backend, rng.standard_normal((1, op.size)), dtype=np.float64, width=layout.width)
    problem = Problem(bound, layout, batch, l2=l2)
    x = layout.allocate(batch, np.float64)
    for view in layout.stored(x):
        view[:] = scale * rng.standard_normal(view.shape)
    return problem, x


def _gradient(problem, x):
    grad = np.zeros_like(x)
    problem.evaluate(x, grad)
    return grad


@pytest.mark.parametrize("name", FIXED)
def test_three_steps_by_hand(name, rng, backend):
    """The rule's formula, written out with plain arrays on the same gradients; every setting off its default."""
    problem, x0 = _setup(rng, backend, l2=0.2)
    rule = FIXED[name]
    state = rule.init(problem, x0.copy())
    x, v, m, s = x0.copy(), np.zeros_like(x0), np.zeros_like(x0), np.zeros_like(x0)
    square = np.zeros(2)
    for t in range(1, 4):
        g = _gradient(problem, x)
        step = np.full(2, rule.lr)
        if name == "gd":
            x = x - 0.05 * g
        elif name == "momentum":
            v = 0.7 * v + g
            x = x - 0.02 * v
        elif name == "nesterov":
            v = 0.7 * v + g
            x = x - 0.02 * (g + 0.7 * v)
        elif name == "group_rmsprop":
            square = 0.9 * square + 0.1 * (g**2).sum(1)
            step = 0.01 / (np.sqrt(square / (1 - 0.9**t)) + 1e-3)
            x = x - step[:, None] * g
        else:
            m, s = 0.8 * m + 0.2 * g, 0.95 * s + 0.05 * g * g
            x = x - 0.01 * (m / (1 - 0.8**t)) / (np.sqrt(s / (1 - 0.95**t)) + 1e-6)
        np.testing.assert_allclose(state.step_size, step, rtol=1e-12)
        np.testing.assert_allclose(state.grad, g, rtol=1e-12, atol=1e-14)
        rule.step(problem, state)
        np.testing.assert_allclose(state.x, x, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(state.objective, problem.evaluate(x, np.empty_like(x))[1], rtol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "rule",
    [
        GradientDescent(lr=0.002),
        GroupRMSprop(lr=0.02),
        Auto(accelerate=False),
        NormalisedGD(lr=0.02),
        Subgradient(lr=0.002, schedule="geometric"),
    ],
)
def test_balancedness_identity(rule, name, rng, backend):
    """D_j(t+1) = D_j(t) + eta^2 (grad_{j+1}^T grad_{j+1} - grad_j grad_j^T): exact for any scalar step."""
    problem, x = _setup(rng, backend, name, dims=(7, 6, 8, 5, 9))
    layout = problem.layout

    def gaps(flat, sign_pairs=None):
        w = layout.factors(flat)
        return [b.swapaxes(1, 2) @ b - a @ a.swapaxes(1, 2) for a, b in itertools.pairwise(w)]

    state = rule.init(problem, x)
    moved, worst = 0, 0.0
    for _ in range(30):
        before, grad, eta, x_before = gaps(state.x), state.grad.copy(), state.step_size.copy(), state.x.copy()
        rule.step(problem, state)
        taken = (state.x != x_before).any(axis=1)
        moved += taken.sum()
        scale = sum(np.sum(w**2) for w in layout.factors(state.x))
        for after, d, jump in zip(gaps(state.x), before, gaps(grad)):
            expected = d + np.where(taken, eta**2, 0)[:, None, None] * jump
            worst = max(worst, np.abs(after - expected).max() / scale)
            assert worst < 1e-12
    assert moved >= 40
    print(f"{type(rule).__name__}, {name}: balancedness identity holds to {worst:.1e}")


def _rotated(factors, seed):
    rng = np.random.default_rng(seed)
    out = [w.copy() for w in factors]
    for j in range(len(out) - 1):
        q = np.linalg.qr(rng.standard_normal((out[j].shape[0],) * 2))[0]
        out[j] = q @ out[j]
        out[j + 1] = out[j + 1] @ q.T
    return out


def _run(op, y, factors, rule, steps, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        return fastdmf.solve(
            op, y, factors=factors, rule=rule, max_iter=steps, check_every=1, tol=kw.pop("tol", 1e-300), **kw
        )


@pytest.mark.parametrize("name", ["auto", "gd", "momentum", "nesterov", "group_rmsprop"])
def test_gauge_invariance(name):
    """From (W_j) and from rotated hidden layers the end-to-end paths agree over 50 evaluations."""
    truth, op, y = completion(3, n=40, rank=2, count=700)
    factors = initial_factors(Layout((40, 40, 40, 40)), "gaussian", 1e-2, 0)
    rule = {"auto": "auto", "gd": GradientDescent(lr=8.0)}.get(name) or RULES[name](
        lr=0.5 if name != "group_rmsprop" else 0.05
    )
    for steps in (10, 25, 49):
        a = _run(op, y, factors, rule, steps)
        b = _run(op, y, _rotated(factors, 5), rule, steps)
        gap = np.linalg.norm(a.matrix() - b.matrix()) / np.linalg.norm(a.matrix())
        print(f"{name}: end-to-end paths agree to {gap:.1e} after {steps} steps")
        assert gap < 1e-10
        np.testing.assert_allclose(a.history["loss"], b.history["loss"], rtol=1e-9)
    assert a.history["loss"][-1] < 0.9 * a.history["loss"][0]  # it went somewhere
    if name == "auto":
        # Hundreds of steps on, rounding has grown to the size of the path, and single ends scatter by 6 %: medians of
        # five rotated starts and of five that differ by rounding alone.
        errors = []
        for k in range(1, 6):
            rng = np.random.default_rng(k)
            nudged = [w * (1 + 1e-14 * rng.standard_normal(w.shape)) for w in factors]
            runs = [_run(op, y, f, rule, 1000, tol=1e-8, truth=truth) for f in (nudged, _rotated(factors, k))]
            assert {run.status for run in runs} == {Status.CONVERGED}
            errors.append([run.history["error"][-1] for run in runs])
        given, rotated = np.median(errors, axis=0)
        assert given == pytest.approx(rotated, rel=0.1)


def test_adam_depends_on_the_basis():
    _, op, y = completion(3, n=40, rank=2, count=700)
    factors = initial_factors(Layout((40, 40, 40)), "gaussian", 1e-2, 0)
    a, b = (_run(op, y, f, Adam(lr=1e-2), 1) for f in (factors, _rotated(factors, 5)))
    assert np.linalg.norm(a.matrix() - b.matrix()) > 1e-3 * np.linalg.norm(a.matrix())


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_stability_limit(depth):
    """At a balanced exact fit of 0.5 ||W - W*||^2, 0.97 of 2 / (N s1^(2 - 2/N)) comes back and 1.03 does not."""
    s1 = 1.7
    op = fastdmf.EntryMask([0], [0], (1, 1))
    w = s1 ** (1 / depth)
    start = [np.array([[w * (1 + 1e-6)]])] + [np.array([[w]])] * (depth - 1)
    limit = 2 / (depth * s1 ** (2 - 2 / depth))
    below, above = (
        _run(op, np.array([s1]), start, GradientDescent(lr=f * limit), 300, loss="sse/2").history["loss"]
        for f in (0.97, 1.03)
    )
    assert below[-1] < 1e-6 * below[0]
    assert above.max() > 100 * above[0]


@pytest.mark.parametrize(("depth", "counts"), [(2, [230, 346, 462]), (3, [377, 916, 2071]), (4, [469, 1554, 4975])])
def test_escape_from_the_plateau(depth, counts):
    """Scalar chain on 0.5 (s - 1)^2, eta = 1e-2: iterations to s = 0.5 from alpha = 1e-2, 1e-3, 1e-4."""
    op = fastdmf.EntryMask([0], [0], (1, 1))
    for alpha, count in zip((1e-2, 1e-3, 1e-4), counts):
        start = [np.array([[alpha ** (1 / depth)]])] * depth
        reached = []
        _run(
            op,
            np.ones(1),
            start,
            GradientDescent(lr=1e-2),
            6000,
            loss="sse/2",
            callback=lambda p, reached=reached: p.values["loss"] <= 0.125 and not reached.append(p.iteration),
        )
        assert abs(reached[0] - count) <= 0.01 * count


def test_coefficients_equal_dense_bfgs(rng, backend):
    """The compact form on inner products gives H g of the dense BFGS updates of gamma I."""
    n, k = 9, 5
    a = rng.standard_normal((n, n))
    a = a @ a.T + np.eye(n)
    s = rng.standard_normal((k, n))
    y, g = s @ a, rng.standard_normal(n)
    oldest_first = np.array([3, 4, 0, 1])  # place 2 is empty
    gamma = (s[1] @ y[1]) / (y[1] @ y[1])
    h = gamma * np.eye(n)
    for i in oldest_first:
        rho = 1 / (s[i] @ y[i])
        v = np.eye(n) - rho * np.outer(s[i], y[i])
        h = v @ h @ v.T + rho * np.outer(s[i], s[i])
    coefficients = np.full(2 * k, np.nan)
    products = np.concatenate([s @ g, y @ g])
    scale = backend.kernels.lbfgs_coefficients(coefficients, s @ y.T, y @ y.T, products, 1, 4)
    assert scale == pytest.approx(gamma)
    assert coefficients[2] == coefficients[7] == 0
    np.testing.assert_allclose(scale * g + coefficients @ np.concatenate([s, y]), h @ g, rtol=1e-9)


def test_inner_products_of_the_memory_stay_true(backend):
    """The products kept by recurrence equal those of the stored pairs after many wraps of the memory."""
    _, op, y = completion(0, n=40, rank=2, count=700)
    layout = Layout((40, 40, 40, 40))
    problem = Problem(op.bind(backend, y[None], width=40), layout, 1)
    x = layout.allocate(1, np.float64)
    layout.write(x, initial_factors(layout, "gaussian", 1e-3, 0))
    rule = Auto()
    state = rule.init(problem, x)
    checked = 0
    for _ in range(120):
        rule.step(problem, state)
        places = state.s_y.shape[1]
        if state.held[0] == places - 1:
            kept = (state.newest[0] - np.arange(places - 1)) % places
            s, y_ = state.pairs[0][kept], state.pairs[0][places + kept]
            norms_s, norms_y = np.linalg.norm(s, axis=1), np.linalg.norm(y_, axis=1)
            inside = np.ix_(kept, kept)
            assert np.abs((state.s_y[0][inside] - s @ y_.T) / np.outer(norms_s, norms_y)).max() < 1e-9
            assert np.abs((state.y_y[0][inside] - y_ @ y_.T) / np.outer(norms_y, norms_y)).max() < 1e-9
            direct = s @ state.grad[0] / np.linalg.norm(state.grad[0])
            kept_products = state.products[0][kept] / np.linalg.norm(state.grad[0])
            assert np.abs((kept_products - direct) / norms_s).max() < 1e-12
            checked += 1
    assert checked > 30


@pytest.mark.parametrize(
    ("depth", "evaluations", "low", "high"), [(2, 250, 3e-2, 9e-2), (3, 250, 1e-5, 8e-5), (4, 350, 5e-6, 8e-5)]
)
def test_auto_on_the_papers_completion(depth, evaluations, low, high):
    """Arora et al.: n = 100, rank 5, 2000 entries, alpha = 1e-3, stop at mse 1e-6; medians of 5 seeds.

    The band for depths 3 and 4 with the authors' rule is 2e-5 to 8e-5; a median below it is better, and the lower
    bounds here only say that the numbers are not from another problem.
    """
    counts, errors = [], []
    for seed in range(5):
        truth, op, y = completion(seed)
        solution = fastdmf.solve(op, y, depth=depth, random_state=seed + 100, truth=truth)
        assert solution.status is Status.CONVERGED
        counts.append(solution.n_eval)
        errors.append(solution.history["error"][-1])
    print(f"depth {depth}: median {np.median(counts):.0f} evaluations {counts}, error {np.median(errors):.2g}")
    assert np.median(counts) <= evaluations
    assert low <= np.median(errors) <= high


@pytest.mark.parametrize("name", ["gaussian", "rank_one", "scipy"])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_auto_converges_on_every_operator(name, depth, rng):
    n1, n2 = 14, 11
    op = OPERATORS[name](n1, n2, 120, rng)
    truth = rng.standard_normal((n1, 2)) @ rng.standard_normal((2, n2))
    # Of 32 such instances at depth 5 one or two take more than the default of 2000 steps (medians 450 to 550), and
    # rounding decides which: the bits of a power step moved the first of them from 1183 to more than 2000.
    solution = fastdmf.solve(op, op.apply(truth), depth=depth, random_state=0, tol=1e-9, max_iter=4000)
    assert solution.status is Status.CONVERGED
    assert np.linalg.norm(op.apply(solution.matrix()) - op.apply(truth)) < 1e-4 * np.linalg.norm(op.apply(truth))


def test_auto_ignores_the_normalisation_and_the_units(rng):
    op = random_mask(20, 15, 150, rng)
    truth = rng.standard_normal((20, 2)) @ rng.standard_normal((2, 15))
    y = op.apply(truth)
    runs = [fastdmf.solve(op, y, loss=loss, random_state=1).matrix() for loss in ("mse", "mse/2", "sse", "sse/2")]
    for w in runs[1:]:
        assert np.linalg.norm(w - runs[0]) < 1e-6 * np.linalg.norm(runs[0])


def test_auto_without_acceleration_stays_in_the_flow():
    _, op, y = completion(0, n=30, rank=2, count=500)
    solution = _run(op, y, initial_factors(Layout((30, 30, 30, 30)), "gaussian", 1e-3, 0), Auto(accelerate=False), 300)
    assert (np.diff(solution.history["objective"]) <= solution.history["objective"][:-1]).all()
    assert solution.history["loss"][-1] < 1e-2 * solution.history["loss"][0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: GradientDescent(lr=0), r"GradientDescent\(lr=...\) must be a number > 0"),
        (lambda: GradientDescent(lr=-1), "lr"),
        (lambda: GradientDescent(lr=np.nan), "lr"),
        (lambda: GradientDescent(lr="fast"), "lr"),
        (lambda: Momentum(beta=1.0), r"beta=...\) must be a number >= 0 and < 1"),
        (lambda: GroupRMSprop(eps=0), "eps"),
        (lambda: Adam(beta2=-0.1), "beta2"),
        (lambda: Auto(accelerate=1.5), "accelerate"),
        (lambda: as_rule("sgd"), "rule must be one of.*'sgd'"),
        (lambda: GradientDescent().set_params(speed=1), "no parameters"),
        (lambda: GradientDescent().set_params(lr=-1), "lr"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(ValueError, match=match):
        make()
    with pytest.raises(TypeError, match="rule must be a name or an object"):
        as_rule(3)


def test_settings_can_be_read_and_set():
    rule = GroupRMSprop(lr=0.1)
    assert rule.get_params() == {"lr": 0.1, "beta": 0.99, "eps": 1e-4}
    assert rule.set_params(lr=0.2).lr == 0.2
    assert type(as_rule("nesterov")) is Nesterov and as_rule(rule) is rule
    with pytest.raises(AttributeError):
        rule.lr = 3  # settings are frozen apart from set_params
