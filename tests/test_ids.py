"""Ids of rows and columns: codes, unknown ids, extension, types."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdmf.ids import IdTable, Positions, read_ids

BIG = st.integers(-(2**63), 2**63 - 1)
SMALL = st.integers(-5, 40)
IDS = st.one_of(st.lists(SMALL, min_size=1), st.lists(BIG, min_size=1), st.lists(st.text(max_size=3), min_size=1))


@given(IDS)
def test_codes_are_places_among_the_ids(values):
    table, codes = IdTable.of("row", values)
    assert [table.ids[code] for code in codes] == values
    assert list(table.ids) == sorted(set(values))
    assert np.array_equal(table.encode(values), codes)
    assert list(table.decode(codes)) == values


@given(st.lists(SMALL), st.lists(SMALL))
def test_extension_keeps_the_codes(first, second):
    table, codes = IdTable.of("row", np.array(first, np.int64))
    wider, new = table.extend(np.array(second, np.int64))
    assert list(wider.ids[: len(table)]) == list(table.ids)
    assert [wider.ids[code] for code in new] == second
    assert np.array_equal(wider.encode(np.array(first, np.int64)), codes)
    assert sorted(wider.ids) == sorted({*first, *second})
    unknown = table.encode(np.array(second, np.int64)) == -1
    assert list(unknown) == [value not in first for value in second]


def test_unknown_ids():
    table, _ = IdTable.of("row", ["b", "a", "b"])
    assert list(table.encode(["a", "z", "b"])) == [0, -1, 1]
    assert list(table.decode([1, -1])) == ["b", None]
    assert list(IdTable.of("row", [7, 5])[0].decode([-1, 0])) == [-1, 5]


@pytest.mark.parametrize(
    "values",
    [
        np.array([3, 1, 3], np.int8),
        np.array([3, 1, 3], np.uint64),
        np.array([3.0, 1.0, 3.0]),
        [3, 1, 3],
        np.array([3, np.int32(1), 3], object),
        pd.Series([3, 1, 3], dtype="Int64"),
        pl.Series([3, 1, 3]),
    ],
)
def test_integers_of_all_kinds(values):
    ids = read_ids("row", values)
    assert ids.dtype == np.int64 and list(ids) == [3, 1, 3]


@pytest.mark.parametrize(
    "values",
    [
        np.array(["x", "ä", "x"]),
        np.array(["x", "ä", "x"], object),
        pd.Series(["x", "ä", "x"]),
        pd.Series(["x", "ä", "x"], dtype="string"),
        pd.Series(["x", "ä", "x"], dtype="category"),
        pl.Series(["x", "ä", "x"]),
        pl.Series(["x", "ä", "x"], dtype=pl.Categorical),
    ],
)
def test_strings_of_all_kinds(values):
    assert list(read_ids("row", values)) == ["x", "ä", "x"]
    assert list(IdTable.of("row", values)[1]) == [0, 1, 0]


def test_ids_beyond_32_bits():
    ids = np.array([2**40, -(2**50), 2**31, 2**62])
    table, codes = IdTable.of("column", ids)
    assert list(codes) == [2, 0, 1, 3]
    assert list(table.encode([2**62, 2**31 + 1])) == [3, -1]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (np.array([1, "a"], object), TypeError, "row ids must all be integers or all be strings, got int, str"),
        (np.array([1, True], object), TypeError, "row ids must all be integers or all be strings, got bool, int"),
        (np.array([1.5, 2.0]), TypeError, "row ids must be whole numbers or strings"),
        (np.array([1e300]), TypeError, "row ids must be whole numbers or strings"),
        (np.array([True]), TypeError, "row ids must be whole numbers or strings, got dtype bool"),
        (np.array(["2020-01-01"], "datetime64[D]"), TypeError, "row ids must be whole numbers or strings"),
        (np.array([1.0, np.nan]), ValueError, "row ids contain missing values: leave those entries out"),
        (np.array(["a", None], object), ValueError, "row ids contain missing values"),
        (np.array(["a", np.nan], object), ValueError, "row ids contain missing values"),
        (pd.Series([1, None], dtype="Int64"), ValueError, "row ids contain missing values"),
        (pl.Series(["a", None]), ValueError, "row ids contain missing values"),
        (np.array([2**63], np.uint64), ValueError, "row ids must fit into 64 bits"),
        (np.array([2**70], object), ValueError, "row ids must fit into 64 bits"),
    ],
)
def test_bad_ids(values, error, message):
    with pytest.raises(error, match=message):
        IdTable.of("row", values)


def test_types_must_stay():
    words, _ = IdTable.of("row", ["a"])
    numbers, _ = IdTable.of("column", [1])
    for call in (words.encode, words.extend):
        with pytest.raises(TypeError, match="row ids were strings at fit and are integers now"):
            call([1])
    for call in (numbers.encode, numbers.extend):
        with pytest.raises(TypeError, match="column ids were integers at fit and are strings now"):
            call(["1"])
    with pytest.raises(ValueError, match="X has 3 rows, the model 1: name new ones by pairs of ids"):
        words.reach(3)
    assert words.reach(1) is words


def test_positions():
    table = Positions("row", 4)
    assert list(table.encode([3, 0])) == [3, 0] and list(table.decode([2, -1])) == [2, -1]
    assert list(table.ids) == [0, 1, 2, 3]
    wider, codes = table.extend([6, 1])
    assert len(wider) == 7 and list(codes) == [6, 1]
    assert len(table.reach(9)) == 9 and len(table.reach(2)) == 4
    with pytest.raises(ValueError, match="row index 4 is out of range: the model has 4 rows"):
        table.encode([1, 4])
    for call in (table.encode, table.extend):
        with pytest.raises(ValueError, match="row index -1 is negative"):
            call([-1])
        with pytest.raises(TypeError, match="row ids are strings, but the model was fitted to positions"):
            call(["a"])
    assert table.encode(np.zeros(0)).size == 0
