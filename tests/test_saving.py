"""Estimators in files: the same bits after a round trip, nothing but whole files, and clear refusals of all others."""

import doctest
import errno
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from enum import Enum
from functools import cache

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline

import fastdmf
from fastdmf import DMFCompleter, DMFImputer, DMFQuadratic, DMFSensing, files, saving
from fastdmf.checkpoint import digest
from fastdmf.row_neighbours import NeighbourRows
from fastdmf.rules import RULES, GradientDescent, Momentum

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

RNG = np.random.default_rng(0)
TRUTH = RNG.standard_normal((40, 2)) @ RNG.standard_normal((2, 30))
NOISY = TRUTH + 0.2 * RNG.standard_normal(TRUTH.shape)
PAIRS = np.argwhere(RNG.random(TRUTH.shape) < 0.5)
VALUES = NOISY[tuple(PAIRS.T)]
TABLE = np.where(RNG.random(TRUTH.shape) < 0.7, NOISY, np.nan)
TABLE[:, 4] = np.nan
MEASUREMENTS = RNG.standard_normal((150, 8, 6))
PRODUCTS = MEASUREMENTS.reshape(150, -1) @ np.outer(np.arange(8.0), np.arange(6.0) - 2).ravel()
INPUTS = RNG.standard_normal((120, 6))


def named(pairs):
    """Pairs with strings for rows: one with a NUL at its end, one in Greek, one that is half a character."""
    names = [f"user {i}" for i in range(40)]
    names[:3] = "null\0", "α", "\udce9"
    return np.array([(names[i], int(j) * 10**16 - 5) for i, j in pairs], object)


def completer(X=PAIRS, y=VALUES, **settings):
    weight = np.linspace(0.5, 2, PAIRS.shape[0]) if settings.pop("weighted", False) else None
    return DMFCompleter(**{"random_state": 0, "max_iter": 6, **settings}).fit(X, y, entry_weight=weight)


def neighbours():
    """An imputer whose fills are corrected by the nearest rows, which needs more of them than there are here."""
    table = np.tile(NOISY[:, :8], (3, 1)) + 0.1 * RNG.standard_normal((120, 8))
    model = DMFImputer(solver="gaussian", random_state=0, max_iter=5).fit(
        np.where(RNG.random((120, 8)) < 0.8, table, np.nan)
    )
    seen = np.isfinite(table)
    model._rows = NeighbourRows.of(getattr(model._rows, "rows", model._rows), table, seen, 0.5)
    return model


def imputer(X=TABLE, **settings):
    with pytest.warns(UserWarning, match="without any observed entry"):
        return DMFImputer(**{"random_state": 0, **settings}).fit(X)


# Every kind of model: name -> maker. Each is fitted once.
MODELS = {
    "completer": completer,
    "completer, float32": lambda: completer(y=VALUES.astype(np.float32)),
    "completer, weighted": lambda: completer(weighted=True),
    "completer, three starts, features": lambda: completer(n_init=3, implicit_features=True),
    "completer, without biases": lambda: completer(biases=False, min_value=-1.5, max_value=np.inf),
    "completer, descent": lambda: completer(solver="descent", rule=Momentum(lr=0.03), depth=3, width=(4, 5)),
    "completer, recovery": lambda: completer(y=TRUTH[tuple(PAIRS.T)], solver="recovery", max_iter=None),
    "completer, names": lambda: completer(named(PAIRS)),
    "completer, positions": lambda: completer(sparse.coo_array((VALUES, PAIRS.T), (41, 30)), None),
    "completer, learned on": lambda: completer().partial_fit([(99, 3), (2, 77)], [0.5, -0.5]),
    "imputer": imputer,
    "imputer, gaussian": lambda: imputer(solver="gaussian", max_iter=5, add_indicator=True),
    "imputer, variational": lambda: imputer(TABLE.astype(np.float32), solver="variational", keep_empty_features=False),
    "imputer, descent": lambda: imputer(solver="descent", standardize=True, min_value=np.linspace(-3, -2, 30)),
    "imputer, recovery": lambda: imputer(np.where(np.isnan(TABLE), np.nan, TRUTH), solver="recovery"),
    "imputer, frame": lambda: imputer(pd.DataFrame(TABLE, columns=[f"spalte {j} ü" for j in range(30)]), max_iter=5),
    "imputer, neighbours": neighbours,
    "sensing": lambda: DMFSensing(random_state=0).fit(MEASUREMENTS, PRODUCTS),
    "sensing, descent": lambda: DMFSensing(random_state=0, depth=2, shape=(6, 8)).fit(
        MEASUREMENTS.reshape(150, -1), PRODUCTS
    ),
    "quadratic": lambda: DMFQuadratic(random_state=0).fit(INPUTS, np.square(INPUTS[:, :2]).sum(axis=1)),
}


