"""The loop: records, stop tests, restoring the best, interruption, divergence, batches."""

import os
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
from conftest import completion

import fastdmf
from fastdmf.engine import (
    Progress,
    SettingWarning,
    Solution,
    SolveWarning,
    Status,
    singular_values,
    warn_unless_success,
)
from fastdmf.rules import Adam, GradientDescent, GroupRMSprop, Momentum

SMALL = dict(n=24, rank=2, count=300)


def _quiet(*args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        return fastdmf.solve(*args, **kw)


def test_records_hold_values_before_the_update():
    truth, op, y = completion(0, **SMALL)
    rule = GradientDescent(lr=3.0)
    every = _quiet(op, y, rule=rule, random_state=1, max_iter=25, check_every=1, truth=truth)
    assert every.history["iteration"].tolist() == list(range(26))
    assert every.n_iter == 25 and every.n_eval == 26
    assert set(every.history) == {"iteration", "loss", "objective", "grad_norm", "step_size", "error"}
    some = _quiet(op, y, rule=rule, random_state=1, max_iter=25, check_every=10, truth=truth)
    assert some.history["iteration"].tolist() == [0, 10, 20, 25]
    for name in ("loss", "objective", "grad_norm", "step_size", "error"):
        np.testing.assert_array_equal(some.history[name], every.history[name][[0, 10, 20, 25]])
    np.testing.assert_allclose(
        every.history["error"][-1], np.sum((every.matrix() - truth) ** 2) / np.sum(truth**2), rtol=1e-12
    )
    start = _quiet(op, y, rule=rule, random_state=1, max_iter=0)
    assert start.n_iter == 0 and start.n_eval == 1 and len(start.history["loss"]) == 1


def test_tracked_quantities():
    _, op, y = completion(0, **SMALL)
    solution = _quiet(
        op,
        y,
        random_state=1,
        max_iter=60,
        track=("singular_values", "nuclear_norm", "effective_rank", "imbalance"),
        l2=1e-3,
    )
    s = np.linalg.svd(solution.matrix(), compute_uv=False)
    h = solution.history
    np.testing.assert_allclose(h["singular_values"][-1], s[:10], rtol=1e-8, atol=1e-12)
    assert h["nuclear_norm"][-1] == pytest.approx(s.sum())
    p = s / s.sum()
    assert h["effective_rank"][-1] == pytest.approx(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()))
    w1, w2, w3 = solution.factors
    gaps = [np.linalg.norm(b.T @ b - a @ a.T) / np.linalg.norm(a) ** 2 for a, b in ((w1, w2), (w2, w3))]
    assert h["imbalance"][-1] == pytest.approx(max(gaps))
    norms = sum(np.sum(w**2) for w in solution.factors)
    assert h["objective"][-1] == pytest.approx(h["loss"][-1] + 0.5 * 1e-3 * norms)
    assert solution.rank == (s > 1e-3 * s[0]).sum()


def test_callback_sees_and_stops():
    _, op, y = completion(0, **SMALL)
    seen = []

    def callback(progress):
        assert isinstance(progress, Progress) and progress.elapsed >= 0 and progress.max_iter == 2000
        assert isinstance(progress.values["loss"], float)
        seen.append((progress.iteration, progress.values["loss"], progress.factors()))
        return progress.iteration == 7

    solution = fastdmf.solve(op, y, random_state=1, callback=callback)
    assert solution.status is Status.STOPPED
    assert [i for i, _, _ in seen] == list(range(8))
    assert [v for _, v, _ in seen] == solution.history["loss"].tolist()
    for a, b in zip(seen[-1][2], solution.factors):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(seen[0][2][0], seen[-1][2][0])  # copies, not views of what moves on


def test_an_exception_in_the_callback_is_the_users():
    _, op, y = completion(0, **SMALL)
    with pytest.raises(ZeroDivisionError):
        fastdmf.solve(op, y, random_state=1, callback=lambda p: 1 / 0)


