"""``sweep``: rows against single runs, what shares a batch, processes, the table, wrong arguments, Ctrl-C."""

import csv
import dataclasses
import itertools
import logging
import signal
import sys
import time

import numpy as np
import pytest

import fastdmf
from fastdmf import sweeps
from fastdmf.operators import as_operator
from fastdmf.rules import GradientDescent, GroupRMSprop
from fastdmf.sweeps import SweepTable, sweep

NUMBERS = ("n_iter", "n_eval", "loss", "error", "rank", "effective_rank", "nuclear_norm")


def budget(monkeypatch, **changes):
    """Let batches on the CPU be something else."""
    monkeypatch.setitem(sweeps._BUDGETS, "cpu", dataclasses.replace(sweeps._BUDGETS["cpu"], **changes))


def instance(seed, count=150, n=20):
    rng = np.random.default_rng([seed, 1])
    truth = rng.standard_normal((n, 2)) @ rng.standard_normal((2, n))
    rows, cols = np.divmod(rng.choice(n * n, count, replace=False), n)
    return fastdmf.EntryMask(rows, cols, truth.shape), truth[rows, cols], truth


def dense():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((8, 2)) @ rng.standard_normal((2, 9))
    operator = fastdmf.GaussianDense(rng.standard_normal((60, 8, 9)))
    return operator, operator.apply(truth), truth


def same_rows(one, other):
    assert one["status"].tolist() == other["status"].tolist()
    for name in NUMBERS:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture
def batches(monkeypatch):
    """The (operator, rows) of every batch that runs in this process."""
    seen = []

    def spied(operator, y, **settings):
        seen.append((operator, len(settings["random_state"])))
        return fastdmf.solve(operator, y, **settings)

    monkeypatch.setattr(sweeps, "solve", spied)
    return seen


# --- rows against single runs ----------------------------------------------------------------------------------------


def compare(table, make, settings, first=50):
    """Compare every row with ``solve`` alone: to rounding over the first evaluations, in quality at the end."""
    for row, mine, spectrum in zip(table, table.solutions, table.singular_values):
        point = {name: row[name] for name in table.axes}
        chosen = {k: point[k] for k in ("seed", "count") if k in point and callable(make)}
        operator, y, truth = make(**chosen) if callable(make) else make
        own = {k: v for k, v in point.items() if k not in ("seed", "count")}
        single = fastdmf.solve(
            operator, y, random_state=row["seed"], truth=truth, on_failure="ignore", **own, **settings
        )
        k = min(first, len(single.history["loss"]), len(mine.history["loss"]))
        for name in ("loss", "error", "nuclear_norm"):
            np.testing.assert_allclose(mine.history[name][:k], single.history[name][:k], rtol=1e-6)
        assert row["status"] == single.status.name
        assert row["rank"] == single.rank
        assert row["error"] == pytest.approx(single.history["error"][-1], rel=0.1)
        assert row["n_eval"] == mine.n_eval and single.n_eval == pytest.approx(row["n_eval"], rel=0.1)
        # The row against plain NumPy on the factors of the run.
        w = mine.matrix()
        s = np.linalg.svd(w, compute_uv=False)
        np.testing.assert_allclose(spectrum, s[: len(spectrum)], atol=1e-12 * s[0])
        assert s[len(spectrum) :].sum() <= 1e-12 * s[0]
        share = s[s > 0] / s.sum()
        assert row["error"] == pytest.approx(np.sum((w - truth) ** 2) / np.sum(truth**2), rel=1e-9)
        assert row["nuclear_norm"] == pytest.approx(s.sum(), rel=1e-9)
        assert row["effective_rank"] == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-6)
        r = operator.apply(w) - y
        assert row["loss"] == pytest.approx(np.mean(r**2), rel=1e-6, abs=1e-12)