@cache
def fitted(kind):
    return MODELS[kind]()


def answers(model, kind):
    """What a model says, as a list of arrays; it is left as it was."""
    if isinstance(model, DMFCompleter):
        pairs = named(PAIRS[::7]) if "names" in kind else PAIRS[::7]
        row, column = model.row_ids_[0], model.column_ids_[:3]
        more = pd.DataFrame({"row": [row] * 3, "column": column, "value": [1.0, 0.5, -2.0]})
        if "positions" in kind:
            more = sparse.coo_array(([1.0, 0.5], ([0, 1], [3, 4])), (2, 30))
        folded = model.fold_in(more)
        out = [model.predict(pairs), model.reconstruct(), *model.top_k(k=4), folded.reconstruct(), *folded.top_k(k=2)]
        if model.solver_ == "variational":
            out += model.predict(pairs, return_std=True)
        # ``partial_fit`` leaves the model that it starts from as it is, so that a shallow copy may learn.
        learner = object.__new__(DMFCompleter)
        vars(learner).update(vars(model))
        learner.duplicates = "last"
        learner.partial_fit(
            *([PAIRS[:9] % 30, np.arange(9.0)] if "names" not in kind else [named(PAIRS[:9]), np.arange(9.0)])
        )
        return [*out, learner.reconstruct(), learner.row_bias_, learner.factors_[0]]
    if isinstance(model, DMFImputer):
        rows = (NOISY[:9] if "neighbours" not in kind else NOISY[:9, :8]).copy()
        rows[:, ::3] = np.nan
        if "frame" in kind:
            rows = pd.DataFrame(rows, columns=model.feature_names_in_)
        if "float32" in kind:
            rows = rows.astype(np.float32)
        return [model.transform(rows), model.uncertainty(rows), model.reconstruct(), model.get_feature_names_out()]
    return [model.predict(MEASUREMENTS.reshape(150, -1) if isinstance(model, DMFSensing) else INPUTS), model.matrix_]


def assert_same(a, b, where="model", met=None):
    """Two values are of one class and have the same bits, through all that they consist of."""
    met = {} if met is None else met
    assert type(a) is type(b) or {type(a), type(b)} == {str, np.str_}, where
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes(), where
        assert (a.flags.f_contiguous or not b.flags.f_contiguous) and b.flags.writeable, where
        assert met.setdefault(id(a), id(b)) == id(b), f"{where}: one array has become two"
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{k}]", met)
    elif isinstance(a, dict) or (hasattr(a, "__dict__") and not isinstance(a, (Enum, type))):
        a, b = (value if isinstance(value, dict) else vars(value) for value in (a, b))
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("_metadata_request", "indicator_"):  # scikit-learn's own, compared by what they do
                assert_same(a[key], b[key], f"{where}.{key}", met)
    elif isinstance(a, np.random.RandomState):
        assert_same(a.get_state(), b.get_state(), where, met)
    else:
        assert repr(a) == repr(b), where


def by_file(model, path):
    fastdmf.save(model, path)
    return fastdmf.load(path)


def by_joblib(model, path):
    joblib.dump(model, path)
    return joblib.load(path)


