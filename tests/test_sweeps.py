"""``sweep``: rows equal single runs, batches and workers change no bit, the table, wrong arguments, Ctrl-C."""

import csv
import logging
import os
import signal
import threading

import numpy as np
import pytest
from conftest import completion

import fastdmf
from fastdmf import sweeps
from fastdmf.rules import GradientDescent, GroupRMSprop

OPTIONS = {"max_iter": 600, "tol": 1e-2, "rule": GroupRMSprop(lr=0.1), "check_every": 1}


def instance(seed, count=150):
    truth, mask, y = completion(seed, n=20, rank=2, count=count)
    return mask, y, truth


def shared():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((12, 2)) @ rng.standard_normal((2, 10))
    operator = fastdmf.GaussianDense(rng.standard_normal((90, 12, 10)))
    return operator, operator.apply(truth), truth


def test_rows_equal_single_runs():
    grid = {"depth": (2, 3), "seed": (3, 5), "init_scale": (1e-2, 0.1), "init": ("gaussian", "orthogonal")}
    table = fastdmf.sweep(instance, **grid, **OPTIONS)
    assert len(table) == 16 and table.columns[:5] == ["depth", "seed", "init_scale", "init", "rule"]
    expected = [(d, s, a, i) for d in (2, 3) for s in (3, 5) for a in (1e-2, 0.1) for i in ("gaussian", "orthogonal")]
    assert [tuple(row.values())[:4] for row in table] == expected
    assert len(set(table["n_iter"])) > 4  # each run stops on its own
    for row in table:
        mask, y, truth = instance(row["seed"])
        settings = {name: row[name] for name in ("depth", "init_scale", "init")}
        single = fastdmf.solve(
            mask, y, random_state=row["seed"], truth=truth, on_failure="ignore", **settings, **OPTIONS
        )
        assert row["status"] == single.status.name and abs(row["n_iter"] - single.n_iter) <= 1
        assert row["loss"] == pytest.approx(single.history["loss"][-1], rel=0.1)
        assert row["error"] == pytest.approx(single.history["error"][-1], rel=0.1)
        assert row["rank"] == single.rank
        assert row["nuclear_norm"] == pytest.approx(single.singular_values().sum(), rel=0.01)


def test_first_steps_to_rounding():
    options = OPTIONS | {"max_iter": 40, "tol": 1e-300}
    table = fastdmf.sweep(shared(), seed=range(4), init_scale=(1e-2, 1e-1), width=(4, 6), keep=True, **options)
    for row, solution in zip(table, table.solutions):
        operator, y, truth = shared()
        settings = {name: row[name] for name in ("init_scale", "width")}
        single = fastdmf.solve(
            operator, y, random_state=row["seed"], truth=truth, on_failure="ignore", **settings, **options
        )
        np.testing.assert_allclose(solution.history["loss"], single.history["loss"], rtol=1e-9)
        np.testing.assert_allclose(solution.history["error"], single.history["error"], rtol=1e-9)
        np.testing.assert_allclose(solution.matrix(), single.matrix(), rtol=1e-8, atol=1e-10)


def test_axes_of_the_instance_and_several_rules():
    calls = []

    def counted(seed, count):
        calls.append((seed, count))
        return instance(seed, count)

    rules = (GradientDescent(lr=3.0), "auto")
    table = fastdmf.sweep(counted, count=(100, 200), seed=(0, 1), rule=rules, init_scale=(0.1, 0.3), max_iter=30)
    assert sorted(calls) == [(0, 100), (0, 200), (1, 100), (1, 200)] and len(table) == 16
    assert len(table.where(count=100, rule=rules[0])) == 4 and len(table.where(rule="auto")) == 8
    more = table.where(rule="auto").group("count")
    assert more["median"][1] < more["median"][0]


def test_one_operator_is_one_batch(monkeypatch):
    sizes = []

    def spy(operator, y, **options):
        sizes.append(len(options["random_state"]))
        return fastdmf.solve(operator, y, **options)

    monkeypatch.setattr(sweeps, "solve", spy)
    made = shared()
    whole = fastdmf.sweep(made, seed=range(5), depth=(2, 3), **OPTIONS)
    assert sizes == [5, 5]
    monkeypatch.setattr(sweeps, "_BATCH_BYTES", 2.5 * 25 * 8 * 320)
    parts = fastdmf.sweep(made, seed=range(5), depth=(2, 3), **OPTIONS)
    assert len(sizes) > 5 and max(sizes[2:]) < 5
    np.testing.assert_array_equal(whole["loss"], parts["loss"])
    np.testing.assert_array_equal(whole["n_iter"], parts["n_iter"])