def test_rows_are_single_runs_on_a_union_of_masks(batches):
    """Masks of several seeds and sizes, depths, widths, starts: 24 rows."""
    settings = {"max_iter": 400, "check_every": 1, "track": "nuclear_norm", "tol": 1e-4, "init": "orthogonal"}
    grid = {"seed": range(2), "init_scale": [1e-2, 0.1], "depth": [2, 3], "width": [3, 20], "count": [150]}
    table = sweep(instance, **grid, **settings, keep="solutions")
    assert [size for _, size in batches] == [4, 4, 4, 4]
    assert all(operator.size > 150 for operator, _ in batches)
    keys = [tuple(row[name] for name in grid) for row in table]
    assert keys == list(itertools.product(*grid.values()))
    assert table.columns[:5] == tuple(grid) and len(set(table["n_iter"])) > 4
    compare(table, instance, settings)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_rows_are_single_runs_on_dense_measurements(depth, batches):
    settings = {"max_iter": 300, "track": "nuclear_norm", "rule": GroupRMSprop(lr=1e-2), "check_every": 1, "tol": 1e-4}
    made = dense()
    table = sweep(
        made, seed=[3, 0], init=["gaussian", "balanced"], l2=[0.0], depth=[depth], keep="solutions", **settings
    )
    assert batches == [(made[0], 4)]
    compare(table, made, settings)


def test_each_rule_and_strength_of_l2_is_a_batch(batches):
    """Rules and l2 act on their own rows; every status tells how its run ended."""
    rules = ["auto", GradientDescent(lr=1e3), GradientDescent(lr=1e-3)]
    made = dense()
    table = sweep(made, rule=rules, l2=[0.0, 0.5], seed=[0, 1], max_iter=150)
    assert [size for _, size in batches] == [2] * 6
    assert set(table.where(rule="auto", l2=0.0)["status"]) == {"CONVERGED"}
    assert set(table.where(rule=rules[1])["status"]) == {"DIVERGED"}
    assert set(table.where(rule=rules[2])["status"]) == {"MAX_ITER"}
    assert (
        table.where(rule="auto", l2=0.5)["nuclear_norm"].max() < table.where(rule="auto", l2=0.0)["nuclear_norm"].min()
    )
    assert np.isfinite(table["loss"]).all()  # of the factors that are returned, not of the blow-up


def test_loss_is_that_of_the_factors_with_held_out_data():
    operator, y, _ = dense()
    y = y + np.random.default_rng(1).standard_normal(len(y))
    table = sweep((operator, y), seed=range(3), validation=0.3, patience=10, keep="solutions")
    assert set(table["status"]) == {"EARLY_STOPPED"}
    for row, solution in zip(table, table.solutions):
        held_out = np.random.default_rng([row["seed"], 1]).choice(60, 18, replace=False)
        r = np.delete(operator.apply(solution.matrix()) - y, held_out)
        assert row["loss"] == pytest.approx(np.mean(r**2), rel=1e-9)
        assert solution.history["loss"][-1] < 0.99 * row["loss"]
    assert np.isnan(table["error"]).all() and table.group("seed")["runs"].tolist() == [0, 0, 0]


def test_symmetric_chains_and_rank_one_measurements():
    rng = np.random.default_rng(2)
    u = rng.standard_normal((6, 2))
    operator = fastdmf.RankOne(rng.standard_normal((80, 6)))
    table = sweep(
        (operator, operator.apply(u @ u.T), u @ u.T), seed=[1, 2], width=[3, 6], symmetric=True, init_scale=0.1
    )
    for row in table:
        single = fastdmf.solve(
            operator,
            operator.apply(u @ u.T),
            symmetric=True,
            width=row["width"],
            init_scale=0.1,
            random_state=row["seed"],
        )
        assert row["n_iter"] == single.n_iter
        assert row["error"] == np.sum((single.matrix() - u @ u.T) ** 2) / np.sum((u @ u.T) ** 2)


def test_float32():
    def single(seed):
        operator, y, truth = instance(seed)
        return operator, y.astype(np.float32), truth

    table = sweep(single, seed=range(3), keep="solutions", tol=1e-5)
    assert table.solutions[2].factors[0].dtype == np.float32
    assert set(table["status"]) == {"CONVERGED"}


# --- what shares a batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_parts_of_a_batch_are_bit_equal(batch_size, batches):
    settings = {"seed": range(7), "init_scale": [1e-3, 1e-2], "max_iter": 100, "tol": 1e-3}
    made = instance(0, n=40, count=500)
    table = sweep(made, batch_size=batch_size, **settings)
    assert {size for _, size in batches} == {1: {1}, 3: {2, 3}, None: {7}}[batch_size]
    same_rows(table, sweep(made, batch_size=2, **settings))


