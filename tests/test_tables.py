"""Entries and tables in files: every format there and back, layouts, and errors that name the line and the fix."""

import csv
import doctest
import errno
import gzip
import io
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import io as scipy_io
from scipy import sparse

import fastdmf
from fastdmf import column_text, files, tables
from fastdmf.tables import (
    MixedIdsError,
    TableError,
    iter_entries,
    read_entries,
    read_matrix,
    read_table,
    write_entries,
    write_table,
)

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

# Numbers that only the shortest text that is long enough brings back.
NUMBERS = np.array([0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, -2.5, 123456789.123456789])
INTEGERS = np.array([3, 0, -7, 2**63 - 1, -(2**63), 3, 10**15 + 1])
NAMES = np.array(["ann", "a,b;c\td|e", 'say "no"', "α", " 7", "ann", "line"], object)
POSITIONS = np.array([0, 5, 2, 0, 1, 3, 4])


def written(folder, content, name="r.csv"):
    """Return the path of a file with this content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lists(parts):
    """Return what a reader returned as lists, in which NaN is None."""
    clean = lambda v: [None if x != x else x for x in v] if isinstance(v, list) else v  # noqa: E731
    out = [part.tolist() if isinstance(part, np.ndarray) else part for part in parts]
    return [
        [clean(v) for v in part] if isinstance(part, list) and part and isinstance(part[0], list) else part
        for part in out
    ]


def assert_equal(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    if a.dtype == object:
        assert a.tolist() == b.tolist() and {type(x) for x in a} <= {str}
    else:
        np.testing.assert_array_equal(a, b)
        assert (np.signbit(a) == np.signbit(b)).all()


# --- there and back ----------------------------------------------------------------------------------------------

TEXTS = ["r.csv", "r.tsv", "r.csv.gz", "R.TSV.GZ"]


@pytest.mark.parametrize("name", [*TEXTS, "r.parquet"])
@pytest.mark.parametrize(("rows", "columns"), [(INTEGERS, NAMES), (NAMES, POSITIONS), (NAMES, NAMES[::-1].copy())])
def test_entries_there_and_back(name, rows, columns, tmp_path):
    write_entries(tmp_path / name, rows, columns, NUMBERS)
    for got, expected in zip(read_entries(tmp_path / name), (rows, columns, NUMBERS), strict=True):
        assert_equal(got, expected)
    # Pairs alone, and what stands beside them.
    write_entries(tmp_path / name, rows, columns)
    got = read_entries(tmp_path / name, header=True)
    assert got[2] is None
    assert_equal(got[0], rows)
    write_entries(tmp_path / name, rows, columns, NUMBERS, std=NUMBERS[::-1], names=("user", "film", "stars"))
    assert_equal(read_entries(tmp_path / name, value="std")[2], NUMBERS[::-1])
    assert_equal(read_entries(tmp_path / name, row="film", column="user")[1], rows)


@pytest.mark.parametrize("name", ["r.npz", "r.mtx"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16, np.int64, bool])
def test_matrices_there_and_back(name, dtype, tmp_path):
    values = np.arange(7).astype(dtype) if dtype is not np.float64 else NUMBERS
    write_entries(tmp_path / name, POSITIONS, POSITIONS[::-1], values)
    rows, columns, got = read_entries(tmp_path / name)
    order, expected = np.lexsort((columns, rows)), np.lexsort((POSITIONS[::-1], POSITIONS))
    assert_equal(rows[order], POSITIONS[expected])
    assert_equal(columns[order], POSITIONS[::-1][expected])
    np.testing.assert_array_equal(got[order], values[expected].astype(np.float64))
    small = name == "r.npz" and dtype not in (np.float64, np.int64)
    assert got.dtype == (np.float32 if small else np.float64)
    assert read_entries(tmp_path / name, value=False)[2] is None


@pytest.mark.parametrize("name", [*TEXTS, "r.parquet"])
@pytest.mark.parametrize("columns", [["x", "Größe, in m", 'a "b"', "2019"], None])
@pytest.mark.parametrize("rows", [None, np.array([7, 5, 9]), np.array(["ä,", "b", "NA"], object)])
def test_tables_there_and_back(name, columns, rows, tmp_path):
    values = np.array([[0.1, np.nan, 5e-324, 2], [np.nan, np.nan, -0.0, 1e300], [1 / 3, 2, np.nan, 0]])
    write_table(tmp_path / name, values, columns, rows)
    settings = {} if columns or rows is None or rows.dtype == object or "parquet" in name else {"rows": 0}
    table = read_table(tmp_path / name, **settings)
    assert_equal(table.values, values)
    assert table.columns == (columns or (["x0", "x1", "x2", "x3"] if "parquet" in name else None))
    assert (table.rows is None) if rows is None else (table.rows.tolist() == rows.tolist())


def test_dense_matrices(tmp_path):
    values = np.array([[0.0, np.nan, 3], [4, 5, np.nan]], np.float32)
    write_table(tmp_path / "t.npy", values)
    assert_equal(read_table(tmp_path / "t.npy").values, values.astype(np.float64))
    rows, columns, got = read_entries(tmp_path / "t.npy")
    assert rows.tolist() == [0, 0, 1, 1] and columns.tolist() == [0, 2, 0, 1]
    assert_equal(got, np.array([0, 3, 4, 5], np.float32))
    scipy_io.mmwrite(tmp_path / "t.mtx", np.arange(6.0).reshape(2, 3))
    assert read_table(tmp_path / "t.mtx").values.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(read_entries(tmp_path / "t.mtx")[0]) == 6


def test_matrices_of_others(tmp_path):
    """Explicit zeros are entries; a symmetric file has both halves, a pattern ones."""
    matrix = sparse.coo_array(([0.0, 2.0], ([0, 2], [1, 0])), (9, 4))
    for kind in ("csr", "csc", "coo"):
        sparse.save_npz(tmp_path / "m.npz", matrix.asformat(kind), compressed=kind != "csc")
        rows, columns, values = read_entries(tmp_path / "m.npz")
        assert sorted(zip(rows.tolist(), columns.tolist(), values.tolist())) == [(0, 1, 0.0), (2, 0, 2.0)]
    text = "%%MatrixMarket matrix coordinate integer symmetric\n% by hand\n3 3 2\n1 1 5\n3 1 -2\n"
    for path in (written(tmp_path, text, "m.mtx"), written(tmp_path, gzip.compress(text.encode()), "m.mtx.gz")):
        rows, columns, values = read_entries(path)
        assert sorted(zip(rows, columns, values)) == [(0, 0, 5), (0, 2, -2), (2, 0, -2)] and values.dtype == np.float64
    path = written(tmp_path, "%%MatrixMarket matrix coordinate pattern general\n2 2 1\n2 1\n", "m.mtx")
    assert lists(read_entries(path)) == [[1], [0], [1.0]]


def test_a_failed_writing_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "r.csv"
    write_entries(path, [1], [2], [3.0])
    before = path.read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    for name in ("r.csv", "r.csv.gz", "r.parquet", "r.npz", "r.mtx"):
        with pytest.raises(OSError, match=f"cannot write '.*{name}': No space left on device"):
            write_entries(tmp_path / name, [4], [5], [6.0])
    assert [p.name for p in tmp_path.iterdir()] == ["r.csv"] and path.read_bytes() == before


def test_many_rows_are_written_and_read_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_BATCH", 100)
    monkeypatch.setattr(column_text, "_BLOCK", 1000)
    rng = np.random.default_rng(0)
    rows = np.array([f"u{k}" for k in rng.integers(0, 90, 1234)], object)
    columns, values = rng.integers(0, 10**12, 1234), rng.standard_normal(1234)
    for name in ("r.csv", "r.csv.gz", "r.parquet"):
        write_entries(tmp_path / name, rows, columns, values)
        for got, expected in zip(read_entries(tmp_path / name), (rows, columns, values), strict=True):
            assert_equal(got, expected)
        table = np.where(rng.random((1234, 5)) < 0.9, rng.standard_normal((1234, 5)), np.nan)
        write_table(tmp_path / name, table, list("abcde"), rows)
        assert_equal(read_table(tmp_path / name).values, table)


# --- layouts -----------------------------------------------------------------------------------------------------

E = read_entries
T = read_table
THREE = [[1, 4], [2, 5], [3.5, -2.0]]
# Reader, content, settings, what is read.
LAYOUTS = [
    (E, "user,item,stars\n1,2,3.5\n4,5,-2\n", {}, THREE),
    (E, "1,2,3.5\n4,5,-2", {}, THREE),
    (E, "1,2,3.5\r\n4,5,-2\r\n", {}, THREE),
    (E, "1,2,3.5\r4,5,-2\r", {}, THREE),
    (E, "\n\nuser,item,stars\n\n1,2,3.5\n\n\n4,5,-2\n\n", {}, THREE),
    (E, "1\t2\t3.5\t881250949\n4\t5\t-2\t881250950\n", {}, THREE),
    (E, "1;2;3,5\n4;5;-2,0\n", {"decimal": ","}, THREE),
    (E, "1\t2\t3,5\n4\t5\t-2,0\n", {"decimal": ","}, THREE),
    (E, "1|2|3.5\n4|5|-2\n", {}, THREE),
    (E, "1 2 3.5\n4 5 -2\n", {}, THREE),
    (E, "1:2:3.5\n4:5:-2\n", {"separator": ":"}, THREE),
    (E, "1 2 3,5\n4 5 -2,0\n", {"decimal": ","}, THREE),
    (E, '\ufeff"1","2","3.5"\n"4","5","-2"\n', {}, THREE),
    (E, "1::2::3.5::9\n4::5::-2::9\n", {"separator": ":", "row": 0, "column": 2, "value": 4}, THREE),
    (E, '"1","2","3.5"\n"4","5","-2"\n', {}, THREE),
    (E, "1, 2, 3.5\n4 , 5 , -2 \n", {}, THREE),
    (E, "1,2,35e-1\n4,5,-2.\n", {}, THREE),
    # Which columns.
    (E, "t,v,i,u\n0,3.5,2,1\n0,-2,5,4\n", {"row": "u", "column": "i", "value": "v"}, THREE),
    (E, "t,v,i,u\n0,3.5,2,1\n0,-2,5,4\n", {"row": 3, "column": "i", "value": 1}, THREE),
    (E, "v,u,i\n3.5,1,2\n-2,4,5\n", {"value": "v"}, THREE),
    (E, " u , i ,v\n1,2,3.5\n4,5,-2\n", {"column": "i"}, THREE),
    (E, "u,u,v\n1,2,3.5\n4,5,-2\n", {"column": 1}, THREE),
    (E, "u,i,v\n1,2,x\n4,5,\n", {"value": False}, [[1, 4], [2, 5], None]),
    (E, "1,2\n4,5\n", {}, [[1, 4], [2, 5], None]),
    (E, "u,i\n4,5\n", {}, [[4], [5], None]),
    (E, "u,i\na,5\n", {}, [["a"], [5], None]),
    (E, "u,i\na,b\n", {"header": True}, [["a"], ["b"], None]),
    (E, "u,i\na,b\n", {"header": False}, [["u", "a"], ["i", "b"], None]),
    # Names or data.
    (E, "1,2,3\n", {}, [[1], [2], [3.0]]),
    (E, "a,b,3\nc,d,4\n", {}, [["a", "c"], ["b", "d"], [3.0, 4.0]]),
    (E, "u,i,1\n1,2,3\n", {"header": True}, [[1], [2], [3.0]]),
    (E, "u,i,v\n1,2,3\n", {"header": np.True_, "row": "u"}, [[1], [2], [3.0]]),
    # Ids.
    (E, "007,1,1\n7,2,1\n", {}, [["007", "7"], [1, 2], [1.0, 1.0]]),
    (E, "1,-1,1\n+2,0,1\n", {}, [["1", "+2"], [-1, 0], [1.0, 1.0]]),
    (E, "1.0,1,1\n2,1e3,1\n", {}, [["1.0", "2"], ["1", "1e3"], [1.0, 1.0]]),
    (E, f"{2**63 - 1},{-(2**63)},1\n", {}, [[2**63 - 1], [-(2**63)], [1.0]]),
    (E, f"{2**63},0,1\n5,0,1\n", {}, [[str(2**63), "5"], [0, 0], [1.0, 1.0]]),
    (E, "NA,null,1\nnan,None,2\n", {}, [["NA", "nan"], ["null", "None"], [1.0, 2.0]]),
    (E, 'ä,"x, ""y""",1\n"ж;|\t",日本,2\n', {}, [["ä", "ж;|\t"], ['x, "y"', "日本"], [1.0, 2.0]]),
    # Encodings.
    (E, "\ufeffu,i,v\nä,1,2\n", {}, [["ä"], [1], [2.0]]),
    (E, "\ufeffä,1,2\n", {}, [["ä"], [1], [2.0]]),
    (E, "\ufeff1,1,2\n", {}, [[1], [1], [2.0]]),
    (E, "größe,i,v\nä,1,2\n".encode("latin-1"), {"encoding": "latin-1", "row": "größe"}, [["ä"], [1], [2.0]]),
    (E, "u,i,v\nä,1,2\n".encode("utf-16"), {"encoding": "utf-16"}, [["ä"], [1], [2.0]]),
    # Tables.
    (T, "a,b\n1,2\n3,4\n", {}, [[[1, 2], [3, 4]], ["a", "b"], None]),
    (T, "1,2\n3,4\n", {}, [[[1, 2], [3, 4]], None, None]),
    (T, "a;b\n1,5;\n;4\n", {"decimal": ","}, [[[1.5, None], [None, 4]], ["a", "b"], None]),
    (T, "a,b\nNA,nan\n NULL,N/A\nNone,#N/A\n", {"missing": " NULL"}, [[[None] * 2] * 3, ["a", "b"], None]),
    (T, "a,b\n?,2\n-,?\n", {"missing": ["?", "-"]}, [[[None, 2], [None, None]], ["a", "b"], None]),
    (T, ",a,b\n7,1,2\n8,3,4\n", {}, [[[1, 2], [3, 4]], ["a", "b"], [7, 8]]),
    (T, "who,a,b\nx,1,2\nNA,3,4\n", {}, [[[1, 2], [3, 4]], ["a", "b"], ["x", "NA"]]),
    (T, "x,1,2\ny,3,4\n", {}, [[[1, 2], [3, 4]], None, ["x", "y"]]),
    (T, "a,who,b\n1,x,2\n3,y,4\n", {"rows": "who"}, [[[1, 2], [3, 4]], ["a", "b"], ["x", "y"]]),
    (T, "1,7,2\n3,8,4\n", {"rows": 1}, [[[1, 2], [3, 4]], None, [7, 8]]),
    (T, ",a,b\n7,1,2\n8,3,4\n", {"rows": None}, [[[7, 1, 2], [8, 3, 4]], ["", "a", "b"], None]),
    (T, "id,2019,2020\n1,2,3\n", {}, [[[1, 2, 3]], ["id", "2019", "2020"], None]),
    (T, "2019,2020\n1,2\n", {"header": True}, [[[1, 2]], ["2019", "2020"], None]),
    (T, "a,a\n1,2\n", {}, [[[1, 2]], ["a", "a"], None]),
    (T, "v\n1\n\n3\n", {}, [[[1], [None], [3]], ["v"], None]),
    (T, "1\n\n3", {}, [[[1], [None], [3]], None, None]),
    (T, "v\n1,5\n2,5\n", {"decimal": ","}, [[[1.5], [2.5]], ["v"], None]),
    (T, "a,b\n,\n", {}, [[[None, None]], ["a", "b"], None]),
]


