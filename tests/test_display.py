"""Displays: what is drawn is what was given, missing numbers are left out, wrong input is told."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

import fastdmf
from fastdmf import (
    DMFImputer,
    EffectiveRankDisplay,
    ErrorDisplay,
    InpaintingDisplay,
    PhaseTransitionDisplay,
    SingularValuesDisplay,
)

matplotlib = pytest.importorskip("matplotlib", reason="the displays draw with matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

TRACK = ("singular_values", "effective_rank")
SCALES = {"init_scale": (1e-3, 1e-2, 1e-1), "measurements": (50, 60, 70)}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def draw(display):
    """Render the whole picture: what is wrong with texts or scales warns only here, and warnings are errors."""
    display.figure_.canvas.draw()
    return display


@pytest.fixture(scope="module")
def instance():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((14, 2)) @ rng.standard_normal((2, 12))
    rows, cols = np.divmod(rng.choice(168, 110, replace=False), 12)
    return truth, fastdmf.EntryMask(rows, cols, truth.shape), truth[rows, cols]


@pytest.fixture(scope="module")
def batch(instance):
    """Three runs that end at different records."""
    truth, mask, y = instance
    options = {"track": TRACK, "truth": truth, "random_state": [0, 1, 2], "max_iter": 150, "on_failure": "ignore"}
    solution = fastdmf.solve(mask, y, **options)
    assert np.isnan(solution.history["error"]).any()
    return solution


@pytest.fixture
def single(batch):
    return batch[1]


def table(n_seeds=3):
    """Errors and ranks of two methods, three depths, three scales, ``n_seeds`` seeds, in no order."""
    rng = np.random.default_rng(1)
    names = ("method", "depth", "init_scale", "seed")
    rows = [
        (m, d, a, s) for m in ("gd", "auto") for d in (10, 2, 3) for a in SCALES["init_scale"] for s in range(n_seeds)
    ]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    columns = {name: np.array(column) for name, column in zip(names, zip(*rows))}
    columns["error"] = 10 ** rng.uniform(-6, 0, len(rows))
    columns["effective_rank"] = rng.uniform(1, 5, len(rows))
    return columns


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# --- singular values -------------------------------------------------------------------------------------------------


def test_singular_values_are_drawn_as_they_are(single, instance):
    truth, *_ = instance
    display = draw(SingularValuesDisplay.from_solution(single, truth=truth).plot())
    assert len(display.lines_) == 10
    for k, line in enumerate(display.lines_):
        np.testing.assert_array_equal(line.get_xdata(), single.history["iteration"])
        np.testing.assert_array_equal(line.get_ydata(), single.history["singular_values"][:, k])
    heights = [line.get_ydata()[0] for line in display.truth_lines_]
    np.testing.assert_allclose(heights, np.linalg.svd(truth, compute_uv=False)[:2])
    assert {line.get_linestyle() for line in display.truth_lines_} == {"--"}
    assert (display.ax_.get_xlabel(), display.ax_.get_ylabel()) == ("iteration", "singular value")
    assert (display.ax_.get_xscale(), display.ax_.get_yscale()) == ("linear", "log")
    assert labels(display.ax_) == ["$\\sigma_{1}$", "$\\sigma_{2}$", "$\\sigma_{3}$ to $\\sigma_{10}$", "truth"]
    colors = [line.get_color() for line in display.lines_]
    assert len(set(colors[:2])) == 2 and set(colors[2:]) == {"0.75"}


@pytest.mark.parametrize("given", [[1.0, 0.5, 2.0], np.diag([0.5, 2.0, 1.0, 0.0])], ids=["values", "matrix"])
def test_true_singular_values_from_values_or_the_matrix(single, given):
    display = SingularValuesDisplay.from_solution(single, truth=given).plot(yscale="linear")
    np.testing.assert_allclose([line.get_ydata()[0] for line in display.truth_lines_], [2, 1, 0.5])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_rounding_in_the_truth_is_no_rank(single, dtype):
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((100, 5)).astype(dtype) @ rng.standard_normal((5, 100)).astype(dtype)
    assert len(SingularValuesDisplay.from_solution(single, truth=truth).truth) == 5


def test_one_run_of_a_batch(batch):
    display = SingularValuesDisplay.from_solution(batch, run=2).plot(yscale="linear", linestyle=":")
    np.testing.assert_array_equal(display.singular_values, batch[2].history["singular_values"])
    np.testing.assert_array_equal(display.iteration, batch[2].history["iteration"])
    assert {line.get_linestyle() for line in display.lines_} == {":"}
    assert display.ax_.get_yscale() == "linear"


def test_top_singular_values_serve_as_well(single):
    history = {"iteration": np.arange(2), "top_singular_values": np.array([[2.0, 1.0], [3.0, np.nan]])}
    display = SingularValuesDisplay.from_history(history)
    np.testing.assert_array_equal(display.singular_values, [[2, 1]])
    both = history | {"singular_values": np.array([[5.0], [4.0]])}
    np.testing.assert_array_equal(SingularValuesDisplay.from_history(both).singular_values, [[5], [4]])


def test_the_colours_of_many_true_values_differ():
    history = {"iteration": np.arange(3), "singular_values": np.tile(np.arange(10.0, 0, -1), (3, 1))}
    display = draw(SingularValuesDisplay.from_history(history, truth=np.arange(1.0, 21)).plot())
    assert len({tuple(line.get_color()) for line in display.lines_}) == 10
    assert len(display.truth_lines_) == 10  # no more than are drawn


def test_rounding_does_not_stretch_the_axis():
    history = {"iteration": np.arange(2), "singular_values": np.array([[1.0, 1e-40], [4.0, 0.0]])}
    display = draw(SingularValuesDisplay.from_history(history).plot())
    assert display.ax_.get_ylim()[0] == pytest.approx(4e-15, abs=0)


def test_time_of_the_flow(instance):
    _, mask, y = instance
    options = {"rule": "flow", "max_iter": 20, "track": TRACK, "on_failure": "ignore"}
    run = fastdmf.solve(mask, y, random_state=0, **options)
    display = SingularValuesDisplay.from_solution(run, x="time").plot()
    np.testing.assert_array_equal(display.lines_[0].get_xdata(), run.history["time"])
    assert display.ax_.get_xlabel() == "time $t$"
    runs = fastdmf.solve(mask, y, random_state=[0, 1], **options)
    with pytest.raises(ValueError, match="history\\['time'\\] differs from run to run .* choose one with run="):
        EffectiveRankDisplay.from_solution(runs, x="time")
    curve = EffectiveRankDisplay.from_solution(runs, x="time", run=1).curves[0]
    np.testing.assert_array_equal(curve.x, runs.history["time"][:, 1])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda s: SingularValuesDisplay.from_history({"loss": [1]}),
            ValueError,
            'track=("singular_values",) is needed',
        ),
        (lambda s: EffectiveRankDisplay.from_history({"loss": [1]}), ValueError, 'track=("effective_rank",) is needed'),
        (lambda s: ErrorDisplay.from_history({"loss": [1]}), ValueError, "only loss: fastdmf.solve records .* truth="),
        (lambda s: SingularValuesDisplay.from_history(s), TypeError, "dict of arrays, .* got Solution"),
        (lambda s: ErrorDisplay.from_solution(s.history), TypeError, "what fastdmf.solve returns, got dict"),
        (lambda s: SingularValuesDisplay.from_solution(s), ValueError, "3 runs: choose one with run=0 to run=2"),
        (lambda s: SingularValuesDisplay.from_solution(s, run=3), ValueError, "run=3 is not there: history holds 3"),
        (lambda s: SingularValuesDisplay.from_solution(s, run=-1), ValueError, "run must be an integer >= 0, got -1"),
        (lambda s: SingularValuesDisplay.from_solution(s[0], run=0), ValueError, "run=0 is for a batch"),
        (lambda s: ErrorDisplay.from_solution(s[0], run=0), ValueError, "run=0 is for a batch"),
        (lambda s: ErrorDisplay.from_solution(s, run=3), ValueError, "run=3 is not there"),
        (lambda s: ErrorDisplay.from_solution(s[0], x="when"), ValueError, "no 'when', .* x names what"),
        (lambda s: ErrorDisplay.from_solution(s[0], x="singular_values"), ValueError, "not one number a record"),
        (lambda s: SingularValuesDisplay.from_solution(s[0], truth=[np.inf]), ValueError, "truth contains"),
        (lambda s: SingularValuesDisplay.from_solution(s[0], truth=np.zeros((2, 2))), ValueError, "truth is zero"),
        (lambda s: EffectiveRankDisplay.from_solution(s[0], truth=0), ValueError, "truth must be a number > 0, got 0"),
        (lambda s: ErrorDisplay.from_history({"error": [np.nan], "iteration": [0]}), ValueError, "no finite number"),
    ],
)
def test_wrong_histories(batch, call, error, text):
    with pytest.raises(error, match=text.replace("(", "\\(").replace(")", "\\)")):
        call(batch)


def test_estimators_say_that_they_record_no_singular_values():
    X = np.random.default_rng(0).standard_normal((8, 4))
    X[0, 0] = np.nan
    history = DMFImputer(random_state=0).fit(X).history_
    with pytest.raises(ValueError, match="the estimators do not"):
        SingularValuesDisplay.from_history(history)


# --- curves against the iteration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [(ErrorDisplay, "error"), (EffectiveRankDisplay, "effective_rank")])
def test_a_history_as_one_curve(single, kind, name):
    display = draw(kind.from_solution(single, name="depth 3").plot(linewidth=3))
    (line,) = display.lines_
    np.testing.assert_array_equal(line.get_xdata(), single.history["iteration"])
    np.testing.assert_array_equal(line.get_ydata(), single.history[name])
    assert line.get_linewidth() == 3 and display.bands_ == []
    assert display.ax_.get_yscale() == ("log" if kind is ErrorDisplay else "linear")
    assert display.ax_.get_ylabel() == display.ylabel
    assert display.ax_.get_legend() is None  # nothing to tell apart


def test_a_batch_is_its_median_and_range_and_ended_runs_keep_their_value(batch):
    values = batch.history["error"].copy()
    for b in range(3):
        values[len(batch[b].history["error"]) :, b] = batch[b].history["error"][-1]
    display = draw(ErrorDisplay.from_solution(batch).plot())
    np.testing.assert_array_equal(display.lines_[0].get_ydata(), np.median(values, axis=1))
    np.testing.assert_array_equal(display.curves[0].low, values.min(axis=1))
    np.testing.assert_array_equal(display.curves[0].high, values.max(axis=1))
    assert display.ax_.get_ylabel().endswith("\n(median and range over runs)")
    curve = ErrorDisplay.from_solution(batch, run=0).curves[0]
    np.testing.assert_array_equal(curve.median, batch[0].history["error"])
    assert not curve.spread


def test_displays_share_axes(batch):
    _, axes = plt.subplots(1, 2, layout="constrained")
    for b in range(3):
        display = ErrorDisplay.from_solution(batch[b], name=f"seed {b}").plot(axes[1])
        assert display.ax_ is axes[1] and display.figure_ is axes[1].figure
    draw(display)
    assert not axes[0].lines and plt.get_fignums() == [1]
    assert labels(axes[1]) == ["seed 0", "seed 1", "seed 2"]
    assert len({line.get_color() for line in axes[1].lines}) == 3
    legend, box = axes[1].get_legend().get_window_extent(), axes[1].get_window_extent()
    assert legend.x0 >= box.x1


def test_labels_that_are_there_stay(single):
    ax = plt.subplots()[1]
    ax.set_ylabel("mine")
    ErrorDisplay.from_solution(single).plot(ax)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("iteration", "mine")


@pytest.mark.parametrize("given", ["number", "values", "matrix"])
def test_effective_rank_of_the_truth(single, instance, given):
    s = np.linalg.svd(instance[0], compute_uv=False)[:2]
    p = s / s.sum()
    expected = np.exp(-np.sum(p * np.log(p)))
    truth = {"number": expected, "values": s, "matrix": instance[0]}[given]
    display = draw(EffectiveRankDisplay.from_solution(single, name="run", truth=truth).plot())
    np.testing.assert_allclose(display.truth_line_.get_ydata(), expected)
    assert labels(display.ax_) == ["run", "truth"]


# --- curves from tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "value"), [(ErrorDisplay, "error"), (EffectiveRankDisplay, "effective_rank")])
@pytest.mark.parametrize("make", [dict, pd.DataFrame, pl.DataFrame], ids=["dict", "pandas", "polars"])
def test_a_table_gives_a_curve_for_each_depth(kind, value, make):
    columns = table()
    display = draw(kind.from_table(make(columns)).plot())
    assert labels(display.ax_) == ["depth 2", "depth 3", "depth 10"]
    assert [len(display.lines_), len(display.bands_)] == [3, 3]
    for line, band, depth in zip(display.lines_, display.bands_, (2, 3, 10)):
        expected = []
        for scale in SCALES["init_scale"]:
            runs = columns[value][(columns["depth"] == depth) & (columns["init_scale"] == scale)]
            assert len(runs) == 6
            expected.append((np.median(runs), runs.min(), runs.max()))
        median, low, high = np.transpose(expected)
        np.testing.assert_array_equal(line.get_xdata(), SCALES["init_scale"])
        np.testing.assert_array_equal(line.get_ydata(), median)
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
        assert corners == set(zip(SCALES["init_scale"], low)) | set(zip(SCALES["init_scale"], high))
        assert line.get_marker() != "None"
    assert len({line.get_color() for line in display.lines_}) == 3
    assert len({line.get_marker() for line in display.lines_}) == 3
    assert display.ax_.get_xscale() == "log"
    assert display.ax_.get_xlabel() == "init scale $\\alpha$"


def test_groups_by_several_columns_and_by_none():
    columns = table()
    columns["measurements"] = np.array(
        [SCALES["measurements"][SCALES["init_scale"].index(a)] for a in columns["init_scale"]]
    )
    display = draw(ErrorDisplay.from_table(columns, x="measurements", by=("method", "depth")).plot())
    first = list(dict.fromkeys(zip(columns["method"], columns["depth"])))
    assert labels(display.ax_) == [f"{method}, depth {depth}" for method, depth in first]
    assert display.ax_.get_xscale() == "linear"
    assert display.ax_.get_xlabel() == "number of measurements $m$"
    method, depth = first[1]
    mine = (columns["method"] == method) & (columns["depth"] == depth) & (columns["measurements"] == 60)
    assert display.lines_[1].get_ydata()[1] == np.median(columns["error"][mine])

    (curve,) = ErrorDisplay.from_table(columns, by=None, ylabel="RMSE [m]").curves
    assert curve.label is None
    assert curve.high[0] == columns["error"][columns["init_scale"] == 1e-3].max()
    assert ErrorDisplay.from_table(columns, by=None, ylabel="RMSE [m]").plot().ax_.get_ylabel().startswith("RMSE [m]\n")


def test_a_sweep_is_a_table(instance):
    truth, mask, y = instance
    swept = fastdmf.sweep((mask, y, truth), seed=[0, 1], depth=[2, 3], init_scale=[1e-2, 1e-1], max_iter=30)
    display = draw(ErrorDisplay.from_table(swept).plot())
    assert labels(display.ax_) == ["depth 2", "depth 3"]
    expected = np.median(swept.where(depth=3, init_scale=0.1)["error"])
    assert display.lines_[1].get_ydata()[1] == expected
    with pytest.raises(ValueError, match="no column 'count', only .*depth.*effective_rank"):
        ErrorDisplay.from_table(swept, x="count")


def test_missing_numbers_are_left_out():
    columns = {
        "init_scale": [0.1, 0.1, 0.1, 0.2, 0.3, np.nan, 0.1],
        "depth": [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, np.nan],
        "error": [1.0, np.nan, 3.0, np.nan, np.inf, 5.0, 9.0],
    }
    (curve,) = ErrorDisplay.from_table(columns).curves
    assert curve.label == "depth 2"
    assert [curve.x.tolist(), curve.median.tolist(), curve.low.tolist(), curve.high.tolist()] == [[0.1], [2], [1], [3]]
    frame = pd.DataFrame({"init_scale": [0.1, 0.2], "depth": [2, 2], "error": pd.array([1, None], "Int64")})
    assert ErrorDisplay.from_table(frame).curves[0].x.tolist() == [0.1]


def test_labels_that_read_alike_keep_their_curves():
    columns = {"init_scale": [1.0, 1.0], "lr": [0.1, 0.1 + 1e-12], "error": [1.0, 2.0]}
    assert [c.median.tolist() for c in ErrorDisplay.from_table(columns, by="lr").curves] == [[1], [2]]


def test_errors_of_zero_get_a_linear_axis():
    columns = {"init_scale": [1.0, 2.0], "depth": [2, 2], "error": [0.0, 0.0]}
    display = draw(ErrorDisplay.from_table(columns).plot())
    assert display.ax_.get_yscale() == "linear" and display.bands_ == []


@pytest.mark.parametrize("kind", [ErrorDisplay, PhaseTransitionDisplay])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"b": None}, "table has no column 'b', only a, c"),
        ({"a": [], "b": [], "c": []}, "table is empty"),
        ({"c": [1.0]}, "columns of different lengths: .*'c': 1"),
        ({"c": ["low", "high"]}, "table\\['c'\\] must hold numbers: .*low"),
        ({"c": [[1.0], [2.0]]}, "table\\['c'\\] must be one value a row, got shape \\(2, 1\\)"),
        ({"c": [np.nan, np.nan]}, "no finite number|no row with"),
    ],
)
def test_wrong_tables(kind, change, text):
    columns = {"a": [1.0, 2.0], "b": [1, 1], "c": [0.1, 0.2]} | change
    columns = {name: values for name, values in columns.items() if values is not None}
    rest = {"by": "b"} if kind is ErrorDisplay else {"y": "b", "threshold": 0.15}
    with pytest.raises(ValueError, match=text):
        kind.from_table(columns, x="a", value="c", **rest)


def test_error_has_no_truth_line():
    with pytest.raises(TypeError, match="truth"):
        ErrorDisplay.from_table(table(), truth=1.0)


# --- phase transitions -----------------------------------------------------------------------------------------------


def trials():
    """A grid of 4 x 3 cells with three runs each but for one cell without, in no order."""
    rng = np.random.default_rng(2)
    rows = [(m, r) for m in (40, 10, 20, 30) for r in (1, 2, 5) for _ in range(3) if (m, r) != (10, 5)]
    m, r = np.array(rows)[rng.permutation(len(rows))].T
    return {"measurements": m, "rank": r, "error": rng.random(len(m))}


@pytest.mark.parametrize("boolean", [False, True])
def test_the_map_is_the_share_of_successes(boolean):
    columns = trials()
    if boolean:
        columns["error"] = columns["error"] <= 0.4
        display = PhaseTransitionDisplay.from_table(columns)
    else:
        columns["error"][0] = np.inf  # a failure
        display = PhaseTransitionDisplay.from_table(pd.DataFrame(columns), threshold=0.4)
    draw(display.plot())
    expected = np.full((3, 4), np.nan)
    for i, r in enumerate((1, 2, 5)):
        for j, m in enumerate((10, 20, 30, 40)):
            runs = columns["error"][(columns["rank"] == r) & (columns["measurements"] == m)]
            if len(runs):
                expected[i, j] = np.mean(runs if boolean else runs <= 0.4)
    assert 0 < np.nanmean(expected) < 1
    np.testing.assert_allclose(display.rates, expected, rtol=1e-15)
    drawn = display.mesh_.get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn), np.isnan(expected))
    np.testing.assert_allclose(drawn.filled(np.nan), expected, rtol=1e-15)
    corners = display.mesh_.get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [5, 15, 25, 35, 45])
    np.testing.assert_allclose(corners[:, 0, 1], [0.5, 1.5, 3.5, 6.5])
    assert display.mesh_.get_clim() == (0, 1)
    ax = display.ax_
    assert [text.get_text() for text in ax.get_xticklabels()] == ["10", "20", "30", "40"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["1", "2", "5"]
    np.testing.assert_array_equal(ax.get_xticks(), [10, 20, 30, 40])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("number of measurements $m$", "rank")
    text = "success rate" if boolean else "success rate (error $\\leq$ 0.4)"
    assert display.colorbar_.ax.get_ylabel() == text
    assert display.theory_line_ is None and ax.get_legend() is None


def test_theory_is_drawn_over_the_map_of_given_axes():
    ax = plt.subplots(layout="constrained")[1]
    r = np.linspace(1, 5, 7)
    theory = (r * (12 - r), r)
    display = PhaseTransitionDisplay.from_table(trials(), threshold=0.4, theory=theory, theory_label="m = r (12 - r)")
    draw(display.plot(ax, colorbar=False, cmap="gray"))
    assert display.ax_ is ax and display.colorbar_ is None and display.mesh_.get_cmap().name == "gray"
    np.testing.assert_array_equal(display.theory_line_.get_data(), theory)
    assert labels(ax) == ["m = r (12 - r)"]
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1
    assert (ax.get_xlim(), ax.get_ylim()) == ((5, 45), (0.5, 6.5))


def test_cells_of_a_geometric_grid_have_one_size_and_few_labels():
    sizes, ranks = 2.0 ** np.arange(12), np.arange(1, 41)
    columns = {"n": np.tile(sizes, 40), "rank": np.repeat(ranks, 12), "success": np.arange(480) % 2 == 0}
    display = draw(PhaseTransitionDisplay.from_table(columns, x="n", value="success").plot())
    assert (display.ax_.get_xscale(), display.ax_.get_yscale()) == ("log", "linear")
    edges = display.mesh_.get_coordinates()[0, :, 0]
    np.testing.assert_allclose(edges[1:] / edges[:-1], 2)
    np.testing.assert_allclose(edges[0], 2**-0.5)
    assert [text.get_text() for text in display.ax_.get_yticklabels()] == [str(r) for r in ranks[::4]]


def test_a_map_of_one_cell():
    columns = {"measurements": [7, 7], "rank": [2, 2], "error": [1.0, np.nan]}
    display = draw(PhaseTransitionDisplay.from_table(columns, threshold=2).plot())
    assert display.rates.tolist() == [[1.0]]
    np.testing.assert_array_equal(display.mesh_.get_coordinates()[0, :, 0], [6.5, 7.5])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "table\\['error'\\] holds numbers, not successes: pass threshold="),
        ({"threshold": 0}, "threshold must be a number > 0, got 0"),
        ({"threshold": 0.1, "theory": ([1, 2], [1])}, "theory must be \\(x, y\\), two lists of one length"),
        ({"threshold": 0.1, "theory": ([1], [1], [1])}, "theory must be \\(x, y\\), two lists of one length"),
    ],
)
def test_wrong_maps(options, text):
    with pytest.raises(ValueError, match=text):
        PhaseTransitionDisplay.from_table(trials(), **options)


def test_successes_take_no_threshold():
    columns = trials() | {"success": trials()["error"] < 0.5}
    with pytest.raises(ValueError, match="table\\['success'\\] holds successes already"):
        PhaseTransitionDisplay.from_table(columns, value="success", threshold=0.5)


# --- inpainting ------------------------------------------------------------------------------------------------------


def picture(seed=0):
    """A truth with a hole of its own, what is observed of it, and two ways to fill the rest."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(3, 9, (6, 8))
    hidden = rng.random(truth.shape) < 0.4
    truth[hidden.nonzero()[0][0], hidden.nonzero()[1][0]] = np.nan
    observed = np.where(hidden, np.nan, truth)
    filled = {name: np.where(hidden, c + rng.random(truth.shape), observed) for name, c in (("low", 2), ("high", 11))}
    return truth, observed, filled, hidden & ~np.isnan(truth)