def test_what_shares_a_batch(batches):
    """The same operator with other data; small masks of one shape and dtype; nothing else."""
    operator, y, truth = dense()
    sweep(lambda scale: (operator, scale * y), scale=[1.0, 2.0, 3.0], max_iter=3)
    sweep(instance, seed=range(3), n=[20, 40], count=200, max_iter=3)  # 40 x 40 is above the limit
    sweep(instance, seed=range(3), max_iter=3, validation=0.2)  # whose draws the union would change
    assert [size for _, size in batches] == [3, 1, 1, 1, 3, 1, 1, 1]  # unions come last
    assert batches[0][0] is operator and batches[4][0].size > 200 and batches[1][0].size == 200
    twice = fastdmf.GaussianDense(operator.a.reshape(60, 8, 9).copy())
    sweep(lambda k: ((operator, twice)[k], y), k=[0, 1], max_iter=3)
    assert [one[0] for one in batches[-2:]] == [operator, twice]


def test_memory_bounds_a_batch(monkeypatch, batches):
    made = dense()
    whole = sweep(made, seed=range(5), max_iter=20)
    layout = sweeps.chain_layout(made[0].shape)
    budget(monkeypatch, memory=2.5 * sweeps._run_bytes(layout))
    parts = sweep(made, seed=range(5), max_iter=20)
    assert [size for _, size in batches] == [5, 2, 2, 1]
    np.testing.assert_allclose(whole["loss"], parts["loss"], rtol=1e-9)
    # Factors of auto's state alone: no less than is told.
    assert sweeps._run_bytes(layout) > 8 * 22 * layout.size


def test_instances_are_made_once_and_when_they_are_needed():
    events = []

    def counted(seed, count):
        events.append((seed, count))
        return instance(seed, count, n=40)

    sweep(
        counted,
        seed=[0, 1],
        depth=[2, 3],
        count=[300, 400],
        max_iter=3,
        n_jobs=1,
        callback=lambda done, total, row: events.append(done),
    )
    assert [e for e in events if isinstance(e, tuple)] == [(0, 300), (0, 400), (1, 300), (1, 400)]
    assert events[:4] == [(0, 300), (0, 400), 1, 2]  # the first is let go of when the second cannot join it


def test_values_go_to_whom_they_concern():
    """A keyword of both, a default of the instance, single values, arrays, and an axis of tuples."""
    seen = []

    def make(seed, dtype, share=0.5):
        seen.append((seed, dtype, share))
        operator, y, truth = instance(seed)
        return operator, y * share, truth

    table = sweep(
        make, seed=np.arange(2), dtype=["float32", "float64"], width=[(4, 5), None], max_iter=2, keep="solutions"
    )
    assert seen == [(0, "float32", 0.5), (0, "float64", 0.5), (1, "float32", 0.5), (1, "float64", 0.5)]
    assert [s.factors[0].dtype.name for s in table.solutions[::2]] == ["float32", "float64"] * 2
    assert table.solutions[0].factors[1].shape == (5, 4) and table.solutions[1].factors[1].shape == (20, 20)
    assert table["width"].tolist() == [(4, 5), None] * 4 and table["width"].dtype == object
    alone = sweep(dense(), max_iter=5)
    assert len(alone) == 1 and alone.axes == () and alone.columns[0] == "status"
    assert alone["loss"][0] == sweep(dense(), max_iter=5, seed=[0])["loss"][0]


# --- processes -------------------------------------------------------------------------------------------------------


def test_processes_change_no_bit():
    grid = {"seed": range(3), "depth": [2, 3], "init": ["gaussian", "balanced"], "n": [20, 40], "count": 200}
    settings = {"max_iter": 60, "keep": "histories", "track": "singular_values"}
    done = []
    there = sweep(instance, n_jobs=2, callback=lambda *now: done.append(now), **grid, **settings)
    here = sweep(instance, n_jobs=1, **grid, **settings)
    same_rows(here, there)
    for one, other in zip(here.histories, there.histories):
        for name in ("singular_values", "error"):
            np.testing.assert_array_equal(one[name], other[name])
    assert [now[0] for now in done] == list(range(1, 25)) and {now[1] for now in done} == {24}
    rows = {(r["seed"], r["depth"], r["init"], r["n"]): r["loss"] for _, _, r in done}
    assert len(rows) == 24 and rows[2, 3, "balanced", 40] == there["loss"][-1]


