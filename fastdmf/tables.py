"""Entries and tables in files: CSV and its like, parquet, MatrixMarket, scipy's sparse npz, npy.

pyarrow reads and writes text and parquet, a block at a time, scipy MatrixMarket; what a file is, its first bytes say
and not its name. Ids come back as they stand: integers where every one of a side is one as Python writes it, so that
007 stays what it is, else strings. Errors name the file, the line and what to do.
"""

import gzip
import io
import os
import re
from collections.abc import Collection
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from scipy import io as scipy_io
from scipy import sparse

from fastdmf.column_text import ColumnText, TableError, first_null, load_pyarrow, short, whole_archive
from fastdmf.files import open_file, whole_file
from fastdmf.ids import read_ids

__all__ = [
    "MixedIdsError",
    "Table",
    "TableError",
    "iter_entries",
    "read_entries",
    "read_matrix",
    "read_table",
    "write_entries",
    "write_table",
]

_SHOWN = 200  # characters of others' errors, which may quote what they found
_BATCH = 1 << 20  # rows of parquet read, and of any file written, at a time
# Entries of a part. Twice as many: 1.44 GB instead of 1.17 for shards of 40 million, in the same time.
_PART = 1 << 22
_SIDES = "row", "column"
# What pandas, R and spreadsheets write where there is nothing.
_MISSING = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "-nan", "null", "NULL", "None")
# What scipy pads with zeros that nobody observed.
_PADDED = ("bsr", "dia")
# Where its other formats have their indices; what it reserves for COO is one array of both.
_INDICES = {"csr": ("indices", "indptr"), "csc": ("indices", "indptr"), "coo": ("row", "col")}
# An integer as Python writes it: two spellings of one number would be two ids, or one id would have lost its zeros.
_PLAIN_INTEGER = r"^(0|-?[1-9][0-9]*)$"


class Table(NamedTuple):
    """What :func:`read_table` returns.

    Attributes
    ----------
    values : ndarray of shape (n, p), float64
        NaN where nothing is known.
    columns : list of str or None
        Names, where the file has them.
    rows : ndarray of shape (n,) or None
        Ids, int64 or strings as objects, where the file has them.
    """

    values: np.ndarray
    columns: list | None
    rows: np.ndarray | None


class MixedIdsError(TableError):
    """Ids of one side that are integers in the first parts of a file and texts in a later one.

    Attributes
    ----------
    side : {"row", "column"}
    """

    def __init__(self, message, side):
        super().__init__(message)
        self.side = side


def read_entries(
    path, *, row=None, column=None, value=None, separator=None, header="auto", decimal=".", encoding="utf-8"
):
    r"""Return the entries of a matrix from a file.

    Parameters
    ----------
    path : str or os.PathLike
        Text (CSV, TSV, ...; also gzipped) or parquet with one entry a line; a MatrixMarket file (``.mtx``,
        ``.mtx.gz``); a sparse matrix of ``scipy.sparse.save_npz``; or a dense matrix of ``numpy.save`` with NaN where
        nothing is known.
    row, column, value : str or int, optional
        Names of the columns, or their places from 0. By default the first three, those that are named left out.
        ``value=False`` reads pairs alone; so does a file of two columns. Text and parquet only.
    separator : str, optional
        One character, by default found among tab, semicolon, comma, bar and blank. Text only, as all that follow.
    header : bool or "auto"
        Whether the first line holds names. ``"auto"`` takes it for names where a column is named, where its value is
        no number, and in files of pairs where it alone is no pair of integers.
    decimal : str
        The decimal point.
    encoding : str

    Returns
    -------
    rows, columns : ndarray of shape (k,)
        Ids, int64 or strings as objects; positions from 0 where the file is a matrix.
    values : ndarray of shape (k,) or None
        float64, or float32 where a binary file holds that or small integers; None for pairs.

    Raises
    ------
    TableError
        If the file is no table, or empty; if a line is malformed, an id is missing, or a value is no finite number:
        with the line. If a column is not there: with those that are.
    OSError
        If the file is missing or cannot be read.
    ImportError
        If pyarrow is needed and missing.

    Notes
    -----
    Texts that are ids keep their blanks and zeros. An id occurs as often as it has entries, and entries may come
    twice: ``DMFCompleter(duplicates=...)`` says what becomes of them.

    Examples
    --------
    >>> import os, tempfile
    >>> from fastdmf.tables import read_entries
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "ratings.csv")
    ...     with open(path, "w") as file:
    ...         _ = file.write("user;film;stars\nann;12;4,5\nbob;7;3\n")
    ...     rows, columns, values = read_entries(path, decimal=",")
    >>> rows.tolist(), columns.tolist(), values.tolist()
    (['ann', 'bob'], [12, 7], [4.5, 3.0])
    """
    layout = {"separator": separator, "header": header, "decimal": decimal, "encoding": encoding}
    (entries,) = _parts(path, (row, column, value), layout, np.inf, ())
    return entries


