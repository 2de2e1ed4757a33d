"""``fastdmf complete`` and ``fastdmf predict``: from files of entries to files of predictions."""

import re
import time
import warnings
from pathlib import Path

import numpy as np

from fastdmf.column_text import ColumnText, TableError
from fastdmf.command_files import INTERRUPTED, Files, UsageError, reading_of, suffix_of
from fastdmf.command_fit import fitted, forget, note, prepared, settings_of
from fastdmf.completer import DMFCompleter
from fastdmf.ids import IdTable
from fastdmf.saving import load, save
from fastdmf.shards import EntryShards
from fastdmf.tables import read_entries, read_matrix, write_entries

__all__ = ["complete", "predict"]

_COLUMNS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
_MATRICES = (".npz", ".mtx")  # rows and columns are positions
_NAMES = ("row", "column", "value")
_STD = "std"
_BINARY = (b"PAR1", b"\x93NUM", b"PK\x03\x04")
_USUAL_WIDTH = 5  # columns of a file of entries, which may have times and the like
_INTEGER = r"\s*(0|-?[1-9][0-9]{0,17})\s*"
_PLACE = r"\brow (\d+), column (\d+)\b"  # in errors of the library, by positions


class Frame(dict):
    """Columns by name, which ``DMFCompleter`` takes like a DataFrame."""

    @property
    def columns(self):
        """Their names."""
        return list(self)

    def __len__(self):
        return len(next(iter(self.values())))


def complete(args):
    """Fit a completer to the entries of a file, and write what it predicts."""
    _check_choices(args)
    with Files() as files:
        args.said = files.said
        path, asked = files.read(args.entries), files.read(args.pairs)
        if args.out is not None:
            suffixes = _COLUMNS if args.pairs is not None or args.std else _COLUMNS + _MATRICES
            files.check_output("--out", args.out, suffixes)
        if args.model is not None:
            files.check_output("--model", args.model, (".npz",))
        begin = time.perf_counter()
        source = _Shards(args, path) if path.is_dir() else _Held(args, path)
        note(args, f"{source.said}, read in {time.perf_counter() - begin:.1f} s")
        pairs = None if asked is None else _read_pairs(args, asked)
        if args.out is not None:
            _check_size(args, source)
        checkpoint = prepared(args)
        model = fitted(args, lambda: source.fit(checkpoint))
        if args.model is not None:
            save(model, args.model)
            note(args, f"the model is in {args.model}")
        if args.out is not None:
            if pairs is not None:
                pairs = _below_names(args, asked, model, pairs)
            _write(args, files, *_predictions(args, source, model, pairs))
        interrupted = model.status_.name == "INTERRUPTED"
        if not interrupted:
            forget(args)
    return INTERRUPTED if interrupted else 0


def predict(args):
    """Write what a saved model predicts at the pairs of a file."""
    names = _names(args)
    with Files() as files:
        args.said = files.said
        path, asked = files.read(args.model), files.read(args.pairs)
        files.check_output("--out", args.out, _COLUMNS)
        model = load(path)
        if not isinstance(model, DMFCompleter):
            raise ValueError(
                f"{args.model} is a {type(model).__name__}, which predicts no pairs: name a model of "
                "'fastdmf complete --model'"
            )
        if args.std and model.solver_ != "variational":
            raise UsageError(f"--std needs a variational model, and {args.model} comes from {model.solver_}")
        model.set_params(n_threads=args.threads)
        pairs = _below_names(args, asked, model, _read_pairs(args, asked))
        _write(args, files, *pairs, *_at_pairs(model, pairs, args.std), names=names)
    return 0


def _check_choices(args):
    """Refuse options that do not go together."""
    if args.out is None and args.model is None:
        raise UsageError("--out FILE or --model FILE is needed")
    if args.pairs is not None and args.top is not None:
        raise UsageError("--pairs and --top are two ways to choose cells: give one")
    if args.pairs is not None and args.cells is not None:
        raise UsageError("--cells chooses among all cells: leave it out with --pairs")
    if args.out is None and (args.pairs is not None or args.top is not None or args.std):
        raise UsageError("--pairs, --top and --std say what --out FILE is to hold: it is needed")
    if args.std and args.solver in ("descent", "recovery"):
        raise UsageError(f"--std needs the variational solver: leave --solver {args.solver} out")
    if args.std and _STD in _names(args):
        raise UsageError(f"--std writes a column {_STD!r}, and --columns has one: name the columns by their places")
    if isinstance(args.width, tuple) and args.solver != "descent":
        raise UsageError("--width N,N,... needs --solver descent")


