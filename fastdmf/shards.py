"""Entries of a matrix on disk, in runs of rows and again in runs of columns, for fits that do not hold them in memory.

A folder of shards has one index, ``index.json``, and arrays in ``.npy`` files that can be mapped: pointers of all rows
and of all columns, and for each run of rows (columns) the columns (rows) of its entries, their values and perhaps
their weights, sorted by row, then column (by column, then row), with ``PAD`` zeros behind the last, as
``kernels.row_solve`` takes them. An entry takes 16 bytes, 8 for each order, with float32 values and fewer than 2^31
rows and columns; 24 with weights.

``write_shards`` reads its entries once. A first pass appends them to a file and counts rows and columns; these counts
say where the runs begin, so that a second pass can append every entry to the file of its run of rows. Each of those is
sorted in memory, saved, and dealt out to the files of the runs of columns, which are sorted and saved last. The disk
needs room for two records an entry, 24 bytes, or 32 with weights.
"""

import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterable
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastdmf.backend import get_backend
from fastdmf.checkpoint import digest
from fastdmf.checks import check_count, check_real
from fastdmf.contract import check_shape
from fastdmf.ids import IdTable, read_ids

__all__ = ["EntryShards", "write_shards"]

_FORMAT, _VERSION = "fastdmf entry shards", 1
_INDEX = "index.json"
_SIDES = "rows", "columns"
_SHARD_ENTRIES = 1 << 22  # 50 MB of indices, values and centred values at a time
_FEWEST = 1 << 16  # entries that are dealt out at a time, where shards have fewer
_MOST_PAD = 1 << 16
_SHOWN = 200  # characters of others' errors
_ADVICE = "write it again with write_shards(...)"


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shards(folder, parts, shape=None, *, ids=False, dtype="float32", shard_entries=_SHARD_ENTRIES):
    """Write entries that come part by part to a folder of shards, with bounded memory.

    Parameters
    ----------
    folder : str or os.PathLike
        New or empty; its parent must exist. It appears whole at the end, or not at all.
    parts : iterable of tuples (rows, cols, values) or (rows, cols, values, weights)
        Arrays of shape (k,), entries in any order, each at most once over all parts. ``rows`` and ``cols`` are integers
        from 0. Weights >= 0 as in :func:`fastdmf.vbmf`. Read once.
    shape : tuple of int, optional
        (n1, n2); by default as far as the indices reach.
    ids : bool
        Whether rows and columns are called by ids, integers or strings, instead: they get positions in the order of
        their first part (in their own order within a part), and ``EntryShards.row_ids`` and ``column_ids`` tell them.
        Every part sorts all ids so far: fewer, larger parts are quicker.
    dtype : {"float32", "float64"}
        Of the values and weights on disk.
    shard_entries : int
        Entries of a run of rows, or of columns. A run is whole rows, and one row of more entries is never divided.
        Memory is about 60 bytes for each, 8 for each row and column, and what the largest part takes.

    Returns
    -------
    EntryShards

    Raises
    ------
    TypeError, ValueError
        If a part is no such tuple, an index is negative or out of range, values or weights are NaN, infinite or
        overflow ``dtype``, an entry comes twice, there is no entry, or the folder is in use.
    OSError
        If files cannot be written.

    See Also
    --------
    EntryShards : Opens the folder again.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> import fastdmf
    >>> def parts():
    ...     for rows in np.array_split(np.arange(60), 4):
    ...         i, j = np.repeat(rows, 10), np.tile(np.arange(10), len(rows))
    ...         yield i, j, np.sin(i) + np.cos(j)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     shards = fastdmf.write_shards(os.path.join(place, "entries"), parts())
    ...     solution = fastdmf.vbmf(shards, random_state=0, on_failure="ignore")
    >>> shards
    <EntryShards: 60 x 10, 600 entries, 1 + 1 shards>
    >>> solution.matrix().shape
    (60, 10)
    """
    folder = _path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"folder {str(folder)!r} is in use: delete it, or name another")
    if not folder.parent.is_dir():
        raise ValueError(f"folder must lie in one that exists, got {str(folder)!r}")
    if not isinstance(ids, (bool, np.bool_)):
        raise ValueError(f"ids must be True or False, got {ids!r}")
    if ids and shape is not None:
        raise ValueError(f"shape must be None with ids=True, which count rows and columns themselves, got {shape!r}")
    if not isinstance(parts, Iterable) or isinstance(parts, np.ndarray):
        raise TypeError(f"parts must be an iterable of (rows, cols, values), got {type(parts).__name__}")
    shape = None if shape is None else check_shape(shape)
    dtype = _check_dtype(dtype)
    check_count("shard_entries", shard_entries)
    with _whole(folder) as place:
        _Writer(place, shape, bool(ids), dtype, int(shard_entries)).write(parts)
    return EntryShards(folder)


