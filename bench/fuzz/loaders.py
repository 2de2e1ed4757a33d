"""Files of entries and tables: text of a grammar, matrices and parquet of odd parts, and all of them with other bytes.

What is read has the promised types and is finite; what is not is refused with a ``TableError`` of one line that names
the file or the option. A text means the same gzipped, behind a byte order mark, in UTF-16, and read in small blocks.
"""

import gzip
import io
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st
from scipy import sparse

from bench.fuzz.harness import Case, Finding, refusal
from bench.fuzz.mutations import applied, byte_changes
from fastdmf import column_text
from fastdmf.tables import MixedIdsError, TableError, iter_entries, read_entries, read_table, write_entries, write_table

__all__ = ["CASES", "prepare"]

_NAME = "fuzzed.file"


def _read_parts(path, **options):
    """Return what ``read_entries`` does, in parts of two entries or a little more."""
    texts = set()
    while True:
        try:
            parts = list(iter_entries(path, size=2, texts=texts, **options))
        except MixedIdsError as error:
            texts.add(error.side)
        else:
            return tuple(None if side[0] is None else np.concatenate(side) for side in zip(*parts))


_READERS = {"entries": read_entries, "table": read_table, "parts": _read_parts}


@cache
def _path():
    return Path(tempfile.mkdtemp()) / _NAME


def _outcome(content, reader, options):
    """Return what is read, or the refusal; both checked."""
    _path().write_bytes(content)
    try:
        out = _READERS[reader](_path(), **options)
    except TableError as error:
        refusal(error, _NAME, *options)
        return error
    if reader != "table":
        rows, columns, values = out
        if not len(rows) == len(columns) >= 1:
            raise Finding(f"{len(rows)} rows and {len(columns)} columns")
        for ids in (rows, columns):
            _check_ids(ids)
        if values is not None and not (
            values.dtype in (np.float32, np.float64) and values.shape == rows.shape and np.isfinite(values).all()
        ):
            raise Finding(f"values {values!r}")
    else:
        n, p = out.values.shape
        if out.values.dtype != np.float64 or not n or not p or np.isinf(out.values).any():
            raise Finding(f"a table of {out.values!r}")
        if out.columns is not None and (len(out.columns) != p or not all(type(c) is str for c in out.columns)):
            raise Finding(f"columns {out.columns}")
        if out.rows is not None:
            _check_ids(out.rows)
            if len(out.rows) != n:
                raise Finding(f"{n} rows with the ids {out.rows}")
    return out


def _check_ids(ids):
    if ids.dtype != np.int64 and not (ids.dtype == object and all(type(text) is str for text in ids)):
        raise Finding(f"ids {ids!r}")


def _same(a, b):
    """Whether two outcomes are equal: two refusals, or equal values."""
    if isinstance(a, TableError) or isinstance(b, TableError):
        return isinstance(a, TableError) and isinstance(b, TableError)
    return all(
        (x is y is None) or (x is not None and y is not None and np.array_equal(x, y, equal_nan=not _objects(x)))
        for x, y in zip(a, b)
    )


def _objects(x):
    return not isinstance(x, np.ndarray) or x.dtype == object


# --- text --------------------------------------------------------------------------------------------------------

_digits = "0 1 -3 2.5 007 +4 1e5 1,5 1.5e-320 1e400 999999999999999999999 -0 1_000 .5 5. inf -Infinity nan NA null ١٢"
_numbers = st.sampled_from([*_digits.split(), "1 ", " 2"])
_odd = """ a é 日本 "a" "a,b" "a""b" " a"b "" # :: ' TRUE 2024-01-01 % 0x1F""".split(" ")
_cells = st.one_of(
    st.integers(0, 9).map(str),
    _numbers,
    st.sampled_from([*_odd, "user 1", '"a\nb"', "\0", "\ufeff", "x" * 300, "\x1a", "\u2028"]),
    st.floats(allow_nan=False).map(repr),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)


