"""What a fit tells while it runs: forecasts, lines of the log, a terminal's line, scikit-learn's callbacks."""

import doctest
import io
import logging
import math
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

import fastdmf
from fastdmf import DMFCompleter, DMFImputer, DMFQuadratic, DMFSensing, progress
from fastdmf.engine import Progress, Status
from fastdmf.progress import Report, Reports, StreamProgress

try:
    from sklearn import callback as sklearn_callback
except ImportError:
    sklearn_callback = None
with_callbacks = pytest.mark.skipif(sklearn_callback is None, reason="scikit-learn has callbacks from 1.9 on")

RNG = np.random.default_rng(0)
TRUTH = RNG.standard_normal((30, 2)) @ RNG.standard_normal((2, 20))
NOISY = TRUTH + 0.2 * RNG.standard_normal(TRUTH.shape)
TABLE = np.where(RNG.random(TRUTH.shape) < 0.7, NOISY, np.nan)
PAIRS = np.argwhere(RNG.random(TRUTH.shape) < 0.6)
VALUES = NOISY[tuple(PAIRS.T)]
MEASUREMENTS = RNG.standard_normal((150, 8, 6)).reshape(150, -1)
PRODUCTS = MEASUREMENTS @ np.outer(np.arange(8.0), np.arange(6.0) - 2).ravel()
INPUTS = RNG.standard_normal((120, 6))
OUTPUTS = np.square(INPUTS[:, :2]).sum(axis=1)

# One row a kind of fit: name -> (estimator, its data).
FITS = {
    "completer": (DMFCompleter(random_state=0), (PAIRS, VALUES)),
    "completer, three starts": (DMFCompleter(n_init=3, random_state=0), (PAIRS, VALUES)),
    "completer, descent": (DMFCompleter(solver="descent", random_state=0), (PAIRS, VALUES)),
    "completer, recovery": (DMFCompleter(solver="recovery", random_state=0), (PAIRS, TRUTH[tuple(PAIRS.T)])),
    "imputer": (DMFImputer(random_state=0), (TABLE,)),
    "imputer, gaussian": (DMFImputer(solver="gaussian", random_state=0), (TABLE,)),
    "imputer, variational": (DMFImputer(solver="variational", random_state=0), (TABLE,)),
    "imputer, descent": (DMFImputer(solver="descent", random_state=0), (TABLE,)),
    "imputer, recovery": (
        DMFImputer(solver="recovery", random_state=0),
        (np.where(np.isnan(TABLE), np.nan, TRUTH),),
    ),
    "sensing": (DMFSensing(random_state=0), (MEASUREMENTS, PRODUCTS)),
    "sensing, rule": (DMFSensing(random_state=0, rule="gd", max_iter=95), (MEASUREMENTS, PRODUCTS)),
    "sensing, recovery": (DMFSensing(solver="recovery", random_state=0), (MEASUREMENTS, PRODUCTS)),
    "quadratic": (DMFQuadratic(random_state=0), (INPUTS, OUTPUTS)),
}
quiet = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def talkative():
    """A stand-in for an estimator of which only that it is verbose counts."""
    return SimpleNamespace(verbose=1)


def record(iteration, elapsed=0.0, max_iter=100, **values):
    return Progress(iteration, iteration, values, elapsed, max_iter, None)


@pytest.fixture
def reports(monkeypatch):
    """Reports of a run, as a list: what the streams would see."""
    seen = []
    monkeypatch.setattr(Reports, "show", lambda self, report: seen.append(report))
    return seen


# --- forecasts -------------------------------------------------------------------------------------------------------


def test_share_of_the_steps(reports):
    run = Reports(talkative()).run("depth 2")
    for iteration, elapsed in ((10, 0.0), (30, 4.0), (100, 9.0)):
        run(record(iteration, elapsed, max_iter=110, loss=1.0))
    assert [report.share for report in reports] == pytest.approx([0, 0.2, 0.9])  # of the 100 that were left
    assert reports[0].left is None
    assert [report.left for report in reports[1:]] == pytest.approx([16.0, 1.0])
    assert reports[1].name == "SimpleNamespace depth 2" and reports[1].elapsed == 4.0