def iter_entries(path, *, texts=(), size=_PART, row=None, column=None, value=None, **layout):
    r"""Yield the entries of a file part by part, so that it may be larger than memory.

    Parameters
    ----------
    path, row, column, value
        As of :func:`read_entries`. Text and parquet come in parts; a matrix is one.
    texts : collection of str
        Sides, of "row" and "column", whose ids are texts whatever they look like. Those of another are integers if
        they are in the first part.
    size : int
        Least number of entries of a part, the last one aside.
    **layout
        ``separator``, ``header``, ``decimal`` and ``encoding``, as of :func:`read_entries`.

    Yields
    ------
    rows, columns, values
        As :func:`read_entries` returns them.

    Raises
    ------
    MixedIdsError
        If ids are texts behind parts in which they were integers: begin again with their side among ``texts``.
    TableError, OSError, ImportError
        As :func:`read_entries`.

    See Also
    --------
    fastdmf.write_shards : Takes parts.

    Examples
    --------
    >>> import os, tempfile
    >>> import fastdmf
    >>> from fastdmf.tables import iter_entries
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "ratings.csv")
    ...     with open(path, "w") as file:
    ...         _ = file.write("ann,12,4\nbob,7,3\ncid,7,5\n")
    ...     fastdmf.write_shards(os.path.join(folder, "entries"), iter_entries(path, size=2), ids=True)
    <EntryShards: 3 x 2, 3 entries, 1 + 1 shards>
    """
    if isinstance(texts, str) or not set(texts) <= set(_SIDES):
        raise ValueError(f"texts must hold 'row', 'column' or both, got {texts!r}")
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"size must be an integer >= 1, got {size!r}")
    usual = {"separator": None, "header": "auto", "decimal": ".", "encoding": "utf-8"}
    if unknown := set(layout) - set(usual):
        raise TypeError(f"iter_entries() got an unexpected keyword argument {min(unknown)!r}")
    yield from _parts(path, (row, column, value), usual | layout, size, texts)


def _parts(path, wanted, layout, size, texts):
    """Yield what :func:`iter_entries` does."""
    kind = _kind(path)
    if kind == "text":
        yield from _parts_of_text(ColumnText(path, **layout), wanted, size, _Ids(path, texts))
    elif kind == "parquet":
        yield from _parts_of_parquet(path, wanted, size, _Ids(path, texts, lines=False))
    else:
        for name, given in zip((*_SIDES, "value"), wanted):
            if given is not None and given is not False:
                raise TableError(f"{path!s} is a matrix without named columns: leave out {name}={given!r}")
        *ids, values = _entries_of_matrix(path, _read_matrix(path, kind))
        ids = [_as_texts(part) if side in texts else part for side, part in zip(_SIDES, ids)]
        yield *ids, None if wanted[2] is False else values


def read_matrix(path):
    """Return the entries of a file that is a matrix, with rows and columns that hold none.

    Parameters
    ----------
    path : str or os.PathLike
        MatrixMarket, sparse npz or dense npy, as of :func:`read_entries`.

    Returns
    -------
    scipy.sparse.coo_array or None
        None for text and parquet, which list entries.

    Raises
    ------
    TableError, OSError
        As :func:`read_entries`.
    """
    kind = _kind(path)
    if kind in ("text", "parquet"):
        return None
    matrix = _read_matrix(path, kind)
    rows, columns, values = _entries_of_matrix(path, matrix)
    return sparse.coo_array((values, (rows, columns)), matrix.shape)


def read_table(path, *, rows="auto", separator=None, header="auto", missing=(), decimal=".", encoding="utf-8"):
    """Return a table of numbers with holes from a file.

    Parameters
    ----------
    path : str or os.PathLike
        Text (CSV, TSV, ...; also gzipped), parquet, a dense matrix of ``numpy.save`` or a dense MatrixMarket file.
    rows : str, int, None or "auto"
        The column that holds the ids of the rows, by its name or place. ``"auto"`` takes the first one if it has no
        name or holds other things than numbers, and what pandas writes as an index to parquet; None takes none.
    separator : str, optional
        One character, by default found among tab, semicolon, comma, bar and blank. Text only, as all that follow.
    header : bool or "auto"
        Whether the first line holds names. ``"auto"`` takes it for names where it holds other things than numbers;
        names that are numbers, like years, need ``True``.
    missing : sequence of str
        Texts that mark a hole, besides nothing at all, NA, NaN, null, None and N/A.
    decimal : str
        The decimal point.
    encoding : str

    Returns
    -------
    Table

    Raises
    ------
    TableError
        If the file is no table, or empty; if a line is malformed, or a cell is no finite number: with line and column.
    OSError
        If the file is missing or cannot be read.
    ImportError
        If pyarrow is needed and missing.
    """
    kind = _kind(path)
    if kind == "text":
        return _table_of_text(ColumnText(path, separator, header, decimal, encoding), rows, missing)
    if kind == "parquet":
        return _table_of_parquet(path, rows)
    if rows not in ("auto", None):
        raise TableError(f"{path!s} is a matrix without named columns: leave out rows={rows!r}")
    matrix = _read_matrix(path, kind)
    if sparse.issparse(matrix):
        raise TableError(
            f"{path!s} is a sparse matrix, which read_entries reads: a table is dense, with NaN in its holes"
        )
    _refuse_infinite(path, matrix)
    return Table(matrix.astype(np.float64), None, None)