def _path(folder):
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder must be a str or an os.PathLike, got {type(folder).__name__}")
    return Path(folder)


@contextmanager
def _whole(folder):
    """Give a new folder beside ``folder`` that takes its place at the end, or vanishes on errors."""
    place = folder.with_name(f"{folder.name}.{os.getpid()}.{threading.get_ident()}.new")
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
    place.mkdir()
    try:
        yield place
        if folder.exists():
            folder.rmdir()
        os.replace(place, folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


class _Writer:
    """Write one folder: records of entries go from the parts through files of runs to sorted arrays."""

    def __init__(self, place, shape, ids, dtype, shard_entries):
        self.place, self.shape, self.dtype, self.shard_entries = place, shape, dtype, shard_entries
        self.kernels = get_backend().kernels
        self.tables = [None, None] if ids else None
        self.reach = list(shape or (0, 0))  # rows and columns so far
        self.counts = [np.zeros(n, np.int64) for n in self.reach]
        self.weighted, self.record = None, None
        self.files, self.sides, self.means = {}, {}, []

    def write(self, parts):
        """Write all."""
        spool = self.place / "spool"
        self._spool(spool, parts)
        n1, n2 = self.shape = tuple(self.reach)
        self.counts = [counts[:n] for counts, n in zip(self.counts, self.shape)]
        cuts = [_cuts(counts, self.shard_entries) for counts in self.counts]
        chunk = max(self.shard_entries, _FEWEST)
        self._deal(_records(spool, self.record, chunk), 0, cuts[0])
        spool.unlink()
        for name, axis in zip(_SIDES, (0, 1)):
            pointers = np.append(0, np.cumsum(self.counts[axis]))
            self._save(f"{name}.pointers.npy", pointers)
            for k, (begin, end) in enumerate(pairwise(cuts[axis].tolist())):
                records = self._sort(axis, k, begin, end)
                if axis == 0:
                    self._deal((records[at : at + chunk] for at in range(0, len(records), chunk)), 1, cuts[1])
            self.sides[name] = cuts[axis].tolist()
        index = {
            "format": _FORMAT,
            "version": _VERSION,
            "shape": [n1, n2],
            "entries": int(self.counts[0].sum()),
            "mean": _mean(self.means),
            "dtype": self.dtype.name,
            "weighted": self.weighted,
            "pad": self.kernels.PAD,
            "cuts": self.sides,
            "ids": self._save_ids(),
            "files": self.files,
        }
        # Last: what has an index is whole.
        with open(self.place / _INDEX, "w", encoding="utf-8") as file:
            json.dump(index, file, indent=1)

    # --- the first pass: parts to records ----------------------------------------------------------------------------

    def _spool(self, path, parts):
        """Append the records of all parts to one file, and count rows and columns."""
        total = 0.0
        with open(path, "wb") as file:
            for k, part in enumerate(parts):
                records = self._read(k, part)
                total += float(records["weight"].sum(dtype=np.float64)) if self.weighted else len(records)
                file.write(records.view(np.uint8).data)
        if self.weighted is None or not self.counts[0].any():
            raise ValueError("parts hold no entry: at least one observed entry is needed")
        if total == 0:
            raise ValueError("weights are zero everywhere: at least one entry must count")

    def _read(self, k, part):
        """Return the records of part k, and count its rows and columns."""
        if not isinstance(part, (tuple, list)) or len(part) not in (3, 4):
            got = f"{len(part)} items" if isinstance(part, (tuple, list)) else type(part).__name__
            raise TypeError(f"part {k} must be (rows, cols, values) or (rows, cols, values, weights), got {got}")
        if self.weighted is None:
            self.weighted = len(part) == 4
        if self.weighted != (len(part) == 4):
            raise ValueError(f"part {k} has {len(part)} items, part 0 has {7 - len(part)}: weights go with all or none")
        rows, cols = (self._places(axis, k, part[axis]) for axis in (0, 1))
        if self.record is None:
            names = ["value", "weight"] if self.weighted else ["value"]
            self.record = np.dtype([("row", rows.dtype), ("col", cols.dtype), *((name, self.dtype) for name in names)])
        data = [np.asarray(values) for values in part[2:]]
        for name, values in zip(("cols", "values", "weights"), (cols, *data)):
            if values.shape != rows.shape:
                raise ValueError(f"{name} of part {k} must have the shape of rows, {rows.shape}, got {values.shape}")
        records = np.empty(len(rows), self.record)
        records["row"], records["col"] = rows, cols
        for name, values in zip(("value", "weight"), data):
            self._fill(records, name, k, values)
        for counts, places in zip(self.counts, (rows, cols)):
            np.add.at(counts, places, 1)
        return records

    def _places(self, axis, k, values):
        """Return rows or columns as positions, int32 wherever it holds all, and let the counts reach them."""
        name = ("rows", "cols")[axis]
        values = np.asarray(values)
        if values.ndim != 1:
            raise ValueError(f"{name} of part {k} must have 1 dimension, got shape {values.shape}")
        if self.tables is not None:
            table = self.tables[axis]
            ids = ("row", "column")[axis], values
            self.tables[axis], values = IdTable.of(*ids) if table is None else table.extend(values)
        elif values.size and values.dtype.kind not in "iu":
            raise TypeError(f"{name} of part {k} must hold integers, got dtype {values.dtype}")
        limit = np.iinfo(np.int32).max if self.shape is None else self.shape[axis]
        low, high = (int(values.min()), int(values.max())) if values.size else (0, -1)
        if low < 0:
            raise ValueError(f"{name} of part {k} must not be negative, got {low} (indices count from 0)")
        if high >= limit:
            what = f"below {limit}, the matrix's size in that direction"
            if self.shape is None:
                what = f"below {limit} where no shape is given: pass shape=(n1, n2), or ids=True"
            raise ValueError(f"{name} of part {k} must be {what}, got {high}")
        self.reach[axis] = max(self.reach[axis], high + 1)
        if high >= len(self.counts[axis]):
            # Twice as far as needed: parts may reach a little farther each.
            self.counts[axis] = np.pad(self.counts[axis], (0, 2 * (high + 1) - len(self.counts[axis])))
        return values.astype(self.kernels.index_type(limit), copy=False)

    def _fill(self, records, name, k, values):
        """Put values or weights into records, refusing what is not finite."""
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            row, col = self._names(records["row"][bad], records["col"][bad])
            raise ValueError(
                f"{name}s of part {k} contain NaN or infinite ones, the first at row {row}, column {col}: "
                "leave those entries out"
            )
        values = check_real(f"{name}s of part {k}", values, (1,))
        if name == "weight" and (values < 0).any():
            raise ValueError(f"weights of part {k} must not be negative")
        with np.errstate(over="ignore"):
            records[name] = values
        if not np.isfinite(records[name]).all():
            raise ValueError(f"{name}s of part {k} overflow in {self.dtype}: scale them, or use dtype='float64'")

    def _names(self, row, col):
        """Return what the user calls a position."""
        if self.tables is None:
            return int(row), int(col)
        return tuple(table.ids[k] for table, k in zip(self.tables, (row, col)))

    # --- the second pass: records to runs ----------------------------------------------------------------------------

    def _run(self, axis, k):
        return self.place / f"{_SIDES[axis]}-{k:05d}.run"

    def _deal(self, chunks, axis, cuts):
        """Append each record to the file of its run of rows (axis 0) or columns (1)."""
        # Numbers of 16 bits are sorted by counting.
        kind = np.uint16 if len(cuts) <= 1 << 16 else np.int64
        run_of = np.repeat(np.arange(len(cuts) - 1, dtype=kind), np.diff(cuts))
        for records in chunks:
            runs = run_of[records[("row", "col")[axis]]]
            records = records.take(np.argsort(runs, kind="stable"))
            ends = np.append(0, np.cumsum(np.bincount(runs, minlength=len(cuts) - 1)))
            for k in np.flatnonzero(np.diff(ends)):
                with open(self._run(axis, k), "ab") as file:
                    file.write(records[ends[k] : ends[k + 1]].view(np.uint8).data)

    def _sort(self, axis, k, begin, end):
        """Sort run k, the rows or columns from ``begin`` to ``end``, and save it; return its sorted records."""
        path = self._run(axis, k)
        records = np.fromfile(path, self.record) if path.exists() else np.empty(0, self.record)
        path.unlink(missing_ok=True)
        major, minor = (records["row"], records["col"])[:: 1 if axis == 0 else -1]
        n = self.shape[1 - axis]
        _, indices, order = self.kernels.entry_sort(major - major.dtype.type(begin), minor, end - begin, n)
        records = records.take(order)
        if axis == 0:
            self._refuse_duplicates(records)
            weights = records["weight"].copy() if self.weighted else None
            self.means.append(_mean_and_weight(records["value"].copy(), weights))
        self._save(f"{_SIDES[axis]}-{k:05d}.indices.npy", indices)
        for name in ("value", "weight") if self.weighted else ("value",):
            data = np.zeros(len(indices), self.dtype)
            data[: len(records)] = records[name]
            self._save(f"{_SIDES[axis]}-{k:05d}.{name}s.npy", data)
        return records

    def _refuse_duplicates(self, records):
        again = (records["row"][1:] == records["row"][:-1]) & (records["col"][1:] == records["col"][:-1])
        if again.any():
            first = int(again.argmax())
            row, col = self._names(records["row"][first], records["col"][first])
            raise ValueError(
                f"entries occur more than once, the first at row {row}, column {col}: combine duplicate entries "
                "(sum, mean or last) before, in one part and over all"
            )

    # --- files -------------------------------------------------------------------------------------------------------

    def _save(self, name, array):
        np.save(self.place / name, array)
        self._enlist(name, zlib.crc32(array))

    def _save_ids(self):
        """Save the ids as JSON, which has integers and strings; return whether there are any."""
        for name, table in zip(_SIDES, self.tables or ()):
            text = json.dumps(table.ids.tolist()).encode()
            self.place.joinpath(f"{name}.ids.json").write_bytes(text)
            self._enlist(f"{name}.ids.json", zlib.crc32(text))
        return self.tables is not None

    def _enlist(self, name, checksum):
        self.files[name] = [self.place.joinpath(name).stat().st_size, checksum]


def _check_dtype(dtype):
    if dtype is not None:
        try:
            if (found := np.dtype(dtype)) in (np.float32, np.float64):
                return found
        except TypeError:
            pass
    raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")


def _cuts(counts, most):
    """Return where runs of about ``most`` entries begin, and the number of rows."""
    pointers = np.append(0, np.cumsum(counts))
    total = int(pointers[-1])
    runs = -(-total // most)
    targets = np.arange(1, runs) * (total / runs)
    return np.unique(np.concatenate([[0], np.searchsorted(pointers, targets), [len(counts)]]))


def _records(path, dtype, count):
    """Yield the records of a file, ``count`` at a time."""
    with open(path, "rb") as file:
        while len(records := np.fromfile(file, dtype, count)):
            yield records


def _mean_and_weight(values, weights):
    """Return the mean of a run and the sum of its weights; of one run it has the bits of that in memory."""
    if weights is None:
        return float(values.mean(dtype=np.float64)) if len(values) else 0.0, float(len(values))
    weight = float(weights.sum(dtype=np.float64))
    return float(np.average(values, weights=weights)) if weight else 0.0, weight


def _mean(parts):
    """Return the mean of runs with these means and weights."""
    mean = total = 0.0
    for value, weight in parts:
        total += weight
        if weight:
            mean += (value - mean) * (weight / total)
    return mean


# --- reading ---------------------------------------------------------------------------------------------------------


class EntryShards:
    """Entries on disk as :func:`fastdmf.write_shards` wrote them; :func:`fastdmf.vbmf` takes them like a mask.

    Parameters
    ----------
    folder : str or os.PathLike
    dtype : numpy dtype, optional
        float32 or float64, in which fits compute; default that of the values on disk.

    Attributes
    ----------
    folder : Path
    shape : tuple of int
    size : int
        Number of entries.
    mean : float
        (Weighted) mean of the values.
    dtype : numpy dtype
        In which fits compute.
    weighted : bool
        Whether entries have weights.
    digest : str
        Tells folders with other entries or other runs apart.

    Raises
    ------
    ValueError
        If the folder holds no shards, files are missing or cut short, or a later version of the library wrote it.

    Notes
    -----
    Opening reads the index and the pointers, 8 bytes a row and column, and compares the sizes of all files;
    :meth:`verify` compares their bytes as well.
    """

    def __init__(self, folder, dtype=None):
        self.folder = _path(folder)
        index = self._read_index()
        try:
            self._parse(index)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN]
            raise ValueError(f"index of {str(self.folder)!r} is damaged ({reason}): {_ADVICE}") from error
        self._check_sizes()
        self._pointers = [self._read_pointers(axis) for axis in (0, 1)]
        self._checked = set()
        self.digest = digest(index)
        self.dtype = self._stored if dtype is None else _check_dtype(dtype)

    def __repr__(self):
        runs = " + ".join(str(len(cuts) - 1) for cuts in self._cuts)
        return f"<EntryShards: {self.shape[0]} x {self.shape[1]}, {self.size} entries, {runs} shards>"

    @cached_property
    def row_ids(self):
        """Ids of the rows in the order of their positions; positions themselves without ``ids=True``."""
        return self._read_ids(0)

    @cached_property
    def column_ids(self):
        """Ids of the columns in the order of their positions; positions themselves without ``ids=True``."""
        return self._read_ids(1)

    @cached_property
    def limits(self):
        """The lowest and the highest value."""
        counts = np.diff(self._pointers[0][self._cuts[0]])
        # One run after the other: what is mapped counts as the process's memory.
        runs = (self._block(0, k)[1][:count] for k, count in enumerate(counts) if count)
        lowest, highest = zip(*((run.min(), run.max()) for run in runs))
        return float(min(lowest)), float(max(highest))

    def parts(self):
        """Yield (rows, cols, values), with weights where there are any, one run of rows at a time.

        To leave entries out, or to change them, write these parts anew.
        """
        pointers = self._pointers[0]
        for k, (begin, end) in enumerate(pairwise(self._cuts[0].tolist())):
            arrays = self._block(0, k)
            rows = np.repeat(np.arange(begin, end), np.diff(pointers[begin : end + 1]))
            yield rows, *(array[: len(rows)].copy() for array in arrays)

    def verify(self):
        """Read all files and compare them with the checksums in the index.

        Raises
        ------
        ValueError
            If one has changed since it was written.
        """
        for name, (_, checksum) in self._files.items():
            path = self.folder / name
            data = path.read_bytes() if path.suffix == ".json" else self._load(name)
            if zlib.crc32(data) != checksum:
                raise ValueError(f"file {str(path)!r} has changed since it was written: {_ADVICE}")

    def sides(self, dtype=None):
        """Return the entries by row and by column as ``alternating.Sweeps`` takes them, less their mean.

        Parameters
        ----------
        dtype : numpy dtype, optional
            float32 or float64, that of the fit; default ``self.dtype``.
        """
        dtype = _check_dtype(self.dtype if dtype is None else dtype)
        return [ShardSide(self, axis, dtype) for axis in (0, 1)]

    # --- files -------------------------------------------------------------------------------------------------------

    def _read_index(self):
        path = self.folder / _INDEX
        if not path.is_file():
            raise ValueError(f"folder {str(self.folder)!r} holds no entry shards: write_shards(...) makes them")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            known = index["format"] == _FORMAT
            version = index["version"]
        except (LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"index of {str(self.folder)!r} is damaged or none of fastdmf's: {_ADVICE}") from error
        if not known:
            raise ValueError(f"index of {str(self.folder)!r} is none of fastdmf's: {_ADVICE}")
        if version != _VERSION:
            raise ValueError(
                f"folder {str(self.folder)!r} has version {str(version)[:_SHOWN]} of the format, this release reads "
                f"{_VERSION}: "
                f"{_ADVICE}"
            )
        return index

    def _parse(self, index):
        """Set what the index says, once it can be so: kernels read where it leads."""
        self.shape, self.size = check_shape(index["shape"]), check_count("entries", index["entries"])
        self.mean, self._stored, self.weighted = index["mean"], _check_dtype(index["dtype"]), index["weighted"]
        self._has_ids = index["ids"]
        self._pad = check_count("pad", index["pad"], get_backend().kernels.PAD)
        if self._pad > _MOST_PAD:
            raise ValueError(f"pad must be at most {_MOST_PAD}, got {self._pad}")
        if not all(isinstance(flag, bool) for flag in (self.weighted, self._has_ids)):
            raise TypeError("weighted and ids must be true or false")
        if not isinstance(self.mean, float) or not np.isfinite(self.mean):
            raise TypeError("mean must be a number")
        self._cuts = [np.array(index["cuts"][name]) for name in _SIDES]
        for cuts, n in zip(self._cuts, self.shape):
            if cuts.ndim != 1 or cuts.dtype != np.int64 or cuts[0] != 0 or cuts[-1] != n or (np.diff(cuts) < 1).any():
                raise ValueError("cuts do not divide the matrix")
        self._files = {name: (int(size), int(checksum)) for name, (size, checksum) in index["files"].items()}
        kinds = ["indices", "values", "weights"][: 3 if self.weighted else 2]
        known = {f"{name}.pointers.npy" for name in _SIDES}
        known |= {f"{name}.ids.json" for name in _SIDES if self._has_ids}
        for name, cuts in zip(_SIDES, self._cuts):
            known |= {f"{name}-{k:05d}.{kind}.npy" for k in range(len(cuts) - 1) for kind in kinds}
        if self._files.keys() != known:
            raise ValueError("files are not those of its runs")

    def _check_sizes(self):
        for name, (size, _) in self._files.items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"folder {str(self.folder)!r} lacks its file {name!r}: {_ADVICE}")
            if (found := path.stat().st_size) != size:
                raise ValueError(f"file {str(path)!r} has {found} bytes instead of {size}: {_ADVICE}")

    def _read_pointers(self, axis):
        name = f"{_SIDES[axis]}.pointers.npy"
        # Kernels read where these say.
        pointers = np.array(self._load(name))
        fits = pointers.shape == (self.shape[axis] + 1,) and pointers.dtype == np.int64
        fits = fits and pointers[0] == 0 and pointers[-1] == self.size and (np.diff(pointers) >= 0).all()
        if not fits or zlib.crc32(pointers) != self._files[name][1]:
            raise ValueError(f"file {str(self.folder / name)!r} has changed since it was written: {_ADVICE}")
        return pointers

    def _read_ids(self, axis):
        name = _SIDES[axis]
        if not self._has_ids:
            return np.arange(self.shape[axis])
        path = self.folder / f"{name}.ids.json"
        try:
            ids = read_ids(name, json.loads(path.read_text(encoding="utf-8")))
            if ids.shape != (self.shape[axis],):
                raise ValueError(f"{ids.shape} ids")
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"file {str(path)!r} has changed since it was written: {_ADVICE}") from error
        return ids

    def _load(self, name):
        """Return a file's array, mapped; private pages keep it writable for NumPy, which is one type for kernels."""
        try:
            return np.asarray(np.load(self.folder / name, mmap_mode="c", allow_pickle=False))
        except Exception as error:  # numpy has a dozen kinds for what bytes may be wrong
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN]
            raise ValueError(f"file {str(self.folder / name)!r} cannot be read ({reason}): {_ADVICE}") from error

    def _block(self, axis, k):
        """Return indices, values and perhaps weights of one run, mapped and padded."""
        begin, end = self._cuts[axis][k : k + 2]
        pointers = self._pointers[axis]
        count = int(pointers[end] - pointers[begin]) + self._pad
        kinds = ["indices", "values", "weights"][: 3 if self.weighted else 2]
        arrays = [self._load(f"{_SIDES[axis]}-{k:05d}.{kind}.npy") for kind in kinds]
        types = [(np.int32, np.int64), (self._stored,), (self._stored,)]
        for kind, array, allowed in zip(kinds, arrays, types):
            right = array.shape == (count,) and array.dtype in allowed
            # Once: kernels read where the indices lead, and one NaN would be everywhere.
            if right and (axis, k) not in self._checked:
                right = self._leads_inside(axis, array) if kind == "indices" else bool(np.isfinite(array).all())
            if not right:
                raise ValueError(f"{kind} of run {k} of {_SIDES[axis]} in {str(self.folder)!r} are damaged: {_ADVICE}")
        self._checked.add((axis, k))
        return arrays

    def _leads_inside(self, axis, indices):
        return bool(0 <= indices.min() and indices.max() < self.shape[1 - axis])


