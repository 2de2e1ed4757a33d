"""Fitted estimators in files: ``save`` and ``load``.

A file is an npz archive of arrays and of a JSON text that says where they belong, what class the estimator is of and
which digest the arrays have. There is no pickle in it: what a file may hold is listed below, each class with how it is
taken apart and put together, so that loading a file runs no code of the file's.
"""

import json
import os
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise

import numpy as np
from sklearn import config_context
from sklearn.impute import MissingIndicator
from sklearn.utils.validation import check_is_fitted

from fastdmf import __version__
from fastdmf.checkpoint import digest
from fastdmf.completer import DMFCompleter
from fastdmf.engine import Status
from fastdmf.factor_model import FactorModel, FactorSide
from fastdmf.files import open_file, whole_file
from fastdmf.ids import IdTable, Positions
from fastdmf.imputer import DMFImputer
from fastdmf.mean_model import MeanModel
from fastdmf.quadratic import DMFQuadratic
from fastdmf.row_models import GaussianRows, LowRankRows
from fastdmf.row_neighbours import NeighbourRows
from fastdmf.rules import RULES
from fastdmf.sensing import DMFSensing

__all__ = ["load", "save"]

_FORMAT, _VERSION = "fastdmf model", 1
_SHOWN = 200  # characters of what a file or its error says
_TWISTER = 624  # words of the Mersenne twister's state
_ESTIMATORS = {cls.__name__: cls for cls in (DMFCompleter, DMFImputer, DMFQuadratic, DMFSensing)}
# Where scikit-learn keeps what ``set_fit_request`` and its like were told; the methods that may have been.
_REQUESTS = "_metadata_request"
# What belongs to a fit and not to its result: where scikit-learn keeps an estimator's callbacks.
_LEFT_OUT = {_REQUESTS, "_skl_callbacks"}
_METHODS = ("fit", "partial_fit", "predict", "score", "transform")


def save(estimator, path):
    """Write a fitted estimator to one file, from which :func:`load` returns its equal.

    Parameters
    ----------
    estimator : DMFCompleter, DMFImputer, DMFQuadratic or DMFSensing
        With its parameters, its ids of rows and columns, and all that it needs to predict, to fold in and to learn on.
        Ids that are ``numpy.str_`` come back as ``str``. Its checkpoint, which is of a fit and of this machine, and
        scikit-learn's callbacks stay behind: ``checkpoint`` comes back as None.
    path : str or os.PathLike
        File to write, conventionally ``.npz``. A former one is replaced in one step, so that at any moment one whole
        file is there.

    Raises
    ------
    sklearn.exceptions.NotFittedError
        Before ``fit``.
    TypeError
        If it is no estimator of fastdmf (pipelines and classes derived from these are for pickle), or a parameter is
        an object that a file cannot hold.
    OSError
        If the file cannot be written.

    See Also
    --------
    load : Reads the file.

    Notes
    -----
    The file is an npz archive without pickles: anybody's may be loaded. It has the size of the arrays that it holds;
    the completer keeps its entries, which come into memory where it was fitted to shards.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> import fastdmf
    >>> X = np.random.default_rng(0).standard_normal((40, 6))
    >>> model = fastdmf.DMFQuadratic(random_state=0).fit(X, X[:, 0] ** 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fastdmf.save(model, os.path.join(folder, "model.npz"))
    ...     again = fastdmf.load(os.path.join(folder, "model.npz"))
    >>> bool((again.predict(X) == model.predict(X)).all())
    True
    """
    name = type(estimator).__name__
    if _ESTIMATORS.get(name) is not type(estimator):
        known = ", ".join(_ESTIMATORS)
        raise TypeError(f"estimator must be one of {known}, got {name}: pickle or joblib keep others")
    check_is_fitted(estimator)
    parameters = estimator.get_params(deep=False) | {"checkpoint": None}
    fitted = {key: value for key, value in vars(estimator).items() if key not in {*parameters, *_LEFT_OUT}}
    if isinstance(estimator, DMFCompleter):
        fitted["_model"] = fitted["_model"].held()
    writer = _Writer()
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "fastdmf": __version__,
        "class": name,
        "parameters": {key: writer.named(f"{name}.{key}", value) for key, value in parameters.items()},
        "fitted": {key: writer.named(f"{name}.{key}", value) for key, value in fitted.items()},
        "requests": _requests(estimator),
        "digest": digest(*writer.arrays),
    }
    text = np.frombuffer(json.dumps(header, allow_nan=False).encode(), np.uint8)
    seal = np.frombuffer(digest(text).encode(), np.uint8)
    with whole_file(path) as file:
        np.savez(file, header=text, seal=seal, **{f"array{k}": array for k, array in enumerate(writer.arrays)})