def write_entries(path, rows, columns, values=None, *, std=None, names=("row", "column", "value")):
    """Write entries to a file, from which :func:`read_entries` returns them.

    Parameters
    ----------
    path : str or os.PathLike
        Its name says what is written: ``.csv``, ``.tsv``, ``.csv.gz``, ``.tsv.gz``; ``.parquet``; and ``.npz`` (scipy's
        sparse) or ``.mtx``, where rows and columns are positions. A former file is replaced in one step.
    rows, columns : array-like of shape (k,)
        Integers or strings.
    values : array-like of shape (k,), optional
        Without them pairs are written, as text or parquet; NaN leaves a cell empty.
    std : array-like of shape (k,), optional
        Their standard deviations, a fourth column; text and parquet only.
    names : sequence of str
        Of the three columns.

    Raises
    ------
    TableError
        If the name says nothing that can be written, lengths differ, ids are neither integers nor strings, or a
        matrix is given ids that are no positions.
    OSError
        If the file cannot be written.
    ImportError
        If pyarrow is needed and missing.

    Notes
    -----
    Text does not tell strings of digits from integers: parquet does.
    """
    kind = _kind_by_name(path, ("text", "parquet", "npz", "mtx"))
    ids = {name: _writable_ids(part, data) for part, name, data in zip(("rows", "columns"), names, (rows, columns))}
    numbers = {name: np.asarray(data) for name, data in ((names[2], values), ("std", std)) if data is not None}
    for name, data in numbers.items():
        if data.dtype.kind not in "biuf" or data.ndim != 1:
            raise TableError(f"{name} must be one column of numbers, got dtype {data.dtype} and shape {data.shape}")
    lengths = {name: len(data) for name, data in (ids | numbers).items()}
    if len(lengths) < 2 + len(numbers):
        raise TableError(f"names must differ, got {tuple(names)}")
    if len(set(lengths.values())) > 1:
        raise TableError(f"rows, columns and values must be equally many, got {lengths}")
    if kind in ("text", "parquet"):
        return _write_columns(path, kind, ids | numbers, header=True)
    if values is None or std is not None or len(names) != 3:
        raise TableError(f"{path!s}: a matrix holds values and nothing else, write .csv or .parquet")
    _write_sparse(path, kind, *ids.values(), numbers[names[2]])


def write_table(path, values, columns=None, rows=None, *, row_name=""):
    """Write a table to a file, from which :func:`read_table` returns it.

    Parameters
    ----------
    path : str or os.PathLike
        Its name says what is written: ``.csv``, ``.tsv``, ``.csv.gz``, ``.tsv.gz``, ``.parquet`` or ``.npy``, which
        keeps no names. A former file is replaced in one step.
    values : array-like of shape (n, p)
        Numbers; NaN leaves a cell empty.
    columns : sequence of str, optional
        Names of the columns. Without them text has no header, and parquet has x0, x1, ...
    rows : array-like of shape (n,), optional
        Integers or strings, written as a first column.
    row_name : str
        Its name, by default none.

    Raises
    ------
    TableError
        If the name says nothing that can be written, or the shapes do not fit each other.
    OSError
        If the file cannot be written.
    ImportError
        If pyarrow is needed and missing.
    """
    kind = _kind_by_name(path, ("text", "parquet", "npy"))
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise TableError(f"values must be a matrix of numbers, got dtype {values.dtype} and shape {values.shape}")
    names = None if columns is None else [str(name) for name in columns]
    if names is not None and (len(names) != values.shape[1] or len(set(names)) < len(names)):
        raise TableError(f"columns must hold {values.shape[1]} different names, got {len(names)}: {names[:10]}")
    if kind == "npy":
        if names is not None or rows is not None:
            raise TableError(f"{path!s}: an .npy file keeps no names, write .csv or .parquet, or leave them out")
        with whole_file(path) as file:
            np.save(file, values)
        return
    data = {} if rows is None else {row_name: _writable_ids("rows", rows)}
    if rows is not None and len(data[row_name]) != len(values):
        raise TableError(f"rows must hold {len(values)} ids, got {len(data[row_name])}")
    if rows is not None and names is not None and row_name in names:
        name = f"the name {row_name!r}" if row_name else "an empty name"
        raise TableError(f"columns must not hold {name} beside rows, whose column is called so")
    data |= dict(zip(names or [f"x{k}" for k in range(values.shape[1])], values.T))
    _write_columns(path, kind, data, header=names is not None)