def test_processes_where_they_are_worth_it(monkeypatch):
    """Masks with enough left to do; never dense measurements, whose kernels use all cores."""
    grid = sweeps._Grid.of(instance, {"seed": range(4), "n": 40})
    mask = next(sweeps._batches(grid, None, None))
    gaussian = next(sweeps._batches(sweeps._Grid.of(dense(), {}), None, None))
    monkeypatch.setattr("joblib.effective_n_jobs", lambda n: 8 if n < 0 else n)
    assert sweeps._jobs(mask, None, 100, 0.5 * sweeps._WORTH) == 1
    assert sweeps._jobs(mask, None, 100, 2 * sweeps._WORTH) == 8
    assert sweeps._jobs(mask, None, 3, 2 * sweeps._WORTH) == 3
    assert sweeps._jobs(mask, 1, 100, 99.0) == 1 and sweeps._jobs(mask, 3, 100, 0.0) == 3
    assert sweeps._jobs(gaussian, None, 100, 99.0) == 1
    budget(monkeypatch, memory=2.5 * sweeps._run_bytes(mask.layout))
    assert sweeps._jobs(mask, None, 100, 99.0) == 2


def cpu_of_a_step(make, settings, **more):
    """Return microseconds of CPU time for each run and step: the least of three sweeps, after one to load kernels."""
    times = []
    for _ in range(4):
        begin = time.process_time()
        sweep(make, **settings, **more, n_jobs=1)
        times.append(time.process_time() - begin)
    return min(times[1:]) * 1e6 / (len(settings["seed"]) * settings["max_iter"])


def test_cost_of_batches(monkeypatch):
    """A run alone, in a batch of eight, and in a batch on the union of eight masks; -s prints all sizes."""
    budget(monkeypatch, union_cells=np.inf)
    for n, rule in itertools.product((10, 30, 50, 100), ("group_rmsprop", "auto")):
        settings = {"rule": rule, "max_iter": 100, "tol": 1e-30, "seed": range(8)}
        own = {"count": n * n // 4, "n": n}
        alone = cpu_of_a_step(instance(0, **own), settings, batch_size=1)
        together = cpu_of_a_step(instance(0, **own), settings, batch_size=8)
        union = cpu_of_a_step(instance, settings | own, batch_size=8)
        print(f"n = {n:3}, {rule:13}: {alone:6.1f} us alone, {together:6.1f} in a batch, {union:6.1f} on the union")
        if n == 10:
            assert together < 0.8 * alone and union < 0.8 * alone


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_control_c_keeps_what_has_ended(n_jobs):
    """From the keyboard while the second run's row is handed out; n = 40: every mask is a batch."""

    def interrupt(done, total, row):
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    table = sweep(
        instance, seed=range(5), n=40, count=300, max_iter=5, n_jobs=n_jobs, callback=interrupt, keep="histories"
    )
    ended = table["status"] == "MAX_ITER"
    assert ended.sum() == 2 and set(table["status"][~ended]) == {"INTERRUPTED"}
    assert np.isfinite(table["loss"][ended]).all() and table["n_iter"].tolist() == [5 * bool(e) for e in ended]
    for name in ("loss", "error", "rank", "seconds"):
        assert np.isnan(table[name][~ended]).all()
    assert [h is not None for h in table.histories] == ended.tolist()
    assert [len(s) for s in table.singular_values] == [40 * bool(e) for e in ended]


def test_control_c_within_a_batch(monkeypatch):
    """Runs of the batch that have ended by themselves count, the others do not."""

    def solve(operator, y, **settings):
        def interrupt(progress):
            if progress.iteration == 70:
                signal.raise_signal(signal.SIGINT)

        return fastdmf.solve(operator, y, callback=interrupt, **settings)

    monkeypatch.setattr(sweeps, "solve", solve)
    table = sweep(dense(), depth=[2, 3], init_scale=[1e-12, 0.3], tol=1e-3)
    assert table["status"].tolist() == ["INTERRUPTED", "CONVERGED", "INTERRUPTED", "INTERRUPTED"]
    assert np.isnan(table["loss"]).tolist() == [True, False, True, True]


def test_callback_ends_the_sweep():
    table = sweep(instance, seed=range(4), n=40, count=300, max_iter=5, n_jobs=1, callback=lambda done, *_: done == 3)
    assert table["status"].tolist() == ["MAX_ITER"] * 3 + ["STOPPED"]


def test_log(caplog):
    with caplog.at_level(logging.INFO, logger="fastdmf"):
        sweep(instance, seed=range(2), max_iter=5)
        assert not caplog.records
        sweep(instance, seed=range(2), n=[40], count=300, max_iter=5, verbose=1)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and lines[1].startswith("sweep: 2 of 2 runs; seed=1, n=40: MAX_ITER after 5 steps, loss ")


# --- the table -------------------------------------------------------------------------------------------------------

TABLE = SweepTable(
    {
        "count": [1, 1, 2, 2, 2],
        "rule": ["gd", GradientDescent(lr=0.5), "gd", "gd", "gd"],
        "seed": [0, 1, 0, 1, 2],
        "error": [1.0, 3.0, float("nan"), 0.25, 0.75],
    },
    axes=("count", "rule", "seed"),
    singular_values=list(range(5)),
    histories=list("abcde"),
)


def test_table_picks_rows():
    part = TABLE.where(count=2, rule="gd")
    assert part["seed"].tolist() == [0, 1, 2] and part.histories == list("cde") and part.singular_values == [2, 3, 4]
    assert part.solutions is None and part.axes == TABLE.axes
    assert TABLE.where(rule=GradientDescent(lr=0.5))["error"].tolist() == [3.0]
    assert len(TABLE.where(count=7)) == 0 and TABLE.where(count=7)["error"].shape == (0,)
    assert next(iter(TABLE)) == {"count": 1, "rule": "gd", "seed": 0, "error": 1.0}
    with pytest.raises(KeyError, match="no column 'depth'; there are count, rule, seed, error"):
        TABLE.where(depth=3)


def test_table_groups():
    groups = TABLE.group(["count"])
    assert groups.columns == ("count", "median", "min", "max", "runs") and groups.axes == ("count",)
    assert groups["median"].tolist() == [2.0, 0.5] and groups["min"].tolist() == [1.0, 0.25]
    assert groups["max"].tolist() == [3.0, 0.75] and groups["runs"].tolist() == [2, 2]
    assert TABLE.group().columns[:2] == ("count", "rule") and len(TABLE.group()) == 3
    assert TABLE.group("seed", "count")["max"].tolist() == [2, 2, 2]
    assert next(iter(TABLE.group([], "count"))) == {"median": 2.0, "min": 1, "max": 2, "runs": 5}
    lost = TABLE.where(seed=0, count=2).group("count")
    assert np.isnan(lost["median"]).all() and lost["runs"].tolist() == [0]
    with pytest.raises(TypeError, match="value must be a column of numbers, 'rule' holds 'gd'"):
        TABLE.group("count", "rule")
    with pytest.raises(KeyError, match="no column 'depth'"):
        TABLE.group("depth")
    with pytest.raises(ValueError, match=r"by holds \['runs'\], names of the new columns: median, min, max, runs"):
        groups.group("runs", "median")


def test_table_leaves(tmp_path, monkeypatch):
    TABLE.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["error"]) for row in rows][3:] == [0.25, 0.75] and rows[1]["rule"] == "GradientDescent(lr=0.5)"
    frame = TABLE.to_pandas()
    assert list(frame.columns) == list(TABLE.columns) and frame["error"].median() == 0.875
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_pandas needs pandas \(pip install pandas\)"):
        TABLE.to_pandas()


