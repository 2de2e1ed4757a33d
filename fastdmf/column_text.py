"""Text in columns, such as CSV: how it is laid out, its numbers and ids a block at a time, and the line of an error.

pyarrow takes the text apart. Python's csv module looks at the first lines, and for the line where something is wrong.
"""

import codecs
import csv
import io
import os
import re
import zlib
from contextlib import contextmanager

import numpy as np

from fastdmf.files import open_file

__all__ = ["ColumnText", "TableError", "first_null", "load_pyarrow", "short", "whole_archive"]

_BLOCK = 8 << 20  # bytes of text that are taken apart at a time
_SAMPLE, _SAMPLE_LINES, _LONGEST = 1 << 16, 100, 1 << 26  # bytes looked at to tell how a text is laid out
_SEPARATORS = "\t;,| "
_SHOWN = 80  # characters of a line in an error


class TableError(ValueError):
    """A file that cannot be read as a table, or a table that cannot be written; one sentence says what to do."""


def load_pyarrow():
    """Return pyarrow with its parts that are used; an ImportError says how to get it."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        # Not found, or found and at odds with numpy's version: the reason says which.
        raise ImportError(f'text and parquet files need pyarrow: pip install "fastdmf[io]" ({error})') from None
    return pyarrow


@contextmanager
def whole_archive(path):
    """Let the errors of what unpacks and parses binary files say which file it is."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise TableError(f"{path!s} is damaged or cut off ({error}): copy it again") from None