def test_share_of_the_way_to_the_tolerance(reports):
    """On a log scale from the first loss; it never falls back, and ends at 1."""
    run = Reports(talkative()).run("depth 2", goal=("loss", 1e-6))
    losses = [100.0, 1.0, 10.0, 1e-2, 0.0, 1e-7]
    for k, loss in enumerate(losses):
        run(record(k, float(k), max_iter=1000, loss=loss))
    assert [report.share for report in reports] == pytest.approx([0, 0.25, 0.25, 0.5, 0.5, 1])


def test_share_of_the_way_of_the_evidence(reports):
    """The gain counts: it is unknown for two records, and where evidence falls."""
    run = Reports(talkative()).run("depth 2", goal=("evidence", 1e-4))
    evidence = np.cumsum([math.nan, -5.0, 1.0, 0.1, -0.1, 0.01])
    evidence = [math.nan, -5.0, -4.0, -3.9, -4.0, -3.99]
    for k, value in enumerate(evidence):
        run(record(k, float(k), max_iter=10**6, loss=1.0, evidence=value))
    assert [report.share for report in reports] == pytest.approx([0, 0, 0, 0.25, 0.25, 0.5], abs=1e-5)


def test_share_of_a_run_without_end(reports):
    run = Reports(talkative()).run("recovery")
    run(record(5, 2.0, max_iter=10**9, loss=1.0))
    assert reports[0].share is None and reports[0].left is None
    assert str(reports[0]) == "SimpleNamespace recovery: iteration 5, loss 1"


def test_a_callback_of_several_runs_begins_anew_with_each(reports):
    run = Reports(talkative()).run("trial", goal=("change", 0.01))
    for iteration, elapsed, change in ((0, 0.0, math.nan), (1, 1.0, 1.0), (2, 2.0, 0.1), (0, 0.0, math.nan)):
        run(record(iteration, elapsed, max_iter=30, change=change))
    assert [report.share for report in reports] == pytest.approx([0, 1 / 30, 0.5, 0])
    assert [report.values for report in reports] == [[], ["largest change 1"], ["largest change 0.1"], []]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (7.4, "7 s"), (99.4, "99 s"), (100, "2 min"), (3600, "60 min"), (6000, "1.7 h"), (1e6, "277.8 h")],
)
def test_texts(seconds, text):
    report = Report("DMFImputer depth 2", 7, ["loss 0.5", "held out 0.25"], 3.0, 0.123, seconds)
    assert str(report) == f"DMFImputer depth 2: 12 %, iteration 7, loss 0.5, held out 0.25, at most {text} left"


# --- the log ---------------------------------------------------------------------------------------------------------


def test_log_lines_carry_their_report(caplog):
    """Every twentieth record, and in slow runs one every ten seconds."""
    run = Reports(talkative()).run("depth 2")
    with caplog.at_level(logging.INFO, logger="fastdmf"):
        for k in range(45):
            run(record(k, 0.1 * k, loss=0.5, validation=0.25))
        for k, elapsed in ((0, 0.0), (1, 6.0), (2, 9.0), (3, 11.0), (4, 20.0), (5, 31.0)):
            run(record(k, elapsed, loss=0.5))
    told = [(line.progress.iteration, line.progress.elapsed) for line in caplog.records]
    assert told == [(0, 0.0), (20, 2.0), (40, 4.0), (3, 11.0), (5, 31.0)]
    assert caplog.messages[1] == "SimpleNamespace depth 2: iteration 20, loss 0.5, held out 0.25, 2.0 s"


@quiet
@pytest.mark.parametrize("kind", FITS)
def test_silent_unless_verbose(kind, caplog):
    """No line, and no callback where nobody listens; the fit is the same to the bit."""
    model, data = FITS[kind]
    with caplog.at_level(logging.INFO, logger="fastdmf"):
        silent = clone(model).fit(*data)
        assert not caplog.records
        verbose = clone(model).set_params(verbose=1).fit(*data)
    assert caplog.records and caplog.messages[0].startswith(f"{type(model).__name__} ")
    assert all(np.array_equal(a, b) for a, b in zip(silent.factors_, verbose.factors_))
    assert Reports(model).run("depth 2") is None