# --- what a file is ----------------------------------------------------------------------------------------------


def _kind(path):
    """Return what a file holds, by its first bytes."""
    with open_file(path) as file:
        start = file.read(16)
        if start[:2] == b"\x1f\x8b":
            file.seek(0)
            with whole_archive(path), gzip.open(file) as inner:
                start = inner.read(16)
            if start[:4] == b"PAR1" or start[:6] == b"\x93NUMPY" or start[:2] == b"PK":
                raise TableError(f"{path!s} is packed once more by gzip: gunzip it first")
    if not start:
        raise TableError(f"{path!s} is empty")
    if start[:4] == b"PAR1":
        return "parquet"
    if start[:6] == b"\x93NUMPY":
        return "npy"
    if start[:14].lower() == b"%%matrixmarket":
        return "mtx"
    if start[:4] == b"PK\x03\x04":
        return "npz"
    return "text"


def _kind_by_name(path, kinds):
    """Return what a file's name says it is to hold, one of ``kinds``."""
    known = {".csv": "text", ".tsv": "text", ".parquet": "parquet", ".npz": "npz", ".mtx": "mtx", ".npy": "npy"}
    known = {suffix: kind for suffix, kind in known.items() if kind in kinds}
    name = os.fspath(path).lower()
    packed = name.endswith(".gz")
    kind = known.get(os.path.splitext(name.removesuffix(".gz"))[1])
    if kind is None or (packed and kind != "text"):
        raise TableError(f"{path!s}: the name must end in one of {', '.join(known)}, text also in .gz")
    return kind


# --- entries -----------------------------------------------------------------------------------------------------


class _Ids:
    """What the ids of either side are, integers or texts, as the first part of a file says."""

    def __init__(self, path, texts, lines=True):
        self.path, self._lines = path, lines
        self._texts = [True if side in texts else None for side in _SIDES]

    def joined(self, axis, chunks):
        """Return the ids of a part, one array: dictionary arrays, or integers; the chunks are let go."""
        text, known = self._texts[axis], self._texts[axis] is not None
        if isinstance(chunks[0], np.ndarray):
            ids = _joined(chunks)
            ids = _as_texts(ids) if text else ids
        else:
            ids = _ids(self.path, chunks, text=bool(text) or not self._lines, lines=self._lines)
        self._texts[axis] = ids.dtype == object
        if known and self._texts[axis] != text:
            side = _SIDES[axis]
            raise MixedIdsError(
                f"{self.path!s} has {side} ids that are texts behind others that are integers: read them all as texts, "
                f"texts=({side!r},)",
                side,
            )
        return ids


def _as_texts(ids):
    return ids.astype(str).astype(object)


def _parts_of_text(text, wanted, size, kinds):
    if any(isinstance(name, str) for name in wanted):
        if text.told is not True and text.told != "auto":
            raise TableError(f"{text.path!s}: columns are named, which header=False says there are no names for")
        text.header = True
    if text.single and "::" in text.lines[0][0]:
        raise TableError(f"{text.path!s} is separated by '::': pass separator=':', row=0, column=2, value=4")
    places = _places(text.path, text.names, text.width, wanted)
    if text.told == "auto" and not text.header:
        text.header = _heads_entries(text, places)
    ids, values, held, total = ([], []), [], 0, 0
    floats = [] if places[2] is None else [places[2]]

    def part():
        return *(kinds.joined(axis, chunks) for axis, chunks in enumerate(ids)), _joined(values) if floats else None

    for first, batch in text.batches(floats, places[:2], ("",), ids_missing=True):
        for chunks, what, place in zip((*ids, values), ("row id", "column id", "value"), places):
            if place is None:
                continue
            data = batch.column(str(place))
            if data.null_count:
                line, shown = text.line(first + first_null(data))
                raise TableError(
                    f"{text.path!s}, line {line}, {text.name_of(place)}: the {what} is missing ({short(shown)}): "
                    "write it, or leave the line out"
                )
            chunks.append(data if what != "value" else _finite_numbers(text, first, place, data))
        held, total = held + len(batch), total + len(batch)
        if held >= size:
            yield part()
            held = 0
    if not total:
        raise TableError(f"{text.path!s} holds names and no entries: entries are one a line, below them")
    if held:
        yield part()


def _places(path, names, width, wanted):
    """Return the places of the columns (row, column, value): those asked for, then the first ones that are left."""
    found = [None, None, None]
    for k, name in enumerate(wanted):
        if name is not None and name is not False:
            found[k] = _place(path, names, width, name)
    taken = [place for place in found if place is not None]
    if len(set(taken)) < len(taken):
        raise TableError(f"row, column and value must be different columns, got {wanted}")
    rest = iter(place for place in range(width) if place not in taken)
    for k, name in enumerate(wanted):
        if name is None:
            found[k] = next(rest, None)
    if None in found[:2]:
        there = f"the columns {names}" if names else f"{width} column{'s' * (width > 1)}"
        raise TableError(f"{path!s} has {there}: row, column and value are needed; pass separator= if they are there")
    return found


