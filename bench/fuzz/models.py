"""Files of the library's own: saved models, checkpoints, folders of shards.

Bytes changed at random are refused with a ``ValueError`` of one line that names the file, or make no difference. Files
whose digests are right again, over a header or arrays that somebody has changed, reach what is behind: whatever they
hold, they are refused the same way or loaded, and what is loaded may raise, but neither crashes nor eats the memory.
"""

import io
import json
import tempfile
import warnings
import zipfile
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

import fastdmf
from bench.fuzz.harness import Case, Finding, refusal
from bench.fuzz.mutations import applied, byte_changes, edited, json_edits
from fastdmf.checkpoint import CheckpointFile, digest
from fastdmf.shards import EntryShards

__all__ = ["CASES", "prepare"]

_NAME = "fuzzed.npz"
_RNG = np.random.default_rng(0)
_TRUTH = _RNG.standard_normal((12, 2)) @ _RNG.standard_normal((2, 9))
_PAIRS = np.argwhere(_RNG.random(_TRUTH.shape) < 0.6)
_VALUES = _TRUTH[tuple(_PAIRS.T)] + 0.1 * _RNG.standard_normal(len(_PAIRS))
_TABLE = np.where(_RNG.random(_TRUTH.shape) < 0.8, _TRUTH, np.nan)
_MASK = fastdmf.EntryMask(*_PAIRS.T, _TRUTH.shape)


@cache
def _folder():
    return Path(tempfile.mkdtemp())


# --- saved models ------------------------------------------------------------------------------------------------


def _fitted(kind):
    if kind == "names":
        pairs = np.array([(f"user {i}", int(j)) for i, j in _PAIRS], object)
        return fastdmf.DMFCompleter(random_state=0, max_iter=3, implicit_features=True).fit(pairs, _VALUES)
    if kind == "starts":
        weights = np.linspace(0.5, 2, len(_VALUES))
        return fastdmf.DMFCompleter(random_state=0, max_iter=3, n_init=2).fit(_PAIRS, _VALUES, entry_weight=weights)
    if kind == "gaussian":
        return fastdmf.DMFImputer(random_state=0, solver="gaussian", max_iter=3, add_indicator=True).fit(_TABLE)
    if kind == "variational":
        return fastdmf.DMFImputer(random_state=0, solver="variational", max_iter=3).fit(_TABLE.astype(np.float32))
    if kind == "quadratic":
        X = _RNG.standard_normal((30, 4))
        return fastdmf.DMFQuadratic(random_state=0, max_iter=9).fit(X, X[:, 0] ** 2)
    A = _RNG.standard_normal((30, 4, 3))
    return fastdmf.DMFSensing(random_state=np.random.RandomState(3), max_iter=9).fit(A, A.sum(axis=(1, 2)))


_KINDS = "names", "starts", "gaussian", "variational", "quadratic", "sensing"


@cache
def _model(kind):
    """Return the bytes of a saved model, and what it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _fitted(kind)
        fastdmf.save(model, _folder() / "whole.npz")
        return (_folder() / "whole.npz").read_bytes(), _answers(model)


def _answers(model):
    """Return what a model predicts."""
    if isinstance(model, fastdmf.DMFCompleter):
        pairs = np.array([(i, j) for i in model.row_ids_[:3] for j in model.column_ids_[:3]], object)
        return [model.predict(pairs), model.predict(pairs, return_std=True)[1], model.reconstruct(), *model.top_k(k=2)]
    if isinstance(model, fastdmf.DMFImputer):
        table = np.where(np.arange(27).reshape(3, 9) % 4 == 0, np.nan, _TRUTH[:3])
        return [model.transform(table), model.uncertainty(table), model.reconstruct()]
    return [model.predict(np.ones((2, model.n_features_in_)))]


def _learn(model):
    """Let a model take in more entries: its own are merged with them."""
    if isinstance(model, fastdmf.DMFCompleter):
        model.duplicates = "last"
        pairs = np.array([(model.row_ids_[0], j) for j in model.column_ids_[:4]], object)
        model.fold_in(pairs, np.ones(4)).reconstruct()
        model.partial_fit(pairs, np.ones(4)).reconstruct()


def _load(content):
    """Return the model in a file, or None once the refusal is checked."""
    path = _folder() / _NAME
    path.write_bytes(content)
    try:
        return fastdmf.load(path)
    except ValueError as error:
        refusal(error, _NAME)
        return None


def _same(a, b):
    return len(a) == len(b) and all(
        x.dtype == y.dtype and (x.tolist() == y.tolist() if x.dtype == object else x.tobytes() == y.tobytes())
        for x, y in zip(a, b)
    )


def _check_bytes(value):
    kind, changes = value
    content, answers = _model(kind)
    model = _load(applied(content, changes))
    if model is not None and not _same(_answers(model), answers):
        raise Finding("a changed file makes another model")
    return model is not None


_numbers = st.sampled_from([0, 1, -1, 2, 3, 7, 100, 2**31 - 1, -(2**31), 2**40, -(2**62), 0.5, -1e300, 1e-300])
_array_edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["put", "kind", "cut", "pad", "turn", "flat", "empty", "wide", "scalar"]),
        st.floats(0, 1, exclude_max=True),
        _numbers,
        st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "u8", "b1", "c16", "U3", ">f8"]),
    ),
    max_size=2,
)


def _changed(array, what, place, number, kind):
    """Return an array changed in one respect."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if what == "put" and array.size:
            array = array.copy()
            with suppress(OverflowError, ValueError):
                array.flat[int(place * array.size)] = number
            return array
        if what == "kind":
            return array.astype(kind) if array.dtype.kind in "biuf" else array
    return {
        "cut": lambda: array[: int(place * len(array))] if array.ndim else array,
        "pad": lambda: np.concatenate([array, array]) if array.ndim else array,
        "turn": lambda: array.T,
        "flat": lambda: array.reshape(-1),
        "empty": lambda: array[..., :0] if array.ndim else array,
        "wide": lambda: array[None],
        "scalar": lambda: np.array(number),
    }.get(what, lambda: array)()