WAYS = {
    "file": by_file,
    "joblib": by_joblib,
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model)),
    "pickle, then file": lambda model, path: by_file(pickle.loads(pickle.dumps(model)), path),
}


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip_has_the_same_bits(kind, tmp_path):
    """All that the model holds and says; by pickle and joblib, too."""
    model = fitted(kind)
    before = answers(model, kind)
    for way, trip in WAYS.items():
        again = trip(model, tmp_path / "model.npz")
        if way == "file":
            assert_same(model, again)
        for place, (a, b) in enumerate(zip(before, answers(again, kind), strict=True)):
            assert_same(a, b, f"{way}, answer {place}", {})


CHILD = """
import sys
import numpy as np, fastdmf

model = fastdmf.load(sys.argv[1])
columns, values = model.top_k(k=4)
np.savez(sys.argv[2], model.reconstruct(), values, columns, *model.predict(model.row_ids_[:, None] * [1, 0], True))
"""


def test_another_process_says_the_same(tmp_path):
    model = fitted("completer, three starts, features")
    path, out = tmp_path / "m.npz", tmp_path / "out.npz"
    fastdmf.save(model, path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", CHILD, path, out], check=True, env=environment)
    columns, values = model.top_k(k=4)
    here = [model.reconstruct(), values, columns, *model.predict(model.row_ids_[:, None] * [1, 0], return_std=True)]
    with np.load(out) as archive:
        assert [archive[name].tobytes() for name in archive.files] == [array.tobytes() for array in here]


def test_the_kinds_are_all_there():
    """The models above hold every class that a file may hold, apart from what is a parameter."""
    held = set()

    def look(value):
        if isinstance(value, (list, tuple)):
            [look(part) for part in value]
        elif hasattr(value, "__dict__") and not isinstance(value, Enum):
            held.add(type(value))
            [look(part) for part in vars(value).values()]
        elif isinstance(value, Enum):
            held.add(type(value))

    [look(fitted(kind)) for kind in MODELS]
    known = set(saving._KIND_OF) - set(RULES.values()) - {np.random.RandomState}
    assert known <= held
    assert set(saving._ESTIMATORS.values()) <= held


def test_a_loaded_model_can_be_fitted_and_cloned(tmp_path):
    model = fitted("completer, descent")
    again = by_file(model, tmp_path / "m.npz")
    assert_same(sklearn.base.clone(again).fit(PAIRS, VALUES), model)
    warm = by_file(DMFQuadratic(random_state=0, warm_start=True).fit(INPUTS, INPUTS[:, 0] ** 2), tmp_path / "q.npz")
    assert warm.fit(INPUTS, INPUTS[:, 0] ** 2).n_iter_ < fitted("quadratic").n_iter_


@pytest.mark.parametrize(
    "value",
    [
        7,
        2**70,
        -0.0,
        float("nan"),
        -np.inf,
        5e-324,
        True,
        None,
        "α\udce9\0",
        (3, (4, None)),
        [1.5, "x"],
        {"a": 1, 2: (np.inf,)},
        np.float32(0.1),
        np.float64("inf"),
        np.int8(-3),
        np.bool_(True),
        np.str_("name"),
        pd.NA,
        np.arange(6).reshape(2, 3).T,
        np.array(["a", "bcd"]),
        np.array([["a", None], [2, (3.5, 1)]], object),
        np.array([], object),
        np.array([], "U"),
        np.zeros((3, 0)),
        np.array(4.5),
        np.arange(4, dtype=">i4"),
        np.random.RandomState(3),
        *(cls() for cls in RULES.values()),
        GradientDescent(lr=np.float64(0.25)),
    ],
    ids=lambda value: f"{type(value).__name__} {value!r}"[:30],
)
def test_parameters_are_kept_exactly(value, tmp_path):
    """Of any kind that a setting may have, wherever it is set."""
    model = sklearn.base.clone(fitted("sensing")).set_params()
    vars(model).update(vars(fitted("sensing")), rule=value)
    again = by_file(model, tmp_path / "m.npz")
    assert_same({"rule": value}, {"rule": again.rule})
    if not isinstance(value, np.ndarray):
        assert type(again.rule) is type(value)


def test_what_scikit_learn_was_told_is_kept(tmp_path):
    """Names of features, the container of results, the requests of metadata routing."""
    frame = pd.DataFrame(np.where(np.arange(160).reshape(40, 4) % 7, NOISY[:, :4], np.nan), columns=list("abcd"))
    model = DMFImputer(random_state=0, max_iter=3).set_output(transform="pandas").fit(frame)
    again = by_file(model, tmp_path / "m.npz")
    assert list(again.transform(frame).columns) == list("abcd")
    with pytest.raises(ValueError, match="feature names"):
        again.transform(frame.rename(columns={"a": "z"}))
    model = fitted("completer")
    assert not vars(by_file(model, tmp_path / "m.npz")).keys() ^ vars(model).keys()
    with sklearn.config_context(enable_metadata_routing=True):
        model = completer().set_fit_request(entry_weight="stars").set_score_request(entry_weight=False)
    routing = by_file(model, tmp_path / "m.npz").get_metadata_routing()
    assert routing.fit.requests == {"entry_weight": "stars"} and routing.score.requests == {"entry_weight": False}
    assert str(routing) == str(model.get_metadata_routing())


class Mine(GradientDescent):
    """A rule of somebody's own."""


class MyCompleter(DMFCompleter):
    """An estimator of somebody's own."""


def changed(model, **values):
    out = pickle.loads(pickle.dumps(model))
    vars(out).update(values)
    return out


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (DMFImputer, NotFittedError, "not fitted yet"),
        (lambda: DMFCompleter(), NotFittedError, "not fitted yet"),
        (lambda: MyCompleter(random_state=0, max_iter=2).fit(PAIRS, VALUES), TypeError, "got MyCompleter: pickle"),
        (lambda: make_pipeline(fitted("imputer")), TypeError, "one of DMFCompleter, DMFImputer, .*got Pipeline"),
        (lambda: DMFImputer, TypeError, "got type"),
        (lambda: changed(fitted("sensing"), rule=Mine()), TypeError, "DMFSensing.rule cannot be saved: .*Mine; pickle"),
        (lambda: changed(fitted("sensing"), width=np.array([1j])), TypeError, "width cannot .*dtype complex128"),
        (lambda: changed(fitted("sensing"), width=slice(3)), TypeError, "DMFSensing.width .*builtins.slice"),
        (lambda: changed(fitted("imputer, gaussian"), note=object()), TypeError, "DMFImputer.note cannot be saved"),
    ],
)
def test_what_cannot_be_saved(make, error, match, tmp_path):
    """Is said before anything is written."""
    with pytest.raises(error, match=match):
        fastdmf.save(make(), tmp_path / "m.npz")
    assert not list(tmp_path.iterdir())