def _place(path, names, width, name):
    """Return the place of a column that is called by its name or its place."""
    if isinstance(name, str):
        there = [k for k, other in enumerate(names) if other == name]
        if len(there) == 1:
            return there[0]
        fault = "several columns" if there else "no column"
        raise TableError(f"{path!s} has {fault} {name!r}: there are {names}; its place from 0 names one as well")
    if isinstance(name, bool) or not isinstance(name, (int, np.integer)) or not 0 <= name < width:
        raise TableError(f"a column is called by its name or its place from 0 to {width - 1}, got {name!r}: {path!s}")
    return int(name)


def _heads_entries(text, places):
    """Whether the first line holds names: its value is no number, or its ids alone are no integers."""

    def integer(cells, place):
        return re.match(_PLAIN_INTEGER, cells[place].strip()) is not None

    first, samples = text.lines[0], text.samples[not text.header :]
    of_integers = [place for place in places[:2] if samples and all(integer(cells, place) for cells in samples)]
    like_the_others = all(integer(first, place) for place in of_integers)
    if places[2] is None:
        return not like_the_others
    return not text.is_number(first[places[2]]) and not (of_integers and like_the_others)


def _finite_numbers(text, first, place, data):
    """Return a column without nulls as an array of finite numbers."""
    numbers = data.to_numpy(zero_copy_only=False)
    finite = np.isfinite(numbers)
    if not finite.all():
        line, shown = text.line(first + int(finite.argmin()))
        raise TableError(
            f"{text.path!s}, line {line}, {text.name_of(place)}: {numbers[finite.argmin()]} is no finite number "
            f"({short(shown)}): leave the line out"
        )
    return numbers


def _ids(path, chunks, *, text=False, lines=True):
    """Return ids of dictionary arrays, which are let go: int64 where all are plain integers, unless ``text``.

    An id with more than one line in it is refused if ``lines``.
    """
    pyarrow = load_pyarrow()
    whole = pyarrow.chunked_array(chunks).unify_dictionaries().chunks
    chunks.clear()
    distinct = whole[0].dictionary
    names = None
    if lines:
        broken = distinct.filter(pyarrow.compute.match_substring(distinct, "\n"))
        if len(broken):
            raise TableError(
                f"{path!s}: the id {short(broken[0].as_py())} goes on in the next line: is a quote left open?"
            )
    if not text:
        trimmed = pyarrow.compute.utf8_trim_whitespace(distinct)
        if pyarrow.compute.all(pyarrow.compute.match_substring_regex(trimmed, _PLAIN_INTEGER)).as_py():
            try:
                names = trimmed.cast(pyarrow.int64()).to_numpy()
            except pyarrow.ArrowInvalid:  # beyond 64 bits
                pass
    if names is None:
        names = distinct.to_numpy(zero_copy_only=False)
    out, at = np.empty(sum(map(len, whole)), names.dtype), 0
    for chunk in whole:
        out[at : at + len(chunk)] = names[chunk.indices.to_numpy()]
        at += len(chunk)
    return out


def _joined(chunks):
    """Return the arrays as one, which takes their place: none is kept beside what has been copied of it."""
    out = np.empty((sum(map(len, chunks)), *chunks[0].shape[1:]), chunks[0].dtype)
    chunks.reverse()
    at = 0
    while chunks:
        chunk = chunks.pop()
        out[at : at + len(chunk)] = chunk
        at += len(chunk)
    return out


# --- tables ------------------------------------------------------------------------------------------------------


def _table_of_text(text, rows, missing):
    texts = [missing] if isinstance(missing, str) else missing
    if not isinstance(texts, Collection) or not all(isinstance(mark, str) for mark in texts):
        raise TableError(f"missing must be texts that mark a hole, got {missing!r}")
    missing = (*_MISSING, *texts)
    number = lambda cell: cell.strip() in missing or text.is_number(cell)  # noqa: E731
    named = isinstance(rows, str) and rows != "auto"
    if named and text.told is not True and text.told != "auto":
        raise TableError(f"{text.path!s}: rows={rows!r} is a name, which header=False says there is none for")
    if text.told == "auto":
        text.header = named or _heads_table(text, number)
    at = None
    if named or not isinstance(rows, str):
        at = None if rows is None else _place(text.path, text.names, text.width, rows)
    elif not text.single and (
        (text.header and not text.names[0]) or not all(number(cells[0]) for cells in text.samples)
    ):
        at = 0
    floats = [k for k in range(text.width) if k != at]
    if not floats:
        raise TableError(f"{text.path!s} has no column of numbers beside the ids: pass rows=None, or separator=")
    values, ids = [], []
    for first, batch in text.batches(floats, [] if at is None else [at], missing):
        block = np.column_stack([batch.column(str(k)).to_numpy(zero_copy_only=False) for k in floats])
        infinite = np.argwhere(np.isinf(block))
        if len(infinite):
            line, shown = text.line(first + int(infinite[0][0]))
            raise TableError(
                f"{text.path!s}, line {line}, {text.name_of(floats[infinite[0][1]])}: no finite number "
                f"({short(shown)}): leave the cell empty if it is not known"
            )
        values.append(block)
        if at is not None:
            ids.append(batch.column(str(at)))
    if not sum(map(len, values)):
        raise TableError(f"{text.path!s} holds names and no rows: rows are one a line, below them")
    names = text.names
    names = None if names is None else [names[k] for k in floats]
    return Table(_joined(values), names, _ids(text.path, ids) if ids else None)