@st.composite
def _texts(draw):
    """Return the lines of a text: most of one width and of like cells, so that many are read."""
    width = draw(st.integers(1, 5))
    separator = draw(st.sampled_from([",", ";", "\t", " ", "|", ":", "::", ", "]))
    ending = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\n"]))
    usual = [draw(st.sampled_from(["id", "word", "number", "cell"])) for _ in range(width)]
    kinds = {"id": st.integers(0, 99).map(str), "word": st.sampled_from(["ann", "bob", "1a", '"c d"', "é"])}
    kinds |= {"number": st.floats(-9, 9, width=16).map(repr), "cell": _cells}
    lines = [[draw(kinds[kind]) for kind in usual] for _ in range(draw(st.integers(0, 8)))]
    if draw(st.booleans()):
        names = ["user", "item", "rating", "note", "time"][:width]
        lines.insert(0, [draw(st.just(name) | _cells) for name in names])
    for _ in range(draw(st.integers(0, 2))):
        if lines:
            line = lines[draw(st.integers(0, len(lines) - 1))]
            line[draw(st.integers(0, width - 1)) : width] = draw(st.lists(_cells, max_size=3))
    return ending.join(separator.join(line) for line in lines) + draw(st.sampled_from([ending, "", "\n\n", " "]))


_names = st.sampled_from(["user", "item", "rating", "é", "", 0, 1, 2, 4, 99, -1])
_encodings = "utf-8 latin-1 utf-16 utf-16-le utf-32 cp1252 utf-8-sig ascii utf-7 shift_jis rot13 hex idna x \0".split(
    " "
)
_text_options = {
    "separator": st.sampled_from([",", ";", "\t", " ", "|", ":", "x", "::", "", '"', "\n", "é", "\0", 7]),
    "header": st.sampled_from([True, False, "auto", "yes", 1, None]),
    "decimal": st.sampled_from([".", ",", ";", "", "..", None]),
    "encoding": st.sampled_from([*_encodings, None]),
}
_entry_options = {"row": _names, "column": _names, "value": _names | st.just(False)}
_table_options = {
    "rows": _names | st.sampled_from(["auto", None]),
    "missing": st.sampled_from(["x", ("0",), ("", "a"), (), ["\0"], (7,), 7]),
}


@st.composite
def _calls(draw, of_text=True):
    """Return (reader, options): the options off their default are few."""
    reader = draw(st.sampled_from(["entries", "table"]))
    known = (_text_options if of_text else {}) | (_entry_options if reader == "entries" else _table_options)
    if not of_text:
        known.pop("missing", None)
    chosen = draw(st.sets(st.sampled_from(sorted(known)), max_size=2)) if draw(st.integers(0, 2)) == 0 else ()
    return reader, {name: draw(known[name]) for name in sorted(chosen)}


def _check_text(value):
    text, changes, (reader, options) = value
    content = applied(text.encode("utf-8", "surrogatepass"), changes)
    out = _outcome(content, reader, options)
    if not isinstance(out, TableError) and len(out[0]) > len(content.splitlines()) + content.count(b"\r") + 1:
        raise Finding(f"{len(out[0])} rows of {len(content.splitlines())} lines")
    return not isinstance(out, TableError)


_TWINS = "gzip", "mark", "blocks", "parts", "utf-16", "utf-32", "utf-32-le"


def _check_twins(value):
    text, twin, (reader, options) = value
    options = {name: value for name, value in options.items() if name != "encoding"}
    text = text.removeprefix("\ufeff")
    content = text.encode("utf-8")
    first = _outcome(content, reader, options)
    if twin == "gzip":
        second = _outcome(gzip.compress(content), reader, options)
    elif twin == "mark":
        second = _outcome(b"\xef\xbb\xbf" + content, reader, options)
    elif twin in ("blocks", "parts"):
        reader = "parts" if (twin, reader) == ("parts", "entries") else reader
        usual, column_text._BLOCK = column_text._BLOCK, 48
        try:
            second = _outcome(content, reader, options)
        finally:
            column_text._BLOCK = usual
        if isinstance(second, TableError) and "has a line of more than" in str(second):
            return False
    else:
        second = _outcome(text.encode(twin), reader, {**options, "encoding": twin})
    if not _same(first, second):
        raise Finding(f"{twin}: {second!r} instead of {first!r}")
    return not isinstance(first, TableError)