def test_panels_hold_what_was_given():
    truth, observed, filled, known = picture()
    display = draw(InpaintingDisplay(observed, filled, truth=truth).plot(errors=True, label="height", unit="m"))
    misses = {name: (each - truth)[known] for name, each in filled.items()}
    assert display.errors == {name: pytest.approx(np.sqrt(np.mean(miss**2))) for name, miss in misses.items()}
    expected = [truth, observed, *filled.values(), *(each - truth for each in filled.values())]
    assert len(display.axes_) == len(display.images_) == 6
    for axis, image, values in zip(display.axes_, display.images_, expected):
        assert image.axes is axis
        np.testing.assert_array_equal(image.get_array().filled(np.nan), values)
        assert not axis.get_xticks().size
    assert {image.get_clim() for image in display.images_[:4]} == {(np.nanmin(truth), np.nanmax(truth))}
    limit = np.quantile(np.abs(list(misses.values())), 0.99)
    np.testing.assert_allclose([image.get_clim() for image in display.images_[4:]], [(-limit, limit)] * 2)
    shown = [axis.get_title() for axis in display.axes_]
    share = f"{np.isnan(observed).mean():.0%}"
    errors = [f"{name}\nRMSE {display.errors[name]:.3g} m" for name in ("low", "high")]
    assert shown == ["truth", f"observed ({share} hidden)", *errors, *["error: filled - truth"] * 2]
    assert [bar.ax.get_ylabel() for bar in display.colorbars_] == ["height [m]", "error [m]"]
    top, bottom = (display.axes_[k].get_position() for k in (2, 4))
    assert top.x0 == pytest.approx(bottom.x0) and top.y0 > bottom.y1  # each error below what was filled in


