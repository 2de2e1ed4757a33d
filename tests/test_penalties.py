"""Penalties: gradients of the whole objective, plain-NumPy values, batches, rules; what the papers say they do."""

import numpy as np
import pytest
from conftest import LOSSES, OPERATORS, completion

import fastdmf
from fastdmf.chain import Layout, initial_factors
from fastdmf.penalties import GradientNorm, NuclearRatio, Penalty, as_penalties
from fastdmf.problem import Problem, dot
from fastdmf.rules import Adam, Flow, GradientDescent
from fastdmf.second_order import sharpness

N1, N2 = 9, 7
# Depth 2 and 4 are narrow enough that W is not formed.
CHAINS = {1: (N2, N1), 2: (N2, 3, N1), 3: (N2, 6, 4, N1), 4: (N2, 5, 8, 2, N1)}
PENALTIES = {
    "gradient_norm": (GradientNorm(0.3),),
    "nuclear_ratio": (NuclearRatio(0.7),),
    "both": (GradientNorm(0.3), NuclearRatio(0.7)),
}


def _problem(name, dims, penalties, rng, backend, *, loss="squared", symmetric=False, weighted=True, l2=0.2):
    """A batch of two, each with data and weights of its own."""
    op, layout = OPERATORS[name](dims[-1], dims[0], 40, rng), Layout(dims, symmetric)
    y, weights = rng.standard_normal((2, op.size)), rng.random((2, op.size)) if weighted else None
    bound = op.bind(backend, y, weights=weights, loss=LOSSES[loss], width=layout.width)
    return Problem(bound, layout, 2, loss="mse/2", l2=l2, penalties=as_penalties(penalties))


def _normal(problem, rng, scale=0.8):
    x = problem.layout.allocate(problem.batch, np.float64)
    for view in problem.layout.stored(x):
        view[:] = scale * rng.standard_normal(view.shape)
    return x


def _evaluate(problem, x):
    """Return (losses, objective, gradient)."""
    grad = np.zeros_like(x)
    return *problem.evaluate(x, grad), grad


def _check_gradient(problem, x, rng):
    """Compare with central differences, one factor at a time."""
    layout, worst = problem.layout, 0.0
    grad = _evaluate(problem, x)[2]
    for j in range(len(layout.stored_shapes)):
        v, errors = np.zeros_like(x), []
        layout.stored(v)[j][:] = rng.standard_normal(layout.stored(v)[j].shape)
        for step in (1e-4, 1e-5, 1e-6):
            difference = _evaluate(problem, x + step * v)[1] - _evaluate(problem, x - step * v)[1]
            errors.append(np.abs(difference / (2 * step) - dot(grad, v)) / np.abs(dot(grad, v)))
        worst = max(worst, np.min(errors, axis=0).max())
    print(f"relative error against central differences {worst:.1e}")
    assert worst < 1e-6


@pytest.mark.parametrize("depth", CHAINS)
@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("name", OPERATORS)
def test_gradient(name, penalties, depth, rng, backend):
    loss = "huber" if depth == 3 else "squared"
    l2 = 0.2 if depth % 2 == 0 else 0.0
    problem = _problem(name, CHAINS[depth], PENALTIES[penalties], rng, backend, loss=loss, weighted=depth > 1, l2=l2)
    _check_gradient(problem, _normal(problem, rng), rng)


@pytest.mark.parametrize("width", [3, 8, 11])
@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("name", ["mask", "gaussian", "rank_one"])
def test_gradient_of_the_symmetric_chain(name, penalties, width, rng, backend):
    problem = _problem(name, (8, width, 8), PENALTIES[penalties], rng, backend, symmetric=True)
    _check_gradient(problem, _normal(problem, rng), rng)


@pytest.mark.parametrize("depth", [1, 3])
def test_gradient_norm_is_that_of_loss_and_l2(depth, rng, backend):
    problem = _problem("mask", CHAINS[depth], (), rng, backend)
    x = _normal(problem, rng)
    _, objective, grad = _evaluate(problem, x)
    problem.penalties = PENALTIES["gradient_norm"]
    np.testing.assert_allclose(_evaluate(problem, x)[1], objective + 0.3 * (grad**2).sum(axis=1), rtol=1e-13)


