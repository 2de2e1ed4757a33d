"""Checkpoints: the state of a run in one file, from which another process goes on to the same bits.

A file is an npz archive of arrays and of a JSON text that says where they belong; no pickle. It is written beside the
former one and takes its place in one step, so that at any moment one whole file is there. It names the run that it
belongs to by a digest of data and settings: another run's file is refused, not overwritten.
"""

import hashlib
import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdmf.files import remove_unfinished, whole_file

__all__ = ["Checkpoint", "CheckpointFile", "digest"]

_FORMAT = "fastdmf checkpoint 1"


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run writes its state; where it goes on from when the file is there.

    Parameters
    ----------
    path : str or os.PathLike
        File to write, conventionally ``.npz``. If it exists it must be of the same run: same data, settings and seed.
    every : float
        Seconds between two writings. What the last ones did is done again after a crash.
    """

    path: object
    every: float = 60.0

    def __post_init__(self):
        if not isinstance(self.path, (str, os.PathLike)):
            raise TypeError(f"checkpoint must be a path or a Checkpoint, got {type(self.path).__name__}")
        if isinstance(self.every, bool) or not isinstance(self.every, (int, float)) or not self.every >= 0:
            raise ValueError(f"Checkpoint(every=...) must be a number of seconds >= 0, got {self.every!r}")


def digest(*parts):
    """Return a text that tells runs apart: of arrays by their bytes, of other values by how they print."""
    out = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            out.update(f"{part.dtype.str}{part.shape}".encode())
            out.update(np.ascontiguousarray(part).view(np.uint8).data)
        else:
            out.update(repr(part).encode())
    return out.hexdigest()


class CheckpointFile:
    """One run's file.

    Parameters
    ----------
    checkpoint : Checkpoint or path
    run : str
        ``digest`` of the run.
    suffix : str
        Appended to the file's name, for runs of several parts.
    """

    def __init__(self, checkpoint, run, suffix=""):
        checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        path = Path(checkpoint.path)
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"checkpoint must name a file in a folder that exists, got {str(path)!r}")
        self.run, self.path, self.every = run, path.with_name(path.name + suffix), checkpoint.every
        self._last, self._failed = time.monotonic(), False

    def due(self):
        """Return whether it is time to write."""
        return time.monotonic() - self._last >= self.every

    def save(self, tree):
        """Write ``tree``: arrays, numbers, texts and None in dicts, lists and tuples.

        Warns
        -----
        RuntimeWarning
            Once, if the file cannot be written; the former one stays, and the run goes on.
        """
        arrays = {}
        text = json.dumps({"format": _FORMAT, "run": self.run, "tree": _pack(tree, arrays)})
        try:
            with whole_file(self.path) as file:
                np.savez(file, header=np.frombuffer(text.encode(), np.uint8), **arrays)
        except OSError as error:
            if not self._failed:
                self._failed = True
                warnings.warn(
                    f"checkpoint {str(self.path)!r} cannot be written ({error}): the run goes on, the former one stays",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._last = time.monotonic()

    def load(self):
        """Return the tree of the file; None where there is none. Unfinished files of killed runs are removed.

        Raises
        ------
        ValueError
            If the file is damaged, no checkpoint, or another run's.
        """
        remove_unfinished(self.path)
        if not self.path.exists():
            return None
        advice = "name another file, or delete it to start again"
        try:
            with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                # What save writes is not packed: a small file does not fill the memory. numpy compares no checksum of
                # an array whose own header has become shorter.
                size = sum(part.file_size for part in archive.zip.infolist())
                if size > os.fstat(file.fileno()).st_size or archive.zip.testzip() is not None:
                    raise ValueError("packed, or cut")
                header = json.loads(archive["header"].tobytes())
                if header["format"] != _FORMAT:
                    raise KeyError(header["format"])
                run, tree = header["run"], _unpack(header["tree"], archive) if header["run"] == self.run else None
        except Exception as error:  # zipfile, zlib and numpy have a dozen kinds for what bytes may be wrong
            raise ValueError(f"checkpoint {str(self.path)!r} is damaged or none of fastdmf's: {advice}") from error
        if run != self.run:
            raise ValueError(
                f"checkpoint {str(self.path)!r} belongs to a run with other data, settings or seed: {advice}"
            )
        return tree


def _pack(value, arrays):
    """Return ``value`` as JSON knows it; arrays go to ``arrays`` and leave their name."""
    if isinstance(value, np.ndarray):
        name = f"array{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(v, arrays)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(v, arrays) for v in value]}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _unpack(value, archive):
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "array":
        return archive[inner]
    if kind == "dict":
        return {key: _unpack(v, archive) for key, v in inner}
    return {"list": list, "tuple": tuple}[kind](_unpack(v, archive) for v in inner)