def load(path):
    """Return the estimator that :func:`save` wrote to a file.

    Parameters
    ----------
    path : str or os.PathLike

    Returns
    -------
    DMFCompleter, DMFImputer, DMFQuadratic or DMFSensing
        Its predictions have the bits of the saved one's; it can be fitted again, folded into and learn on as well.

    Raises
    ------
    OSError
        If the file is missing or cannot be read.
    ValueError
        If it is damaged, not one of :func:`save`, or from a later version.

    See Also
    --------
    save : Writes the file, and has an example.
    """
    header, arrays = _read(path)
    try:
        return _estimator(header, _Reader(arrays))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN]
        raise ValueError(
            f"{path!s} was written by fastdmf {_writer_of(header)} and does not fit fastdmf {__version__}: load it "
            f"with that version, or fit again ({reason})"
        ) from error


def _read(path):
    """Return (header, arrays) of a file whose digests are right."""
    said, none = str(path), "is no model that fastdmf.save wrote"
    with open_file(path) as file:
        try:
            archive = np.load(file, allow_pickle=False)
            # What save writes is not packed: a small file does not fill the memory.
            if sum(part.file_size for part in archive.zip.infolist()) > os.fstat(file.fileno()).st_size:
                raise ValueError("packed")
            # Members are read only as far as they are asked for, so that another's archive costs nothing.
            parts = {name: archive[name] for name in ("header", "seal") if name in archive.files}
        except Exception as error:  # zipfile, zlib and numpy have a dozen kinds for what bytes may be wrong
            raise ValueError(f"{said} is damaged, or {none}: copy it again, or save again") from error
        if "header" not in parts:
            raise ValueError(f"{said} {none}, but another npz file: name the one that it wrote")
        header = _header(said, parts["header"], none)
        damaged = f"{said} is damaged, its contents and their digest differ: copy it again, or save again"
        if "seal" not in parts or parts["seal"].tobytes() != digest(parts["header"]).encode():
            raise ValueError(damaged)
        try:
            count = len(archive.files) - len(parts)
            arrays = [archive[f"array{k}"] for k in range(count)]
        except Exception as error:
            raise ValueError(damaged) from error
        if digest(*arrays) != header.get("digest"):
            raise ValueError(damaged)
    return header, arrays


def _header(said, text, none):
    """Return the header of a file of this format, of a version up to this one."""
    try:
        header = json.loads(text.tobytes())
        kind, version = header["format"], header.get("version")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ValueError(f"{said} {none}: name the one that it wrote") from None
    if str(kind).startswith("fastdmf checkpoint"):
        raise ValueError(f"{said} is a checkpoint of a run, no model: pass it as checkpoint= to the run that wrote it")
    if kind != _FORMAT or not isinstance(version, int):
        raise ValueError(f"{said} {none}: name the one that it wrote")
    if version > _VERSION:
        raise ValueError(
            f"{said} was written by fastdmf {_writer_of(header)} in version {version} of the format, and fastdmf "
            f"{__version__} reads up to {_VERSION}: pip install -U fastdmf"
        )
    return header


def _writer_of(header):
    """Return the version of fastdmf that a header names."""
    return str(header.get("fastdmf"))[:_SHOWN]


def _estimator(header, reader):
    cls = _ESTIMATORS[header["class"]]
    estimator = cls(**{key: reader.value(packed) for key, packed in header["parameters"].items()})
    fitted = {key: reader.value(packed) for key, packed in header["fitted"].items()}
    hidden = [key for key in fitted if hasattr(cls, key)]
    if hidden:
        raise ValueError(f"{cls.__name__} has {hidden} of its own")
    vars(estimator).update(fitted)
    if cls is DMFCompleter:
        _check_tables(estimator)
    if header["requests"]:
        with config_context(enable_metadata_routing=True):
            for method, requests in header["requests"].items():
                getattr(estimator, f"set_{method}_request")(**requests)
    return estimator


def _check_tables(completer):
    """Refuse ids that lead to no row or column of the model: the kernels check no index."""
    model = completer._model
    members = model.members if isinstance(model, MeanModel) else [model]
    shape = len(completer._rows), len(completer._columns)
    if not members or any((len(member.rows), len(member.columns)) != shape for member in members):
        raise ValueError(f"a model of another shape than its ids, {shape}")


def _requests(estimator):
    """Return what the methods ask of scikit-learn's metadata routing, method -> argument -> answer."""
    if not hasattr(estimator, _REQUESTS):
        return {}
    routing = estimator.get_metadata_routing()
    asked = {method: getattr(routing, method).requests for method in _METHODS}
    return {method: dict(requests) for method, requests in asked.items() if requests}