# --- streams ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock, perf_counter=clock))
    return clock


def screen(text):
    """What a terminal shows in its last line."""
    line = ""
    for part in text.split("\r"):
        line = part + line[len(part) :]
    return line


def run_for(clock, seconds, step=0.25, **options):
    """A fit of that many seconds and a record every quarter of one."""
    reports = Reports(talkative())
    run = reports.run("depth 2", **options)
    start, count = clock.now, int(seconds / step)
    for k in range(count + 1):
        clock.now = start + k * step
        run(record(k, k * step, max_iter=count, loss=1 / (k + 1)))
    return reports


def test_stream_of_a_log(clock):
    """A plain line every five seconds, the first after one."""
    out = io.StringIO()
    with StreamProgress(out, every=5.0):
        run_for(clock, 20).end()
    lines = out.getvalue().splitlines()
    assert [line.split(", ")[1] for line in lines] == [f"iteration {4 * t}" for t in (1, 6, 11, 16)]
    assert lines[1] == "SimpleNamespace depth 2: 30 %, iteration 24, loss 0.04, at most 14 s left"


def test_stream_of_a_terminal(clock, monkeypatch):
    """One line, written over again and taken away; wide terminals see all of it, narrow ones its beginning."""
    for columns in (120, 40):
        monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda c=columns: SimpleNamespace(columns=c))
        out = Terminal()
        with StreamProgress(out):
            reports = run_for(clock, 20)
            text = "[####################] SimpleNamespace depth 2: 100 %, iteration 80, loss 0.01235, at most 1 s left"
            assert screen(out.getvalue()).rstrip() == text[: columns - 1].rstrip()
            assert "[######..............] SimpleNamespace" in out.getvalue()
            assert "\n" not in out.getvalue()
            reports.end()
            assert screen(out.getvalue()).strip() == "" and out.getvalue().endswith("\r")
        assert max(len(part) for part in out.getvalue().split("\r")) <= columns - 1


def test_nothing_in_the_first_second(clock):
    for out in (io.StringIO(), Terminal()):
        with StreamProgress(out, every=0.0):
            for _ in range(3):  # of each fit
                run_for(clock, 0.75).end()
        assert out.getvalue() == ""


def test_a_fit_of_many_short_runs_is_a_long_one(clock):
    out = io.StringIO()
    with StreamProgress(out, every=0.0):
        reports = Reports(talkative())
        run = reports.run("trial")
        for k in range(4):
            clock.now = 100 + 0.5 * k
            run(record(0, 0.0, max_iter=30, change=0.5))
    assert len(out.getvalue().splitlines()) == 2


def test_streams_are_for_verbose_fits_within_the_block(clock):
    outer, inner = io.StringIO(), io.StringIO()
    with StreamProgress(outer, every=0.0):
        with StreamProgress(inner, every=0.0):
            run_for(clock, 2)
        before = inner.getvalue()
        run_for(clock, 2)
        silent = SimpleNamespace(verbose=0)
        assert Reports(silent).run("depth 2") is None
    run_for(clock, 2)
    assert inner.getvalue() == before != "" and outer.getvalue().count("iteration 4,") == 1
    assert progress._streams == []


def test_a_stream_that_fails_does_not_end_the_fit(clock):
    out = io.StringIO()
    with StreamProgress(out, every=0.0):
        out.close()
        run_for(clock, 2).end()


def test_example():
    results = doctest.testmod(progress)
    assert results.attempted == 5 and results.failed == 0


def test_default_stream_and_bad_arguments(clock, monkeypatch):
    for every in (-1, "often", True, math.nan):
        with pytest.raises(ValueError, match="every must be a number of seconds >= 0"):
            StreamProgress(every=every)
    shown = StreamProgress(every=0.0)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)  # as it is when the block is entered
    with shown:
        run_for(clock, 2)
    assert out.getvalue()


