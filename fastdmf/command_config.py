"""Options of a command from a TOML file: ``--config FILE``; the command line wins over it."""

import argparse
import csv
import difflib
import io
import tomllib

from fastdmf.command_files import UsageError

__all__ = ["with_config"]

_NOT_HERE = ("help", "config")


def with_config(parser, argv, path):
    """Return the arguments of a command, a dict, with the options of a file in place of their defaults.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        That of the command.
    argv : list of str
        What follows the command's name.
    path : Path
        A TOML file; its keys are names of options, with ``-`` or ``_`` between their words.

    Raises
    ------
    OSError
        If the file cannot be read.
    UsageError
        If it is no TOML, has a key that is no option, or a value that the option does not take.
    """
    options = {action.dest: action for action in parser._actions if action.option_strings}
    names = sorted(dest for dest in options if dest not in _NOT_HERE)
    settings = {}
    for key, value in _read(path).items():
        dest = key.replace("-", "_")
        if dest not in names:
            near = difflib.get_close_matches(dest, names, n=1)
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else f"{parser.prog} --help lists them"
            raise UsageError(f"{path}: {parser.prog} has no option {key!r}: {hint}")
        try:
            settings[dest] = _value(options[dest], value)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise UsageError(f"{path}, {key} = {value!r}: {error}") from None
    defaults = {dest: action.default for dest, action in options.items()}
    # What is not on the command line must not come back as a default.
    for action in options.values():
        action.default = argparse.SUPPRESS
    given = parser.parse_args(argv)
    return defaults | settings | vars(given)


def _read(path):
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}; --config names a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML file: {error}") from None


def _value(action, value):
    """Return what the option makes of a value: the same as of its text on the command line."""
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("true or false is needed")
        return value
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, (str, int, float)) and not isinstance(text, bool) for text in texts):
        raise ValueError("a text or a number is needed")
    if isinstance(value, list):
        # As on the command line, quotes protect commas, and digits that are a name.
        line = io.StringIO()
        csv.writer(line, quoting=csv.QUOTE_NONNUMERIC, lineterminator="").writerow(texts)
        text = line.getvalue()
    else:
        text = str(value)
    made = action.type(text) if action.type else text
    if action.choices is not None and made not in action.choices:
        raise ValueError(f"one of {', '.join(map(str, action.choices))} is needed")
    return made