def test_without_truth_the_colours_are_those_of_what_was_observed():
    _, observed, filled, _ = picture()
    display = draw(InpaintingDisplay(np.ma.masked_invalid(observed), filled).plot(cmap="gray"))
    assert display.errors == {} and len(display.images_) == 3
    assert {image.get_clim() for image in display.images_} == {(np.nanmin(observed), np.nanmax(observed))}
    assert [axis.get_title() for axis in display.axes_[1:]] == ["low", "high"]
    assert {image.get_cmap().name for image in display.images_} == {"gray"}
    assert display.colorbars_[0].ax.get_ylabel() == ""


def test_given_axes():
    truth, observed, filled, _ = picture()
    figure, grid = plt.subplots(2, 2, layout="constrained")
    display = InpaintingDisplay(observed, filled, truth=truth)
    draw(display.plot(grid))
    assert display.axes_ == list(grid.ravel()) and display.figure_ is figure
    with pytest.raises(ValueError, match="ax holds 1 axes for 6 panels"):
        display.plot(grid[0, 0], errors=True)
    assert plt.get_fignums() == [1]


def test_a_long_table_fills_its_panel():
    observed = np.full((400, 3), 2.0)
    observed[::2, 1] = np.nan
    display = draw(InpaintingDisplay(observed, {"mean": np.full((400, 3), 2.0)}).plot())
    box = display.axes_[0].get_window_extent()
    assert box.height < 3 * box.width


