"""Fits of several parts: checkpoints of each, Ctrl-C at any moment, and nothing that is half fitted."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import cross_val_score
from test_progress import FITS, INPUTS, MEASUREMENTS, OUTPUTS, PAIRS, PRODUCTS, TABLE, VALUES

import fastdmf
from fastdmf import Checkpoint, DMFCompleter, DMFImputer, DMFQuadratic, DMFSensing, fit_parts, progress
from fastdmf.engine import Status
from fastdmf.fit_parts import Kept

RNG = np.random.default_rng(1)
EXACT = RNG.standard_normal((40, 2)) @ RNG.standard_normal((2, 32))
EXACT = np.where(RNG.random(EXACT.shape) < 0.3, EXACT, np.nan)
SCARCE = np.random.default_rng(0).standard_normal((90, 10, 8))
RANK_TWO = np.arange(10.0)[:, None] * np.linspace(-1, 1, 8) + np.cos(np.arange(10.0))[:, None]
# More routes through the solvers, each with all its parts.
FITS = FITS | {
    "imputer, exact": (DMFImputer(random_state=0), (EXACT,)),
    "imputer, deep": (DMFImputer(solver="descent", depth=4, width=(5, 5, 5), random_state=0), (TABLE,)),
    "imputer, float32": (DMFImputer(random_state=0), (TABLE.astype(np.float32),)),
    "sensing, exact": (DMFSensing((10, 8), random_state=0), (SCARCE, np.einsum("kij,ij->k", SCARCE, RANK_TWO))),
    "sensing, psd": (
        DMFSensing((6, 6), psd=True, random_state=0),
        (MEASUREMENTS[:, :36], MEASUREMENTS[:, :36] @ np.outer(np.arange(6.0), np.arange(6.0)).ravel()),
    ),
}
# The files that each writes, by what their names end in.
FILES = {
    "completer, three starts": {"", ".1", ".2"},
    "imputer": {"", ".covariances", ".fold0", ".fold1", ".fold2", ".fold3", ".fold4", ".fold5"},
    "imputer, exact": {".covariances", ".fold0", ".fold1", ".fold2", ".fold3", ".fold4", ".fold5", ".fold6"}
    | {".depth2", ".depth3", ".recovery"},
    "imputer, gaussian": {"", ".covariances"},
    "imputer, descent": {".depth2", ".depth3"},
    "sensing": {"", ".recovery"},
}
quiet = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def made(kind, **settings):
    return clone(FITS[kind][0]).set_params(**settings)


def everything(model):
    """All that a fit leaves, as bytes."""
    left = {name: value for name, value in vars(model).items() if name not in model.get_params()}
    return {name: pickle.dumps(value) for name, value in left.items()}


@pytest.fixture(scope="module")
def whole():
    """Return the attributes of a fit that nothing disturbs; made once for each kind."""
    made_once = {}

    def attributes(kind):
        if kind not in made_once:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made_once[kind] = everything(made(kind).fit(*FITS[kind][1]))
        return made_once[kind]

    return attributes


class At(logging.Handler):
    """Calls something at one record of the log, while every record of the solvers is one of it."""

    def __init__(self, monkeypatch, place, call):
        super().__init__()
        monkeypatch.setattr(progress, "_LOG_EVERY", 1)
        monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
        self.place, self.call, self.count = place, call, 0

    def emit(self, record):
        if hasattr(record, "progress"):
            self.count += 1
            if self.count == self.place:
                self.call()

    def __enter__(self):
        logger = logging.getLogger("fastdmf")
        self._level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, *exception):
        logger = logging.getLogger("fastdmf")
        logger.setLevel(self._level)
        logger.removeHandler(self)


def press():
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


class Killed(BaseException):
    """Ends a fit as a kill does: at once, whatever it is at."""


def kill():
    raise Killed


def records(kind, monkeypatch):
    with At(monkeypatch, 0, None) as counter:
        made(kind, verbose=1).fit(*FITS[kind][1])
    return counter.count


def places(count):
    return sorted({1, 2, count // 3, 2 * count // 3, count - 1} - {0})


# --- checkpoints -----------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("kind", FITS)
def test_resumed_fits_have_the_same_bits(kind, whole, tmp_path, monkeypatch):
    """Ended at five places, and resumed; all attributes are those of a fit that was never ended."""
    data = FITS[kind][1]
    reference = whole(kind)
    count = records(kind, monkeypatch)
    for place in places(count):
        path = tmp_path / f"{place}.npz"
        model = made(kind, checkpoint=Checkpoint(path, every=0), verbose=1)
        with At(monkeypatch, place, kill), pytest.raises(Killed):
            model.fit(*data)
        with At(monkeypatch, 0, None) as counter:
            model.fit(*data)
        assert everything(model) == reference
        # What was done is not done again: of every part that had ended one record comes again, and a trial of a
        # covariance, of at most 30 steps, begins anew.
        parts = len(list(tmp_path.glob(f"{place}.npz*")))
        trial = 30 if "imputer" in kind else 0
        assert counter.count <= count - place + 1 + parts + trial
        if kind in FILES:
            assert {file.name.removeprefix(path.name) for file in tmp_path.glob(f"{place}.npz*")} == FILES[kind]
    # A finished fit is read.
    with At(monkeypatch, 0, None) as counter:
        again = made(kind, checkpoint=path, verbose=1).fit(*data)
    assert everything(again) == reference and counter.count <= parts
    # In many pieces.
    path = tmp_path / "pieces.npz"
    model = made(kind, checkpoint=Checkpoint(path, every=0), verbose=1)
    for _ in range(4):
        with At(monkeypatch, 4, kill):
            try:
                model.fit(*data)
            except Killed:
                pass
    assert everything(model.fit(*data)) == reference


def test_other_data_settings_and_seeds_are_refused(tmp_path):
    """Also for the files of parts; the estimator is what it was."""
    path = tmp_path / "run.npz"
    imputer = DMFImputer(random_state=0, checkpoint=path).fit(TABLE)
    before = dict(vars(imputer))
    for other in (TABLE + 1, TABLE[:-1]):
        with pytest.raises(ValueError, match="run.npz.covariances' belongs to a run with other data, settings or seed"):
            imputer.fit(other)
    assert all(vars(imputer)[name] is value for name, value in before.items())
    with pytest.raises(ValueError, match="run.npz.* belongs to a run with other"):
        clone(imputer).set_params(random_state=1).fit(TABLE)
    for model, data, name in (
        (DMFSensing(random_state=0, solver="descent"), (MEASUREMENTS, PRODUCTS), "sensing"),
        (DMFQuadratic(random_state=0), (INPUTS, OUTPUTS), "quadratic"),
        (DMFCompleter(random_state=0), (PAIRS, VALUES), "completer"),
    ):
        model.set_params(checkpoint=tmp_path / name).fit(*data)
        with pytest.raises(ValueError, match=f"{name}' belongs to a run with other"):
            model.fit(data[0], data[1] + 1)
        with pytest.raises(ValueError, match=f"{name}' belongs to a run with other"):
            clone(model).set_params(random_state=1).fit(*data)
        if name != "completer":
            with pytest.raises(ValueError, match=f"{name}' belongs to a run with other"):
                clone(model).set_params(init_scale=1e-2).fit(*data)
    with pytest.raises(ValueError, match="belongs to a run with other"):
        cross_val_score(model, PAIRS, VALUES, cv=2, error_score="raise")


@pytest.mark.parametrize("estimator", [DMFCompleter, DMFImputer, DMFQuadratic, DMFSensing])
def test_bad_checkpoints(estimator, tmp_path):
    data = {"DMFCompleter": (PAIRS, VALUES), "DMFImputer": (TABLE,), "DMFQuadratic": (INPUTS, OUTPUTS)}
    data = data.get(estimator.__name__, (MEASUREMENTS, PRODUCTS))
    for checkpoint, error, match in (
        (7, TypeError, "checkpoint must be a path or a Checkpoint, got int"),
        (tmp_path / "nowhere" / "run.npz", ValueError, "checkpoint must name a file in a folder that exists"),
        (tmp_path, ValueError, "checkpoint must name a file in a folder that exists"),
    ):
        with pytest.raises(error, match=match):
            estimator(checkpoint=checkpoint, random_state=0).fit(*data)
    model = estimator(checkpoint=tmp_path / "run.npz")
    with pytest.raises(ValueError, match="checkpoint needs random_state=an integer"):
        model.fit(*data)
    with pytest.raises(NotFittedError):
        model.score(*data)
    assert vars(model).keys() == model.get_params().keys() and not list(tmp_path.iterdir())


def test_parameters_clones_pickles_and_files(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run.npz", every=5.0)
    model = DMFSensing(random_state=0, checkpoint=checkpoint)
    assert model.get_params()["checkpoint"] is checkpoint and "checkpoint=Checkpoint" in repr(model)
    twin = clone(model)
    assert twin.checkpoint == checkpoint
    twin.fit(MEASUREMENTS, PRODUCTS)
    assert pickle.loads(pickle.dumps(twin)).checkpoint == checkpoint
    fastdmf.save(twin, tmp_path / "model.npz")
    again = fastdmf.load(tmp_path / "model.npz")
    assert again.checkpoint is None and np.array_equal(again.matrix_, twin.matrix_)


def test_kept_results(tmp_path, monkeypatch):
    """They are made once; the file is of its run; without a file nothing is kept."""
    path = tmp_path / "kept.npz"
    kept = Kept(Checkpoint(path, every=0), lambda: "run")
    assert kept.get("a") is None
    kept.put("a", [np.arange(3.0), "text"])
    again = Kept(Checkpoint(path), lambda: "run")
    array, text = again.get("a")
    assert np.array_equal(array, np.arange(3.0)) and text == "text"
    again.put("b", 1.5)  # not due
    assert Kept(Checkpoint(path), lambda: "run").get("b") is None
    again.write()
    assert Kept(Checkpoint(path), lambda: "run").get("b") == 1.5
    before = path.stat().st_mtime_ns
    again.write()
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="belongs to a run with other"):
        Kept(Checkpoint(path), lambda: "other")
    nothing = Kept(None, lambda: pytest.fail("no digest is needed"))
    nothing.put("a", 1)
    nothing.write()
    assert nothing.get("a") is None


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FITS)
def test_ctrl_c_in_a_solver(kind, whole, tmp_path, monkeypatch):
    """At six records of the fit: an estimator that works, a warning, and a checkpoint that goes on to the end."""
    data = FITS[kind][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = records(kind, monkeypatch)
    previous = signal.getsignal(signal.SIGINT)
    for place in [*places(count), count]:  # the last one, too, at which the fit would have ended
        path = tmp_path / f"{place}.npz"
        model = made(kind, checkpoint=path, verbose=1)
        with At(monkeypatch, place, press) as counter, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(*data)
        assert signal.getsignal(signal.SIGINT) is previous
        assert model.status_ is Status.INTERRUPTED
        assert counter.count <= place + 1
        told = [warning for warning in caught if warning.category is ConvergenceWarning]
        assert [str(warning.message) for warning in told] == [
            f"{type(model).__name__}: INTERRUPTED: {Status.INTERRUPTED.sentence}"
        ]
        assert told[0].filename == __file__
        assert everything(model).keys() == whole(kind).keys()
        usable(model, *data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert everything(made(kind, checkpoint=path).fit(*data)) == whole(kind)


def usable(model, X, y=None):
    if isinstance(model, DMFImputer):
        out = model.transform(X)
        assert np.isfinite(out).all() and np.array_equal(out[~np.isnan(X)], X[~np.isnan(X)])
        assert np.isfinite(model.reconstruct()).all()
        return
    assert np.isfinite(model.predict(X)).all()
    assert np.isfinite(model.score(X, y))
    if isinstance(model, DMFCompleter):
        model.fold_in(X[:5], y[:5])
        model.set_params(duplicates="last").partial_fit(X[:5], y[:5])


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="setitimer")
@quiet
@pytest.mark.parametrize("kind", FITS)
def test_ctrl_c_at_any_time(kind, whole):
    """Before, in and behind the solvers: a whole fit, an interrupted one, or an exception and nothing changed."""
    model, data = FITS[kind]
    reference = whole(kind)
    model = clone(model)
    former = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    ends, errors = [], np.geterr()
    try:
        for moment in np.geomspace(2e-4, 0.5, 14):
            before = dict(vars(model))
            try:
                signal.setitimer(signal.ITIMER_REAL, moment)
                model.fit(*data)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                assert np.geterr() == errors
                after = vars(model)
                unchanged = after.keys() == before.keys() and all(after[name] is before[name] for name in before)
                # whole: the signal came when fit had returned and the timer was not off yet
                assert unchanged or everything(model) == reference
                ends.append("raised")
                continue
            if model.status_ is Status.INTERRUPTED:
                assert everything(model).keys() == reference.keys()
                usable(clone_of(model), *data)
                ends.append("interrupted")
            else:
                assert everything(model) == reference
                ends.append("whole")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert {"raised", "interrupted"} & set(ends)
    assert everything(model.fit(*data)) == reference


def test_ctrl_c_as_an_errstate_ends(monkeypatch):
    """A second signal, or one outside of the solvers' loops, can come before NumPy's state is put back."""

    def late(*args, **kwargs):
        np.seterr(over="ignore", invalid="raise")
        raise KeyboardInterrupt

    model, data = FITS["imputer, deep"]
    monkeypatch.setattr("fastdmf.imputer.fit_descent", late)
    before = np.geterr()
    with pytest.raises(KeyboardInterrupt):
        clone(model).fit(*data)
    assert np.geterr() == before


def clone_of(model):
    """A fitted copy, that may learn."""
    return pickle.loads(pickle.dumps(model))


@quiet
@pytest.mark.parametrize(
    ("model", "data", "place"),
    [
        (DMFCompleter(random_state=0), (PAIRS, VALUES), "fastdmf.completer.DMFCompleter._settle"),
        (DMFImputer(solver="variational", random_state=0), (TABLE,), "fastdmf.imputer.effective_rank"),
        (DMFQuadratic(max_iter=2, random_state=0), (INPUTS, OUTPUTS), "fastdmf.fitting.warnings.warn"),
        (DMFSensing(random_state=0), (MEASUREMENTS, PRODUCTS), "fastdmf.sensing.DMFSensing._attributes"),
    ],
)
def test_a_failed_fit_changes_nothing(model, data, place, monkeypatch):
    """Ctrl-C while attributes are set: a new estimator stays new, a fitted one as it was fitted."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    for fitted in (False, True):
        model = clone(model).fit(*data) if fitted else clone(model)
        before = dict(vars(model))
        monkeypatch.setattr(place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.fit(*data)
        monkeypatch.undo()
        assert vars(model).keys() == before.keys()
        assert all(vars(model)[key] is value for key, value in before.items())
        assert fitted or vars(model).keys() == model.get_params().keys()


def test_a_failed_partial_fit_changes_nothing(monkeypatch):
    model = DMFCompleter(duplicates="last", random_state=0).fit(PAIRS, VALUES)
    before, bits = dict(vars(model)), everything(model)
    monkeypatch.setattr("fastdmf.completer.effective_rank", lambda s: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.partial_fit([[3, 4], [99, 5]], [100.0, 2.0])
    assert all(vars(model)[key] is value for key, value in before.items()) and everything(model) == bits


CHILD = """
import signal, sys, warnings
signal.signal(signal.SIGINT, signal.default_int_handler)
import logging
import numpy as np
import fastdmf
from fastdmf import DMFImputer

rng = np.random.default_rng(0)
X = rng.standard_normal((400, 5)) @ rng.standard_normal((5, 300)) + rng.standard_normal((400, 300))
X[rng.random(X.shape) < 0.5] = np.nan


class Tell(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), flush=True)


logging.getLogger("fastdmf").addHandler(Tell())
logging.getLogger("fastdmf").setLevel(logging.INFO)
warnings.simplefilter("always")
imputer = DMFImputer(solver="descent", max_iter=10**6, patience=10**6, tol=1e-300, random_state=0, verbose=1).fit(X)
print("status", imputer.status_.name, np.isfinite(imputer.transform(X)).all(), flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of a terminal")
def test_ctrl_c_from_outside():
    """SIGINT to a process in the middle of a long fit."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHILD], env=environment, **pipes) as process:
        try:
            for line in process.stdout:
                if "iteration 40," in line:
                    break
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == "status INTERRUPTED True"
    assert "DMFImputer: INTERRUPTED: interrupted from the keyboard" in err and "Traceback" not in err


def test_warnings_name_the_line_of_the_caller():
    """Through decorators, ``fit_transform`` and scikit-learn's own layers."""
    for call in (
        lambda: DMFImputer(max_iter=1, random_state=0, solver="variational").fit(TABLE),
        lambda: DMFImputer(max_iter=1, random_state=0, solver="variational").fit_transform(TABLE),
        lambda: DMFCompleter(max_iter=1, random_state=0).fit(PAIRS, VALUES),
        lambda: DMFSensing(max_iter=1, random_state=0).fit(MEASUREMENTS, PRODUCTS),
        lambda: DMFQuadratic(max_iter=1, random_state=0).fit(INPUTS, OUTPUTS),
        lambda: DMFQuadratic(random_state=0).fit(INPUTS, -OUTPUTS),
        lambda: DMFImputer(random_state=0).fit(np.column_stack([TABLE, np.full(len(TABLE), np.nan)])),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert caught and {warning.filename for warning in caught} == {__file__}
    assert fit_parts.caller_level() == 1
