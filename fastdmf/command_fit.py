"""What the commands that fit have in common: settings, the checkpoint's folder, progress and notes on stderr."""

import sys
import time
from contextlib import contextmanager, nullcontext, suppress

from fastdmf.checkpoint import Checkpoint
from fastdmf.command_files import UsageError
from fastdmf.progress import StreamProgress

__all__ = ["fitted", "forget", "note", "prepared", "settings_of"]

_NAME = "fit.npz"
_EVERY = 5.0  # seconds between two lines of progress


def note(args, text):
    """Say something on stderr, unless ``--quiet``."""
    if not args.quiet:
        print(f"fastdmf: {text}", file=sys.stderr, flush=True)


def prepared(args):
    """Return the :class:`Checkpoint` that is asked for, whose folder is made; or None.

    Raises
    ------
    UsageError
        If there is a state in it already, and no ``--resume``.
    OSError
        If the folder cannot be made.
    """
    if args.checkpoint is None:
        if args.resume:
            raise UsageError("--resume needs the folder to go on from: --checkpoint FOLDER")
        return None
    if args.checkpoint.exists() and not args.checkpoint.is_dir():
        raise UsageError(f"--checkpoint {args.checkpoint} is a file: name a folder")
    args.checkpoint.mkdir(parents=True, exist_ok=True)
    there = bool(_states(args))
    if there and not args.resume:
        raise UsageError(
            f"--checkpoint {args.checkpoint} holds the state of another fit: go on from it by --resume, or take "
            "another folder"
        )
    if args.resume and not there:
        note(args, f"there is no state in {args.checkpoint} yet: the fit starts at its beginning")
    return Checkpoint(args.checkpoint / _NAME, args.checkpoint_every)


def _states(args):
    return [path for path in sorted(args.checkpoint.glob(f"{_NAME}*")) if path.suffix != ".new"]


def forget(args):
    """Delete the checkpoint of a fit whose result is written."""
    if args.checkpoint is None:
        return
    for path in _states(args):
        path.unlink()
    with suppress(OSError):  # somebody keeps other things in it
        args.checkpoint.rmdir()


def settings_of(args, checkpoint):
    """Return what every estimator is told."""
    settings = {
        "depth": args.depth,
        "width": args.width,
        "solver": args.solver,
        "max_iter": args.max_iter,
        "validation_fraction": args.validation,
        "device": args.device,
        "n_threads": args.threads,
        "random_state": args.seed,
        "checkpoint": checkpoint,
        "verbose": int(not args.quiet),
    }
    bounds = {name: getattr(args, name) for name in ("min_value", "max_value")}
    return settings | {name: value for name, value in bounds.items() if value is not None}


@contextmanager
def _progress(args):
    with nullcontext() if args.quiet else StreamProgress(sys.stderr, _EVERY):
        yield


def fitted(args, fit):
    """Return what ``fit()`` returns, with its progress on stderr, and say what it is."""
    begin = time.perf_counter()
    with _progress(args):
        model = fit()
    unit = "steps" if model.solver_ == "descent" else "sweeps"
    note(
        args,
        f"{model.solver_} fit in {time.perf_counter() - begin:.1f} s: {model.n_iter_} {unit}, rank "
        f"{len(model.singular_values_)}, standard deviation of the noise {model.noise_variance_**0.5:.4g}",
    )
    if model.status_.name == "INTERRUPTED":
        note(args, "interrupted: what is written comes from the fit so far")
    return model