# --- objects -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """How the objects of one class are taken apart, into a dict of what a file holds, and put together from it."""

    cls: type
    apart: object
    together: object


def _of_fields(cls, *derived):
    """Return the kind of a dataclass; what it derives from its fields comes along where that saves time or bits."""
    names = {field.name for field in fields(cls)} | set(derived)

    def apart(value):
        if vars(value).keys() != names:
            raise TypeError(f"a {cls.__name__} with {sorted(vars(value))} is not what a file holds of it")
        return vars(value)

    def together(parts):
        if parts.keys() != names:
            raise ValueError(f"{cls.__name__} has {sorted(names)}, the file {sorted(parts)}")
        made = object.__new__(cls)
        vars(made).update(parts)
        return made

    return _Kind(cls, apart, together)


def _of_arguments(cls, apart):
    """Return the kind of a class whose constructor takes what ``apart`` returns."""
    return _Kind(cls, apart, lambda parts: cls(**parts))


def _random_state(parts):
    state, (_, words, place, *_) = np.random.RandomState(0), parts["state"]
    if not 0 <= place <= _TWISTER or words.dtype != np.uint32:
        raise ValueError(f"a RandomState of {words.dtype} at place {place}")  # numpy would read there
    state.set_state(parts["state"])
    return state


def _indicator(parts):
    """Return the indicator that ``DMFImputer`` fits: to a row with holes in the same columns."""
    row = np.zeros((1, parts["n"]))
    row[0, parts["features"]] = np.nan
    return MissingIndicator(error_on_new=False).fit(row)


def _factor_model(parts):
    """Return the model, once its parts fit each other: the kernels check no index."""
    model = _FACTOR_MODEL.together(parts)
    n1, n2 = len(model.rows), len(model.columns)
    m = int(model.indptr[-1]) if model.indptr.dtype == np.int64 and model.indptr.size else 0
    consistent = (
        model.indptr.shape == (n1 + 1,)
        and model.indptr.dtype == np.int64
        and model.indptr[0] == 0
        and (np.diff(model.indptr) >= 0).all()
        and model.indices.dtype in (np.int32, np.int64)
        and (model.indices[:m] < n2).all()
        and (model.indices >= 0).all()
        and model.indices.ndim == 1
        and len(model.indices) >= m
        and all(
            v is None or (v.shape == model.indices.shape and v.dtype == model.rows.x.dtype) for v in (model.y, model.w)
        )
        and model.rows.x.shape[1:] == model.columns.x.shape[1:]
        and model.rows.x.dtype == model.columns.x.dtype
    )
    if not consistent:
        raise ValueError("a FactorModel whose parts do not fit each other")
    return model


def _factor_side(parts):
    from fastdmf.backend import get_backend

    side = _FACTOR_SIDE.together(parts)
    n, width = side.x.shape
    vectors = side.prior, side.second, side.variance, side.free
    if (
        side.x.dtype not in (np.float32, np.float64)
        or len(side.counts) != n
        or any(v.shape != (width,) for v in vectors)
    ):
        raise ValueError("a FactorSide whose parts do not fit each other")
    # Rows on cache lines, as the solver has them.
    x, side.x = side.x, get_backend().kernels.aligned_empty(side.x.shape, side.x.dtype)
    side.x[:] = x
    return side


_FACTOR_MODEL, _FACTOR_SIDE = _of_fields(FactorModel), _of_fields(FactorSide)
_KINDS = [
    _Kind(Status, lambda status: {"name": status.name}, lambda parts: Status[parts["name"]]),
    _Kind(np.random.RandomState, lambda state: {"state": state.get_state()}, _random_state),
    # Of the imputer.
    _of_fields(GaussianRows, "_precision"),
    _of_fields(LowRankRows),
    _of_fields(NeighbourRows, "_squares"),
    _Kind(MissingIndicator, lambda made: {"n": made.n_features_in_, "features": made.features_}, _indicator),
    # Of the completer.
    _Kind(FactorModel, _FACTOR_MODEL.apart, _factor_model),
    _Kind(FactorSide, _FACTOR_SIDE.apart, _factor_side),
    _of_arguments(MeanModel, vars),
    _of_arguments(IdTable, lambda table: {"name": table.name, "ids": table.ids}),
    _of_arguments(Positions, lambda table: {"name": table.name, "n": len(table)}),
    # Rules are settings.
    *(_of_arguments(cls, cls.get_params) for cls in RULES.values()),
]
_KIND_OF = {kind.cls: kind for kind in _KINDS}
_KIND_NAMED = {kind.cls.__name__: kind for kind in _KINDS}