def _nuclear_ratio(w):
    """Return ||W||_* / ||W||_F and its gradient in W, by the formula of the paper."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    kept = s > 1e-7 * s[0]
    frobenius = np.sqrt((w**2).sum())
    gradient = u[:, kept] @ vt[kept] / frobenius - s.sum() * w / frobenius**3
    return s.sum() / frobenius, gradient


@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e60])
@pytest.mark.parametrize("depth", CHAINS)
def test_nuclear_ratio_against_plain_numpy(depth, scale, rng, backend):
    """Value and gradient of all factors, for chains that have full rank and that have not, at any scale."""
    problem = _problem("mask", CHAINS[depth], (), rng, backend)
    x = _normal(problem, rng)
    w = problem.layout.factors(x)
    w[0][:, :, -2:] = w[0][:, :, :2]  # two columns of W twice
    w[0][1, 2:] = 0  # the second slice has rank 2
    x *= scale ** (1 / depth)
    grad = np.zeros_like(x)
    values = NuclearRatio(0.7).add(problem, x, grad)
    for b in range(2):
        factors = [f[b] for f in problem.layout.factors(x)]
        # lefts[j] = W_N ... W_(j+1) and rights[j] = W_(j-1) ... W_1, counted from 0.
        lefts, rights = [np.eye(N1)], [np.eye(N2)]
        for below, above in zip(factors[:-1], factors[:0:-1]):
            lefts.insert(0, lefts[0] @ above)
            rights.append(below @ rights[-1])
        ratio, g = _nuclear_ratio(factors[-1] @ rights[-1])
        assert values[b] == pytest.approx(0.7 * ratio, rel=1e-12)
        for left, right, view in zip(lefts, rights, problem.layout.factors(grad)):
            expected = 0.7 * left.T @ g @ right.T
            size = np.linalg.norm(left, 2) * np.linalg.norm(g) * np.linalg.norm(right, 2)
            assert np.linalg.norm(view[b] - expected) < 1e-12 * size
    assert 1 <= values[1] / 0.7 <= np.sqrt(2)


def test_nuclear_ratio_of_rank_one_and_of_zero(rng, backend):
    """One and flat at rank one; zero and flat at W = 0, in either precision."""
    problem = _problem("mask", CHAINS[1], (), rng, backend)
    for dtype in (np.float64, np.float32):
        x, grad = (problem.layout.allocate(2, dtype) for _ in range(2))
        problem.layout.factors(x)[0][1] = np.outer(rng.standard_normal(N1), rng.standard_normal(N2))
        values = NuclearRatio(0.7).add(problem, x, grad)
        np.testing.assert_allclose(values, [0, 0.7], rtol=1e-6)
        assert not grad[0].any() and np.isfinite(grad).all()
    assert np.linalg.norm(_evaluate(problem, np.zeros_like(x, np.float64))[2]) > 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_slice_that_overflowed_leaves_the_others_alone(depth, rng, backend):
    problem = _problem("mask", CHAINS[depth], (NuclearRatio(0.7),), rng, backend)
    x = _normal(problem, rng)
    expected = _evaluate(problem, x)
    x[0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        _, objective, grad = _evaluate(problem, x)
    assert not np.isfinite(objective[0]) and objective[1] == pytest.approx(expected[1][1], rel=1e-13)
    np.testing.assert_allclose(grad[1], expected[2][1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("depth", CHAINS)
def test_a_slice_is_its_single_run_and_float32_is_close(depth, penalties, rng, backend):
    problem = _problem("gaussian", CHAINS[depth], PENALTIES[penalties], rng, backend)
    x = _normal(problem, rng)
    _, objective, grad = _evaluate(problem, x)
    for b in range(2):
        _, alone, alone_grad = _evaluate(problem.take(np.array([b])), x[b : b + 1])
        assert alone[0] == pytest.approx(objective[b], rel=1e-13)
        np.testing.assert_allclose(alone_grad[0], grad[b], rtol=1e-11, atol=1e-13)
    bound, layout = problem.bound, problem.layout
    data = {"weights": bound.weights.astype(np.float32), "dtype": np.float32, "width": layout.width}
    single = bound.operator.bind(backend, bound.y.astype(np.float32), **data)
    terms = {"loss": "mse/2", "l2": 0.2, "penalties": problem.penalties}
    _, rough, rough_grad = _evaluate(Problem(single, layout, 2, **terms), x.astype(np.float32))
    assert rough_grad.dtype == np.float32 and rough.dtype == np.float64
    np.testing.assert_allclose(rough, objective, rtol=1e-5)
    assert np.linalg.norm(rough_grad - grad) < 1e-5 * np.linalg.norm(grad)


# --- in solve --------------------------------------------------------------------------------------------------------

RULES = {"gd": GradientDescent(lr=0.5), "adam": Adam(lr=1e-2), "auto": "auto", "flow": "flow"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("penalties", PENALTIES)
def test_solve(penalties, rule, dtype):
    """Every rule lowers the objective, ends, and gives a batch's runs as it gives single ones."""
    _, mask, y = completion(0, n=20, rank=2, count=200)
    options = {"depth": 2, "init_scale": 0.3, "rule": RULES[rule], "penalty": PENALTIES[penalties], "dtype": dtype}
    options |= {"max_iter": 40, "tol": 1e-3, "on_failure": "ignore", "check_every": 1}
    batch = fastdmf.solve(mask, y, random_state=[0, 1], **options)
    for seed in range(2):
        run = fastdmf.solve(mask, y, random_state=seed, **options)
        objective = run.history["objective"]
        assert np.isfinite(objective).all() and objective[-1] < objective[0]
        if rule == "gd" and penalties == "gradient_norm":  # the other one has kinks
            assert (np.diff(objective) < 0).all()
        assert (objective > run.history["loss"]).all()
        tolerance = 1e-6 if dtype == "float64" else 0.02
        np.testing.assert_allclose(batch[seed].history["objective"][-1], objective[-1], rtol=tolerance)