def test_workers_change_no_bit():
    grid = {"seed": range(3), "depth": (2, 3)}
    here, there = (fastdmf.sweep(instance, n_jobs=n, **grid, **OPTIONS) for n in (1, 2))
    for name in ("status", "n_iter", "loss", "error", "rank", "effective_rank", "nuclear_norm"):
        np.testing.assert_array_equal(here[name], there[name])


def test_workers_only_where_they_are_worth_it():
    mask, dense = instance(0)[0], shared()[0]
    small, large = [([0], (mask,))] * 4, [([0], (dense,))] * 4
    cores = os.cpu_count()
    assert not sweeps._worth_workers(small, 5, 1.0, 1)
    assert sweeps._worth_workers(small, 5, 1.0, 2)
    assert sweeps._worth_workers(small, 5, 100.0, None) == (cores > 1)
    assert not sweeps._worth_workers(small, 5, 0.1, None) and not sweeps._worth_workers(small, 4, 100.0, None)
    assert not sweeps._worth_workers(large, 5, 100.0, 2)


def test_table(tmp_path):
    table = fastdmf.sweep(instance, seed=(0, 1), depth=(2, 3), init_scale=(0.1,), **OPTIONS)
    grouped = table.group(["depth"], "error")
    for row in grouped:
        errors = table.where(depth=row["depth"])["error"]
        assert (row["min"], row["max"], row["count"]) == (errors.min(), errors.max(), 2)
        assert row["median"] == np.median(errors)
    text = repr(table).splitlines()
    assert len(text) == 5 and "effective_rank" in text[0]
    table.to_csv(tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["error"]) for row in rows] == table["error"].tolist()
    frame = table.to_pandas()
    assert list(frame.columns) == table.columns and (frame["depth"] == table["depth"]).all()
    with pytest.raises(KeyError, match="'speed' is no column; there are seed"):
        table["speed"]
    with pytest.raises(KeyError, match="'speed' is no column"):
        table.where(speed=3)
    with pytest.raises(KeyError, match="'speed' is no column"):
        table.group("depth", "speed")


def test_without_a_truth():
    operator, y, _ = shared()
    table = fastdmf.sweep((operator, y), seed=(0, 1), **OPTIONS)
    assert (
        np.isnan(table["error"]).all() and table.group("depth" if "depth" in table.columns else "seed")["count"][0] == 0
    )
    assert table.solutions is None


def test_progress(caplog):
    told = []
    with caplog.at_level(logging.INFO, logger="fastdmf"):
        fastdmf.sweep(instance, seed=range(3), verbose=1, callback=lambda *a: told.append(a), **OPTIONS)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert "sweep: 3 of 3 runs" in caplog.text


def test_control_c():
    """The first run is interrupted, the second never begins."""

    def slow(seed):
        truth, mask, y = completion(seed, n=60, rank=2, count=1500)
        if seed == 1:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return mask, y, truth

    options = {"rule": GradientDescent(lr=1e-6), "max_iter": 10_000_000}
    table = fastdmf.sweep(slow, seed=(0, 1), n_jobs=1, **options)
    assert table["status"].tolist() == ["INTERRUPTED", "NOT_RUN"]
    assert np.isfinite(table["loss"][0]) and np.isnan(table["loss"][1])


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "match"),
    [
        (instance, {"seed": []}, ValueError, "seed is an axis without values"),
        (instance, {"speed": [1]}, TypeError, "sweep knows no 'speed'.*and instance takes seed"),
        (lambda count: None, {}, TypeError, r"instance asks for count: give each as an axis, count=\[...\]"),
        (3, {}, TypeError, r"instance must be \(operator, y\[, truth\]\)"),
        (lambda: 3, {}, TypeError, "instance must return"),
        (lambda: (shared()[0], np.zeros(4)), {}, ValueError, r"y of shape \(4,\) for an operator with 90"),
        (lambda: (*shared()[:2], np.zeros((2, 2))), {}, ValueError, r"truth of shape \(2, 2\)"),
        (instance, {"factors": []}, TypeError, "factors belongs to a single run"),
        (instance, {"random_state": 3}, TypeError, "random_state belongs to a single run"),
        (instance, {"init_scale": [-1]}, ValueError, "init_scale"),
        (instance, {"init": ["warm"]}, ValueError, "init must be one of"),
        (instance, {"rule": ["sgd"]}, ValueError, "rule must be one of"),
        (instance, {"n_jobs": 0}, ValueError, "n_jobs"),
        (instance, {"callback": 3}, TypeError, "callback must be callable"),
    ],
)
def test_wrong_arguments(arguments, settings, error, match):
    with pytest.raises(error, match=match):
        fastdmf.sweep(arguments, **{"max_iter": 2, **settings})
