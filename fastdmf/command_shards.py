"""``fastdmf shard``, and the fit of ``fastdmf complete`` from a folder of shards."""

import re
import time
from dataclasses import replace

import numpy as np

from fastdmf.backend import get_backend
from fastdmf.column_text import TableError
from fastdmf.command_files import Files, UsageError, reading_of
from fastdmf.command_fit import note
from fastdmf.completer import DMFCompleter
from fastdmf.fit_parts import Parts
from fastdmf.fitting import report
from fastdmf.ids import IdTable
from fastdmf.mean_model import MeanModel
from fastdmf.shards import write_shards
from fastdmf.tables import read_entries
from fastdmf.variational import vbmf

__all__ = ["fit_shards", "held", "shard"]

_GAIN = 5e-4  # of ``vbmf``: the gain of evidence an entry at which it ends


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


def fit_shards(shards, *, solver, dtype, **settings):
    """Return a :class:`DMFCompleter` that was fitted to entries on disk by the variational solver.

    Its entries stay on the disk: it predicts, and :func:`held` brings them into memory.

    Parameters
    ----------
    shards : EntryShards
    solver : {"auto", "variational"}
    dtype : {"float32", "float64"} or None
        None for that of the shards.
    **settings
        As of :class:`DMFCompleter`.
    """
    model = DMFCompleter(solver=solver, **settings)
    model._check()
    names = ("depth", "width", "implicit_features", "biases", "n_init", "max_iter", "device", "n_threads")
    options = {name: getattr(model, name) for name in names}
    tol = _GAIN if model.tol is None else model.tol
    parts = Parts(model, most=model.n_init)
    # As the estimator tells its solvers: from one shard a side the fit has the bits of that in memory.
    options["random_state"] = int(np.random.RandomState(model.random_state).randint(np.iinfo(np.int32).max))
    solution = vbmf(
        shards,
        dtype=None if dtype is None else np.dtype(dtype),
        tol=tol,
        on_failure="ignore",
        **parts.options("of shards", goal=("evidence", tol)),
        **options,
    )
    parts.reports.close()
    lowest, highest = zip(*((v.min(), v.max()) for _, _, v, *_ in shards.parts() if len(v)))
    model._observed = float(min(lowest)), float(max(highest))
    report(model, solution)
    model.solver_, model.depth_ = "variational", len(solution.factors)
    model.n_features_in_ = 2
    model._settle(solution.factor_model(), IdTable("row", shards.row_ids), IdTable("column", shards.column_ids))
    return model


def held(model):
    """Let a model of entries on disk have them in memory, 8 bytes each in float32, so that it can be saved."""
    model._model = _held(model._model)


def _held(model):
    if isinstance(model, MeanModel):
        return MeanModel([_held(member) for member in model.members])
    places, pad = np.arange(int(model.indptr[-1])), get_backend().kernels.PAD
    arrays = {name: getattr(model, name) for name in ("indices", "y", "w")}
    arrays = {name: None if array is None else np.pad(array[places], (0, pad)) for name, array in arrays.items()}
    return replace(model, **arrays)
