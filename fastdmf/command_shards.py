"""``fastdmf shard``: files of entries to a folder of shards."""

import re
import time

from fastdmf.column_text import TableError
from fastdmf.command_files import Files, UsageError, reading_of
from fastdmf.command_fit import note
from fastdmf.shards import write_shards
from fastdmf.tables import read_entries

__all__ = ["shard"]


def shard(args):
    """Write entries to a folder of shards."""
    if args.out is None:
        raise UsageError("--out FOLDER is needed")
    begin = time.perf_counter()
    with Files() as files:
        args.said = files.said
        paths = [files.read(path) for path in args.entries]
        if any(path.resolve() == args.out.resolve() for path in paths):
            raise UsageError(f"--out {args.out} is an input: name another folder")
        try:
            shards = write_shards(
                args.out,
                _parts(args, paths),
                ids=not args.positions,
                dtype=args.dtype,
                shard_entries=args.shard_entries,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(_by_file(str(error), args.entries)) from error
    seconds = time.perf_counter() - begin
    note(args, f"{shards.size} entries of {shards.shape[0]} rows and {shards.shape[1]} columns, {seconds:.1f} s")
    return 0


def _parts(args, paths):
    """Yield the entries of one file after the other, with ids as those of the first: texts, or integers."""
    columns = dict(zip(("row", "column", "value"), args.columns or ()))
    text = None
    for given, path in zip(args.entries, paths):
        rows, cols, values = read_entries(path, **columns, **reading_of(args))
        if values is None:
            raise TableError(f"{given} holds pairs without values: entries are row, column, value")
        text = [ids.dtype == object for ids in (rows, cols)] if text is None else text
        sides = [_as_first(given, *side) for side in zip(("row", "column"), (rows, cols), text)]
        note(args, f"{given}: {len(values)} entries")
        yield *sides, values


def _as_first(given, name, ids, text):
    """Return ids as texts where those of the first file are."""
    if ids.dtype == object and not text:
        raise TableError(f"{given}: its {name} ids are texts, those of the first file integers: name this file first")
    return ids.astype(str).astype(object) if text and ids.dtype != object else ids


def _by_file(text, names):
    """Return an error of ``write_shards`` with its parts called by their files."""
    text = re.sub(r"\b(of )?part (\d+)\b", lambda match: f"{match[1] or ''}{names[int(match[2])]}", text)
    return text.replace("combine duplicate entries (sum, mean or last) before, in one part and over all", _COMBINE)


_COMBINE = "leave all but one out, over all files"
