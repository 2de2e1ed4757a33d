"""``fastdmf impute``: from a table with holes to a table without."""

import time
from contextlib import suppress

import numpy as np

from fastdmf.column_text import ColumnText, TableError, load_pyarrow
from fastdmf.command_files import INTERRUPTED, Files, UsageError, reading_of, suffix_of
from fastdmf.command_fit import fitted, forget, note, prepared, settings_of
from fastdmf.imputer import DMFImputer
from fastdmf.tables import read_table, write_table

__all__ = ["impute"]

_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".npy")
_TEXT_COLUMN = (
    "; a column of texts is no part of what can be filled: encode it as numbers, take it out, or name it by --rows if "
    "it holds the ids of the rows"
)


def impute(args):
    """Fit an imputer to the table of a file, and write the table without holes."""
    if args.out is None:
        raise UsageError("--out FILE is needed")
    if isinstance(args.width, tuple) and args.solver not in ("auto", "descent"):
        raise UsageError("--width N,N,... needs --solver descent")
    with Files() as files:
        args.said = files.said
        path = files.read(args.table)
        outputs = {"--out": args.out} if args.std_out is None else {"--out": args.out, "--std-out": args.std_out}
        for option, out in outputs.items():
            files.check_output(option, out, _SUFFIXES)
        begin = time.perf_counter()
        table = _read(args, path)
        holes = int(np.isnan(table.values).sum())
        n, p = table.values.shape
        note(args, f"{n} rows, {p} columns, {holes} holes, read in {time.perf_counter() - begin:.1f} s")
        if holes == n * p:
            raise TableError(f"{args.table} holds no number: all its {holes} cells are holes")
        names = _names(args, path, table, outputs)
        checkpoint = prepared(args)
        model = DMFImputer(
            standardize={"auto": "auto", "yes": True, "no": False}[args.standardize],
            keep_empty_features=args.keep_empty,
            **settings_of(args, checkpoint),
        )
        fitted(args, lambda: model.fit(table.values))
        names["columns"] = _kept(model, names["columns"])
        tables = {"--out": model.transform(table.values)}
        if args.std_out is not None:
            tables["--std-out"] = model.uncertainty(table.values)
        for option, out in outputs.items():
            with files.writing(out, f".{args.format}") as place:
                write_table(place, tables[option], **names)
            note(args, f"{out} is written")
        interrupted = model.status_.name == "INTERRUPTED"
        if not interrupted:
            forget(args)
    return INTERRUPTED if interrupted else 0


def _read(args, path):
    rows = {"none": None}.get(args.rows, int(args.rows) if args.rows.isdecimal() else args.rows)
    try:
        table = read_table(path, rows=rows, missing=args.missing, **reading_of(args))
        for text in args.missing:
            # -999 is written -999.0 as well, and binary files hold no texts.
            with suppress(ValueError):
                table.values[table.values == float(text)] = np.nan
        return table
    except TableError as error:
        if "is no number" not in str(error) and "no numbers" not in str(error):
            raise
        raise TableError(f"{error}{_TEXT_COLUMN}") from error


def _names(args, path, table, outputs):
    """Return the names that are written, which must fit the outputs."""
    if table.columns is not None and len(set(table.columns)) < len(table.columns):
        twice = next(name for name in table.columns if table.columns.count(name) > 1)
        raise TableError(f"{args.table} has several columns {twice!r}: give them different names")
    for option, out in outputs.items():
        if suffix_of(out) == ".npy" and (table.columns is not None or table.rows is not None):
            raise UsageError(
                f"{option} {out}: an .npy file keeps no names of columns or rows: write a .csv or .parquet"
            )
    return {"columns": table.columns, "rows": table.rows, "row_name": _row_name(args, path, table)}


def _row_name(args, path, table):
    """Return what the file calls its column of row ids; pandas' index has no name of its own."""
    if table.rows is None or table.columns is None:
        return ""
    with open(path, "rb") as file:
        if file.read(4) == b"PAR1":
            names = load_pyarrow().parquet.read_schema(path).names
        else:
            text = ColumnText(path, *reading_of(args).values())
            text.header = True
            names = text.names
    name = next((name for name, other in zip(names, [*table.columns, None]) if name != other), "")
    return "" if name.startswith("__index_level_") else name


def _kept(model, columns):
    """Return the names of the columns that are not dropped."""
    return None if columns is None else model.get_feature_names_out(np.array(columns, object)).tolist()