def test_a_model_that_has_grown_is_not_saved_in_part(tmp_path):
    model = pickle.loads(pickle.dumps(fitted("completer")))
    model._model.rows.more = 3
    with pytest.raises(TypeError, match=r"_model cannot be saved: a FactorSide with .*'more'"):
        fastdmf.save(model, tmp_path / "m.npz")


# --- files -------------------------------------------------------------------------------------------------------


def test_the_file_holds_no_pickle_and_is_as_large_as_its_arrays(tmp_path):
    path = tmp_path / "model of mine"  # the name stays as it is
    fastdmf.save(fitted("completer, names"), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    assert all(array.dtype != object for array in arrays.values())
    header = json.loads(arrays["header"].tobytes())
    assert header["class"] == "DMFCompleter" and header["fastdmf"] == fastdmf.__version__
    assert path.stat().st_size < sum(array.nbytes for array in arrays.values()) + 400 * len(arrays)
    # Once each, however many parts of the model share it.
    members = fitted("completer, three starts, features")
    fastdmf.save(members, path)
    entries = members._model.members[0].y
    with np.load(path) as archive:
        assert sum(archive[name].tobytes() == entries.tobytes() for name in archive.files) == 1


@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
def test_a_failed_save_leaves_the_former_file(as_path, tmp_path, monkeypatch):
    path = as_path(tmp_path / "m.npz")
    fastdmf.save(fitted("sensing"), path)
    save = np.savez

    def full(file, **arrays):
        save(file, **dict(list(arrays.items())[:3]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"cannot write '.*m\.npz': No space left on device"):
        fastdmf.save(fitted("quadratic"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]
    assert_same(fastdmf.load(path), fitted("sensing"))


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "store").mkdir()
    link = tmp_path / "latest.npz"
    link.symlink_to(tmp_path / "store" / "m.npz")
    for kind in ("sensing", "quadratic"):
        fastdmf.save(fitted(kind), link)
        assert link.is_symlink() and type(fastdmf.load(tmp_path / "store" / "m.npz")) is type(fitted(kind))


@pytest.mark.parametrize(
    ("place", "error", "match"),
    [
        ("", IsADirectoryError, "cannot write '.*': it is a folder, name a file in it"),
        ("no/m.npz", FileNotFoundError, "cannot write '.*no/m.npz': the folder does not exist, create it first"),
        ("m" * 300, OSError, "cannot write 'm*.*': File name too long"),
    ],
)
def test_where_nothing_can_be_written(place, error, match, tmp_path):
    with pytest.raises(error, match=match):
        fastdmf.save(fitted("sensing"), os.path.join(tmp_path, place))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_pipes_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="cannot write '.*pipe': it is no ordinary file"):
        fastdmf.save(fitted("sensing"), tmp_path / "pipe")
    with pytest.raises(OSError, match="cannot read '.*pipe': it is no ordinary file"):
        fastdmf.load(tmp_path / "pipe")


def test_what_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="cannot read '.*m.npz': there is no such file, check its name"):
        fastdmf.load(tmp_path / "m.npz")
    with pytest.raises(IsADirectoryError, match="cannot read '.*': it is a folder, name a file in it"):
        fastdmf.load(tmp_path)
    for path in (7, None, io.BytesIO()):
        with pytest.raises(TypeError, match="path must be a str or an os.PathLike, got"):
            fastdmf.load(path)

    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match="cannot read 'm.npz': Permission denied, check the name and its perm"):
        fastdmf.load("m.npz")