@quiet
@pytest.mark.parametrize("kind", FITS)
def test_real_fits_are_shown(kind, monkeypatch):
    model, data = FITS[kind]
    monkeypatch.setattr(progress, "_SILENT", 0.0)
    out = io.StringIO()
    with StreamProgress(out, every=0.0):
        clone(model).set_params(verbose=1).fit(*data)
    assert out.getvalue().startswith(f"{type(model).__name__} ") and "iteration" in out.getvalue()


def test_the_line_is_gone_before_a_warning(monkeypatch):
    """A warning begins at the left margin."""
    out = Terminal()
    monkeypatch.setattr(progress, "_SILENT", 0.0)
    monkeypatch.setattr(progress, "_REDRAW", 0.0)
    model, data = FITS["sensing, rule"]
    margins = []
    monkeypatch.setattr(fastdmf.fitting.warnings, "warn", lambda *a, **k: margins.append(screen(out.getvalue())))
    with StreamProgress(out):
        clone(model).set_params(verbose=1).fit(*data)
    assert "iteration" in out.getvalue() and [margin.strip() for margin in margins] == [""]


# --- scikit-learn's callbacks ----------------------------------------------------------------------------------------


class Spy:
    """A callback that keeps all it is told, and stops at a task."""

    def __init__(self, stop_at=None):
        self.told, self.stop_at, self.scores = [], stop_at, []

    def setup(self, estimator, context):
        self.told.append(("setup", ()))

    def teardown(self, estimator, context):
        self.told.append(("teardown", ()))

    def on_fit_task_begin(self, estimator, context, *, X=None, y=None):
        self.told.append(("begin", path(context)))
        assert estimator.__class__.__name__ == context.estimator_name
        assert context.max_subtasks is None or context.max_subtasks >= 0

    def on_fit_task_end(self, estimator, context, *, X=None, y=None, fitted_estimator=None):
        self.told.append(("end", path(context)))
        if fitted_estimator is not None and y is not None:
            self.scores.append(fitted_estimator.score(X, y))
        return len(self.told) >= self.stop_at if self.stop_at else None


def path(context):
    return ((*path(context.parent), (context.task_name, context.task_id))) if context else ()


@with_callbacks
@quiet
@pytest.mark.parametrize("kind", FITS)
def test_callbacks_see_a_tree_of_tasks(kind):
    """Every task that begins ends, within its parent; the fit has the bits of one without callbacks."""
    model, data = FITS[kind]
    spy = Spy()
    model = clone(model).set_callbacks(spy)
    reference = clone(FITS[kind][0]).fit(*data)
    model.fit(*data)
    assert all(np.array_equal(a, b) for a, b in zip(model.factors_, reference.factors_))
    assert spy.told[0][0] == "setup" and spy.told[-1][0] == "teardown"
    open_tasks, seen = [], set()
    for event, where in spy.told[1:-1]:
        if event == "begin":
            assert where[:-1] == (open_tasks[-1] if open_tasks else ()) and where not in seen
            open_tasks.append(where)
            seen.add(where)
        else:
            assert open_tasks.pop() == where
    assert not open_tasks
    runs = [where for where in seen if len(where) == 2]
    steps = [where for where in seen if len(where) == 3]
    assert runs and len(steps) > len(runs)
    if kind == "completer, three starts":
        assert len(runs) == 3
    assert vars(model).keys() - vars(reference).keys() == {"_skl_callbacks"}


@with_callbacks
@quiet
@pytest.mark.parametrize("kind", ["sensing", "sensing, recovery", "quadratic"])
def test_callbacks_get_an_estimator_fitted_so_far(kind):
    """The score rises from that of the start to that of the fitted estimator."""
    model, data = FITS[kind]
    spy = Spy()
    model = clone(model).set_callbacks(spy).fit(*data)
    assert len(spy.scores) > 5
    assert spy.scores[0] < 0.5 < 0.99 < spy.scores[-1] == model.score(*data)
    assert model.score(*data) == pytest.approx(max(spy.scores), abs=1e-3)