@pytest.mark.parametrize("marker", [np.nan, -1])
def test_from_a_fitted_imputer(marker):
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((20, 2)) @ rng.standard_normal((2, 9)) + 5
    hidden = rng.random(truth.shape) < 0.2
    X = pd.DataFrame(np.where(hidden, marker, truth))
    imputer = DMFImputer(random_state=0, missing_values=marker).fit(X)
    display = draw(InpaintingDisplay.from_estimator(imputer, X, truth=truth).plot())
    filled = imputer.transform(X)
    np.testing.assert_array_equal(display.observed, np.where(hidden, np.nan, truth))
    np.testing.assert_array_equal(display.images_[2].get_array(), filled)
    assert display.errors == {"DMFImputer": pytest.approx(np.sqrt(np.mean((filled - truth)[hidden] ** 2)))}
    named = InpaintingDisplay.from_estimator(imputer, X, name="ours")
    assert list(named.filled) == ["ours"] and named.truth is None


def test_an_imputer_that_changes_the_shape_is_told():
    X = np.random.default_rng(0).standard_normal((9, 4))
    X[0, 0] = np.nan
    imputer = DMFImputer(random_state=0, add_indicator=True).fit(X)
    with pytest.raises(ValueError, match="filled\\['DMFImputer'\\] has shape \\(9, 5\\), observed \\(9, 4\\)"):
        InpaintingDisplay.from_estimator(imputer, X)