@cache
def whole(kind="completer, names"):
    """Return the bytes of a model's file."""
    buffer = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "whole_file", lambda path: _Kept(buffer))
        fastdmf.save(fitted(kind), "nowhere")
    return buffer.getvalue()


class _Kept:
    def __init__(self, buffer):
        self.buffer = buffer

    def __enter__(self):
        return self.buffer

    def __exit__(self, *error):
        return None


def rewritten(change, content=None, sealed=True):
    """Return a file whose header and arrays ``change`` has changed in place, with digests that are right again."""
    with np.load(io.BytesIO(content or whole())) as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(arrays.pop("header").tobytes())
    del arrays["seal"]
    change(header, arrays)
    if sealed and isinstance(header, dict):
        header["digest"] = digest(*arrays.values())
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    out = io.BytesIO()
    np.savez(out, header=text, seal=np.frombuffer(digest(text).encode(), np.uint8), **arrays)
    return out.getvalue()


def load_bytes(content, folder):
    path = folder / "m.npz"
    path.write_bytes(content)
    return fastdmf.load(path)


def saved(writer):
    buffer = io.BytesIO()
    writer(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(part, tmp_path):
    with pytest.raises(ValueError, match=r"m.npz is damaged, or is no model that fastdmf.save wrote: copy it again"):
        load_bytes(whole()[: int(part * len(whole()))], tmp_path)


def test_every_member_is_guarded(tmp_path):
    """A bit in the middle of any array is seen; so is one whose checksum in the archive fits."""
    with zipfile.ZipFile(io.BytesIO(whole())) as archive:
        members = [(info.filename, info.header_offset, info.file_size) for info in archive.infolist()]
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    for name, offset, size in members:
        broken = bytearray(whole())
        broken[offset + size // 2 + 60] ^= 1
        with pytest.raises(ValueError, match="is damaged"):
            load_bytes(bytes(broken), tmp_path)
        if size > 128:  # not an empty array
            changed_parts = {**parts, name: parts[name][:-1] + bytes([parts[name][-1] ^ 1])}
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                for member, content in changed_parts.items():
                    archive.writestr(member, content)
            with pytest.raises(
                ValueError, match="is damaged, its contents and their digest differ: copy it|is no model"
            ):
                load_bytes(out.getvalue(), tmp_path)


def npz(**arrays):
    return saved(lambda file: np.savez(file, **arrays))


FOREIGN = {
    "empty": (b"", "is damaged, or is no model"),
    "text": (b"row,column,value\n1,2,3\n", "is damaged, or is no model that fastdmf.save wrote"),
    "pickle": (pickle.dumps({"a": 1}), "is damaged, or is no model"),
    "pickle in npz": (saved(lambda f: np.savez(f, header=np.array([{}], object))), "is damaged, or is no model"),
    "npy": (saved(lambda file: np.save(file, np.arange(3))), "is damaged, or is no model"),
    "zip": (saved(lambda file: zipfile.ZipFile(file, "w").close()), "but another npz file"),
    "npz": (npz(a=np.arange(3)), "m.npz is no model that fastdmf.save wrote, but another npz file: name the one"),
    "sparse": (saved(lambda file: sparse.save_npz(file, sparse.eye_array(3, format="csr"))), "but another npz file"),
    "header": (npz(header=np.arange(3)), "is no model that fastdmf.save wrote: name the one that it wrote"),
    "list": (npz(header=np.frombuffer(b"[1]", np.uint8)), "is no model that fastdmf.save wrote: name"),
    "deep": (npz(header=np.frombuffer(b"[" * 100_000, np.uint8)), "is no model that fastdmf.save wrote: name"),
    "format": (
        lambda: rewritten(lambda header, _: header.update(format="others'")),
        "is no model that fastdmf.save wrote",
    ),
    "no version": (
        lambda: rewritten(lambda header, _: header.update(version=None)),
        "is no model that fastdmf.save wrote",
    ),
    "newer": (
        lambda: rewritten(lambda header, _: header.update(version=2, fastdmf="9.1.0")),
        "m.npz was written by fastdmf 9.1.0 in version 2 of the format, and fastdmf .* reads up to 1: pip install -U",
    ),
    "no digest": (
        lambda: rewritten(lambda header, _: header.pop("digest"), sealed=False),
        "contents and their digest differ",
    ),
    "an array less": (
        lambda: rewritten(lambda _, arrays: arrays.popitem(), sealed=False),
        "contents and their digest differ",
    ),
    "another name": (
        lambda: rewritten(lambda _, arrays: arrays.update(other=arrays.pop("array3"))),
        "contents and their digest differ",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_others(kind, tmp_path):
    content, match = FOREIGN[kind]
    with pytest.raises(ValueError, match=match):
        load_bytes(content() if callable(content) else content, tmp_path)


def test_checkpoints_are_told_apart(tmp_path):
    path = tmp_path / "run.npz"
    mask = fastdmf.EntryMask(*PAIRS.T, TRUTH.shape)
    fastdmf.vbmf(mask, VALUES, random_state=0, checkpoint=path, callback=lambda progress: True, on_failure="ignore")
    with pytest.raises(ValueError, match="run.npz is a checkpoint of a run, no model: pass it as checkpoint="):
        fastdmf.load(path)


def place_of(header, *names):
    """Return the place of an array in the completer's model."""
    packed = header["fitted"]["_model"]
    for name in names:
        packed = packed["object"][1][name]
    return f"array{packed['array']}"


def replace(*names, by):
    def change(header, arrays):
        name = place_of(header, *names)
        arrays[name] = by(arrays[name])

    return change


# Files that are whole and fit no model of this version: by hand, or by a later one that forgot to say so.
MISFITS = {
    "class": lambda header, _: header.update({"class": "DMFOther"}),
    "parameter": lambda header, _: header["parameters"].update(colour=1),
    "method": lambda header, _: header["fitted"].update(predict=1),
    "dunder": lambda header, _: header["fitted"].update(__class__=1),
    "kind": lambda header, _: header["fitted"].update(note={"code": "import os"}),
    "two kinds": lambda header, _: header["fitted"].update(note={"list": [], "tuple": []}),
    "object": lambda header, _: header["fitted"].update(note={"object": ["os", {}]}),
    "place": lambda header, _: header["fitted"].update(note={"array": 10_000}),
    "status": lambda header, _: header["fitted"].update(status_={"object": ["Status", {"name": "GREAT"}]}),
    "field": lambda header, _: header["fitted"]["_model"]["object"][1].pop("noise"),
    "rule": lambda header, _: header["parameters"].update(rule={"object": ["Adam", {"lr": -1}]}),
    "index": replace("indices", by=lambda indices: indices + 1000),
    "negative index": replace("indices", by=lambda indices: indices - 10),
    "pointers": replace("indptr", by=lambda indptr: indptr[::-1]),
    "far pointers": replace("indptr", by=lambda indptr: indptr * 1000),
    "few pointers": replace("indptr", by=lambda indptr: indptr[1:]),
    "small pointers": replace("indptr", by=lambda indptr: indptr.astype(np.int16)),
    "values": replace("y", by=lambda y: y[:5]),
    "half": replace("y", by=lambda y: y.astype(np.float16)),
    "narrow": replace("rows", "x", by=lambda x: np.ascontiguousarray(x[:, ::2])),
    "short": replace("columns", "prior", by=lambda prior: prior[:3]),
    "counts": replace("columns", "counts", by=lambda counts: counts[:3]),
    "whole numbers": replace("columns", "x", by=lambda x: x.astype(np.int64)),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_files_that_fit_no_model(kind, tmp_path):
    content = rewritten(MISFITS[kind])
    with pytest.raises(
        ValueError, match=f"m.npz was written by fastdmf .* and does not fit fastdmf {fastdmf.__version__}"
    ):
        load_bytes(content, tmp_path)


def test_rewriting_alone_changes_nothing(tmp_path):
    """The misfits above fail for what is changed in them."""
    assert_same(load_bytes(rewritten(lambda header, arrays: None), tmp_path), fitted("completer, names"))


cuts = st.tuples(st.sampled_from(["flip", "set", "drop", "double", "end"]), st.floats(0, 1), st.integers(0, 255))


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["completer, names", "imputer, gaussian", "sensing"]),
    changes=st.lists(cuts, min_size=1, max_size=4),
)
def test_mutated_files_are_refused_or_right(tmp_path_factory, kind, changes):
    """Whatever happens to the bytes: a documented error, or the very model (bytes that say nothing may change)."""
    content = bytearray(whole(kind))
    for what, place, byte in changes:
        at = min(int(place * len(content)), len(content) - 1)
        if not content:
            break
        if what == "flip":
            content[at] ^= byte
        elif what == "set":
            content[at : at + 4] = bytes([byte] * 4)
        elif what == "drop":
            del content[at : at + byte]
        elif what == "double":
            content[at:at] = content[at : at + byte]
        else:
            del content[at:]
    try:
        model = load_bytes(bytes(content), tmp_path_factory.getbasetemp())
    except ValueError as error:
        assert str(error).split(" is ")[0].endswith("m.npz") and len(str(error)) < 400
    else:
        assert_same(model, fitted(kind))


def test_examples():
    """The docstrings' examples give what they say."""
    results = doctest.testmod(saving)
    assert results.attempted > 5 and results.failed == 0