# --- matrices ----------------------------------------------------------------------------------------------------

_market_numbers = st.sampled_from([*"0 3 -1 4 1.5 -2e3 1e999 nan inf 99999999999 2147483648 x +1".split(), "1 2", ""])


@st.composite
def _market(draw):
    """Return a MatrixMarket file, whole but for a few parts."""
    form = draw(st.sampled_from(["coordinate", "array"]))
    field = draw(st.sampled_from(["real", "integer", "pattern", "complex", "unsigned-integer", "double"]))
    symmetry = draw(st.sampled_from(["general", "symmetric", "skew-symmetric", "hermitian"]))
    n, p = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    number = st.integers(-9, 9).map(str) if "integer" in field else st.floats(-9, 9, width=16).map(repr)
    count = {"pattern": 0, "complex": 2}.get(field, 1)
    values = lambda: [draw(number) for _ in range(count)]  # noqa: E731
    if form == "array":
        lines = [[str(n), str(p)], *(values() for _ in range(n * p))]
    else:
        k = draw(st.integers(0, 4))
        lines = [[str(n), str(p), str(k)]]
        lines += [[str(draw(st.integers(1, n))), str(draw(st.integers(1, p))), *values()] for _ in range(k)]
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        line = lines[draw(st.integers(0, len(lines) - 1))]
        if line:
            line[draw(st.integers(0, len(line) - 1))] = draw(_market_numbers)
    notes = draw(st.lists(st.sampled_from(["% note", "", "%%x"]), max_size=2))
    lines = [f"%%MatrixMarket matrix {form} {field} {symmetry}", *notes, *map(" ".join, lines)]
    return draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines) + draw(st.sampled_from(["\n", ""]))


def _check_market(value):
    text, packed, changes, (reader, options) = value
    content = applied(text.encode(), changes)
    out = _outcome(gzip.compress(content) if packed else content, reader, options)
    return not isinstance(out, TableError)


_KINDS = ["<f8", "<f4", "<f2", "<i4", "<i8", ">i4", "<u8", "|b1", "|i1", "<c16", "<U2", "|S3", "|O", "<M8[s]"]
_whole = st.sampled_from([0, 1, 2, 3, 4, 5, -1, 7, 100, 2**31, 2**40, -(2**31)])


@st.composite
def _arrays(draw, most=8):
    """Return what :func:`_array` makes an array of."""
    return draw(st.sampled_from(_KINDS)), tuple(draw(st.lists(_whole, max_size=most)))


def _array(made):
    kind, values = made
    with np.errstate(all="ignore"):
        if kind in ("|O", "<M8[s]", "<U2", "|S3"):
            return np.array(values, np.int64).astype(kind)
        return np.array(values, np.float64 if kind[1] in "fc" else np.int64).astype(kind)