# --- values ------------------------------------------------------------------------------------------------------


class _Writer:
    """Turns values into what JSON knows; arrays are put aside, each once however often it is met."""

    def __init__(self):
        self.arrays, self._met = [], {}

    def named(self, name, value):
        """Return the value, packed; errors say which one it is."""
        try:
            return self.value(value)
        except TypeError as error:
            raise TypeError(f"{name} cannot be saved: {error}; pickle or joblib keep such estimators") from None

    def value(self, value):
        """Return the value, packed: as it is, or as a dict of its kind and its parts."""
        kind = type(value)
        if kind in (bool, int, str, type(None)):
            return value
        if kind is float:
            return value if np.isfinite(value) else {"float": repr(value)}
        if kind in (list, tuple):
            return {kind.__name__: [self.value(part) for part in value]}
        if kind is dict:
            return {"dict": [[self.value(key), self.value(part)] for key, part in value.items()]}
        if kind in (np.ndarray, np.memmap):
            if id(value) not in self._met:
                self._met[id(value)] = value, self._array(value)  # the array stays alive, and so its id its own
            return self._met[id(value)][1]
        if isinstance(value, np.generic) and value.dtype.kind in "biufU":
            return {"scalar": self._place(np.asarray(value))}
        if kind.__name__ == "NAType":
            return {"pandas.NA": None}
        if kind in _KIND_OF:
            parts = _KIND_OF[kind].apart(value)
            return {"object": [kind.__name__, {key: self.value(part) for key, part in parts.items()}]}
        raise TypeError(f"a file holds no {kind.__module__}.{kind.__qualname__}")

    def _array(self, array):
        if array.dtype == object:
            flat = array.ravel().tolist()
            if all(isinstance(text, str) for text in flat):
                return {"texts": [list(array.shape), *map(self._place, _bytes_of(flat))]}
            return {"objects": [list(array.shape), [self.value(part) for part in flat]]}
        if array.dtype.kind not in "biufU":
            raise TypeError(f"a file holds no array of dtype {array.dtype}")
        return {"array": self._place(array)}

    def _place(self, array):
        self.arrays.append(array)
        return len(self.arrays) - 1


class _Reader:
    """Turns what a :class:`_Writer` made into the values again."""

    def __init__(self, arrays):
        self.arrays, self._made, self._size = arrays, {}, sum(array.size for array in arrays)

    def value(self, packed):
        """Return the value."""
        if not isinstance(packed, dict):
            return packed
        ((kind, inner),) = packed.items()
        return getattr(self, _VALUES[kind])(inner)

    def _float(self, text):
        return float(text)

    def _list(self, parts):
        return [self.value(part) for part in parts]

    def _tuple(self, parts):
        return tuple(self._list(parts))

    def _dict(self, pairs):
        return {self.value(key): self.value(part) for key, part in pairs}

    def _array(self, place):
        return self.arrays[place]

    def _scalar(self, place):
        return self.arrays[place][()]

    def _texts(self, inner):
        shape, data, ends = inner
        if data not in self._made:
            self._made[data] = _filled(shape, _texts_of(self.arrays[data], self.arrays[ends]))
        return self._made[data]

    def _objects(self, inner):
        shape, parts = inner
        return _filled(shape, self._list(parts))

    def _missing(self, _):
        import pandas

        return pandas.NA

    def _object(self, inner):
        name, parts = inner
        parts = {key: self.value(part) for key, part in parts.items()}
        # What is counted is also held, somewhere: a number alone does not fill the memory.
        if isinstance(parts.get("n"), int) and parts["n"] > self._size:
            raise ValueError(f"a {name} of {parts['n']}")
        return _KIND_NAMED[name].together(parts)


_VALUES = {
    name: f"_{name}" for name in ("float", "list", "tuple", "dict", "array", "scalar", "texts", "objects", "object")
}
_VALUES["pandas.NA"] = "_missing"


def _bytes_of(texts):
    """Return the bytes of all texts and where each ends: arrays of texts would lose NULs, and pad to the longest."""
    parts = [str(text).encode("utf-8", "surrogatepass") for text in texts]
    ends = np.fromiter(accumulate(map(len, parts)), np.int64, len(parts))
    return np.frombuffer(b"".join(parts), np.uint8), ends


def _texts_of(data, ends):
    whole = data.tobytes()
    return [whole[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise([0, *ends.tolist()])]


def _filled(shape, parts):
    return np.fromiter(parts, object, len(parts)).reshape(shape)