ONES, HOLES = np.ones((2, 3)), np.array([[1.0, np.nan, 1], [1, 1, 1]])


@pytest.mark.parametrize(
    ("observed", "filled", "truth", "error", "text"),
    [
        (HOLES, ONES, None, TypeError, "filled must be a dict of name -> matrix, got ndarray"),
        (HOLES, {}, None, TypeError, "filled must be a dict"),
        (HOLES, {"a": ONES.T}, None, ValueError, "filled\\['a'\\] has shape \\(3, 2\\), observed \\(2, 3\\)"),
        (HOLES, {"a": HOLES}, None, ValueError, "filled\\['a'\\] still has 1 holes"),
        (HOLES, {"a": ONES}, ONES[0], ValueError, "truth must be a matrix, got shape \\(3,\\)"),
        (HOLES, {"a": ONES}, HOLES, ValueError, "hides no entry whose truth is known"),
        (HOLES * np.nan, {"a": ONES}, None, ValueError, "observed has no entry"),
        (HOLES * np.inf, {"a": ONES}, None, ValueError, "observed holds infinite values"),
        (HOLES + 1j, {"a": ONES}, None, TypeError, "observed must hold real numbers, got dtype complex128"),
    ],
)
def test_wrong_pictures(observed, filled, truth, error, text):
    with pytest.raises(error, match=text):
        InpaintingDisplay(observed, filled, truth=truth)


def test_errors_need_a_truth():
    with pytest.raises(ValueError, match="errors=True needs the truth"):
        InpaintingDisplay(HOLES, {"a": ONES}).plot(errors=True)


# --- matplotlib ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda single: SingularValuesDisplay.from_solution(single),
        lambda single: ErrorDisplay.from_solution(single),
        lambda single: EffectiveRankDisplay.from_table(table()),
        lambda single: PhaseTransitionDisplay.from_table(trials(), threshold=0.5),
        lambda single: InpaintingDisplay(HOLES, {"a": ONES}),
    ],
)
def test_without_matplotlib(single, make, monkeypatch):
    """The data can be prepared; only drawing asks for it, and says how to get it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    display = make(single)
    with pytest.raises(ImportError, match='pip install "fastdmf\\[plot\\]"'):
        display.plot()


def test_the_module_loads_neither_matplotlib_nor_scikit_learn():
    code = "import sys, fastdmf; fastdmf.ErrorDisplay; print({'matplotlib', 'sklearn'} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "set()\n"