def test_a_run_that_diverges_says_so():
    _, mask, y = completion(0, n=20, rank=2, count=200)
    options = {"rule": GradientDescent(lr=1e3), "init_scale": 0.3, "max_iter": 200, "on_failure": "ignore"}
    for penalties in PENALTIES.values():
        run = fastdmf.solve(mask, y, penalty=penalties, random_state=0, **options)
        assert run.status is fastdmf.Status.DIVERGED


def test_a_penalty_is_part_of_a_run_in_a_checkpoint(tmp_path):
    _, mask, y = completion(0, n=20, rank=2, count=200)
    options = {"rule": "gd", "random_state": 0, "on_failure": "ignore", "checkpoint": tmp_path / "run"}
    fastdmf.solve(mask, y, penalty=GradientNorm(0.1), max_iter=10, **options)
    with pytest.raises(ValueError, match="other data, settings or seed"):
        fastdmf.solve(mask, y, penalty=GradientNorm(0.2), max_iter=10, **options)


@pytest.mark.parametrize("weight", [-1, np.nan, np.inf, "small", None, True])
@pytest.mark.parametrize("kind", [GradientNorm, NuclearRatio])
def test_bad_weight(kind, weight):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(weight=...\) must be a number >= 0, got"):
        kind(weight)


def test_bad_penalties():
    _, mask, y = completion(0, n=20, rank=2, count=200)
    with pytest.raises(ValueError, match="GradientNorm at place 1: .* give it first"):
        fastdmf.solve(mask, y, penalty=[NuclearRatio(0.1), GradientNorm(0.1)])
    with pytest.raises(ValueError, match="GradientNorm at place 1: .* and once"):
        as_penalties([GradientNorm(0.1), GradientNorm(0.1)])
    with pytest.raises(TypeError, match=r"penalty must be an object of fastdmf.penalties, or several, got float"):
        fastdmf.solve(mask, y, penalty=[0.1])
    with pytest.raises(NotImplementedError):
        Penalty().add(None, None, None)
    assert as_penalties(NuclearRatio(0.1)) == (NuclearRatio(0.1),) and as_penalties(()) == ()


def test_no_weight_changes_nothing(rng, backend):
    for depth in (1, 3):
        problem = _problem("mask", CHAINS[depth], (), rng, backend)
        x = _normal(problem, rng)
        before = _evaluate(problem, x)
        problem.penalties = (GradientNorm(0), NuclearRatio(0.0))
        for found, expected in zip(_evaluate(problem, x), before):
            np.testing.assert_array_equal(found, expected)