class ShardSide:
    """The rows, or the columns, of shards: the counterpart of ``alternating.HeldSide``.

    Attributes
    ----------
    indptr : ndarray of shape (n + 1,)
        Pointers of all rows.
    weighted : bool
    dtype : numpy dtype
    """

    def __init__(self, shards, axis, dtype):
        self.shards, self.axis, self.dtype = shards, axis, dtype
        self.indptr, self.weighted = shards._pointers[axis], shards.weighted

    def blocks(self):
        """Yield (slice of the rows, indptr, indices, y, w) of every run; y, less the mean, is overwritten by the next.

        Indices are mapped for as long as the block is in use, so that of the entries only one block counts as the
        process's memory, beside what the system caches of the files.
        """
        # Neither hints to read the next run ahead nor a thread that does made a fit with an empty cache faster.
        shards, cuts = self.shards, self.shards._cuts[self.axis]
        most = int(np.diff(self.indptr[cuts]).max()) + shards._pad
        y = np.zeros(most, self.dtype)
        for k, (begin, end) in enumerate(pairwise(cuts.tolist())):
            indices, values, *weights = shards._block(self.axis, k)
            indptr = self.indptr[begin : end + 1] - self.indptr[begin]
            count = int(indptr[-1])
            y[:count] = values[:count]
            y[:count] -= self.dtype.type(shards.mean)
            y[count : count + shards._pad] = 0
            w = weights[0].astype(self.dtype, copy=False) if weights else None
            yield slice(begin, end), indptr, indices, y, w

    def arrays(self):
        """Return (indptr, indices, y, w) of all entries, which read the places that are asked for."""
        w = _Stored(self, 2) if self.weighted else None
        return self.indptr, _Stored(self, 0), _Stored(self, 1), w


class _Stored:
    """Indices, values or weights of all entries in sorted order, read where they are indexed by an array of places."""

    def __init__(self, side, kind):
        self._side, self._kind = side, kind
        sample = side.shards._block(side.axis, 0)[0]
        self.dtype = sample.dtype if kind == 0 else side.dtype

    def __len__(self):
        return int(self._side.indptr[-1])

    def __getitem__(self, places):
        if not isinstance(places, np.ndarray) or places.dtype.kind not in "iu":
            raise TypeError(
                "the entries lie in shards on disk and can be read at some places only, by an array of integers: "
                "what needs all of them, as learning new entries does, takes a fit to an EntryMask, or a completer "
                "that was saved and loaded"
            )
        side, shards = self._side, self._side.shards
        starts = side.indptr[shards._cuts[side.axis][:-1]]
        runs = np.searchsorted(starts, places, side="right") - 1
        out = np.empty(places.shape, self.dtype)
        for k in np.unique(runs):
            here = runs == k
            out[here] = shards._block(side.axis, k)[self._kind][places[here] - starts[k]]
        if self._kind == 1:
            out -= self.dtype.type(shards.mean)
        return out