@with_callbacks
@quiet
@pytest.mark.parametrize("kind", ["completer", "completer, descent", "imputer, variational", "sensing", "quadratic"])
def test_callbacks_can_stop(kind):
    model, data = FITS[kind]
    model = clone(model).set_callbacks(Spy(stop_at=9)).fit(*data)
    assert model.status_ is Status.STOPPED
    assert model.n_iter_ <= 5 < clone(FITS[kind][0]).fit(*data).n_iter_


@with_callbacks
def test_scoring_monitor_and_grid_search():
    model, data = FITS["sensing"]
    monitor = sklearn_callback.ScoringMonitor(scoring="r2")
    model = clone(model).set_callbacks(monitor).fit(*data)
    scores = [row["r2"] for row in monitor.get_logs().data if "r2" in row]
    assert len(scores) > 5 and max(scores) > 0.99
    # Once for every fit of a search, whose tree of tasks goes on in those of the fits.
    spy = Spy()
    spy.max_propagation_depth = None
    search = GridSearchCV(DMFQuadratic(random_state=0), {"width": [2, 4]}, cv=2, n_jobs=1).set_callbacks(spy)
    search.fit(INPUTS, OUTPUTS)
    assert spy.told[0][0] == "setup" and sum(event == "setup" for event, _ in spy.told) == 1
    inside = {where for event, where in spy.told if any(name == "steps" for name, _ in where)}
    assert len({where[:-1] for where in inside}) == 5  # four fits and that of the best


@with_callbacks
def test_progress_bar():
    pytest.importorskip("rich", reason="scikit-learn's progress bar needs rich")
    for kind in ("completer", "imputer", "sensing"):
        model, data = FITS[kind]
        clone(model).set_callbacks(sklearn_callback.ProgressBar()).fit(*data)


@with_callbacks
def test_callbacks_are_taken_down_after_an_error():
    spy = Spy()
    model = DMFSensing(random_state=0).set_callbacks(spy)
    with pytest.raises(ValueError, match="NaN"):
        model.fit(MEASUREMENTS, np.full(150, np.nan))
    assert [event for event, _ in spy.told] == ["setup", "begin", "teardown"]
    assert vars(model).keys() == {*model.get_params(), "_skl_callbacks"}


@with_callbacks
def test_callbacks_and_copies(tmp_path):
    """Clones and pickles keep them; files do not."""
    model, data = FITS["sensing"]
    spy = Spy()
    model = clone(model).set_callbacks(spy).fit(*data)
    assert clone(model)._skl_callbacks == [spy]
    assert pickle.loads(pickle.dumps(model)).score(*data) == model.score(*data)
    fastdmf.save(model, tmp_path / "model.npz")
    again = fastdmf.load(tmp_path / "model.npz")
    assert not hasattr(again, "_skl_callbacks") and np.array_equal(again.matrix_, model.matrix_)


WITHOUT = """
import sys
import numpy as np
import sklearn.impute, sklearn.metrics, sklearn.utils
there = sys.modules.pop("sklearn.callback", None)
sys.modules["sklearn.callback"] = None  # as before scikit-learn 1.9
from fastdmf import DMFImputer
if there is not None:  # where its own fits ask for them
    sys.modules["sklearn.callback"] = there
X = np.where(np.eye(20), np.nan, np.add.outer(np.arange(20.0), np.arange(20.0)))
imputer = DMFImputer(solver="descent", random_state=0).fit(X)
assert not hasattr(imputer, "set_callbacks")
print(np.isfinite(imputer.transform(X)).all(), imputer.factors_[0].tobytes().hex())
"""


def test_without_callbacks_in_scikit_learn():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    finite, factor = done.stdout.split()
    X = np.where(np.eye(20), np.nan, np.add.outer(np.arange(20.0), np.arange(20.0)))
    assert finite == "True"
    assert factor == DMFImputer(solver="descent", random_state=0).fit(X).factors_[0].tobytes().hex()