# --- what the papers say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "l2"), [(2, 0.0), (3, 0.01)])
def test_gradient_descent_follows_the_flow_with_the_penalty(depth, l2, backend):
    """Barrett and Dherin 2021: to O(h^2) with (h/4) ||grad E||^2, to O(h) without; slopes of three halvings."""
    _, mask, y = completion(0, n=12, rank=2, count=90)
    layout = Layout((12,) * (depth + 1))
    bound, start = mask.bind(backend, y[None], width=12), initial_factors(layout, "gaussian", 0.3, 0)
    total, fine, flow = 20.0, 50, Flow(rtol=1 - 1e-9)  # equal steps, so that both end at one time

    def end(rule, count, penalties=()):
        problem = Problem(bound, layout, 1, loss="mse/2", l2=l2, penalties=penalties)
        x = layout.allocate(1, np.float64)
        layout.write(x, start)
        state = rule.init(problem, x)
        first = state.objective[0]
        for _ in range(count):
            state.step_size = np.array([total / count])
            rule.step(problem, state)
        assert state.objective[0] < 0.6 * first
        return state.x.copy()

    plain, gaps = end(flow, fine), []
    counts = (100, 200, 400, 800)
    for count in counts:
        h = total / count
        descent, with_penalty = end(GradientDescent(lr=h), count), end(flow, fine, (GradientNorm(h / 4),))
        gaps.append([np.linalg.norm(descent - path) for path in (plain, with_penalty)])
    slopes = np.diff(np.log2(gaps), axis=0) * -1
    own = np.linalg.norm(end(flow, 2 * fine) - plain)
    print(f"gaps {gaps}, slopes {slopes}, of the flow itself {own:.1e}")
    assert own < 1e-3 * gaps[-1][1]
    np.testing.assert_allclose(slopes, [[1, 2]] * 3, atol=0.03)


def test_gradient_norm_balances_and_flattens(backend):
    """Their model of two parameters, from (2.8, 3.5): descent ends flatter, and to O(h^2) where the flow with h/4 does.

    E = (0.6 - a b)^2 / 2 has the sharpness a^2 + b^2 at its minima; the flow of E alone keeps a^2 - b^2.
    """
    mask = fastdmf.EntryMask([0], [0], (1, 1))
    problem = Problem(mask.bind(backend, np.array([[0.6]]), width=1), Layout((1, 1, 1)), 1, loss="sse/2")

    def end(rule, penalty=()):
        """Return (imbalance, sharpness)."""
        options = {"factors": [np.array([[3.5]]), np.array([[2.8]])], "loss": "sse/2", "tol": 1e-14}
        solution = fastdmf.solve(mask, np.array([0.6]), rule=rule, penalty=penalty, **options)
        x = problem.layout.allocate(1, np.float64)
        problem.layout.write(x, solution.factors)
        b, a = (float(w[0, 0]) for w in solution.factors)
        return np.array([b**2 - a**2, sharpness(problem, x)[0]])

    flow, gaps = end(Flow(rtol=1e-9)), []
    assert flow[0] == pytest.approx(3.5**2 - 2.8**2, rel=1e-6)
    for h in (0.01, 0.005):
        penalised, descent = end(Flow(rtol=1e-9), GradientNorm(h / 4)), end(GradientDescent(lr=h))
        print(f"(imbalance, sharpness) at h={h}: flow {flow}, with the penalty {penalised}, descent {descent}")
        assert (penalised < flow - 12 * h).all() and (descent < flow - 12 * h).all()
        gaps.append(np.abs(descent - penalised))
    np.testing.assert_allclose(gaps[0] / gaps[1], 4, rtol=0.05)


def test_nuclear_ratio_brings_depth_one_to_low_rank():
    """Zhao 2023: with Adam one factor finds the rank and the matrix, where without the penalty it finds neither."""
    truth, mask, y = completion(1, n=30, rank=2, count=400)
    options = {"depth": 1, "init_scale": 1e-3, "rule": Adam(lr=5e-3), "max_iter": 8000, "tol": 1e-300}
    options |= {"truth": truth, "track": ["effective_rank"], "check_every": 8000, "on_failure": "ignore"}
    ends = {}
    for penalty in ((), NuclearRatio(0.1)):
        run = fastdmf.solve(mask, y, penalty=penalty, random_state=0, **options)
        ends[penalty] = run.history["error"][-1], run.history["effective_rank"][-1]
    print("(error, effective rank) without and with", list(ends.values()))
    plain, penalised = ends.values()
    assert plain[0] > 0.4 and plain[1] > 14
    assert penalised[0] < 0.01 and penalised[1] < 2.2
