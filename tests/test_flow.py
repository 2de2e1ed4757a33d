"""Gradient flow: a closed-form path, the order of the pair, energy, balancedness, batches, bad settings."""

import numpy as np
import pytest
from conftest import completion

import fastdmf
from fastdmf.flow import Flow


def logistic(t, start, target):
    """Return w(t) of dw/dt = 2 w (target - w): one entry, two balanced factors, loss sse/2."""
    return target / (1 + (target / start - 1) * np.exp(-2 * target * t))


def one_entry(rtol, target=1.5, start=1e-4, **options):
    mask = fastdmf.EntryMask([0], [0], (1, 1))
    root = np.full((1, 1), np.sqrt(start))
    options = {"loss": "sse/2", "rule": Flow(rtol=rtol), "tol": 1e-12, "truth": np.ones((1, 1)), **options}
    return fastdmf.solve(mask, np.array([target]), factors=[root, root.copy()], **options)


def test_one_entry_follows_the_closed_form():
    paths = []
    solution = one_entry(1e-8, callback=lambda p: paths.append(float((p.factors()[1] @ p.factors()[0])[0, 0])))
    expected = logistic(solution.history["time"], 1e-4, 1.5)
    away = np.abs(np.array(paths) / expected - 1).max()
    print(f"{solution.n_iter} steps, relative error at most {away:.1e} from 1e-4 to 1.5")
    assert solution.status is fastdmf.Status.CONVERGED and away < 1e-6
    assert solution.n_eval == 6 * solution.n_iter + 1
    assert (np.diff(solution.history["time"]) >= 0).all()


def test_order():
    """Equal steps to one time: five halvings of the step, the slope of the error is 5; the estimate's is 5 a step."""
    from fastdmf.backend import get_backend
    from fastdmf.chain import Layout
    from fastdmf.problem import Problem

    layout = Layout((1, 1, 1))
    mask = fastdmf.EntryMask([0], [0], (1, 1))
    problem = Problem(mask.bind(get_backend(), np.array([[1.5]]), width=1), layout, 1, loss="sse/2")
    rule, errors, counts = Flow(rtol=1 - 1e-9), [], (8, 16, 32, 64)
    for count in counts:
        x = layout.allocate(1, np.float64)
        layout.write(x, [np.full((1, 1), 0.5), np.full((1, 1), 0.5)])
        state = rule.init(problem, x)
        for _ in range(count):
            state.step_size = np.array([2.0 / count])
            rule.step(problem, state)
        assert state.time[0] == pytest.approx(2.0)
        w = [v[0] for v in layout.factors(state.x)]
        errors.append(abs(float((w[1] @ w[0])[0, 0]) - logistic(2.0, 0.25, 1.5)))
    slopes = -np.diff(np.log2(errors))
    print("errors", errors, "slopes", slopes)
    assert (slopes > 4.7).all() and (slopes < 5.6).all()


@pytest.mark.parametrize("depth", [2, 3])
def test_energy_and_balance_are_kept_to_the_tolerance(depth):
    truth, mask, y = completion(0, n=30, rank=2, count=400)
    gaps = {}
    for rtol in (1e-4, 1e-6, 1e-8):
        options = {"depth": depth, "init": "balanced", "init_scale": 1e-2, "loss": "sse/2", "random_state": 0}
        solution = fastdmf.solve(
            mask, y, rule=Flow(rtol=rtol), max_iter=400, track=["imbalance"], on_failure="ignore", **options
        )
        gaps[rtol] = np.abs(solution.history["energy_gap"]).max(), solution.history["imbalance"].max()
        assert solution.history["objective"][-1] < 0.9 * solution.history["objective"][0]
    print(gaps)
    for rtol, (energy, imbalance) in gaps.items():
        assert energy < 30 * rtol and imbalance < 300 * rtol
    assert gaps[1e-8][0] < 1e-2 * gaps[1e-4][0]


def test_gradient_descent_approaches_the_flow():
    """The distance to the flow at one time halves with the step."""
    _, mask, y = completion(0, n=12, rank=1, count=90)
    options = {"depth": 3, "init": "balanced", "init_scale": 0.1, "loss": "mse/2", "random_state": 0}
    options |= {"on_failure": "ignore", "check_every": 1, "tol": 1e-300}
    flow = fastdmf.solve(mask, y, rule=Flow(rtol=1e-9), max_iter=60, **options)
    reached = float(flow.history["time"][-1])
    distances = []
    for count in (200, 400, 800):
        run = fastdmf.solve(mask, y, rule=fastdmf.rules.GradientDescent(lr=reached / count), max_iter=count, **options)
        distances.append(np.linalg.norm(run.matrix() - flow.matrix()))
    print("distances to the flow", distances)
    np.testing.assert_allclose(np.divide(distances[:-1], distances[1:]), 2, rtol=0.1)


def test_batch_equals_single_runs():
    _, mask, y = completion(0, n=20, rank=2, count=200)
    options = {"rule": "flow", "max_iter": 60, "tol": 1e-3, "on_failure": "ignore"}
    batch = fastdmf.solve(mask, y, random_state=[0, 1, 2], **options)
    for seed in range(3):
        single = fastdmf.solve(mask, y, random_state=seed, **options)
        np.testing.assert_allclose(batch[seed].matrix(), single.matrix(), rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(batch[seed].history["time"], single.history["time"], rtol=1e-8)
        assert batch.status[seed] is single.status


def test_the_path_does_not_depend_on_the_basis():
    _, mask, y = completion(0, n=20, rank=2, count=200)
    rng = np.random.default_rng(0)
    factors = [0.1 * rng.standard_normal((20, 20)) for _ in range(3)]
    turn = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    turned = [turn @ factors[0], factors[1] @ turn.T, factors[2]]
    options = {"rule": "flow", "max_iter": 50, "tol": 1e-300, "on_failure": "ignore"}
    one, two = (fastdmf.solve(mask, y, factors=f, **options) for f in (factors, turned))
    np.testing.assert_allclose(one.matrix(), two.matrix(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rtol", [0, -1, 1, "small", np.nan])
def test_bad_tolerance(rtol):
    with pytest.raises(ValueError, match=r"Flow\(rtol=...\) must be a number > 0 and < 1"):
        Flow(rtol=rtol)
