"""Files that are there whole or not at all, and errors about them that say what to do."""

import glob
import os
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["open_file", "remove_unfinished", "whole_file"]

_UNFINISHED = ".new"


@contextmanager
def whole_file(path):
    """Yield a binary file that becomes ``path`` in one step when the block ends well, and leaves no trace when not.

    It is written beside the file that it replaces, whatever that is linked to, and is on the disk before it does.

    Parameters
    ----------
    path : str or os.PathLike

    Raises
    ------
    OSError
        If ``path`` is a folder, or in none, or cannot be written.
    """
    said, path = os.fspath(path), Path(os.path.realpath(path))
    if os.path.isdir(path):
        raise IsADirectoryError(f"cannot write {said!r}: it is a folder, name a file in it")
    if not os.path.isdir(path.parent):
        raise FileNotFoundError(f"cannot write {said!r}: the folder does not exist, create it first")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"cannot write {said!r}: it is no ordinary file, name another one")
    new = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{_UNFINISHED}")
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise type(error)(f"cannot write {said!r}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            os.unlink(new)


def remove_unfinished(path):
    """Remove what processes that were killed in :func:`whole_file` left beside ``path``; what is in use stays.

    Parameters
    ----------
    path : str or os.PathLike
    """
    if os.name != "posix":  # elsewhere there is no harmless way to ask for a process
        return
    path = Path(os.path.realpath(path))
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{_UNFINISHED}"):
        process = left.name[len(path.name) + 1 :].split(".")[0]
        with suppress(OSError):
            if process.isdecimal() and not _is_running(int(process)):
                left.unlink()


def _is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def open_file(path):
    """Return ``path`` opened for reading, binary.

    Parameters
    ----------
    path : str or os.PathLike

    Raises
    ------
    TypeError
        If it is no path.
    OSError
        If there is no such file, or it is a folder or a pipe, or may not be read.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or an os.PathLike, got {type(path).__name__}")
    said = os.fspath(path)
    if os.path.isdir(said):
        raise IsADirectoryError(f"cannot read {said!r}: it is a folder, name a file in it")
    if os.path.exists(said) and not os.path.isfile(said):
        raise OSError(f"cannot read {said!r}: it is no ordinary file, write it to one first")
    try:
        return open(said, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"cannot read {said!r}: there is no such file, check its name") from None
    except OSError as error:
        raise type(error)(f"cannot read {said!r}: {error.strerror}, check the name and its permissions") from error