@pytest.mark.parametrize("rule", ["auto", Momentum(lr=1.0)])
def test_early_stopping_restores_the_best(rule):
    truth, op, y = completion(1, **SMALL)
    y = y + 0.3 * np.random.default_rng(0).standard_normal(len(y))
    held_out = np.arange(0, len(y), 10)
    solution = fastdmf.solve(
        op, y, rule=rule, random_state=1, validation=held_out, patience=40, tol=1e-12, check_every=1, max_iter=20_000
    )
    assert solution.status is Status.EARLY_STOPPED
    v = solution.history["validation"]
    best = int(v.argmin())
    assert solution.n_iter == best + 40
    x = solution.matrix()
    mean = np.mean((x[op.rows[held_out], op.cols[held_out]] - y[held_out]) ** 2)
    assert mean == pytest.approx(v.min(), rel=1e-9)
    kept = np.setdiff1d(np.arange(len(y)), held_out)
    loss = np.mean((x[op.rows[kept], op.cols[kept]] - y[kept]) ** 2)
    assert loss == pytest.approx(solution.history["loss"][best], rel=1e-9)  # held-out data took no part in the fit


def test_held_out_fraction_is_drawn_by_seed():
    _, op, y = completion(1, **SMALL)
    runs = [_quiet(op, y, random_state=s, validation=0.1, max_iter=20).history["validation"] for s in (3, 3, 4)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize(
    "rule",
    [GradientDescent(lr=1e4), Momentum(lr=1e3), GroupRMSprop(lr=1e6), Adam(lr=1e8)],
    ids=lambda r: type(r).__name__,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_unstable_step_is_said_and_gives_no_nan(rule, dtype):
    _, op, y = completion(0, **SMALL)
    foreseen = nullcontext()
    if isinstance(rule, (GradientDescent, Momentum)):
        foreseen = pytest.warns(SettingWarning, match="times the limit of stability")
    with foreseen, pytest.warns(SolveWarning, match="DIVERGED: the objective grew.*lower the learning rate"):
        solution = fastdmf.solve(op, y, rule=rule, random_state=1, dtype=dtype, check_every=5)
    assert solution.status is Status.DIVERGED
    assert all(np.isfinite(w).all() for w in solution.factors)
    assert np.isfinite(solution.matrix()).all()
    ceiling = 1e3 * max(solution.history["objective"][0], np.mean(y**2))
    i, j = op.rows, op.cols
    assert np.mean((solution.matrix()[i, j] - y) ** 2) <= ceiling


def test_max_iter_and_stall_warn_with_a_sentence():
    _, op, y = completion(0, **SMALL)
    with pytest.warns(SolveWarning, match="MAX_ITER: .*raise max_iter"):
        assert fastdmf.solve(op, y, random_state=1, max_iter=3).status is Status.MAX_ITER
    quiet = fastdmf.solve(op, y, random_state=1, max_iter=3, on_failure="ignore")  # a warning would be an error here
    assert quiet.status is Status.MAX_ITER
    with pytest.warns(SolveWarning, match="STALLED: .*larger tol"):
        stalled = fastdmf.solve(op, y.astype(np.float32), random_state=1, tol=1e-20)
    assert stalled.status is Status.STALLED
    assert stalled.history["loss"][-1] < 1e-8 and np.isfinite(stalled.matrix()).all()


def test_ctrl_c_returns_the_factors_of_the_moment():
    _, op, y = completion(0, **SMALL)
    previous = signal.getsignal(signal.SIGINT)

    def press(progress):
        if progress.iteration == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.warns(SolveWarning, match="INTERRUPTED"):
        solution = fastdmf.solve(op, y, random_state=1, callback=press)
    assert solution.status is Status.INTERRUPTED and 5 <= solution.n_iter <= 6
    reference = _quiet(op, y, random_state=1, max_iter=solution.n_iter)
    np.testing.assert_array_equal(solution.matrix(), reference.matrix())
    assert signal.getsignal(signal.SIGINT) is previous

    def raise_it(progress):
        raise KeyboardInterrupt

    with pytest.warns(SolveWarning, match="INTERRUPTED"):
        assert fastdmf.solve(op, y, random_state=1, callback=raise_it).n_iter == 0


def test_a_foreign_handler_is_left_alone():
    _, op, y = completion(0, **SMALL)
    mine = lambda *a: None  # noqa: E731
    previous = signal.signal(signal.SIGINT, mine)
    try:
        fastdmf.solve(op, y, random_state=1, callback=lambda p: signal.getsignal(signal.SIGINT) is not mine)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, previous)


def test_threads_of_python_run_side_by_side():
    _, op, y = completion(0, **SMALL)
    alone = fastdmf.solve(op, y, random_state=1).matrix()
    results = [None] * 4

    def work(i):
        results[i] = fastdmf.solve(op, y, random_state=1).matrix()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for r in results:
        np.testing.assert_array_equal(r, alone)


def test_threads_of_python_on_numbas_own_layer():
    """Without OpenMP numba aborts the process when two threads enter parallel kernels at the same time."""
    code = (
        "import threading, warnings, numpy as np, numba, fastdmf\n"
        "warnings.simplefilter('ignore')\n"
        "rows, cols = np.divmod(np.random.default_rng(0).permutation(200 * 900)[:60_000], 900)\n"
        "op = fastdmf.EntryMask(rows, cols, (200, 900))\n"
        "go = lambda: fastdmf.solve(op, np.sin(rows + cols), width=16, random_state=0, max_iter=30)\n"
        "threads = [threading.Thread(target=go) for _ in range(4)]\n"
        "[t.start() for t in threads], [t.join() for t in threads]\n"
        "print(numba.threading_layer())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NUMBA_THREADING_LAYER": "workqueue"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "workqueue"


def test_solution_of_one_and_of_many(rng):
    w1, w2 = rng.standard_normal((3, 2, 5)), rng.standard_normal((3, 6, 2))
    history = {"iteration": np.arange(3), "loss": np.array([[1.0, 1, 1], [0.5, 0.5, np.nan], [0.2, np.nan, np.nan]])}
    many = Solution([w1, w2], [Status.CONVERGED] * 3, np.array([2, 1, 0]), 4, history)
    assert len(many) == 3 and [s.n_iter for s in many] == [2, 1, 0]
    one = many[1]
    assert one.history["loss"].tolist() == [1.0, 0.5] and one.history["iteration"].tolist() == [0, 1]
    np.testing.assert_allclose(many.matrix()[1], one.matrix())
    np.testing.assert_allclose(one.matrix(), w2[1] @ w1[1])
    assert many.rank == [2, 2, 2] and one.rank == 2
    np.testing.assert_allclose(one.singular_values()[:2], np.linalg.svd(one.matrix(), compute_uv=False)[:2])
    for misuse in (lambda: len(one), lambda: one[0]):
        with pytest.raises(TypeError, match="single run"):
            misuse()
    with pytest.raises(IndexError):
        many[3]
    assert repr(one) == "<Solution: 6 x 5, depth 2; CONVERGED after 4 evaluations, loss 0.5>"
    assert repr(many) == "<Solution: 6 x 5, depth 2; 3 CONVERGED after 4 evaluations>"
    u = rng.standard_normal((5, 2))
    np.testing.assert_allclose(Solution([u], Status.STOPPED, 1, 1, {}, symmetric=True).matrix(), u @ u.T)
    assert Solution([np.zeros((3, 4))], Status.STOPPED, 1, 1, {}).rank == 0


def test_singular_values_of_thin_products(rng):
    left, right = rng.standard_normal((50, 3)), rng.standard_normal((3, 40))
    expected = np.linalg.svd(left @ right, compute_uv=False)[:3]
    np.testing.assert_allclose(singular_values(left, right), expected, rtol=1e-10)


def test_warnings_count_the_runs():
    with pytest.warns(SolveWarning) as caught:
        warn_unless_success([Status.CONVERGED, Status.MAX_ITER, Status.MAX_ITER, Status.DIVERGED])
    assert sorted(str(w.message).split(":")[0] for w in caught) == ["DIVERGED (1 of 4 runs)", "MAX_ITER (2 of 4 runs)"]