def _heads_table(text, number):
    """Whether the first line holds names: more than half of its cells are no numbers, ids of rows left aside."""
    first, samples = text.lines[0], text.samples[not text.header :]
    if text.single:
        return not number(first[0])
    named = sum(not number(cell) for cell in first[1:])
    beside = not number(first[0]) and samples and all(number(cells[0]) for cells in samples)
    return bool(2 * named > len(first) - 1 or beside)


# --- parquet -----------------------------------------------------------------------------------------------------


@contextmanager
def _parquet(path):
    """Yield the opened file; its errors say which it is."""
    pyarrow = load_pyarrow()
    try:
        with open_file(path) as file, pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        said = " ".join(str(error).split())[:_SHOWN]
        raise TableError(f"{path!s} is damaged, or no parquet file ({said}): copy it again") from None


def _parts_of_parquet(path, wanted, size, kinds):
    with _parquet(path) as parquet:
        names = parquet.schema_arrow.names
        places = _places(path, names, len(names), wanted)
        chunks = [[], [], []]
        at, held = 0, 0

        def part():
            ids = (kinds.joined(axis, chunks[axis]) for axis in (0, 1))
            return *ids, None if places[2] is None else _joined(chunks[2])

        used = [place for place in places if place is not None]
        for batch in parquet.iter_batches(_BATCH, columns=[names[k] for k in used]):
            for k, place in enumerate(places):
                if place is None:
                    continue
                data, what = batch.column(used.index(place)), ("row id", "column id", "value")[k]
                where = f"column {names[place]!r}"
                if data.null_count:
                    raise TableError(f"{path!s}, row {at + first_null(data)} (from 0), {where}: the {what} is missing")
                chunks[k].append(_numbers(path, where, data) if k == 2 else _parquet_ids(path, where, data))
                if k == 2 and not np.isfinite(chunks[k][-1]).all():
                    row = at + int(np.isfinite(chunks[k][-1]).argmin())
                    raise TableError(f"{path!s}, row {row} (from 0), {where}: no finite number: leave the entry out")
            at, held = at + len(batch), held + len(batch)
            if held >= size:
                yield part()
                held = 0
        if not at:
            raise TableError(f"{path!s} holds no entries")
        if held:
            yield part()


