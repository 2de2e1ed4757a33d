"""Files of the command line: standard input and output, and what is checked before the work is done."""

import os
import shutil
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = ["INTERRUPTED", "Files", "UsageError", "check_writable", "reading_of", "suffix_of"]

INTERRUPTED = 130  # exit code after Ctrl-C
STREAM = "-"


class UsageError(Exception):
    """Options that do not go together, or are missing; the text says which and what to do."""


class Files(ExitStack):
    """The inputs and outputs of one command; temporary ones vanish at its end.

    Attributes
    ----------
    said : dict of str
        What to call a temporary file in messages, by its path.
    """

    def __init__(self):
        super().__init__()
        self.said, self._inputs, self._outputs = {}, {}, {}

    def read(self, path):
        """Return a path with the bytes of ``path``, which can be read as often as needed.

        Standard input (``-``) and pipes are copied to a temporary file.
        """
        if path is None:
            return None
        if str(path) == STREAM:
            return self._spooled("standard input", sys.stdin.buffer)
        if path.exists() and not path.is_file() and not path.is_dir():
            with open(path, "rb") as pipe:
                return self._spooled(str(path), pipe)
        self._inputs[_place(path)] = path
        return path

    def _spooled(self, name, stream):
        if name in self.said.values():
            raise UsageError(f"{name} can be read only once: name a file for the other one")
        place = self._folder() / f"input{len(self.said)}"
        self.said[str(place)] = name
        with open(place, "wb") as file:
            shutil.copyfileobj(stream, file)
        return place

    def _folder(self):
        return Path(self.enter_context(tempfile.TemporaryDirectory(prefix="fastdmf-")))

    def check_output(self, option, path, suffixes):
        """Refuse an output that cannot be written, or would overwrite what is read or written elsewhere.

        Parameters
        ----------
        option : str
            Which names it, for the messages.
        path : Path
        suffixes : sequence of str
            One of which must end its name, unless it is standard output (``-``), where text may go.

        Raises
        ------
        UsageError
            If the name is wrong.
        OSError
            If it cannot be written.
        """
        if str(path) == STREAM and ".csv" in suffixes:
            if STREAM in self._outputs:
                raise UsageError(f"{option} and {self._outputs[STREAM]} cannot both be standard output")
            self._outputs[STREAM] = option
            return
        place = _place(path)
        if place in self._inputs:
            raise UsageError(f"{option} {path} is the input {self._inputs[place]}: name another file")
        if place in self._outputs:
            raise UsageError(f"{option} {path} is what {self._outputs[place]} writes: name another file")
        if suffix_of(path) not in suffixes:
            stream = ", or be - for standard output" if ".csv" in suffixes else ""
            raise UsageError(f"{option} {path}: the name must end in one of {', '.join(suffixes)}{stream}")
        self._outputs[place] = option
        check_writable(path, option)

    @contextmanager
    def writing(self, path, suffix):
        """Yield where to write ``path``; for standard output a ``suffix`` file, which it gets if all goes well."""
        if str(path) != STREAM:
            yield path
            return
        place = self._folder() / f"output{suffix}"
        yield place
        with open(place, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def reading_of(args):
    """Return the arguments of ``read_entries`` and its like that say how text is read."""
    header = {"auto": "auto", "yes": True, "no": False}[args.header]
    return {"separator": args.separator, "header": header, "decimal": args.decimal, "encoding": args.encoding}


def suffix_of(path):
    """Return the suffix of a name in lower case; of a gzipped file both."""
    name = os.fspath(path).lower()
    packed = ".gz" if name.endswith(".gz") else ""
    return os.path.splitext(name.removesuffix(packed))[1] + packed


def check_writable(path, option):
    """Fail before the work is done, not after it.

    Raises
    ------
    OSError
        If ``path`` cannot be written.
    """
    place = _place(path)
    try:
        if place.exists():
            place.open("r+b").close()
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose another place with {option}") from None


def _place(path):
    return Path(os.path.realpath(path))