@pytest.mark.parametrize(("reader", "content", "options", "expected"), LAYOUTS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_layouts(reader, content, options, expected, pack, tmp_path):
    """Whatever the file is called."""
    content = content if isinstance(content, bytes) else content.encode()
    assert lists(reader(written(tmp_path, pack(content), "ratings.dat"), **options)) == expected


def test_equal_entries_make_equal_files(tmp_path):
    """A gzipped file does not hold the time, nor a name."""
    for name in ("a.csv.gz", "b.csv.gz"):
        write_entries(tmp_path / name, NAMES, POSITIONS, NUMBERS)
    first = (tmp_path / "a.csv.gz").read_bytes()
    assert first[4:8] == bytes(4) and first == (tmp_path / "b.csv.gz").read_bytes()


def test_a_damaged_page_of_parquet_is_seen(tmp_path):
    """The files that are written have checksums, which are looked at: never are other values read."""
    path = tmp_path / "r.parquet"
    values = np.random.default_rng(0).standard_normal(50)
    write_entries(path, np.arange(50), np.arange(50), values)
    whole = path.read_bytes()
    at = whole.index(values[20:21].tobytes())
    broken = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    with pytest.raises(TableError, match="r.parquet is damaged, or no parquet file"):
        read_entries(written(tmp_path, broken, "r.parquet"))


def test_other_ways_to_pack_and_to_name(tmp_path):
    for suffix in ("bz2", "zst"):
        with pa.CompressedOutputStream(
            str(tmp_path / f"r.csv.{suffix}"), "detect" and {"zst": "zstd"}.get(suffix, suffix)
        ) as file:
            file.write(b"1,2,3.5\n4,5,-2\n")
        assert lists(read_entries(str(tmp_path / f"r.csv.{suffix}"))) == THREE


def test_wide_tables(tmp_path, monkeypatch):
    """A line longer than the sample that is looked at, and than a block."""
    monkeypatch.setattr(column_text, "_BLOCK", 1 << 12)
    values = np.random.default_rng(0).standard_normal((5, 8000)).round(9)
    text = (
        ",".join(f"column {k}" for k in range(8000)) + "\n" + "\n".join(",".join(map(repr, v)) for v in values.tolist())
    )
    assert len(text.splitlines()[0]) > column_text._SAMPLE
    table = read_table(written(tmp_path, text))
    np.testing.assert_array_equal(table.values, values)
    assert table.columns[-1] == "column 7999"


def test_what_pandas_writes(tmp_path):
    frame = pd.DataFrame({"a": [1.5, np.nan], "b": [3, 4]}, index=pd.Index(["x", "y"], name="who"))
    frame.to_csv(tmp_path / "f.csv")
    frame.to_parquet(tmp_path / "f.parquet")
    for name in ("f.csv", "f.parquet"):
        assert lists(read_table(tmp_path / name)) == [[[1.5, 3], [None, 4]], ["a", "b"], ["x", "y"]]
    frame.reset_index(drop=True).to_parquet(tmp_path / "f.parquet")
    assert read_table(tmp_path / "f.parquet").rows is None
    frame.set_axis([8, 9]).to_parquet(tmp_path / "f.parquet")
    assert read_table(tmp_path / "f.parquet").rows.tolist() == [8, 9]
    frame.set_axis([8, 9]).to_csv(tmp_path / "f.csv")
    assert read_table(tmp_path / "f.csv").rows.tolist() == [8, 9]


PARQUET = {
    "small": (pa.array([1, 2], pa.int8()), pa.array(["a", "b"]), pa.array([0.5, 2], pa.float32()), np.float32),
    "large": (pa.array([1, 2**40]), pa.array(["a", "b"], pa.large_string()), pa.array([1, 2], pa.int64()), np.float64),
    "category": (
        pa.array([1.0, 2.0]),
        pa.array(["b", "a", "b"]).dictionary_encode()[:2],
        pa.array([1, 2], pa.int16()),
        np.float32,
    ),
    "decimal": (
        pa.array([1, 2], pa.uint64()),
        pa.array(["7", "8"]),
        pa.array([1, 2]).cast(pa.decimal128(20, 1)),
        np.float64,
    ),
    "boolean": (pa.array([1, 2]), pa.array(["7", "8"]), pa.array([True, False]), np.float32),
}


@pytest.mark.parametrize("kind", PARQUET)
def test_kinds_of_parquet(kind, tmp_path):
    """Strings stay strings, also those of digits."""
    *columns, dtype = PARQUET[kind]
    pq.write_table(pa.table(columns, names=["u", "i", "v"]), tmp_path / "p.parquet")
    rows, names, values = read_entries(tmp_path / "p.parquet")
    assert rows.dtype == np.int64 and rows.tolist() == [int(x) for x in columns[0].to_pylist()]
    assert names.tolist() == columns[1].to_pylist() and names.dtype == object
    assert values.dtype == dtype and values.tolist() == [float(x) for x in columns[2].to_pylist()]
    assert read_table(tmp_path / "p.parquet", rows="i").rows.tolist() == columns[1].to_pylist()


# --- errors ------------------------------------------------------------------------------------------------------

# Reader, content, settings, error.
FAULTS = [
    (E, "u,i,v\n1,2,3\n4,5\n", {}, "r.csv, line 3: 2 columns, line 1 has 3 ('4,5'): correct it, put quotes around"),
    (E, "1,2,3\n\n\n4,5,6,7\n", {}, "r.csv, line 4: 4 columns, line 1 has 3 ('4,5,6,7'): correct it"),
    (E, "1,2,3\nx\n", {}, "line 2: 1 column, line 1 has 3 ('x')"),
    (E, "1,2,3\n4,5,6 " + "x" * 200 + ",7\n", {}, f"line 2: 4 columns, line 1 has 3 ('4,5,6 {'x' * 74}...')"),
    (E, "1,2,3\n4,5,four\n", {}, "line 2, column 2 (from 0): 'four' is no number ('4,5,four'): correct it, or leave"),
    (E, "u,i,v\r\n\r\n1,2,3\r\n4,5,NA\r\n", {}, "r.csv, line 4, column 'v': 'NA' is no number ('4,5,NA')"),
    (E, "u;i;v\n1;2;3,5\n", {}, "line 2, column 'v': '3,5' is no number ('1;2;3,5'): pass decimal=','"),
    (E, "1;2;3.5\n", {"decimal": ","}, "line 1, column 2 (from 0): '3.5' is no number"),
    (
        E,
        "1,2,x\n1,2,3\n",
        {},
        "line 1, column 2 (from 0): 'x' is no number ('1,2,x'): pass header=True if the line holds",
    ),
    (E, "1,2,0x10\n", {"header": False}, "'0x10' is no number"),
    (
        E,
        "u,i,v\n1,2,3\n4,5,\n",
        {},
        "line 3, column 'v': the value is missing ('4,5,'): write it, or leave the line out",
    ),
    (E, "u,i,v\n1,2,3\n,5,1\n", {}, "line 3, column 'u': the row id is missing (',5,1')"),
    (E, 'u,i,v\n1,2,3\n4,"",1\n', {}, "line 3, column 'i': the column id is missing"),
    (E, "1,2,3\n4,5,nan\n", {}, "line 2, column 2 (from 0): nan is no finite number ('4,5,nan'): leave the line out"),
    (E, "1,2,3\n4,5,-Inf\n", {}, "line 2, column 2 (from 0): -inf is no finite number"),
    (E, "1,2,3\n4,5,1e999\n", {}, "inf is no finite number ('4,5,1e999')"),
    (E, '1,2\n3,"4\n5"\n6,7\n', {}, "r.csv: the id '4\\n5' goes on in the next line: is a quote left open?"),
    (E, '1,2\n3,"4\n5,6\n', {}, "r.csv, line 2: a quote is opened and never closed: close it"),
    (E, 'u,i,v,note\n\n1,2,3,"x\ny"\n\n4,5,6,"z\n7,8,9,-\n', {}, "r.csv, line 6: a quote is opened and never closed"),
    (E, '1,2,3\n3,"4,1\n5,6,1\n', {}, "line 2: 2 columns, line 1 has 3 ('3,\"4,1')"),
    (E, "", {}, "r.csv is empty"),
    (E, "\n\r\n\n", {}, "r.csv is empty: all its lines are"),
    (E, "u,i,v\n", {}, "r.csv holds names and no entries: entries are one a line, below them"),
    (E, "u,i,v", {"row": "u"}, "r.csv holds names and no entries"),
    (E, "1\n2\n", {}, "r.csv has 1 column: row, column and value are needed; pass separator="),
    (E, "u\na\n", {"row": "u"}, "r.csv has the columns ['u']: row, column and value are needed"),
    (E, "1::2::3\n", {}, "r.csv is separated by '::': pass separator=':', row=0, column=2, value=4"),
    (E, "u,i,v\n1,2,3\n", {"row": "x"}, "r.csv has no column 'x': there are ['u', 'i', 'v']"),
    (E, "u,u,v\n1,2,3\n", {"row": "u"}, "r.csv has several columns 'u': there are ['u', 'u', 'v']; its place from 0"),
    (E, "u,i,v\n1,2,3\n", {"row": 3}, "called by its name or its place from 0 to 2, got 3: "),
    (E, "u,i,v\n1,2,3\n", {"row": -1}, "place from 0 to 2, got -1"),
    (E, "u,i,v\n1,2,3\n", {"value": True}, "place from 0 to 2, got True"),
    (E, "u,i,v\n1,2,3\n", {"row": "i", "column": 1}, "must be different columns, got ('i', 1, None)"),
    (
        E,
        "u,i,v\n1,2,3\n",
        {"row": "u", "header": False},
        "columns are named, which header=False says there are no names",
    ),
    (E, "1,2,3\n", {"separator": "::"}, "separator must be one ASCII character, got '::': of lines like 1::2::3"),
    (E, "1,2,3\n", {"separator": ""}, "separator must be one ASCII character, got ''"),
    (E, "1,2,3\n", {"separator": '"'}, "separator must be one ASCII character"),
    (E, "1,2,3\n", {"header": 2}, "header must be True, False or 'auto', got 2"),
    (E, "1,2,3\n", {"header": "yes"}, "header must be True, False or 'auto', got 'yes'"),
    (E, "1,2,3\n", {"decimal": ";"}, "decimal must be '.' or ',', got ';'"),
    (E, "1,2,3\n", {"encoding": "latin-99"}, "encoding must be one of text that Python knows, got 'latin-99'"),
    (E, b"u,i,v\n1,2,3\nJos\xe9,2,3\n", {}, "r.csv, line 3: byte 0xe9 is not UTF-8: pass encoding='latin-1', or what"),
    (E, b"gr\xf6\xdfe,i,v\n1,2,3\n", {"row": "x"}, "r.csv, line 1: byte 0xf6 is not UTF-8"),
    (E, "u,i,v\nä,2,3\n", {"encoding": "ascii"}, "r.csv is not ascii: pass the encoding= that it was written in"),
    (E, "u,i,v\n1,2,3\n".encode("utf-16"), {}, "r.csv is UTF-16: pass encoding='utf-16', or save it as UTF-8"),
    (E, bytes(range(256)), {}, "r.csv is neither text nor a format that is known: save it as CSV or parquet"),
    (E, b"\xd0\xcf\x11\xe0\xa1\xb1" + bytes(100), {}, "r.csv is neither text nor a format that is known"),
    (E, b"PK\x03\x04" + bytes(40), {}, "r.csv cannot be read as a matrix: "),
    (E, b"\x93NUMPY\x01\x00", {}, "r.csv cannot be read as a matrix: "),
    (E, b"PAR1" + bytes(40), {}, "r.csv is damaged, or no parquet file ("),
    (E, b"%%MatrixMarket matrix coordinate real general\n2 2 2\n1 1 1\n", {}, "r.csv cannot be read as a matrix: "),
    (E, b"%%MatrixMarket matrix coordinate real general\n2 2 1\n1 1 x\n", {}, "r.csv cannot be read as a matrix: "),
    (E, b"%%MatrixMarket matrix coordinate real general\n2 2 1\n3 1 1\n", {}, "r.csv cannot be read as a matrix: "),
    (
        E,
        b"%%MatrixMarket matrix coordinate complex general\n2 2 1\n1 1 1 2\n",
        {},
        "r.csv holds complex128 of shape (2, 2)",
    ),
    (
        E,
        b"%%MatrixMarket matrix coordinate real general\n2 2 1\n2 1 inf\n",
        {},
        "row 1, column 0 (from 0): inf is no finite",
    ),
    (E, b"%%MatrixMarket matrix coordinate real general\n2 2 0\n", {}, "r.csv holds no entries"),
    (
        E,
        b"%%MatrixMarket matrix coordinate real general\n2 2 1\n1 1 1\n",
        {"row": "u"},
        "without named columns: leave out row='u'",
    ),
    (E, gzip.compress(b"1,2,3\n" * 9999)[:-20], {}, "r.csv is damaged or cut off ("),
    (E, gzip.compress(b"1,2,3\n" * 9999)[:12], {}, "r.csv is damaged or cut off ("),
    (E, gzip.compress(b"PAR1" + bytes(40)), {}, "r.csv is packed once more by gzip: gunzip it first"),
    (T, "a,b\n1,2\n3\n", {}, "r.csv, line 3: 1 column, line 1 has 2 ('3')"),
    (T, "a,b\n1,2\n3,red\n", {}, "r.csv, line 3, column 'b': 'red' is no number ('3,red')"),
    (T, "DE,1,2x\nFR,3,4\n", {}, "line 1, column 2 (from 0): '2x' is no number ('DE,1,2x'): pass header=True"),
    (T, "v\n1\n\n\nx\n", {}, "r.csv, line 5, column 'v': 'x' is no number ('x')"),
    (T, "a,b\n1,2\n3,inf\n", {}, "r.csv, line 3, column 'b': no finite number ('3,inf'): leave the cell empty if"),
    (T, "a,b\n", {}, "r.csv holds names and no rows: rows are one a line, below them"),
    (T, "v\n1\n", {"rows": "v"}, "r.csv has no column of numbers beside the ids: pass rows=None, or separator="),
    (
        T,
        "a,b\n1,2\n",
        {"rows": "a", "header": False},
        "r.csv: rows='a' is a name, which header=False says there is none",
    ),
    (T, "\ufeff1,2\n\n\n3,x\n", {}, "r.csv, line 4, column 1 (from 0): 'x' is no number ('3,x')"),
    (T, "\ufeff1,x2\n", {"header": False}, "'x2' is no number ('1,x2'): pass header=True"),
    (T, '1,2\n"' + "x" * 200_000 + '",2\n3,four\n', {}, "r.csv, line "),
    (T, "a,b\n1,2\n", {"rows": "c"}, "r.csv has no column 'c': there are ['a', 'b']"),
    (T, "", {}, "r.csv is empty"),
    (
        T,
        b"%%MatrixMarket matrix coordinate real general\n2 2 1\n1 1 1\n",
        {},
        "is a sparse matrix, which read_entries reads",
    ),
    (
        T,
        b"%%MatrixMarket matrix array real general\n1 1\n-inf\n",
        {},
        "r.csv, row 0 (from 0), column 0: no finite number",
    ),
    (T, b"%%MatrixMarket matrix array real general\n1 1\n1\n", {"rows": 0}, "without named columns: leave out rows=0"),
]


@pytest.mark.parametrize(("reader", "content", "options", "message"), FAULTS)
def test_faults(reader, content, options, message, tmp_path):
    """One line each, with the file, the place and the fix."""
    with pytest.raises(TableError) as caught:
        reader(written(tmp_path, content), **options)
    text = str(caught.value)
    assert message in text and "\n" not in text


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"u": ["a", None], "i": [1, 2], "v": [1.0, 2]}, {}, "row 1 (from 0), column 'u': the row id is missing"),
        ({"u": ["a", "b"], "i": [None, 2], "v": [1.0, 2]}, {}, "row 0 (from 0), column 'i': the column id is missing"),
        ({"u": ["a", "b"], "i": [1, 2], "v": [1.0, None]}, {}, "row 1 (from 0), column 'v': the value is missing"),
        ({"u": ["a", "b"], "i": [1, 2], "v": [1, np.inf]}, {}, "row 1 (from 0), column 'v': no finite number"),
        ({"u": ["a", "b"], "i": [1, 2], "v": ["1", "2"]}, {}, "column 'v' holds string, no numbers: encode it"),
        ({"u": [1.5, 2], "i": [1, 2], "v": [1, 2]}, {}, "column 'u' ids must be whole numbers or strings"),
        ({"u": pa.array([1, 2**63], pa.uint64()), "i": [1, 2], "v": [1, 2]}, {}, "'u' ids must fit into 64 bits"),
        ({"u": pa.array([1, 2]).cast(pa.timestamp("s")), "i": [1, 2]}, {}, "'u' holds timestamp[ms], ids are integers"),
        ({"u": [1, 2]}, {}, "has the columns ['u']: row, column and value are needed"),
        ({"u": [1, 2], "i": [1, 2]}, {"value": "v"}, "has no column 'v': there are ['u', 'i']"),
        ({"u": pa.array([], pa.int64()), "i": pa.array([], pa.int64())}, {}, "p.parquet holds no entries"),
    ],
)
def test_faults_of_parquet(columns, options, message, tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(TableError, match=re.escape(message)):
        read_entries(path, **options)


def test_faults_of_parquet_tables(tmp_path):
    path = tmp_path / "p.parquet"
    for columns, message in [
        ({"a": [1.0, 2], "b": [-np.inf, 2]}, "row 0 (from 0), column 'b': no finite number: write NaN"),
        (
            {"a": [1.0, 2], "b": ["x", "y"]},
            "column 'b' holds string, no numbers: encode it as numbers, or leave it out",
        ),
        ({"a": ["x", "y"]}, "p.parquet holds no numbers: it has the columns ['a'] and 2 rows"),
        ({"a": pa.array([], pa.float64())}, "p.parquet holds no numbers: it has the columns ['a'] and 0 rows"),
    ]:
        pq.write_table(pa.table(columns), path)
        with pytest.raises(TableError, match=re.escape(message)):
            read_table(path)
    whole = path.read_bytes()
    for content in (whole[:-4], whole[: len(whole) // 2], whole[:40] + b"\xff" * 9 + whole[49:-9] + b"\xff" * 9):
        with pytest.raises(TableError, match="p.parquet is damaged, or no parquet file"):
            read_table(written(tmp_path, content, "p.parquet"))


def test_faults_of_archives(tmp_path):
    path = tmp_path / "m.npz"
    sparse.save_npz(path, sparse.dia_array(sparse.eye_array(3)))
    with pytest.raises(TableError, match="m.npz is sparse in DIA format, which stores zeros of its own: save .tocsr"):
        read_entries(path)
    np.savez(path, a=np.arange(3))
    with pytest.raises(TableError, match="m.npz is a zip archive, but no sparse matrix of scipy.sparse.save_npz"):
        read_entries(path)
    model = fastdmf.DMFCompleter(random_state=0, max_iter=2)
    with pytest.warns(UserWarning, match="MAX_ITER"):
        model.fit(np.argwhere(np.ones((4, 4)))[::2], np.arange(8.0))
    fastdmf.save(model, path)
    with pytest.raises(TableError, match="m.npz is a model: fastdmf.load reads it"):
        read_entries(path)
    for array in (np.arange(3.0), np.array([["a"]]), np.zeros((0, 3)), np.ones((2, 2), complex)):
        np.save(tmp_path / "m.npy", array)
        with pytest.raises(TableError, match="m.npy holds"):
            read_table(tmp_path / "m.npy")
    np.save(tmp_path / "m.npy", np.array([[{}]]))
    with pytest.raises(TableError, match="m.npy cannot be read as a matrix: .*allow_pickle=False"):
        read_entries(tmp_path / "m.npy")
    np.save(tmp_path / "m.npy", np.full((2, 2), np.nan))
    with pytest.raises(TableError, match="m.npy holds no entries"):
        read_entries(tmp_path / "m.npy")
    np.save(tmp_path / "m.npy", np.array([[1, np.inf]]))
    for reader in (read_entries, read_table):
        with pytest.raises(TableError, match=r"m.npy, row 0.*column 1.*no finite number"):
            reader(tmp_path / "m.npy")


@pytest.mark.parametrize("reader", [read_entries, read_table])
def test_what_cannot_be_read(reader, tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot read '.*r.csv': there is no such file, check its name"):
        reader(tmp_path / "r.csv")
    with pytest.raises(IsADirectoryError, match="cannot read '.*': it is a folder, name a file in it"):
        reader(tmp_path)
    with pytest.raises(TypeError, match="path must be a str or an os.PathLike, got StringIO"):
        reader(io.StringIO("1,2,3"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read all")
def test_what_may_not_be_read(tmp_path):
    path = written(tmp_path, "1,2,3\n")
    path.chmod(0)
    with pytest.raises(PermissionError, match="cannot read '.*r.csv': Permission denied, check the name and its perm"):
        read_entries(path)


def test_without_pyarrow(tmp_path, monkeypatch):
    """Text and parquet say what to install; matrices need nothing."""
    text = written(tmp_path, "1,2,3\n")
    write_table(tmp_path / "t.npy", [[1.0, 2]])
    write_entries(tmp_path / "m.mtx", [0], [1], [2.0])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (
        read_entries,
        read_table,
        lambda path: write_entries(path, [1], [2]),
        lambda path: write_table(path, [[1]]),
    ):
        with pytest.raises(ImportError, match=re.escape('need pyarrow: pip install "fastdmf[io]"')):
            call(text)
    assert read_table(tmp_path / "t.npy").values.tolist() == [[1, 2]]
    assert lists(read_entries(tmp_path / "m.mtx")) == [[0], [1], [2.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda d: write_entries(d / "r.xlsx", [1], [2], [3.0]),
            "must end in one of .csv, .tsv, .parquet, .npz, .mtx, text",
        ),
        (lambda d: write_entries(d / "r", [1], [2], [3.0]), "the name must end in"),
        (lambda d: write_entries(d / "r.parquet.gz", [1], [2], [3.0]), "the name must end in"),
        (lambda d: write_entries(d / "r.npy", [1], [2], [3.0]), "the name must end in"),
        (lambda d: write_entries(d / "r.csv", [1, 2], [2], [3.0]), "must be equally many, got {'row': 2, 'column': 1"),
        (lambda d: write_entries(d / "r.csv", [1], [2], ["x"]), "value must be one column of numbers, got dtype <U1"),
        (lambda d: write_entries(d / "r.csv", [1], ["a"], [[3.0]]), "value must be one column of numbers, .*shape"),
        (
            lambda d: write_entries(d / "r.csv", [1, "a"], [1, 2], [3.0, 4]),
            "rows ids must all be integers or all be str",
        ),
        (lambda d: write_entries(d / "r.csv", [1], [2], [3.0], names=("a", "a", "b")), "names must differ"),
        (lambda d: write_entries(d / "r.csv", ["\udce9"], [2], [3.0]), "r.csv: an id is no text that UTF-8 can hold"),
        (lambda d: write_entries(d / "r.npz", ["a"], [2], [3.0]), "a matrix has positions from 0"),
        (lambda d: write_entries(d / "r.mtx", [-1], [2], [3.0]), "a matrix has positions from 0"),
        (lambda d: write_entries(d / "r.npz", [1], [2]), "a matrix holds values and nothing else"),
        (lambda d: write_entries(d / "r.npz", [1], [2], [3.0], std=[1.0]), "a matrix holds values and nothing else"),
        (lambda d: write_entries(d / "r.npz", [1], [2], [np.nan]), "a matrix needs entries, all of them finite"),
        (lambda d: write_entries(d / "r.npz", [], [], []), "a matrix needs entries"),
        (lambda d: write_table(d / "t.npz", [[1]]), "must end in one of .csv, .tsv, .parquet, .npy, text also in .gz"),
        (
            lambda d: write_table(d / "t.csv", [1, 2]),
            r"values must be a matrix of numbers, got dtype int64 and shape \(2,\)",
        ),
        (lambda d: write_table(d / "t.csv", [["x"]]), "values must be a matrix of numbers"),
        (lambda d: write_table(d / "t.csv", [[1, 2]], ["a"]), r"columns must hold 2 different names, got 1: \['a'\]"),
        (lambda d: write_table(d / "t.csv", [[1, 2]], ["a", "a"]), "columns must hold 2 different names"),
        (lambda d: write_table(d / "t.csv", [[1, 2]], ["a", "b"], [1, 2]), "rows must hold 1 ids, got 2"),
        (lambda d: write_table(d / "t.csv", [[1, 2]], ["", "b"], [1]), "must not hold an empty name beside rows"),
        (lambda d: write_table(d / "t.npy", [[1, 2]], ["a", "b"]), "an .npy file keeps no names"),
    ],
)
def test_what_cannot_be_written(call, message, tmp_path):
    with pytest.raises(TableError, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_is_written_as_nothing(tmp_path):
    path = tmp_path / "r.csv"
    write_entries(path, [1, 2], [3, 4], [np.nan, 0.5])
    assert path.read_text().splitlines()[1:] == ["1,3,", "2,4,0.5"]
    with pytest.raises(TableError, match="line 2, column 'value': the value is missing"):
        read_entries(path)


def test_a_quote_that_swallows_blocks(tmp_path, monkeypatch):
    """Also where Python's csv module gives up on a cell so long, and where quotes are odd within cells for a reason."""
    monkeypatch.setattr(column_text, "_BLOCK", 1 << 14)
    for count in (100, 4_000, 40_000):
        path = written(tmp_path, '1,2,3,-\n\n4,5,6,"' + "7,8,9,-\n" * count)
        with pytest.raises(TableError, match="r.csv, line 3: a quote is opened and never closed: close it"):
            read_entries(path)
    for content in ('1,a 5" disk,3\n' * 3, '1,a,3,"b" c"\n' * 3):
        assert len(read_entries(written(tmp_path, content))[0]) == 3
    path = written(tmp_path, "1,2,3\n" * 12_000 + "4,5," + "7" * (1 << 16) + "\n")
    with pytest.raises(TableError, match="r.csv has a line of more than 16384 bytes: name another separator="):
        read_entries(path)


@pytest.mark.parametrize("header", [True, False])
def test_the_line_is_right_wherever_it_is(header, tmp_path, monkeypatch):
    """In any block, behind empty lines and cells that go on in the next line; against lines counted by hand."""
    monkeypatch.setattr(column_text, "_BLOCK", 128)
    rng = np.random.default_rng(int(header))
    lines = ["user,item,value,note"] if header else ["0,0,0,-"]
    for k in range(1, 120):
        lines += [""] * int(rng.integers(0, 3) == 0)
        lines += [f'{k},{k},0.5,"two\r\nlines"' if rng.integers(0, 8) == 0 else f"{k},{k},0.5,-"]
    whole = "\n".join(lines).split("\n")
    data = [k for k, line in enumerate(whole) if k and re.fullmatch(r"\d+,\d+,0.5,-", line)]
    for k in data[:: 1 + len(data) // 25] + data[-2:]:
        for bad, message in [
            ("1,2,x,-", "'x' is no number ('1,2,x,-')"),
            ("1,2,,-", "the value is missing"),
            ("1,2,inf,-", "inf is no finite number"),
            ("1,2", "2 columns"),
        ]:
            broken = "\n".join([*whole[:k], bad, *whole[k + 1 :]])
            with pytest.raises(TableError) as caught:
                read_entries(written(tmp_path, broken), header=header)
            assert f"r.csv, line {k + 1}" in str(caught.value) and message in str(caught.value)
    assert len(read_entries(written(tmp_path, "\n".join(whole)), header=header)[0]) == 120 - header


# --- with the estimators -----------------------------------------------------------------------------------------


def test_entries_go_to_the_completer(tmp_path):
    """Duplicates are its business, and it says what to do."""
    path = written(tmp_path, "u,i,v\n" + "".join(f"{k % 7},{k % 5},{k}\n" for k in range(35)) + "3,3,9\n")
    rows, columns, values = read_entries(path)
    model = fastdmf.DMFCompleter(random_state=0, max_iter=2)
    with pytest.raises(ValueError, match="occur more than once.*choose duplicates='sum', 'mean' or 'last'"):
        model.fit(np.column_stack([rows, columns]), values)
    frame = pd.DataFrame({"row": rows, "column": columns, "value": values})
    with pytest.warns(UserWarning, match="MAX_ITER"):
        model.set_params(duplicates="last").fit(frame)
    assert model.predict(np.column_stack([rows, columns])).shape == (36,)


def test_tables_go_to_the_imputer_and_back(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((30, 2)) @ rng.standard_normal((2, 6))
    write_table(tmp_path / "t.csv", np.where(rng.random(truth.shape) < 0.8, truth, np.nan), list("abcdef"))
    table = read_table(tmp_path / "t.csv")
    filled = fastdmf.DMFImputer(random_state=0).fit_transform(table.values)
    write_table(tmp_path / "out.tsv", filled, table.columns)
    assert_equal(read_table(tmp_path / "out.tsv").values, filled)


# --- at random ---------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\t"), min_size=1, max_size=8)
numbers = st.integers(-(2**64), 2**64).map(str)
ids = st.lists(numbers, min_size=1, max_size=9) | st.lists(texts | numbers, min_size=1, max_size=9)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    rows=ids,
    columns=ids,
    separator=st.sampled_from(",;\t| :"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    ending=st.sampled_from(["\n", "\r\n", "\r"]),
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=9, max_size=9),
)
def test_what_the_csv_module_writes(tmp_path_factory, rows, columns, separator, quoting, ending, values):
    """Text by text and bit by bit, and integers where all of a side are."""
    path = tmp_path_factory.getbasetemp() / "written.csv"
    entries = list(zip(rows, columns, values))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=ending)
        writer.writerows([("row", "column", "value"), *((*pair, repr(value)) for *pair, value in entries)])
    got = read_entries(path, separator=separator, header=True)
    for side, part in enumerate(zip(*entries)):
        expected = list(part)
        if side < 2 and all(re.fullmatch(r"0|-?[1-9]\d*", text.strip(), re.ASCII) for text in part):
            integers = [int(text) for text in part]
            expected = integers if all(-(2**63) <= n < 2**63 for n in integers) else expected
        assert got[side].tolist() == expected
    assert got[2].tobytes() == np.array(values[: len(entries)]).tobytes()


SEEDS = ["u,i,v\nann,1,2.5\nbob,2,3\n" * 3, "1\t2\t3\n" * 6, 'a;"b;c";1,5\n' * 4, ",x,y\na,1,\nb,,3\n"]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 4)), max_size=5),
    reader=st.sampled_from([read_entries, read_table]),
)
def test_mutated_text_is_read_or_refused(tmp_path_factory, seed, changes, reader):
    """Whatever the bytes are: a TableError of one line, or as many rows as there are lines of data at most."""
    content = bytearray(seed.encode())
    for place, inserted, removed in changes:
        at = int(place * len(content))
        content[at : at + removed] = inserted
    path = tmp_path_factory.getbasetemp() / "mutated.csv"
    path.write_bytes(content)
    try:
        out = reader(path)
    except TableError as error:
        assert "mutated.csv" in str(error) and "\n" not in str(error)
    else:
        lines = re.split(rb"\r\n|\r|\n", bytes(content))
        assert 1 <= len(out[0]) <= len(lines)


def binaries(folder):
    """Return the bytes of a file of every binary format."""
    matrix = sparse.random(9, 8, density=0.3, random_state=0)
    sparse.save_npz(folder / "m.npz", matrix)
    np.save(folder / "m.npy", np.where(matrix.toarray() == 0, np.nan, matrix.toarray()))
    write_entries(folder / "m.parquet", matrix.row, [f"i{j}" for j in matrix.col], matrix.data)
    return [(folder / f"m.{kind}").read_bytes() for kind in ("npz", "npy", "parquet")]


def test_mutated_binaries_are_read_or_refused(tmp_path):
    """With a TableError of one line and nothing else."""
    rng = np.random.default_rng(0)
    refused = 0
    for whole in binaries(tmp_path):
        for k in range(150):
            content = bytearray(whole)
            for _ in range(rng.integers(1, 4)):
                at = rng.integers(len(content))
                content[at] ^= rng.integers(1, 256)
            path = written(tmp_path, bytes(content[: rng.integers(len(content))] if k % 3 == 0 else content), "mutated")
            for reader in (read_entries, read_table):
                try:
                    reader(path)
                except TableError as error:
                    refused += 1
                    assert "mutated" in str(error) and "\n" not in str(error)
    assert refused > 300


MARKET = """
import sys
import numpy as np
from fastdmf.tables import TableError, read_entries

rng = np.random.default_rng(0)
whole = b"%%MatrixMarket matrix coordinate real general\\n% by hand\\n3 4 3\\n1 1 1.5\\n2 2 -3\\n3 4 1e5\\n"
dense = b"%%MatrixMarket matrix array real general\\n2 2\\n1.5\\n-3\\n1e5\\n7\\n"
endings = [whole + b"\\0", whole[:-1] + b"/", whole.replace(b"-3", b"-3\\0"), dense.replace(b"2 2", b"0 2")]
refused = 0
for k in range(600):
    content = bytearray(endings[k] if k < len(endings) else (whole, dense)[k % 2])
    for _ in range(rng.integers(1, 4) * (k >= len(endings))):
        at = rng.integers(len(content))
        content[at : at + rng.integers(0, 3)] = bytes([rng.choice(list(b"0123456789 .-e\\n\\0%/\\xcc"))])
    with open(sys.argv[1], "wb") as file:
        file.write(content)
    try:
        read_entries(sys.argv[1])
    except TableError as error:
        refused += 1
        assert "\\n" not in str(error)
print(refused)
"""


def test_mutated_matrix_market_files(tmp_path):
    """In a process of its own: scipy 1.17 alone crashes on the first of these."""
    command = [sys.executable, "-c", MARKET, str(tmp_path / "m.mtx")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300 and done.stderr == ""


@pytest.mark.parametrize("suffix", [".npz", ".mtx", ".mtx.gz", ".npy"])
def test_a_matrix_keeps_its_shape(tmp_path, suffix):
    dense = np.full((6, 5), np.nan)
    dense[[1, 1, 3], [0, 3, 2]] = 1.5, 0.0, -2.0
    rows, cols = np.nonzero(~np.isnan(dense))
    matrix = sparse.coo_array((dense[rows, cols], (rows, cols)), dense.shape)
    path = tmp_path / f"m{suffix}"
    if suffix == ".npy":
        np.save(path, dense)
    elif suffix == ".npz":
        sparse.save_npz(path, matrix)
    else:
        scipy_io.mmwrite(tmp_path / "m.mtx", matrix)
        path.write_bytes(gzip.compress((tmp_path / "m.mtx").read_bytes()) if suffix == ".mtx.gz" else
                         (tmp_path / "m.mtx").read_bytes())  # fmt: skip
    read = read_matrix(path)
    assert read.shape == (6, 5) and read.nnz == 3
    for ours, entries in zip((read.row, read.col, read.data), read_entries(path)):
        np.testing.assert_array_equal(ours, entries)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TableError):
        read_matrix(path)


def test_lists_are_no_matrix(tmp_path):
    for name in ("f.csv", "f.parquet"):
        write_entries(tmp_path / name, [0, 1], [1, 0], [1.0, 2.0])
        assert read_matrix(tmp_path / name) is None


# --- part by part ----------------------------------------------------------------------------------------------------


def parts_of(path, **options):
    parts = list(iter_entries(path, **options))
    return parts, [np.concatenate(side) if side[0] is not None else None for side in zip(*parts)]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet", ".npz"])
@pytest.mark.parametrize("pairs", [False, True])
def test_parts_are_the_whole(tmp_path, monkeypatch, suffix, pairs):
    monkeypatch.setattr("fastdmf.column_text._BLOCK", 300)
    monkeypatch.setattr(tables, "_BATCH", 25)
    rng = np.random.default_rng(0)
    rows, cols = np.divmod(rng.choice(2000, 400, replace=False), 40)
    names = rows if suffix == ".npz" else np.array([f"u{i}" for i in rows], object)
    path = tmp_path / f"f{suffix}"
    write_entries(path, names, cols, None if pairs and suffix != ".npz" else np.round(rng.standard_normal(400), 3))
    value = {"value": False} if pairs else {}
    whole = read_entries(path, **value)
    parts, joined = parts_of(path, size=60, **value)
    if suffix == ".npz":
        assert len(parts) == 1
    else:
        assert len(parts) >= 4 and all(60 <= len(part[0]) < 120 for part in parts[:-1])
    for one, other in zip(joined, whole):
        if other is None:
            assert one is None and pairs
        else:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    assert sum(1 for _ in iter_entries(path, **value)) == 1


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_ids_of_parts_are_of_one_kind(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("fastdmf.column_text._BLOCK", 40)
    path = tmp_path / f"f{suffix}"
    numbers = np.arange(100, 140)
    write_entries(path, numbers, numbers, np.ones(40))
    for texts in ((), ("row",), ["column"], {"row", "column"}):
        _, (rows, columns, _) = parts_of(path, size=5, texts=texts)
        for side, ids in (("row", rows), ("column", columns)):
            expected = numbers.astype(str) if side in texts else numbers
            assert ids.tolist() == expected.tolist() and (ids.dtype == object) == (side in texts)
    if suffix == ".csv":
        with open(path, "a") as file:
            file.write("007,9,1\n")
        with pytest.raises(MixedIdsError, match="f.csv has row ids that are texts behind .*texts=.'row',.") as caught:
            parts_of(path, size=5)
        assert caught.value.side == "row" and isinstance(caught.value, TableError)
        parts, (rows, columns, _) = parts_of(path, size=5, texts=("row",))
        assert rows.tolist() == [*numbers.astype(str), "007"] and columns.dtype == np.int64
        # Texts first are texts throughout.
        path.write_text("a,1,1\n" + "".join(f"{k},1,1\n" for k in range(50)))
        assert parts_of(path, size=5)[1][0].tolist() == ["a", *map(str, range(50))]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"texts": "row"}, ValueError, "texts must hold 'row', 'column' or both, got 'row'"),
        ({"texts": ["value"]}, ValueError, "texts must hold 'row', 'column' or both"),
        ({"size": 0}, ValueError, "size must be an integer >= 1, got 0"),
        ({"size": 2.5}, ValueError, "size must be an integer >= 1, got 2.5"),
        ({"sep": ","}, TypeError, "unexpected keyword argument 'sep'"),
        ({"row": "user"}, TableError, "has no column 'user'"),
    ],
)
def test_parts_refuse(tmp_path, options, error, message):
    path = tmp_path / "f.csv"
    path.write_text("a,b,c\n1,2,3\n")
    with pytest.raises(error, match=message):
        next(iter_entries(path, **options))


def test_a_line_of_a_later_part_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdmf.column_text._BLOCK", 40)
    path = tmp_path / "f.csv"
    path.write_text("r,c,v\n" + "1,2,3\n" * 50 + "1,2,three\n")
    parts = iter_entries(path, size=5)
    assert len(next(parts)[0]) >= 5
    with pytest.raises(TableError, match="f.csv, line 52, column 'v': 'three' is no number"):
        list(parts)


def test_examples():
    """The docstrings' examples give what they say."""
    results = doctest.testmod(tables)
    assert results.attempted == 8 and results.failed == 0