def _table_of_parquet(path, rows):
    with _parquet(path) as parquet:
        schema = parquet.schema_arrow
        names, types = schema.names, load_pyarrow().types
        if not names:
            raise TableError(f"{path!s} has no columns")
        if isinstance(rows, str) and rows == "auto":
            index = [name for name in (schema.pandas_metadata or {}).get("index_columns", ()) if isinstance(name, str)]
            if len(index) == 1 and index[0] in names:
                at = names.index(index[0])
            else:
                at = 0 if names[0] == "" or _is_text(types, schema.types[0]) else None
        else:
            at = None if rows is None else _place(path, names, len(names), rows)
        floats = [k for k in range(len(names)) if k != at]
        values, ids = [], []
        for batch in parquet.iter_batches(max(1, _BATCH // len(names))):
            block = np.empty((len(batch), len(floats)))
            for j, k in enumerate(floats):
                block[:, j] = _numbers(path, f"column {names[k]!r}", batch.column(k))
            _refuse_infinite(path, block, sum(map(len, values)), [names[k] for k in floats])
            values.append(block)
            if at is not None:
                data, where = batch.column(at), f"column {names[at]!r}"
                if data.null_count:
                    row = sum(map(len, values[:-1])) + first_null(data)
                    raise TableError(f"{path!s}, row {row} (from 0), {where}: the row id is missing")
                ids.append(_parquet_ids(path, where, data))
    if not floats or not sum(map(len, values)):
        raise TableError(f"{path!s} holds no numbers: it has the columns {names} and {sum(map(len, values))} rows")
    if ids:
        ids = _joined(ids) if isinstance(ids[0], np.ndarray) else _ids(path, ids, text=True, lines=False)
    return Table(_joined(values), [names[k] for k in floats], None if at is None else ids)


def _is_text(types, kind):
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view"


def _parquet_ids(path, where, data):
    """Return ids of a column: int64, or a dictionary array of strings."""
    pyarrow = load_pyarrow()
    if _is_text(pyarrow.types, data.type):
        plain = data if pyarrow.types.is_dictionary(data.type) else data.dictionary_encode()
        return plain.cast(pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    if pyarrow.types.is_integer(data.type) or pyarrow.types.is_floating(data.type):
        try:
            return read_ids(where, data.to_numpy(zero_copy_only=False))
        except (TypeError, ValueError) as error:
            raise TableError(f"{path!s}: {error}") from None
    raise TableError(f"{path!s}, {where} holds {data.type}, ids are integers or strings: convert them")


def _numbers(path, where, data):
    """Return a column as float32, if it holds that or small integers, else float64; NaN for nulls."""
    pyarrow = load_pyarrow()
    types, kind = pyarrow.types, data.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)):
        raise TableError(f"{path!s}, {where} holds {kind}, no numbers: encode it as numbers, or leave it out")
    small = types.is_boolean(kind) or (
        not types.is_decimal(kind) and kind.bit_width <= (32 if types.is_floating(kind) else 16)
    )
    return data.cast(pyarrow.float32() if small else pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False)


# --- matrices ----------------------------------------------------------------------------------------------------


def _read_matrix(path, kind):
    """Return the real matrix, sparse or dense, of a file that holds nothing else."""
    try:
        if kind == "mtx":
            with _market(path) as text:
                n, p, _, form, _, symmetry = scipy_io.mminfo(text)
            if 0 in (n, p):  # scipy 1.17 divides by it
                raise TableError(f"{path!s} holds an empty matrix, of shape {(n, p)}")
            if symmetry != "general":
                _check_symmetric(path, n, p, form, symmetry)
            with _market(path) as text:
                matrix = scipy_io.mmread(text)
        else:
            with open_file(path) as file:
                matrix = np.load(file, allow_pickle=False) if kind == "npy" else _read_npz(path, file)
    except TableError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and scipy have a dozen kinds for what bytes may be wrong
        said = " ".join(str(error).split()) or type(error).__name__
        raise TableError(f"{path!s} cannot be read as a matrix: {said[:_SHOWN]}") from None
    if matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
        raise TableError(f"{path!s} holds {matrix.dtype} of shape {matrix.shape}: a matrix of real numbers is needed")
    if 0 in matrix.shape:
        raise TableError(f"{path!s} holds an empty matrix, of shape {matrix.shape}")
    return matrix


def _check_symmetric(path, n, p, form, symmetry):
    """Refuse what is not square or not whole: scipy 1.17 writes beside the matrix, or fills it up with zeros."""
    if n != p:
        raise TableError(f"{path!s} holds a {symmetry} matrix of shape {(n, p)}: it must be square")
    if form == "array":
        with _market(path) as text:
            found = sum(1 for line in text if line.strip() and not line.startswith(b"%")) - 1
        needed = n * (n - 1) // 2 if symmetry == "skew-symmetric" else n * (n + 1) // 2
        if found != needed:
            raise TableError(f"{path!s} has {found} values, a {symmetry} matrix of {n} rows and columns has {needed}")


@contextmanager
def _market(path):
    """Yield the text of a MatrixMarket file."""
    with open_file(path) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip.open(file) if packed else file as text:
            yield io.BufferedReader(_Ended(text))


class _Ended(io.RawIOBase):
    """A text that ends with its line and holds no NUL: scipy 1.17 crashes on what follows a number in any other."""

    def __init__(self, file):
        self._file, self._ended = file, False

    def readable(self):
        """Whether it can be read."""
        return True

    def readinto(self, out):
        """Read into ``out`` and return how many bytes."""
        n = self._file.readinto(out)
        if b"\0" in bytes(out[:n]):
            raise ValueError("it holds NUL characters")
        if n == 0 and not self._ended and len(out):
            out[:1], n, self._ended = b"\n", 1, True
        return n


def _read_npz(path, file):
    """Return the matrix of ``scipy.sparse.save_npz``, whose own reader trusts the indices that it finds."""
    with np.load(file, allow_pickle=False) as archive:
        members = set(archive.files)
        if {"header", "seal"} <= members:
            raise TableError(f"{path!s} is a model: fastdmf.load reads it")
        if not {"format", "shape", "data"} <= members:
            raise TableError(
                f"{path!s} is a zip archive, but no sparse matrix of scipy.sparse.save_npz (a spreadsheet?): save it "
                "as CSV, parquet or .npy"
            )
        form = archive["format"].item()
        form = form.decode() if isinstance(form, bytes) else form
        if form in _PADDED:
            raise TableError(
                f"{path!s} is sparse in {form.upper()} format, which stores zeros of its own: save .tocsr()"
            )
        names = "coords" if form == "coo" and "coords" in members else _INDICES[form]
        data, shape = archive["data"], archive["shape"]
        indices = archive[names] if isinstance(names, str) else [archive[name] for name in names]
    if any(part.dtype.kind not in "iu" for part in (shape, *indices)):
        raise ValueError("its indices are no integers")
    if form == "coo":
        return sparse.coo_array((data, tuple(indices)), tuple(shape.tolist()))
    indptr = indices[1]
    if indptr.ndim != 1 or (indptr[1:] < indptr[:-1]).any():  # scipy's check leaves these out where it finds no entry
        raise ValueError("its pointers decrease")
    make = sparse.csr_array if form == "csr" else sparse.csc_array
    matrix = make((data, *indices), tuple(shape.tolist()))
    matrix.check_format(full_check=True)
    return matrix.tocoo()


def _entries_of_matrix(path, matrix):
    if sparse.issparse(matrix):
        matrix = matrix.tocoo()
        rows, columns, values = matrix.row, matrix.col, matrix.data
    else:
        rows, columns = np.nonzero(~np.isnan(matrix))
        values = matrix[rows, columns]
    if not len(values):
        raise TableError(f"{path!s} holds no entries")
    finite = np.isfinite(values)
    if not finite.all():
        k = int(finite.argmin())
        raise TableError(
            f"{path!s}, row {rows[k]}, column {columns[k]} (from 0): {values[k]} is no finite number: leave the entry "
            "out"
        )
    small = values.dtype.itemsize <= (4 if values.dtype.kind == "f" else 2)
    return rows.astype(np.int64), columns.astype(np.int64), values.astype(np.float32 if small else np.float64)


def _refuse_infinite(path, block, start=0, names=None):
    infinite = np.argwhere(np.isinf(block))
    if len(infinite):
        i, j = infinite[0]
        where = f"column {int(j) if names is None else names[j]!r}"
        raise TableError(f"{path!s}, row {start + i} (from 0), {where}: no finite number: write NaN if it is not known")


# --- writing -----------------------------------------------------------------------------------------------------


def _writable_ids(part, ids):
    try:
        return read_ids(part, ids)
    except (TypeError, ValueError) as error:
        raise TableError(str(error)) from None


def _write_columns(path, kind, data, header):
    """Write columns, name -> array, as text or parquet, a batch of rows at a time."""
    pyarrow = load_pyarrow()
    data = {name: _plain(column) for name, column in data.items()}
    kinds = {
        name: pyarrow.string() if c.dtype == object else pyarrow.from_numpy_dtype(c.dtype) for name, c in data.items()
    }
    schema = pyarrow.schema(list(kinds.items()))
    name = os.fspath(path).lower()
    length = len(next(iter(data.values()))) if data else 0
    with whole_file(path) as file:
        # Without time and name: equal entries make equal files.
        packed = gzip.GzipFile("", "wb", 6, file, mtime=0) if name.endswith(".gz") else file
        sink = pyarrow.PythonFile(packed, "w")
        if kind == "text":
            separator = "\t" if ".tsv" in name[-7:] else ","
            options = pyarrow.csv.WriteOptions(include_header=header, delimiter=separator)
            writer = pyarrow.csv.CSVWriter(sink, schema, write_options=options)
        else:
            writer = pyarrow.parquet.ParquetWriter(sink, schema, write_page_checksum=True)
        with writer:
            for k in range(0, length, _BATCH):
                at = slice(k, k + _BATCH)
                try:
                    columns = [pyarrow.array(data[name][at], kinds[name], from_pandas=True) for name in data]
                except UnicodeEncodeError as error:
                    raise TableError(f"{path!s}: an id is no text that UTF-8 can hold: {error.object!r}") from None
                writer.write_batch(pyarrow.record_batch(columns, schema=schema))
        if packed is not file:
            packed.close()


def _plain(column):
    """Return a column in a dtype that every format knows."""
    if column.dtype == object or column.dtype in (np.float32, np.float64) or column.dtype.kind in "iu":
        return column
    return column.astype(
        {"b": np.int8, "f": np.float32 if column.dtype.itemsize < 4 else np.float64}[column.dtype.kind]
    )


def _write_sparse(path, kind, rows, columns, values):
    """Write entries as a sparse matrix, as large as they reach."""
    if not len(values) or not np.isfinite(values).all():
        raise TableError(f"{path!s}: a matrix needs entries, all of them finite: write .csv or .parquet")
    if rows.dtype == object or columns.dtype == object or min(rows.min(), columns.min()) < 0:
        raise TableError(f"{path!s}: a matrix has positions from 0, and these ids are others: write .csv or .parquet")
    shape = int(rows.max()) + 1, int(columns.max()) + 1
    matrix = sparse.coo_array((_plain(values), (rows, columns)), shape)
    with whole_file(path) as file:
        if kind == "npz":
            sparse.save_npz(file, matrix)
        else:
            scipy_io.mmwrite(file, matrix, symmetry="general")