class ColumnText:
    """How a text is laid out: found in its first lines unless it is told.

    Attributes
    ----------
    path, separator, decimal, encoding
    lines : list of list of str
        The cells of the first lines that are not empty.
    told : bool or "auto"
        Whether the first of them holds names.
    first : int
        Its line in the file, from 1.
    """

    def __init__(self, path, separator, header, decimal, encoding):
        single = isinstance(separator, str) and len(separator) == 1 and separator.isascii()
        if separator is not None and (not single or separator in '\0\r\n"'):
            raise TableError(
                f"separator must be one ASCII character, got {separator!r}: of lines like 1::2::3 separator=':' makes "
                "columns 0, 2 and 4"
            )
        self.told = bool(header) if isinstance(header, (bool, np.bool_)) else header
        if self.told not in (True, False, "auto"):
            raise TableError(f"header must be True, False or 'auto', got {header!r}")
        if decimal not in (".", ","):
            raise TableError(f"decimal must be '.' or ',', got {decimal!r}")
        try:
            self.encoding = codecs.lookup(encoding).name
            b"1".decode(encoding, "replace")  # rot13 and hex are codecs as well, and idna replaces nothing
        except (LookupError, TypeError, ValueError):
            raise TableError(f"encoding must be one of text that Python knows, got {encoding!r}") from None
        # For Python's own readers: pyarrow passes over a byte order mark by itself.
        self._codec = "utf-8-sig" if self.encoding == "utf-8" else self.encoding
        self.path, self.decimal = path, decimal
        raw, self.longest = self._first_lines()
        self.first = next((k for k, line in enumerate(raw) if line.strip("\r\n")), len(raw)) + 1
        raw = raw[self.first - 1 :]
        if not raw:
            raise TableError(f"{path!s} is empty: all its lines are")
        self.separator = separator or _likely_separator(raw, _SEPARATORS.replace(decimal, ""))
        self.lines = self._cells(raw)
        self.header = self.told is True

    def open(self):
        """Return the bytes of the file, unpacked, as pyarrow reads them."""
        pyarrow = load_pyarrow()
        with open_file(self.path) as file:
            packed = "gzip" if file.read(2) == b"\x1f\x8b" else "detect"
        return pyarrow.input_stream(os.fspath(self.path), compression=packed)

    def _first_lines(self):
        """Return some first lines, and the bytes of the longest."""
        size = _SAMPLE
        while True:
            with whole_archive(self.path), self.open() as file:
                data = file.read(size)
            if len(data) < size or data.count(b"\n") + data.count(b"\r") > 2 or size >= _LONGEST:
                break
            size *= 4
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") and not self.encoding.startswith(("utf-16", "utf-32")):
            raise TableError(f"{self.path!s} is UTF-16: pass encoding='utf-16', or save it as UTF-8")
        try:
            text = codecs.getincrementaldecoder(self._codec)("replace").decode(data)
        except UnicodeError:  # UTF-32 that does not begin like it
            raise self.undecodable() from None
        if "\0" in text:
            raise TableError(f"{self.path!s} is neither text nor a format that is known: save it as CSV or parquet")
        lines = io.StringIO(text, newline="").readlines()
        if len(data) == size and len(lines) > 1:
            lines.pop()  # it goes on behind the sample
        return lines[: _SAMPLE_LINES + 1], max(map(len, data.splitlines()), default=0)

    def _cells(self, lines):
        try:
            return [cells for cells in csv.reader(lines, delimiter=self.separator) if cells]
        except csv.Error as error:
            raise TableError(
                f"{self.path!s}, line {self.first}: {error}, found no columns: name the separator="
            ) from None

    @property
    def width(self):
        """Number of columns."""
        return len(self.lines[0])

    @property
    def single(self):
        """Whether there is one column, of which an empty line is a hole."""
        return self.width == 1

    @property
    def names(self):
        """Names of the columns, or None."""
        if not self.header:
            return None
        names = [name.strip() for name in self.lines[0]]
        if any("\ufffd" in name for name in names):
            raise self.undecodable()
        return names

    @property
    def samples(self):
        """The first lines of data, those that have all columns."""
        return [cells for cells in self.lines[self.header :] if len(cells) == self.width]

    def is_number(self, cell):
        """Whether a cell holds a number, whatever it is."""
        try:
            float(cell.strip().replace(self.decimal, "."))
        except ValueError:
            return False
        return "_" not in cell

    def name_of(self, place):
        """Return what to call a column in an error."""
        return f"column {short(self.names[place])}" if self.header else f"column {place} (from 0)"

    def batches(self, floats, texts, missing, ids_missing=False):
        """Yield (number of the first record, batch) of the columns ``floats``, float64, and ``texts``, dictionaries.

        Records are numbered as pyarrow does, which counts what it skips and leaves out empty lines. What is in
        ``missing`` is null, among texts only if ``ids_missing``.
        """
        pyarrow = load_pyarrow()
        types = dict.fromkeys(map(str, floats), pyarrow.float64())
        types |= dict.fromkeys(map(str, texts), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
        # Serial: it alone numbers the records, and is as fast where the columns are few.
        read = pyarrow.csv.ReadOptions(
            use_threads=False,
            block_size=max(_BLOCK, 4 * self.longest),
            skip_rows=self.skipped,
            column_names=[str(k) for k in range(self.width)],
            encoding="utf8" if self.encoding == "utf-8" else self.encoding,
        )
        parse = pyarrow.csv.ParseOptions(
            delimiter=self.separator, ignore_empty_lines=not self.single, newlines_in_values=True
        )
        convert = pyarrow.csv.ConvertOptions(
            column_types=types,
            include_columns=list(types),
            null_values=list(missing),
            strings_can_be_null=ids_missing,
            decimal_point=self.decimal,
        )
        record = self.skipped + 1
        try:
            with self.open() as file:
                counted = _QuoteCounter(file)
                with pyarrow.csv.open_csv(counted, read, parse, convert) as reader:
                    for batch in reader:
                        yield record, batch
                        record += len(batch)
        except (pyarrow.ArrowException, OSError, UnicodeError) as error:
            if "Could not skip initial" in str(error):  # the names are all there is
                return
            raise self._explained(error) from None
        # What a quote that is never closed swallows, pyarrow takes for one cell.
        if counted.quotes % 2 and (open_quote := self._open_quote()):
            raise open_quote

    @property
    def skipped(self):
        """Lines that pyarrow is told to skip: up to the header, for empty ones it skips itself."""
        return self.first if self.header else 0

    def _explained(self, error):
        """Return a :class:`TableError` that says where and what for an error of pyarrow's, which numbers the record."""
        said = str(error)
        found = re.search(r"CSV parse error: Row #(\d+): Expected \d+ columns, got (\d+)", said)
        if found:
            line, text = self.line(int(found[1]))
            return TableError(
                f"{self.path!s}, line {line}: {found[2]} column{'s' * (found[2] != '1')}, line {self.first} has "
                f"{self.width} ({short(text)}): correct it, put quotes around cells that hold the separator "
                f"{self.separator!r}, or pass separator="
            )
        found = re.search(r"CSV column #(\d+): Row #(\d+): .*: invalid value '(.*)'", said, re.DOTALL)
        if found:
            place, number, cell = int(found[1]), int(found[2]), found[3]
            line, text = self.line(number)
            advice = "correct it, or leave the line out"
            if "," in cell and self.decimal == ".":
                advice = "pass decimal=',' if that is the decimal point"
            elif line == self.first:
                advice = "pass header=True if the line holds names"
            return TableError(
                f"{self.path!s}, line {line}, {self.name_of(place)}: {short(cell)} is no number ({short(text)}): "
                f"{advice}"
            )
        if "invalid UTF8" in said or isinstance(error, UnicodeError):
            return self.undecodable()
        if "straddling" in said:
            longest = f"{self.path!s} has a line of more than {_BLOCK} bytes: name another separator="
            return self._open_quote() or TableError(longest)
        if isinstance(error, OSError):
            return TableError(f"{self.path!s} is damaged or cut off ({error}): copy it again")
        return TableError(f"{self.path!s} cannot be read as a table: {' '.join(said.split())}")

    def undecodable(self):
        """Return the error of a text that is in another encoding, at the first line that shows it."""
        with self.open() as file:
            for line, data in enumerate(io.BufferedReader(file) if self.encoding == "utf-8" else (), 1):
                try:
                    data.decode()
                except UnicodeDecodeError as error:
                    return TableError(
                        f"{self.path!s}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8: pass "
                        "encoding='latin-1', or what else the file was written in"
                    )
        return TableError(f"{self.path!s} is not {self.encoding}: pass the encoding= that it was written in")

    def _open_quote(self):
        """Return the error of a quote that is never closed, or None if there is none."""
        with self.open() as file:
            text = io.TextIOWrapper(io.BufferedReader(file), self._codec, "replace", newline="")
            records = csv.reader(text, delimiter=self.separator, strict=True)
            before = 0
            try:
                for _ in records:
                    before = records.line_num
            except csv.Error as error:
                if "unexpected end of data" not in str(error) and "field limit" not in str(error):
                    return None  # quotes within cells, which pyarrow takes for what they are
                return TableError(f"{self.path!s}, line {before + 1}: a quote is opened and never closed: close it")
        return None

    def line(self, number):
        """Return the line of the file at which record ``number`` begins, and its text."""
        with self.open() as file:
            text = io.TextIOWrapper(io.BufferedReader(file), self._codec, "replace", newline="")
            for _ in range(self.skipped):
                next(text)
            line, before = self.skipped, number - self.skipped - 1
            if before:
                records = csv.reader(text, delimiter=self.separator)
                try:
                    for cells in records:
                        before -= bool(cells) or self.single
                        if not before:
                            break
                except csv.Error:  # a cell too long for it: the number of the record is near
                    return number, ""
                line += records.line_num
            for raw in text:
                line += 1
                if raw.strip("\r\n") or self.single:
                    return line, raw.rstrip("\r\n")
        return number, ""


class _QuoteCounter(io.RawIOBase):
    """The bytes of a file, and how many quotes were among them so far."""

    def __init__(self, file):
        self._file, self.quotes = file, 0

    def readable(self):
        """Whether it can be read."""
        return True

    def read(self, size=-1):
        """Return some bytes."""
        data = self._file.read(size)
        self.quotes += data.count(b'"')
        return data


def short(text):
    """Return a text for an error, cut to a length that can be read."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _likely_separator(lines, separators):
    """Return the separator at which most lines have equally many columns, and of several the one that makes more."""

    def agreement(separator):
        try:
            widths = [len(cells) for cells in csv.reader(lines, delimiter=separator) if cells]
        except csv.Error:
            return 0.0, 1
        usual = max(set(widths), key=lambda width: (widths.count(width), width))
        return (widths.count(usual) / len(widths), usual) if usual > 1 else (0.0, 1)

    # A blank separates only where nothing else does: texts hold blanks.
    best = max(separators[:-1], key=agreement)
    return best if agreement(best)[1] > 1 else max(best, " ", key=agreement)


def first_null(data):
    """Return the place of the first missing value of a pyarrow array; 0 if there is none."""
    return int(data.is_null().to_numpy(zero_copy_only=False).argmax())