def _names(args):
    """Return what the columns of the output are called: as in ``--columns``, where it has names."""
    given = [*(args.columns or ()), *_NAMES[len(args.columns or ()) :]]
    return tuple(name if isinstance(name, str) else usual for name, usual in zip(given, _NAMES))


# --- entries ---------------------------------------------------------------------------------------------------------


class _Held:
    """Entries in memory, from a file."""

    def __init__(self, args, path):
        self._args = args
        matrix = None if args.columns else read_matrix(path)
        if matrix is None:
            columns = dict(zip(_NAMES, args.columns or ()))
            rows, columns, values = read_entries(path, **columns, **reading_of(args))
            if values is None:
                raise TableError(f"{args.entries} holds pairs without values: entries are row, column, value")
            self.row_ids, self.column_ids = map(_distinct, (rows, columns))
            self._data = Frame(zip(_NAMES, (rows, columns, self._in_dtype(values))))
            values = self._data["value"]
            _warn_of_width(args, path)
        else:
            matrix.data = values = self._in_dtype(matrix.data)
            self.row_ids, self.column_ids = map(np.arange, matrix.shape)
            self._data = matrix
        sizes = len(self.row_ids), len(self.column_ids)
        span = f"{values.min():.6g} to {values.max():.6g}"
        self.said = f"{len(values)} entries ({span}), {sizes[0]} rows, {sizes[1]} columns"

    def _in_dtype(self, values):
        """Return values in the type asked for."""
        args = self._args
        if args.dtype is None:
            return values
        with np.errstate(over="ignore"):
            values = values.astype(args.dtype)
        if not np.isfinite(values).all():
            raise TableError(f"{args.entries} holds values that overflow in {args.dtype}: use --dtype float64")
        return values

    def fit(self, checkpoint):
        """Return the fitted model."""
        args = self._args
        model = DMFCompleter(
            biases=args.biases,
            implicit_features=args.implicit_features,
            n_init=args.n_init,
            tol=args.tol,
            duplicates=args.duplicates,
            **settings_of(args, checkpoint),
        )
        try:
            return model.fit(self._data)
        except ValueError as error:
            raise ValueError(re.sub(_PLACE, self._by_ids, str(error))) from error

    def _by_ids(self, place):
        return f"row {self.row_ids[int(place[1])]}, column {self.column_ids[int(place[2])]}"

    def known(self):
        """Yield (rows, columns) by their places among the ids."""
        if isinstance(self._data, Frame):
            yield tuple(IdTable.of(name, self._data[name])[1] for name in _NAMES[:2])
        else:
            yield self._data.coords


def _distinct(ids):
    """Return the different ids in their order, which is that of the model."""
    return np.array(sorted(set(ids.tolist())), object) if ids.dtype == object else np.unique(ids)


def _warn_of_width(args, path):
    """Say of a text with many columns that it may be a table, whose first cells were taken for entries."""
    with open(path, "rb") as file:
        if args.columns is not None or file.read(4) in _BINARY:
            return
    width = ColumnText(path, *reading_of(args).values()).width
    if width > _USUAL_WIDTH:
        warnings.warn(
            f"{args.entries} has {width} columns, of which the first three are row, column and value: --columns names "
            "others, and 'fastdmf impute' fills a table",
            UserWarning,
            stacklevel=2,
        )


class _Shards:
    """Entries on disk, in a folder."""

    def __init__(self, args, folder):
        if args.solver not in ("auto", "variational"):
            raise UsageError(f"only the variational solver fits from shards: leave --solver {args.solver} out")
        if args.duplicates != "error" or (args.columns is not None and args.pairs is None):
            raise UsageError("shards hold every entry once and have no names: leave --duplicates and --columns out")
        if args.implicit_features:
            raise UsageError("--implicit-features needs the entries in memory: fit from the file instead of its shards")
        self._args, self._shards = args, EntryShards(folder, args.dtype)
        self.row_ids, self.column_ids = self._shards.row_ids, self._shards.column_ids
        sizes = len(self.row_ids), len(self.column_ids)
        self.said = f"{self._shards.size} entries on disk, {sizes[0]} rows, {sizes[1]} columns"

    def fit(self, checkpoint):
        """Return the fitted model."""
        args = self._args
        model = DMFCompleter(biases=args.biases, n_init=args.n_init, tol=args.tol, **settings_of(args, checkpoint))
        return model.fit(self._shards)

    def known(self):
        """Yield (rows, columns) by their places among the ids, one run at a time."""
        for rows, columns, *_ in self._shards.parts():
            yield rows, columns