def test_table_prints():
    assert str(TABLE.where(count=1)).splitlines() == [
        "count                     rule  seed  error",
        "    1                       gd     0      1",
        "    1  GradientDescent(lr=0.5)     1      3",
    ]
    many = SweepTable({"seed": range(100)})
    lines = repr(many).splitlines()
    assert len(lines) == 42 and lines[-1] == "... and 60 more of 100 rows"


# --- wrong arguments -------------------------------------------------------------------------------------------------


def test_names_are_the_functions():
    assert fastdmf.sweep is sweep and fastdmf.SweepTable is SweepTable
    assert fastdmf.sweeps is sweeps  # the module has a name of its own


@pytest.mark.parametrize(
    ("make", "grid", "error", "match"),
    [
        (
            instance,
            {"counts": [3]},
            TypeError,
            "'counts' is neither an axis .* and the instance takes seed, count, n: an",
        ),
        (dense(), {"count": [3]}, TypeError, "'count' is neither .* takes no keywords: .* function that names it"),
        (instance, {"depth": []}, ValueError, "depth is empty"),
        (instance, {"seed": range(0)}, ValueError, "seed is empty"),
        (instance, {"seed": [None]}, ValueError, "seed must hold integers >= 0, got None"),
        (instance, {"seed": [0, -1]}, ValueError, "must hold integers >= 0, got -1"),
        (instance, {"init": ["zero"]}, ValueError, "init must be one of .* got 'zero'"),
        (instance, {"init_scale": [1e-3, 0]}, ValueError, "init_scale must be a number > 0, got 0"),
        (instance, {"l2": [-1.0]}, ValueError, "l2 must be a number >= 0"),
        (instance, {"rule": ["sgd"]}, ValueError, "rule must be one of"),
        (instance, {"depth": [2, 0]}, ValueError, "at depth=0: depth must be an integer >= 1"),
        (
            instance,
            {"seed": [4], "width": [(3,)]},
            ValueError,
            r"at seed=4, width=\(3,\): width must hold depth - 1 = 2",
        ),
        (instance, {"seed": [4], "loss": "rmse"}, ValueError, "at seed=4: loss must be one of"),
        (instance, {"weights": np.ones((2, 150))}, ValueError, r"weights must have shape \(m,\)"),
        (instance, {"count": [[1, 2]]}, TypeError, "count holds a list"),
        (lambda rank: dense(), {"rank": [1, 2]}, ValueError, "the table has a column 'rank' of its own"),
        (
            lambda seed, count: dense(),
            {},
            TypeError,
            r"the instance takes count, which .* not given: add count=\[...\]",
        ),
        (pow, {}, TypeError, "the instance takes base, which sweep was not given"),
        (len, {}, TypeError, "instance is called with keywords, its argument 'obj' takes none"),
        (7, {}, TypeError, r"instance must be \(operator, y\), .* got int"),
        (lambda seed: None, {"seed": [5]}, TypeError, r"instance\(seed=5\) must be \(operator, y\) or .* got NoneType"),
        (lambda: dense()[:1], {}, TypeError, r"instance\(\) must be .* got 1 items"),
        ((np.eye(3), np.ones(3)), {}, TypeError, "instance: operator must be a fastdmf operator"),
        ((dense()[0], np.ones(4)), {}, ValueError, "instance: y has 4 measurements, the operator 60"),
        ((dense()[0], np.ones((2, 60))), {}, ValueError, "instance: y must have 1 dimensions"),
        ((dense()[0], np.full(60, np.nan)), {}, ValueError, "instance: y contains NaN"),
        ((*dense()[:2], np.ones((9, 8))), {}, ValueError, r"instance: truth has shape"),
        ((*dense()[:2], np.zeros((8, 9))), {}, ValueError, "instance: truth is zero everywhere"),
        (instance, {"truth": np.ones((20, 20))}, TypeError, r"sweep takes no truth: let the instance return"),
        (instance, {"random_state": 3}, TypeError, "sweep takes no random_state: use seed"),
        (instance, {"factors": []}, TypeError, "sweep takes no factors"),
        (instance, {"checkpoint": "f"}, TypeError, "sweep takes no checkpoint: let callback store"),
        (instance, {"on_failure": "warn"}, TypeError, "sweep takes no on_failure"),
        (instance, {"n_jobs": 0}, ValueError, "n_jobs must be None or an integer other than 0, got 0"),
        (instance, {"n_jobs": 1.5}, ValueError, "n_jobs must be"),
        (instance, {"batch_size": 0}, ValueError, "batch_size must be an integer >= 1"),
        (instance, {"keep": "all"}, ValueError, "keep must be None, 'histories' or 'solutions', got 'all'"),
        (instance, {"callback": 3}, TypeError, "callback must be callable"),
        (instance, {"track": "nuclear_norm"}, ValueError, "track .* keep='histories'"),
    ],
)
def test_wrong_arguments(make, grid, error, match):
    with pytest.raises(error, match=match):
        sweep(make, **{"max_iter": 2, **grid})


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_run_that_is_refused_is_named(n_jobs):
    """In a batch with others, here and in a worker."""
    kept = []
    with pytest.raises(ValueError, match=r"^at seed=0, init_scale=1e-300: the start cannot move.*init_scale=1e-300"):
        sweep(
            instance,
            depth=3,
            seed=[0],
            init_scale=[1e-2, 1e-300],
            rule="gd",
            max_iter=2,
            n_jobs=n_jobs,
            callback=lambda *now: kept.append(now),
        )
    assert not kept
    linear = as_operator(np.random.default_rng(0).standard_normal((10, 6)), (2, 3))
    assert sweep((linear, np.ones(10)), max_iter=2, n_jobs=n_jobs)["n_iter"][0] == 2
