"""``fastdmf shard``: files of entries to a folder of shards."""

import re
import time

from fastdmf.command_files import Files, UsageError, reading_of
from fastdmf.command_fit import note
from fastdmf.shards import write_shards
from fastdmf.tables import MixedIdsError, TableError, iter_entries

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
        shards = _written(args, paths)
    seconds = time.perf_counter() - begin
    note(args, f"{shards.size} entries of {shards.shape[0]} rows and {shards.shape[1]} columns, {seconds:.1f} s")
    return 0


def _written(args, paths):
    """Return the shards, with ids as texts on a side where any file has one that is no integer."""
    texts = set()
    while True:
        names = []  # of the files that the parts come from
        try:
            return write_shards(
                args.out,
                _parts(args, paths, texts, names),
                ids=not args.positions,
                dtype=args.dtype,
                shard_entries=args.shard_entries,
            )
        except MixedIdsError as error:
            if args.positions:
                raise
            texts.add(error.side)
            note(args, f"{error.side} ids that are texts come behind integers: all are read as texts, once more")
        except (TypeError, ValueError) as error:
            raise type(error)(_by_file(str(error), names)) from error


def _parts(args, paths, texts, names):
    """Yield the entries of one file after the other part by part; ids are texts on the sides ``texts``.

    Sides whose ids are texts in the first part join these.
    """
    columns = dict(zip(("row", "column", "value"), args.columns or ()))
    for given, path in zip(args.entries, paths):
        total = 0
        for *ids, values in iter_entries(path, texts=texts, **columns, **reading_of(args)):
            if values is None:
                raise TableError(f"{given} holds pairs without values: entries are row, column, value")
            found = {side for side, part in zip(("row", "column"), ids) if part.dtype == object}
            if names and (later := found - texts):
                side = min(later)
                raise MixedIdsError(f"{given} has {side} ids that are texts behind others that are integers", side)
            texts |= found
            names.append(given)
            total += len(values)
            yield *ids, values
        note(args, f"{given}: {total} entries")


def _by_file(text, names):
    """Return an error of ``write_shards`` with its parts called by their files."""
    text = re.sub(r"\b(of )?part (\d+)\b", lambda match: f"{match[1] or ''}{names[int(match[2])]}", text)
    return text.replace("combine duplicate entries (sum, mean or last) before, in one part and over all", _COMBINE)


_COMBINE = "leave all but one out, over all files"