def _read_pairs(args, path):
    """Return rows and columns of a file of pairs."""
    columns = dict(zip(_NAMES[:2], args.columns or ()))
    return read_entries(path, **columns, value=False, **reading_of(args))[:2]


def _below_names(args, path, model, pairs):
    """Return the pairs without the first one where that can only be the names of the columns.

    Texts look like names; but of the first line both are unknown to the model, and of the others some are known.
    """
    with open(path, "rb") as file:
        text = not file.read(4).startswith(_BINARY)
    if not text or args.header != "auto" or len(pairs[0]) < 2:
        return pairs
    known = [np.isin(_as_known(ids, others), others) for ids, others in zip(pairs, (model.row_ids_, model.column_ids_))]
    if known[0][0] or known[1][0] or not (known[0][1:] | known[1][1:]).any():
        return pairs
    names = " and ".join(repr(str(ids[0])) for ids in pairs)
    note(args, f"{names} in the first line of {args.pairs} are taken for names (--header no: for a pair)")
    return tuple(ids[1:] for ids in pairs)


def _check_size(args, source):
    """Refuse, before the fit, what would not be written after it."""
    if suffix_of(args.out) in _MATRICES:
        for ids in (source.row_ids, source.column_ids):
            if ids.dtype == object or ids.min() < 0:
                raise UsageError(
                    f"--out {args.out}: a matrix has positions from 0, and {args.entries} has ids like "
                    f"{str(ids[0])!r}: write a .csv or .parquet"
                )
    if args.pairs is not None:
        return
    rows, columns = len(source.row_ids), len(source.column_ids)
    count = rows * (columns if args.top is None else min(args.top, columns))
    if count > args.max_cells:
        raise UsageError(
            f"{count} cells would be written, more than --max-cells {args.max_cells}: ask for the best of each row by "
            "--top K, or for some pairs by --pairs FILE, or raise --max-cells"
        )


# --- predictions -----------------------------------------------------------------------------------------------------


def _predictions(args, source, model, pairs):
    """Return (rows, columns, values, std or None) of what is asked for."""
    if pairs is not None:
        return *pairs, *_at_pairs(model, pairs, args.std)
    if args.top is not None:
        return _best(args, model)
    return _cells(args, source, model)


def _at_pairs(model, pairs, std):
    """Return predictions at pairs, and standard deviations or None."""
    known = (model.row_ids_, model.column_ids_)
    frame = Frame(zip(_NAMES, (_as_known(ids, others) for ids, others in zip(pairs, known))))
    return model.predict(frame, return_std=True) if std else (model.predict(frame), None)


def _as_known(ids, known):
    """Return ids in the type of those that the model knows: 7 in one file may be the text '7' in another."""
    if ids.dtype == known.dtype:
        return ids
    if known.dtype == object:
        return ids.astype(str).astype(object)
    unknown = int(known.min()) - 1 if known.min() > np.iinfo(np.int64).min else int(known.max()) + 1
    numbers = [int(text) if re.fullmatch(_INTEGER, text) else unknown for text in ids.tolist()]
    return np.array(numbers, np.int64)


def _best(args, model):
    """Return the cells with the highest predictions in each row, the best first."""
    k = min(args.top, len(model.column_ids_))
    columns, values = model.top_k(k=k, exclude_seen=args.cells != "all")
    there = ~np.isnan(values)
    rows, columns, values = np.repeat(model.row_ids_, there.sum(axis=1)), columns[there], values[there]
    std = model.predict(Frame(zip(_NAMES, (rows, columns))), return_std=True)[1] if args.std else None
    return rows, columns, values, std


def _cells(args, source, model):
    """Return all cells, or those without an entry, row by row."""
    shape = len(model.row_ids_), len(model.column_ids_)
    chosen = np.ones(shape, bool)
    if args.cells == "missing":
        for at in source.known():
            chosen[at] = False
    rows = np.repeat(model.row_ids_, chosen.sum(axis=1))
    columns = np.broadcast_to(model.column_ids_, shape)[chosen]
    if args.std:
        return rows, columns, *model.predict(Frame(zip(_NAMES, (rows, columns))), return_std=True)
    return rows, columns, model.reconstruct()[chosen], None


def _write(args, files, rows, columns, values, std, names=None):
    begin = time.perf_counter()
    names = _names(args) if names is None else names
    with files.writing(args.out, f".{args.format}") as path:
        write_entries(path, rows, columns, values, std=std, names=names)
    where = "standard output" if args.out == Path("-") else args.out
    note(args, f"{len(values)} predictions to {where} in {time.perf_counter() - begin:.1f} s")