@st.composite
def _sparse(draw):
    """Return the members of an archive that is nearly one of ``scipy.sparse.save_npz``."""
    form = draw(st.sampled_from(["csr", "csc", "coo", "dia", "bsr", "lil", "", "\0", "csr"]))
    k, n, p = draw(st.integers(0, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    places = lambda high: st.tuples(st.just("<i4"), st.tuples(*[st.integers(0, high)] * k))  # noqa: E731
    members = {"shape": ("<i8", (n, p)), "data": ("<f8", tuple(range(k)))}
    if form == "coo":
        members |= {"row": draw(places(n - 1)), "col": draw(places(p - 1))}
    else:
        cuts = sorted(draw(st.lists(st.integers(0, k), min_size=n - 1, max_size=n - 1)))
        members |= {"indices": draw(places(p - 1)), "indptr": ("<i4", (0, *cuts, k))}
    for name in draw(st.lists(st.sampled_from(sorted(members)), max_size=2)):
        what = draw(st.sampled_from(["other", "drop", "item", "kind"]))
        kind, values = members.get(name, ("<i4", ()))
        if what == "other":
            members[name] = draw(_arrays())
        elif what == "drop":
            members.pop(name, None)
        elif what == "kind":
            members[name] = draw(st.sampled_from(_KINDS)), values
        elif values:
            at = draw(st.integers(0, len(values) - 1))
            members[name] = kind, (*values[:at], draw(_whole), *values[at + 1 :])
    return form, members


def _check_sparse(value):
    (form, members), packed, changes, (reader, options) = value
    buffer = io.BytesIO()
    arrays = {name: _array(made) for name, made in members.items()}
    (np.savez_compressed if packed else np.savez)(buffer, format=np.array(form.encode()), **arrays)
    return not isinstance(_outcome(applied(buffer.getvalue(), changes), reader, options), TableError)


@st.composite
def _npy(draw):
    """Return the bytes of an .npy file whose header is of odd parts."""
    descr = draw(st.sampled_from(["'<f8'"] * 9 + [*map(repr, _KINDS), "'<V8'", "[('a', '<f8')]", "'x'", "7"]))
    order = draw(st.sampled_from(["False", "True", "False", "0", "None"]))
    odd = ["(2, 3, 1)", "()", "(0, 3)", "(-1, 3)", "(10**6,)", "(99999, 99999)", "(10000000000000, 9)", "(2, 3.0)", "6"]
    shape = draw(st.sampled_from(["(2, 3)", "(3, 2)", "(6,)", "(2, 2)", *odd, "(True, 6)", "[2, 3]", f"({10**30}, 1)"]))
    whole = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    odd = [f"{{'descr': {descr}, 'shape': {shape}}}", shape, "(" * 300, whole.replace(" }", " 'x': 1}"), "", "{0", "\0"]
    text = draw(st.sampled_from([whole] * 9 + odd)) + "\n"
    version = draw(st.sampled_from([1, 1, 1, 2, 3, 0, 9]))
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    numbers = [0.5, -1.0, 2.0, 1e300, 7.0, draw(st.sampled_from([0.0, 5e-324]))]
    data = np.array(numbers).tobytes()[: draw(st.sampled_from([48, 48, 48, 47, 8, 0]))]
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode() + data


def _check_bytes(value):
    content, changes, (reader, options) = value
    return not isinstance(_outcome(applied(content, changes), reader, options), TableError)


# --- parquet -----------------------------------------------------------------------------------------------------

# Name of a column's type -> its values.
_COLUMNS = {
    "int64": pyarrow.array([3, -1, 2**62], pyarrow.int64()),
    "uint64": pyarrow.array([3, 1, 2**64 - 1], pyarrow.uint64()),
    "int8": pyarrow.array([1, None, 3], pyarrow.int8()),
    "bool": pyarrow.array([True, False, None]),
    "half": pyarrow.array(np.array([1, 2, 60000], np.float16)),
    "float": pyarrow.array([0.5, 2.0, 1e30], pyarrow.float32()),
    "double": pyarrow.array([0.5, -1e300, 5e-324]),
    "whole": pyarrow.array([0.0, 1.0, 2.0]),
    "infinite": pyarrow.array([0.0, float("inf"), float("nan")]),
    "decimal": pyarrow.array([1, 2, 3]).cast(pyarrow.decimal128(25, 2)),
    "wide": pyarrow.array([1, 2, 3]).cast(pyarrow.decimal256(70, 2)),
    "text": pyarrow.array(["a", "", "é\n"]),
    "digits": pyarrow.array(["1", "02", "3"]),
    "large": pyarrow.array(["a", "b", "b"], pyarrow.large_string()),
    "view": pyarrow.array(["a", "b", None], pyarrow.string_view()),
    "category": pyarrow.array(["u", "v", "u"]).dictionary_encode(),
    "numbers": pyarrow.array([7, 9, 7]).dictionary_encode(),
    "bytes": pyarrow.array([b"\xff", b"a", b""]),
    "fixed": pyarrow.array([b"ab", b"cd", b"\0\0"], pyarrow.binary(2)),
    "null": pyarrow.nulls(3),
    "date": pyarrow.array([0, 1, 2], pyarrow.date32()),
    "time": pyarrow.array([0, 1, 2], pyarrow.timestamp("ns", "UTC")),
    "span": pyarrow.array([0, 1, 2], pyarrow.duration("s")),
    "list": pyarrow.array([[1], [], [2, 3]]),
    "struct": pyarrow.array([{"a": 1}, {"a": 2}, None]),
    "map": pyarrow.array([[("a", 1)], [], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
}


@st.composite
def _parquet(draw):
    """Return (name and type of each column, rows, rows of a group)."""
    kinds = st.sampled_from(sorted(_COLUMNS)) | st.sampled_from(["int64", "text", "double", "float"])
    names = st.sampled_from(["a", "b", "", "user", "item", "rating", "é", "a.b"])
    columns = draw(st.lists(st.tuples(names, kinds), max_size=4))
    return columns, draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.sampled_from(["1.0", "2.6"]))


@cache
def _parquet_bytes(columns, rows, group, version):
    table = pyarrow.Table.from_arrays([_COLUMNS[kind] for _, kind in columns], names=[name for name, _ in columns])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        table.slice(0, rows), buffer, row_group_size=group, version=version, write_page_checksum=True
    )
    return buffer.getvalue()


def _check_parquet(value):
    (columns, *layout), changes, (reader, options) = value
    try:
        content = _parquet_bytes(tuple(columns), *layout)
    except (pyarrow.ArrowException, NotImplementedError):
        return False
    return not isinstance(_outcome(applied(content, changes), reader, options), TableError)


# --- whole files with other bytes --------------------------------------------------------------------------------


@cache
def _seeds():
    """Return name -> bytes of a valid file of each format."""
    folder, rng = Path(tempfile.mkdtemp()), np.random.default_rng(0)
    matrix = sparse.random(9, 8, density=0.3, random_state=0)
    files = {}
    for name in ("m.npz", "m.mtx", "m.csv", "m.csv.gz", "m.parquet"):
        write_entries(folder / name, matrix.row, matrix.col, matrix.data)
    for name in ("t.csv", "t.parquet", "t.npy"):
        names = None if name == "t.npy" else list("abcd")
        write_table(folder / name, np.where(rng.random((5, 4)) < 0.7, rng.random((5, 4)), np.nan), names)
    write_entries(folder / "n.parquet", [f"i{i}" for i in matrix.row], matrix.col, matrix.data.astype(np.float32))
    for path in sorted(folder.iterdir()):
        files[path.name] = path.read_bytes()
        if path.suffix == ".mtx":
            files[path.name + ".gz"] = gzip.compress(files[path.name], mtime=0)
    for name, part in {"csr": matrix.tocsr(), "csc": matrix.tocsc(), "dia": matrix.todia()}.items():
        buffer = io.BytesIO()
        sparse.save_npz(buffer, part)
        files[f"{name}.npz"] = buffer.getvalue()
    return files


def _check_seed(value):
    name, changes, (reader, options) = value
    return not isinstance(_outcome(applied(_seeds()[name], changes), reader, options), TableError)


_no_changes = st.just([]) | byte_changes
CASES = {
    "text": Case(st.tuples(_texts(), _no_changes, _calls()), _check_text),
    "twins": Case(
        st.tuples(
            _texts(), st.sampled_from(["gzip", "mark", "blocks", "parts", "utf-16", "utf-32", "utf-32-le"]), _calls()
        ),
        _check_twins,
    ),
    "market": Case(st.tuples(_market(), st.booleans(), _no_changes, _calls(False)), _check_market),
    "sparse": Case(st.tuples(_sparse(), st.booleans(), _no_changes, _calls(False)), _check_sparse),
    "npy": Case(st.tuples(_npy(), _no_changes, _calls(False)), _check_bytes),
    "parquet": Case(st.tuples(_parquet(), _no_changes, _calls(False)), _check_parquet),
    "seeds": Case(st.tuples(st.sampled_from(sorted(_seeds())), byte_changes, _calls()), _check_seed),
    "bytes": Case(st.tuples(st.binary(max_size=40), st.just([]), _calls()), _check_bytes),
}


def prepare():
    """Read one file of each kind, before the memory is limited and the time counts."""
    for name in _seeds():
        for reader in _READERS:
            _check_seed((name, [], (reader, {})))