def _sealed(content, edits, array_edits, packed):
    """Return a file of a model with edits in its header and arrays, and digests that fit them."""
    with np.load(io.BytesIO(content)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(arrays.pop("header").tobytes())
    del arrays["seal"]
    for name_at, *change in array_edits:
        name = list(arrays)[int(name_at * len(arrays))]
        arrays[name] = _changed(arrays[name], *change)
    header["digest"] = digest(*arrays.values())
    header = {**edited(header, edits), "digest": header["digest"]}
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    buffer = io.BytesIO()
    seal = np.frombuffer(digest(text).encode(), np.uint8)
    (np.savez_compressed if packed else np.savez)(buffer, header=text, seal=seal, **arrays)
    return buffer.getvalue()


def _check_sealed(value):
    kind, edits, array_edits, packed = value
    model = _load(_sealed(_model(kind)[0], edits, array_edits, packed))
    if model is None:
        return False
    for use in (_answers, _learn):
        # A model of somebody's making may not work; that it takes the process along is what must not be.
        with suppress(Exception), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            use(model)
    return True


def _check_bomb(value):
    """Whatever a small file unpacks to, little of it is unpacked."""
    if _load(_bomb(*value)) is not None:
        raise Finding("a bomb is a model")
    return False


_BOMBS = [
    (name, megabytes, shape)
    for name in ("header", "seal", "array0")
    for megabytes, shape in [(300, "(314572803,)"), (300, "(3,)"), (0, "(99999, 99999)"), (0, f"({2**40}, {2**40})")]
]


@cache
def _bomb(name, megabytes, shape):
    """Return an archive of which one member is packed well."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in ("header", "seal", "array0"):
            with archive.open(f"{member}.npy", "w") as file:
                file.write(_npy_header(shape if member == name else "(3,)") + bytes(3))
                for _ in range(megabytes if member == name else 0):
                    file.write(bytes(1 << 20))
    return buffer.getvalue()


def _npy_header(shape):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


# --- checkpoints -------------------------------------------------------------------------------------------------


@cache
def _checkpoint(kind):
    """Return the bytes of a checkpoint, its run, and its tree."""
    path = _folder() / "whole"
    path.unlink(missing_ok=True)
    run = fastdmf.vbmf if kind == "vbmf" else fastdmf.solve
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(_MASK, _VALUES, random_state=0, checkpoint=path, callback=lambda p: p.iteration >= 2)
    with np.load(path) as archive:
        run = json.loads(archive["header"].tobytes())["run"]
    return path.read_bytes(), run, _flat(CheckpointFile(path, run).load())


def _flat(tree):
    """Return a text that tells trees apart."""
    if isinstance(tree, dict):
        return f"{{{', '.join(f'{key!r}: {_flat(part)}' for key, part in tree.items())}}}"
    if isinstance(tree, (list, tuple)):
        return f"{type(tree).__name__}({', '.join(map(_flat, tree))})"
    return digest(tree) if isinstance(tree, np.ndarray) else repr(tree)


def _check_checkpoint(value):
    kind, changes, edits = value
    content, run, flat = _checkpoint(kind)
    if edits:
        with np.load(io.BytesIO(content)) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = edited(json.loads(arrays.pop("header").tobytes()), edits)
        buffer = io.BytesIO()
        np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
        content = buffer.getvalue()
    path = _folder() / _NAME
    path.write_bytes(applied(content, changes))
    try:
        tree = CheckpointFile(path, run).load()
    except ValueError as error:
        refusal(error, _NAME)
        return False
    if not edits and _flat(tree) != flat:
        raise Finding("a changed file makes another state")
    return True


# --- shards ------------------------------------------------------------------------------------------------------


@cache
def _shards(kind):
    """Return name -> bytes of the files of a folder, and the entries in it."""
    weights = np.linspace(1, 2, len(_VALUES))
    rows, cols = _PAIRS.T
    rows = np.array([f"user {i}" for i in rows], object) if kind == "ids" else rows
    part = (rows, cols, _VALUES, weights) if kind == "weighted" else (rows, cols, _VALUES)
    folder = _folder() / f"whole {kind}"
    shards = fastdmf.write_shards(folder, [part], ids=kind == "ids", shard_entries=30)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}, _entries(shards)


def _entries(shards):
    return [digest(*part) for part in shards.parts()] + [shards.row_ids.tolist(), shards.column_ids.tolist()]


def _check_shards(value):
    kind, name_at, changes, edits, array_edits, signed = value
    files, entries = _shards(kind)
    files = dict(files)
    name = sorted(files)[int(name_at * len(files))]
    for file_at, *change in array_edits:
        name = sorted(name for name in files if name.endswith(".npy"))[
            int(file_at * (len(files) - 1 - 2 * (kind == "ids")))
        ]
        buffer = io.BytesIO()
        np.save(buffer, _changed(np.load(io.BytesIO(files[name])), *change))
        files[name] = buffer.getvalue()
    files[name] = applied(files[name], changes)
    with suppress(ValueError):
        index = json.loads(files["index.json"])
        if signed and isinstance(index, dict) and name in index.get("files", ()):
            data = files[name]
            with suppress(Exception):
                data = np.load(io.BytesIO(data)) if name.endswith(".npy") else data
            index["files"][name] = [len(files[name]), zlib.crc32(np.ascontiguousarray(data))]
        if edits or signed:
            files["index.json"] = json.dumps(edited(index, edits)).encode()
    folder = _folder() / "fuzzed"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return _use_shards(folder, None if edits or signed else entries)


def _use_shards(folder, entries):
    """Open, verify, read and fit; each works or is refused with the name of the folder in it."""
    try:
        shards = EntryShards(folder)
    except ValueError as error:
        refusal(error, "fuzzed")
        return False
    whole = True
    try:
        shards.verify()
    except ValueError as error:
        refusal(error, "fuzzed")
        whole = False
    try:
        found = _entries(shards)
    except ValueError as error:
        refusal(error, "fuzzed")
    else:
        if whole and entries is not None and found != entries:
            raise Finding("changed files pass for whole")
    try:
        with np.errstate(all="ignore"):
            fastdmf.vbmf(shards, random_state=0, max_iter=2, width=2, on_failure="ignore")
    except ValueError as error:
        refusal(error, "fuzzed", "values", "y ")
    return whole


_kinds = st.sampled_from(_KINDS)
CASES = {
    "bytes": Case(st.tuples(_kinds, byte_changes), _check_bytes),
    # The time is what kernels for other types take to compile.
    "header": Case(st.tuples(_kinds, json_edits, st.just([]), st.booleans()), _check_sealed, 30.0),
    "arrays": Case(st.tuples(_kinds, st.just([]), _array_edits, st.just(False)), _check_sealed, 30.0),
    "bomb": Case(st.sampled_from(_BOMBS), _check_bomb, 20.0),
    "checkpoint": Case(
        st.tuples(st.sampled_from(["vbmf", "solve"]), byte_changes, st.just([]) | json_edits), _check_checkpoint
    ),
    "shards": Case(
        st.tuples(
            st.sampled_from(["plain", "weighted", "ids"]),
            st.floats(0, 1, exclude_max=True),
            st.just([]) | byte_changes,
            st.just([]) | json_edits,
            _array_edits,
            st.booleans(),
        ),
        _check_shards,
        30.0,
    ),
}


def prepare():
    """Make the whole files, and compile what they need, before the memory is limited and the time counts."""
    for kind in _KINDS:
        _learn(_load(_model(kind)[0]))
    for bomb in _BOMBS:
        _bomb(*bomb)
    for kind in ("vbmf", "solve"):
        _checkpoint(kind)
    for kind in ("plain", "weighted", "ids"):
        _check_shards((kind, 0.0, [], [], [], False))
